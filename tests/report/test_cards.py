import base64
import io
import re
import warnings

import pytest
from PIL import Image

from prism_ray.report import cards
from prism_ray.report.cards import judged_cards, picture, sample_cards, worst_pair_cards

EVIL = "<img src=x onerror=alert(1)>"


def image(width=8, height=8, kind="PNG", mode="RGB"):
    file = io.BytesIO()
    Image.effect_noise((width, height), 80).convert(mode).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def shown(html):
    data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', html)
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data[2])))


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "L"), ("WEBP", "RGB"), ("GIF", "P")]
)
def test_a_large_image_is_made_small_whatever_its_kind(kind, mode):
    html = picture(image(800, 400, kind, mode))
    assert max(shown(html).size) == cards.LARGEST_SIDE and len(html) < 120_000


def test_a_small_image_keeps_its_size():
    assert shown(picture(image(32, 16))).size == (32, 16)


@pytest.mark.parametrize("data", ["aGVsbG8=", "not base64 at all", image()[:60], '"><script>'])
def test_what_is_no_image_is_said_to_be_none(data):
    html = picture(data)
    assert "image cannot be shown" in html and "<script" not in html


def test_an_image_bomb_is_not_opened(monkeypatch):
    monkeypatch.setattr(cards, "MOST_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "image too large" in picture(image(11, 10))


def test_a_question_is_shown_once_with_what_every_checkpoint_answered():
    common = {"question": "<image>How many?", "image": image(), "ground_truth": "3"}
    rows = [
        common | {"label": "sft", "response": "<caption>two cats</caption><think>t</think><answer>2</answer>",
                  "truth": {"answer": 0.0, "cell_accuracy": 0.5}},
        common | {"label": "prism", "response": "no tags", "truth": {"answer": 1.0}},
        {"label": "sft", "question": "another"},
    ]  # fmt: skip
    html = sample_cards(rows)
    assert html.count("How many?") == 1 and html.count("<img") == 1 and html.count("<article") == 2
    assert "<b>caption</b>two cats" in html and "<pre>no tags</pre>" in html and "right answer: 3" in html
    assert "✗ answer" in html and "✓ answer" in html and "cell_accuracy 0.50" in html


def test_text_outside_of_the_elements_is_not_hidden():
    html = sample_cards([{"label": "a", "question": "q", "response": "<caption>c</caption> and more"}])
    assert "&lt;caption&gt;c&lt;/caption&gt; and more" in html


def test_worst_pairs_say_which_side_is_preferred_and_mark_what_differs():
    base = {"view": "perception", "question": "<image>q", "image": image(), "rollout": 2, "reference_score": 1.0}
    rows = [
        base | {"gap": -2.0, "rollout_score": 3.0, "reference": "<caption>A red 1</caption>",
                "response": "<caption>A blue 1</caption>"},
        base | {"gap": 0.5, "rollout_score": 0.5, "view": "reasoning", "reference": "r", "response": "r"},
    ]  # fmt: skip
    html = worst_pair_cards(rows)
    assert "perception (1 pairs)" in html and "reasoning (1 pairs)" in html and html.count("<img") == 2
    assert "gap -2.000: the rollout is preferred" in html and "gap 0.500: the reference is preferred" in html
    assert "A <mark>red</mark> 1" in html and "A <mark>blue</mark> 1" in html


def test_judged_groups_show_the_scores_of_reference_and_rollouts():
    rollout = {"index": 4, "response": "<caption>c</caption>", "reward": 0.25, "scores": {"perception": -1.5}}
    verified = {"index": 5, "response": "x", "reward": 0.0, "parts": {"accuracy": 0.0}, "reason": "missing <think>"}
    group = {"group": 7, "version": 3, "judge_version": 2, "question": "q", "image": "", "reference": "ref",
             "reference_scores": {"perception": 2.0}, "rollouts": [rollout, verified]}  # fmt: skip
    html = judged_cards([group])
    assert "group 7, update 3, judge version 2" in html and "perception 2.000" in html and "perception -1.500" in html
    assert "reward 0.250" in html and "accuracy 0.000" in html and "missing &lt;think&gt;" in html


@pytest.mark.parametrize("show", [sample_cards, worst_pair_cards, judged_cards])
def test_nothing_that_was_written_is_markup_and_rows_may_lack_anything(show):
    fields = ("label", "question", "response", "reference", "view", "ground_truth", "gap", "truth", "scores", "group")
    evil = dict.fromkeys(fields, EVIL) | {"truth": {EVIL: EVIL}, "rollouts": [{"response": EVIL, "scores": {EVIL: 1}}]}
    assert "<img src=x" not in show([evil, {}, {"rollouts": None}, {"rollouts": [1]}])


@pytest.mark.parametrize("show", [sample_cards, judged_cards])
def test_the_number_of_cards_is_bounded(show):
    html = show([{"question": str(i), "label": "a"} for i in range(500)])
    assert html.count("<article") == cards.MOST_CARDS and f"{500 - cards.MOST_CARDS} more" in html


def test_a_very_long_response_is_cut():
    assert len(sample_cards([{"label": "a", "response": "word " * 100_000}])) < 10_000
