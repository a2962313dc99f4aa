import json

import numpy as np
import pytest

from prism_ray.corpora.checks import Requirements, check
from prism_ray.corpora.rows import BadRow, prompt_from_row
from prism_ray.response import render


@pytest.fixture
def reason(make):
    return lambda changes, needs=None: reason_for(make, changes, needs)


def reason_for(make, changes, needs):
    with pytest.raises(BadRow) as caught:
        check(prompt_from_row(make.row(**changes)), needs or Requirements())
    return caught.value.reason


def test_published_row_becomes_a_prompt(make):
    prompt = prompt_from_row(make.row(3))
    assert prompt.id == "row-3"
    assert prompt.messages[1] == {"role": "user", "content": "<image>what is 3"}
    assert prompt.images == (make.png(3),)
    assert prompt.reference == render("a picture", "look", "3")
    assert (prompt.ground_truth, prompt.data_source, prompt.extra["split"]) == ("3", "mm_gad", "train")


def test_row_as_pandas_or_ray_gives_it_is_the_same(make):
    given = make.row(3)
    as_arrays = given | {"prompt": np.array(given["prompt"]), "images": np.array(given["images"])}
    assert prompt_from_row(as_arrays) == prompt_from_row(given)


@pytest.mark.parametrize("tagged", [True, False])
def test_reference_is_put_together_from_columns_with_or_without_tags(tagged, make):
    columns = (
        {"teacher_caption": "<caption>c</caption>", "teacher_cot": "<think>t</think>\n<answer>7</answer>"}
        if tagged
        else {"teacher_caption": "c", "teacher_cot": "t"}
    )
    prompt = prompt_from_row(make.row(7, teacher_response=None, **columns))
    assert prompt.reference == render("c", "t", "7")


def test_reference_takes_what_is_missing_from_the_response(make):
    columns = {"teacher_caption": "c", "teacher_cot": None, "teacher_response": "<think>t</think><answer>8</answer>"}
    assert prompt_from_row(make.row(7, **columns)).reference == render("c", "t", "8")


def test_reference_that_cannot_be_put_together_stays_as_it_is(make, reason):
    columns = {"teacher_caption": None, "teacher_cot": None, "teacher_response": "forty-two"}
    assert prompt_from_row(make.row(**columns)).reference == "forty-two"
    assert reason(columns, Requirements(reference=True)) == "teacher_response: not in the format"


def test_rlvr_row_without_teacher_columns(make):
    lean = {k: v for k, v in make.row(5).items() if not k.startswith("teacher")}
    prompt = prompt_from_row(lean | {"extra_info": {"answer": "5"}, "reward_model": None, "answer": None}, "d:5")
    assert (prompt.id, prompt.reference, prompt.ground_truth) == ("d:5", "", "5")


def test_image_by_path_is_read_beside_the_corpus(tmp_path, make):
    (tmp_path / "a.png").write_bytes(make.png(1))
    item = {"images": [{"bytes": None, "path": "a.png"}]}
    assert prompt_from_row(make.row(**item), folder=tmp_path).images == (make.png(1),)
    with pytest.raises(BadRow, match="cannot be read .*b.png"):
        prompt_from_row(make.row(images=["b.png"]), folder=tmp_path)


def test_typed_content_parts_become_markers(make):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why"}]}
    assert prompt_from_row(make.row(prompt=[turn])).messages[0]["content"] == "<image>why"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": None}, "prompt: not a list of chat turns"),
        ({"prompt": "what?"}, "prompt: not a list of chat turns"),
        ({"prompt": []}, "prompt: not a list of chat turns"),
        ({"prompt": [{"content": "x"}]}, "prompt: a chat turn without a role"),
        ({"prompt": [{"role": "user", "content": 3}]}, "prompt: a chat turn whose content is not text"),
        ({"prompt": [{"role": "user", "content": " "}], "images": []}, "prompt: empty"),
        ({"images": []}, "prompt: <image> markers and images differ in number"),
        ({"images": "a.png"}, "images: not a list"),
        ({"images": [{"bytes": None, "path": None}]}, "images: an image with neither bytes nor path"),
        ({"images": [{"bytes": b"not an image", "path": None}]}, "images: does not decode"),
        ({"images": [{"bytes": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "path": None}]}, "images: does not decode"),
        ({"images": [{"bytes": b"<svg><script/></svg>", "path": None}]}, "images: does not decode"),
        ({"extra_info": "{"}, "extra_info: not JSON"),
        ({"extra_info": "[1]"}, "extra_info: not an object"),
        ({"reward_model": "{"}, "reward_model: not JSON"),
        ({"reward_model": 3}, "reward_model: not a struct"),
    ],
)
def test_bad_rows_name_the_column(changes, expected, make, reason):
    assert reason(changes) == expected


def test_truncated_image_passes_without_decoding_and_fails_with_it(make, reason):
    half = make.png(0, (64, 64))[:6000]
    changes = {"images": [{"bytes": half, "path": None}]}
    check(prompt_from_row(make.row(**changes)), Requirements(decode=False))
    assert reason(changes) == "images: does not decode"


def test_a_reference_that_the_judge_refuses_is_kept_with_its_words(make):
    def refusal(text: str) -> str:
        return "" if "look" in text else "nothing in the reasoning view"

    needs = Requirements(reference=True, refusal=refusal)
    check(prompt_from_row(make.row()), needs)
    with pytest.raises(BadRow, match="nothing in the reasoning view") as caught:
        check(
            prompt_from_row(make.row(teacher_cot="<think>see</think><answer>3</answer>", teacher_response=None)), needs
        )
    assert caught.value.reason == "teacher_response: cannot be judged"


def test_a_truth_that_the_verifier_refuses_is_kept_with_its_words(make):
    needs = Requirements(ground_truth=True, truth_refusal=lambda p: "no number" if p.ground_truth == "red" else "")
    check(prompt_from_row(make.row()), needs)
    with pytest.raises(BadRow, match="no number") as caught:
        check(prompt_from_row(make.row(reward_model={"ground_truth": "red"})), needs)
    assert caught.value.reason == "reward_model: cannot be judged"


def test_requirements(make, reason):
    assert reason({}, Requirements(max_image_pixels=100)) == "images: too many pixels"
    missing = {"reward_model": None, "answer": None, "extra_info": json.dumps({})}
    assert reason(missing, Requirements(ground_truth=True)) == "reward_model: no ground truth"
    assert reason({}, Requirements(tokenise=lambda p: (p, 11), max_prompt_tokens=10)) == "prompt: too long"
    none = {"teacher_response": None, "teacher_caption": None, "teacher_cot": None}
    assert reason(none, Requirements(reference=True)) == "teacher_response: missing"

    def refuses(prompt):
        raise ValueError("no such token")

    assert reason({}, Requirements(tokenise=refuses)) == "prompt: cannot be encoded"
