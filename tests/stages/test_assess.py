"""The evaluation of a checkpoint on one's own prompts: what its samples come to; and the job, killed and continued."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_ray.config.evaluation import EvaluationSettings
from prism_ray.config.load import load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.testbed import TestbedSettings
from prism_ray.corpora.reader import CorpusError
from prism_ray.corpora.references import FIELDS, row_of
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt
from prism_ray.report.intervals import wilson
from prism_ray.stages.assess import SAMPLES, AssessError, _note, assess, check_inputs, read_samples, result_of
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary

ROOT = Path(__file__).resolve().parents[2]


def response(answer, tokens=10, **more):
    return {"response": "r", "tokens": tokens, "ended_by": "stop", "truth": {"answer": answer, "format": 1.0, **more}}


def row(position, source, *answers, greedy=1.0):
    sampled = [response(answer, 10 + i) for i, answer in enumerate(answers)]
    return {"position": position, "data_source": source, "sampled": sampled, "greedy": response(greedy)}


def test_the_result_has_the_fields_of_a_summary_pass_at_k_and_each_source():
    rows = [
        row(0, "a", 1.0, 0.0, 0.0, 0.0),
        row(1, "a", 0.0, 0.0, 0.0, 0.0, greedy=0.0),
        row(2, "", 1.0, 1.0, 1.0, 1.0),
    ]
    rows[1]["sampled"][0]["truth"]["failed"] = 1.0
    result = result_of(rows)
    assert result["evaluation"]["n"] == 3 and result["evaluation"]["format"] == 1.0
    assert result["evaluation"]["accuracy"]["mean"] == pytest.approx(5 / 12)
    assert result["evaluation"]["accuracy_greedy"] == wilson(2, 3)._asdict()
    assert result["evaluation"]["mean_tokens"] == 11.5
    assert result["pass@k"] == pytest.approx({"1": 5 / 12, "2": (0.5 + 0 + 1) / 3, "4": 2 / 3})
    assert result["failed"] == 1 and result["sources"]["unknown"]["failed"] == 0
    assert {name: part["evaluation"]["n"] for name, part in result["sources"].items()} == {"a": 2, "unknown": 1}
    assert result["sources"]["a"]["pass@k"]["4"] == 0.5
    assert "pass@k" not in result_of([row(0, "a", 1.0)])
    with pytest.raises(AssessError, match="no prompt could be used; quarantine.parquet"):
        result_of([])


def noted(folder, *lines):
    with (folder / SAMPLES).open("a") as file:
        file.write("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def test_a_batch_that_a_kill_has_torn_is_sampled_again(tmp_path):
    assert read_samples(tmp_path) == ([], 0)
    first, second, third = (row(i, "a", 1.0) for i in range(3))
    noted(tmp_path, first, second, {"from": 0, "next": 2, "count": 2}, third)
    assert read_samples(tmp_path) == ([first, second], 2), "not yet complete"
    noted(tmp_path, '{"position": 3, "sam\n')
    assert read_samples(tmp_path)[1] == 2
    noted(tmp_path, third, {"from": 2, "next": 3, "count": 1})
    assert read_samples(tmp_path) == ([first, second, third], 3)
    noted(tmp_path, third, {"from": 2, "next": 3, "count": 1}, {"from": 3, "next": 8, "count": 0})
    assert read_samples(tmp_path) == ([first, second, third], 8), "once each; a batch of unusable rows counts"


def test_a_line_ends_with_a_newline_and_with_nothing_else(tmp_path):
    """JSON leaves the characters as they are that end a line to `str.splitlines`."""
    text = "a\u2028b\u2029c\u0085d\x0be\x1cf\rg"
    said = row(0, text, 1.0) | {"question": text, "ground_truth": text}
    said["sampled"][0]["response"] = text
    _note(tmp_path / SAMPLES, [said], 0, 1)
    _note(tmp_path / SAMPLES, [row(1, "a", 1.0)], 1, 2)
    assert "\u2028" in (tmp_path / SAMPLES).read_text(encoding="utf-8")
    assert read_samples(tmp_path) == ([said, row(1, "a", 1.0)], 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assess")
    build_tiny(folder / "policy", vocabulary(), TinyModelSettings(), seed=0)
    sizes = dict.fromkeys(("pretrain", "base", "sft", "align", "rlvr", "evaluate_unseen"), 1)
    write_corpora(folder / "corpora", TestbedSettings(evaluate=10, **sizes), seed=0)
    turns = ({"role": "user", "content": "how many?"},)
    rows = [row_of(Prompt(f"p{i}", turns, (), "", str(i), "counts")) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(FIELDS)), folder / "counts.parquet")
    return folder


def settings(world, output, *overrides):
    plain = [f"checkpoint={world / 'policy'}", f"prompts=[{world}/corpora/evaluate.parquet]", f"output={output}"]
    return load_config(EvaluationSettings, None, [*plain, *overrides])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["prompts=[]"], "prompts is empty, and so is data.evaluate"),
        (["prompts=[nowhere.parquet]"], "nowhere.parquet"),
        (["checkpoint=nowhere"], "nowhere: no config.json"),
        (["evaluate.truth=nothing:here"], "evaluate.truth: nothing:here cannot be loaded"),
        (["by=verifier", "verify.environment=prism/None-v0"], "verify.environment: prism/None-v0 cannot be made"),
    ],
)
def test_bad_input_is_a_sentence_before_anything_starts(world, tmp_path, overrides, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        check_inputs(settings(world, tmp_path / "out", *overrides))


def test_an_array_may_be_as_large_as_the_settings_say(world, tmp_path):
    turns = [{"role": "user", "content": "how many?"}]
    rows = [{"prompt": turns, "reward_model": {"ground_truth": str(i), "style": "rule"}} for i in range(40)]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    given = f"prompts=[{tmp_path}/array.json]"
    check_inputs(settings(world, tmp_path / "out", given))
    small = settings(world, tmp_path / "small", given, "corpora.max_json_mb=0.001")
    with pytest.raises(CorpusError, match=r"corpora.max_json_mb is 0.001"):
        check_inputs(small)
    with pytest.raises(CorpusError, match=r"corpora.max_json_mb is 0.001"):
        asyncio.run(assess(small))


def test_samples_of_one_folder_are_made_alike(world, tmp_path):
    check_inputs(settings(world, tmp_path, "n=2"))
    check_inputs(settings(world, tmp_path, "n=2", "limit=4", "batch=2", "rollout.engines=2"))
    for changed in ("n=3", "by=verifier", "evaluate.temperature=0.5", "rollout.max_response_tokens=20"):
        with pytest.raises(AssessError, match="holds samples made with another"):
            check_inputs(settings(world, tmp_path, *(["n=2"] if changed != "n=3" else []), changed))


def command(world, output, *overrides):
    small = [
        "rollout.kv_cache_gb=0.1",
        "rollout.cpus_per_engine=0.5",
        "rollout.max_response_tokens=32",
        "cluster.cpus=2",
    ]
    corpus = f"prompts=[{world}/corpora/evaluate.parquet]"
    plain = [f"checkpoint={world / 'policy'}", corpus, f"output={output}", "n=2", "batch=2", "cluster.cpus=2", *small]
    return [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *plain, *overrides]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_job_is_interrupted_goes_on_and_refuses_what_it_cannot_judge(world, tmp_path):
    output = tmp_path / "out"
    first = subprocess.Popen(command(world, output), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 240
    while read_samples(output)[1] < 2:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[1][-4000:]
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130 and "interrupted; the same command goes on" in errors
    before, reached = read_samples(output)
    assert reached < 10, "it was not interrupted"

    second = subprocess.run(command(world, output), capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr[-4000:]
    rows, reached = read_samples(output)
    assert rows[: len(before)] == before and reached == 10
    assert sorted(r["position"] for r in rows) == list(range(10)) and len({r["id"] for r in rows}) == 10
    result = json.loads((output / "evaluation.json").read_text())
    assert result["evaluation"]["n"] == 10 and set(result["pass@k"]) == {"1", "2"}
    assert {"caption_exact", "cell_accuracy", "reasoning_given_caption"} <= set(result["evaluation"])
    assert list(result["sources"]) == ["prism_testbed"] and "done:" in second.stdout

    shutil.rmtree(output)
    foreign = command(world, output, f"prompts=[{world}/counts.parquet]")
    third = subprocess.run(foreign, capture_output=True, text=True, timeout=300, env=os.environ)
    assert third.returncode == 2
    assert "set evaluate.truth to prism_ray.verify.answer:truth_of" in third.stderr.strip().splitlines()[-1]
