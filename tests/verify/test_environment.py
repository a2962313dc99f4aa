import io
import pickle

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

from prism_ray.records import Prompt
from prism_ray.response import render
from prism_ray.verify.answer import truth_of
from prism_ray.verify.environment import AnyText
from prism_ray.verify.judging import truth_refusal
from prism_ray.verify.symbolic import SymbolicChecker

IDS = ("prism/Answer-v0", "prism/Math-v0", "prism/MultipleChoice-v0", "prism/Number-v0")


def png(width, height):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 7, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(truth="5", images=()):
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "<image>" * len(images) + "how many?"})
    return Prompt("p", turns, images, ground_truth=truth)


@pytest.fixture
def env():
    with gymnasium.make(IDS[0], disable_env_checker=True) as made:
        yield made


def test_episode_observes_the_prompt_and_judges_the_response(env):
    observation, _ = env.reset(options={"prompt": ask(images=(png(4, 2),))})
    assert observation["prompt"] == "how many?"
    assert observation["image"].shape == (2, 4, 3) and observation["image"].max() == 7
    assert env.unwrapped.observation_space.contains(observation)
    _, reward, terminated, truncated, info = env.step(render("c", "t", "5.0"))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info == {"accuracy": 1.0, "format": 1.0, "valid": True, "reason": "", "rule": "number", "cut": 0.0}


def test_nothing_leaks_between_episodes(env):
    for truth, expected in (("5", 1.0), ("6", 0.2), ("5", 1.0)):
        env.reset(options={"prompt": ask(truth)})
        assert env.step(render("c", "t", "5"))[1] == pytest.approx(expected)


def test_invalid_format_is_worth_nothing_and_says_why(env):
    env.reset(options={"prompt": ask()})
    _, reward, _, _, info = env.step("5")
    assert (reward, info["valid"], info["reason"]) == (0.0, False, "missing <caption>")


def test_prompt_is_needed(env):
    with pytest.raises(ValueError, match="needs a prism_ray.records.Prompt"):
        env.reset()


@pytest.mark.parametrize("name", IDS)
def test_they_are_gymnasium_environments(name):
    made = gymnasium.make(name, disable_env_checker=True).unwrapped

    class Prompted(type(made)):
        def reset(self, *, seed=None, options=None):
            prompt = ask("5" if "Choice" not in name else "B", images=(png(1, 1),))
            return super().reset(seed=seed, options={"prompt": prompt} | (options or {}))

    assert isinstance(made.observation_space, gymnasium.spaces.Dict)
    assert set(made.observation_space) == {"image", "prompt"} and isinstance(made.action_space, gymnasium.spaces.Text)
    check_env(Prompted(), skip_render_check=True)


def rewards(name, truth, *answers, **extra):
    with gymnasium.make(name, disable_env_checker=True) as env:
        found = []
        for answer in answers:
            env.reset(options={"prompt": Prompt("p", (), ground_truth=truth, extra=extra)})
            found.append(env.step(render("c", "t", answer))[1])
        return found


def test_each_kind_of_answer_has_its_environment():
    """The same pairs of truth and answer, judged by what an environment knows of them."""
    assert rewards("prism/Answer-v0", "B", "the answer is B", "A") == pytest.approx([1.0, 0.2])
    assert rewards("prism/MultipleChoice-v0", "J", "(J) jam", "K") == pytest.approx([1.0, 0.2])
    assert rewards("prism/Math-v0", "B", "B", "(B) or B^2") == pytest.approx([1.0, 0.2])
    assert rewards("prism/Math-v0", r"2\sqrt{3}", r"\sqrt{12}", r"\sqrt{13}") == pytest.approx([1.0, 0.2])
    assert rewards("prism/Number-v0", "5 kg", "5.0 kilograms", "5 lb", "6") == pytest.approx([1.0, 0.2, 0.2])
    assert rewards("prism/Number-v0", "0.5", "1/2", r"\sin(\pi/6)") == pytest.approx([1.0, 0.2])


@pytest.mark.parametrize(
    ("name", "truth", "what"),
    [
        ("prism/MultipleChoice-v0", "5 cm", "names no option A to J"),
        ("prism/MultipleChoice-v0", "K", "names no option A to J"),
        ("prism/Number-v0", "red", "is no number"),
        ("prism/Number-v0", "3x", "is no number"),
    ],
)
def test_a_truth_of_another_kind_is_named(name, truth, what):
    with pytest.raises(ValueError, match=f"prompt p: the ground truth '{truth}' {what}; .*prism/Answer-v0"):
        rewards(name, truth, "5")


