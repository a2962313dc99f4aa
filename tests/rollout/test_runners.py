"""A checkpoint as other programs' evaluation runners take it: by transformers' auto classes, and by vLLM's chat.

Stand-ins for lmms-eval's and VLMEvalKit's Qwen3-VL runners: the same calls, in the same order, with their arguments.
"""

import base64
import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prism_ray.config.evaluation import EvaluationSettings
from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.learner.group import LearnerGroup
from prism_ray.models.encode import Encoder
from prism_ray.models.load import copy_policy
from prism_ray.models.template import set_system_turn
from prism_ray.records import Prompt
from prism_ray.stages.assess import Examiner
from prism_ray.stages.phase import recipe_of

SYSTEM = "max of red"
"""Of words the tiny tokenizer has."""

VLLM_RUNNER = """
import json, os, sys
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    asked = json.load(open(sys.argv[1]))
    client = LLM(model=asked["model"], tensor_parallel_size=1, gpu_memory_utilization=0.8, trust_remote_code=True,
                 disable_log_stats=False, **asked["kwargs"])
    params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], top_p=0.95)
    outputs = client.chat(sampling_params=params, messages=asked["messages"])
    told = [{"prompt": o.prompt_token_ids, "ids": list(o.outputs[0].token_ids), "text": o.outputs[0].text}
            for o in outputs]
    json.dump(told, open(sys.argv[2], "w"))
"""
MOST = 12


@pytest.fixture(scope="module")
def exported(folder, run, cluster, tmp_path_factory):
    """What a stage of the loop hands over: the learner's export, from a start policy with a system turn."""
    place = tmp_path_factory.mktemp("exported")
    copy_policy(folder, place / "sft")
    set_system_turn(place / "sft", SYSTEM)
    settings = RunSettings()
    learner_settings = settings.learner.model_copy(update={"cpus_per_rank": 0.5})

    async def export():
        recipe = recipe_of(settings, settings.rlvr)
        learner = await LearnerGroup.create(place / "sft", learner_settings, recipe, 200, 1)
        try:
            await learner.export(place / "rlvr")
        finally:
            learner.shutdown()

    run(export())
    return place / "rlvr"


@pytest.fixture(scope="module")
def questions(ask):
    """Two questions with a picture each: image before text, as VLMEvalKit has it."""
    return [ask(f"q{i}", seed=i, question=q) for i, q in enumerate((" max of red green blue", " count of red"))]


def parts(prompt, image):
    return [image, {"type": "text", "text": prompt.messages[0]["content"].removeprefix("<image>")}]


def by_transformers(folder, prompts):
    """As VLMEvalKit's Qwen3VLChat and lmms-eval's qwen3_vl do, greedily."""
    processor = AutoProcessor.from_pretrained(folder)
    how = {"dtype": "auto", "attn_implementation": "sdpa", "output_loading_info": True}
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, **how)
    assert not any(loading.values()), f"{folder} lacks weights, or has others: {loading}"
    model.eval()
    told = []
    for prompt in prompts:
        picture = Image.open(io.BytesIO(prompt.images[0]))
        messages = [{"role": "user", "content": parts(prompt, {"type": "image", "image": picture})}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=[picture], videos=None, do_resize=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=MOST, repetition_penalty=1.0, do_sample=False)
        new = ids[0, inputs.input_ids.shape[1] :]
        said = processor.tokenizer.batch_decode([new], skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
        told.append({"prompt": inputs.input_ids[0].tolist(), "ids": new.tolist(), "text": said})
    return told


def by_vllm(folder, prompts, tmp_path):
    """As lmms-eval's vllm model does: OpenAI's messages with the image as a data URL."""
    urls = ("data:image/png;base64," + base64.b64encode(p.images[0]).decode() for p in prompts)
    messages = [
        [{"role": "user", "content": parts(p, {"type": "image_url", "image_url": {"url": url}})}]
        for p, url in zip(prompts, urls, strict=True)
    ]
    images = {"image": 1, "video": 0}
    cpu = {"dtype": "float32", "enforce_eager": True, "max_model_len": 320, "limit_mm_per_prompt": images}
    asked = {"model": str(folder), "messages": messages, "max_tokens": MOST, "kwargs": cpu}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "runner.py").write_text(VLLM_RUNNER)
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
             "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    command = [sys.executable, str(tmp_path / "runner.py"), str(tmp_path / "asked.json"), str(tmp_path / "told.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | quiet)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((tmp_path / "told.json").read_text())


@pytest.mark.long
@pytest.mark.timeout(400)
def test_other_runners_load_a_checkpoint_and_ask_it_what_we_would(exported, questions, tmp_path):
    ours = [encoded.token_ids.tolist() for encoded in Encoder(exported, 200).prompts(questions)]
    theirs, served = by_transformers(exported, questions), by_vllm(exported, questions, tmp_path)
    tokenizer = AutoProcessor.from_pretrained(exported).tokenizer
    for prompt, one, other in zip(ours, theirs, served, strict=True):
        assert one["prompt"] == other["prompt"] == prompt, "the runners ask something else than rollouts do"
        assert tokenizer.decode(prompt).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
        assert one["ids"] and one["ids"] == other["ids"]
    assert theirs[0]["ids"] != theirs[1]["ids"], "the question makes no difference, so nothing was tested"


@pytest.mark.long
def test_the_tags_of_the_format_survive_the_runners_decoding(exported):
    tokenizer = AutoProcessor.from_pretrained(exported).tokenizer
    text = "<caption> A</caption><think> B</think><answer> 5</answer>"
    ids = tokenizer(text + "<|im_end|>")["input_ids"]
    assert tokenizer.batch_decode([ids], skip_special_tokens=True, clean_up_tokenization_spaces=False) == [text]


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("by", ["truth", "verifier", "episodes"])
def test_an_examiner_judges_by_truth_by_verifier_and_by_episodes(pool, run, folder, ask, by):
    talking = ["by=verifier", "verify.environment=slow_environment:prism-test/Talking-v0", "verify.max_turns=2"]
    how = {
        "truth": ["evaluate.truth=prism_ray.verify.answer:truth_of"],
        "verifier": ["by=verifier", "verify.environment=slow_environment:prism-test/Parity-v0"],
        "episodes": talking,
    }[by]
    settings = load_config(EvaluationSettings, None, [f"checkpoint={folder}", "n=3", *how])
    prompts = [
        Prompt(p.id, p.messages, p.images, ground_truth="5", data_source="s") for p in (ask("a", 1), ask("b", 2))
    ]
    examiner = Examiner(settings, pool)
    try:
        rows = run(examiner.examine(prompts))
    finally:
        examiner.shutdown()
    assert [row["id"] for row in rows] == ["a", "b"] and all(len(row["sampled"]) == 3 for row in rows)
    for row in rows:
        assert row["greedy"]["tokens"] <= 48 and row["ground_truth"] == "5" and row["data_source"] == "s"
        for one in (*row["sampled"], row["greedy"]):
            assert set(one["truth"]) >= {"answer", "format"}
            if by == "verifier":
                assert one["truth"]["answer"] == len(one["response"]) % 2
            if by == "episodes":
                assert one["truth"]["turns"] == len(one.get("turns", ())) // 2 + 1
