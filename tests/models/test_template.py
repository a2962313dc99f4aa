import json
import shutil

import pytest
from transformers import AutoProcessor, AutoTokenizer

from prism_ray.models.encode import Encoder
from prism_ray.models.template import set_system_turn, with_system_turn

SYSTEM = 'You are careful.\nAnswer in "tags" like <answer>…</answer>, never {{ }} or {% %}; it\'s 100 % 🙂'
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]}]


@pytest.fixture
def folder(dense_folder, tmp_path):
    return shutil.copytree(dense_folder, tmp_path / "policy")


def rendered(folder, messages):
    processor = AutoProcessor.from_pretrained(folder)
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_conversation_without_a_system_turn_gets_it_and_one_with_another_keeps_it(folder):
    own = [{"role": "system", "content": "Be brief."}, *ASKED]
    before, kept = rendered(folder, ASKED), rendered(folder, own)
    set_system_turn(folder, SYSTEM)
    assert rendered(folder, ASKED) == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{before}"
    assert rendered(folder, own) == kept
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")


def test_it_is_replaced_and_taken_away_again(folder):
    before = (folder / "chat_template.jinja").read_text()
    for system in (SYSTEM, "other", SYSTEM):
        set_system_turn(folder, system)
    assert (folder / "chat_template.jinja").read_text() == with_system_turn(before, SYSTEM)
    set_system_turn(folder, "")
    assert (folder / "chat_template.jinja").read_text() == before


def test_training_and_rollouts_see_what_other_runners_see(folder, ask, picture):
    prompt = ask("p", picture(0))
    without = Encoder(folder, 300).prompt(prompt).token_ids.tolist()
    set_system_turn(folder, SYSTEM)
    encoder = Encoder(folder, 300)
    ids = encoder.prompt(prompt).token_ids.tolist()
    assert ids[-len(without) :] == without and len(ids) > len(without)
    later = encoder.answer("p", {"role": "user", "content": "again"}, (), ended=True).tolist()
    assert "careful" not in encoder.tokenizer.decode(later), "a system turn in the middle of a conversation"


def test_older_places_of_a_template_are_found(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(FileNotFoundError, match="no chat template to put system_prompt into"):
        set_system_turn(folder, SYSTEM)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**held, "chat_template": template}))
    set_system_turn(folder, SYSTEM)
    for name in ("chat_template.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text())["chat_template"] == with_system_turn(template, SYSTEM)