def test_what_an_environment_cannot_judge_is_known_ahead_and_in_other_processes():
    def refused(name, truth, **extra):
        refusal = pickle.loads(pickle.dumps(truth_refusal(name)))
        return refusal(Prompt("p", (), ground_truth=truth, extra=extra))

    assert refused("prism/Answer-v0", "7" * 1023) == ""
    assert "longer than 1023 characters" in refused("prism/Answer-v0", "7" * 1024)
    assert "is no list" in refused("prism/Math-v0", "7", equivalent_answers="7")
    assert "names no option" in refused("prism/MultipleChoice-v0", "5 cm") and not refused("prism/Math-v0", "5 cm")
    assert "is no number" in refused("prism/Number-v0", "red")
    assert truth_refusal("prism_ray.testbed.environment:prism/Testbed-v0") is None


def test_any_of_the_equivalent_answers_is_right():
    assert rewards("prism/Answer-v0", "5", "7", "5", "6", equivalent_answers=["7"]) == pytest.approx([1.0, 1.0, 0.2])
    assert rewards("prism/Answer-v0", "5", "7", equivalent_answers=["7", "__EMPTY__"]) == pytest.approx([0.2])


def test_a_bomb_is_only_wrong_and_said_to_have_been_cut():
    with gymnasium.make("prism/Answer-v0", disable_env_checker=True, limit_s=0.2) as env:
        env.reset(options={"prompt": ask("7")})
        _, reward, _, _, info = env.step(render("c", "t", "9^{9^{9^{9}}}"))
        assert (reward, info["cut"], info["rule"]) == (pytest.approx(0.2), 1.0, "none")
        _, reward, _, _, info = env.step(render("c", "t", "3+4"))
        assert (reward, info["cut"], info["rule"]) == (1.0, 0.0, "symbolic")


def watched(checker, monkeypatch):
    """What is asked of a checker from now on: (limit, what came of it)."""
    asked, compare = [], checker.compare

    def noting(truth, answer, limit_s=None):
        asked.append((limit_s, compare(truth, answer, limit_s)))
        return asked[-1][1]

    monkeypatch.setattr(checker, "compare", noting)
    return asked


def test_all_comparisons_of_an_answer_share_one_limit(monkeypatch):
    bomb = "9^{9^{9^{9}}}"
    with gymnasium.make("prism/Answer-v0", disable_env_checker=True, limit_s=0.5) as env:
        asked = watched(env.unwrapped._checker, monkeypatch)
        for truth, answer in (("7", bomb), ("7x, 8x", f"{bomb}x, {bomb}")):
            prompt = Prompt("p", (), ground_truth=truth, extra={"equivalent_answers": ["8x", "9x", "10x", "11x"]})
            env.reset(options={"prompt": prompt})
            *_, info = env.step(render("c", "t", answer))
            assert info["cut"] == 1.0 and [compared.cut for _, compared in asked] == [True], "asked of a spent limit"
            asked.clear()
        env.reset(options={"prompt": Prompt("p", (), ground_truth="x+1", extra={"equivalent_answers": ["x+2", "x+3"]})})
        assert env.step(render("c", "t", "3+x"))[1] == 1.0
        limits = [limit for limit, _ in asked]
        assert limits == pytest.approx([0.5 - sum(c.spent_s for _, c in asked[:i]) for i in range(3)])
        assert 0.5 == limits[0] > limits[1] > limits[2]


def test_the_evaluation_spends_no_more_on_an_answer_either(monkeypatch):
    monkeypatch.setattr("prism_ray.verify.answer._checker", lambda: checker)
    checker = SymbolicChecker(0.5)
    asked = watched(checker, monkeypatch)
    prompt = Prompt("p", (), ground_truth="7", extra={"equivalent_answers": ["8", "9"]})
    assert truth_of(render("c", "t", "9^{9^{9^{9}}}"), prompt) == {"answer": 0.0, "format": 1.0}
    assert len(asked) == 1
    checker.close()


def test_evaluation_uses_the_same_rules():
    assert truth_of(render("c", "t", "7 - 2"), ask("5")) == {"answer": 1.0, "format": 1.0}
    assert truth_of(render("c", "t", "7"), ask("5")) == {"answer": 0.0, "format": 1.0}
    assert truth_of("5", ask("5")) == {"answer": 0.0, "format": 0.0}


def test_any_text_is_an_action():
    assert AnyText().contains("ünï\ud800 \x00") and not AnyText(3).contains("long") and not AnyText().contains(3)
