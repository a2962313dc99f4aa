import io

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

from prism_ray.records import Prompt
from prism_ray.response import render
from prism_ray.verify.answer import AnswerEnvironment
from prism_ray.verify.environment import AnyText

ID = "prism_ray.verify.answer:prism/Answer-v0"


def png(width, height):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 7, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(truth="5", images=()):
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "<image>" * len(images) + "how many?"})
    return Prompt("p", turns, images, ground_truth=truth)


@pytest.fixture
def env():
    with gymnasium.make(ID, disable_env_checker=True) as made:
        yield made


def test_episode_observes_the_prompt_and_judges_the_response(env):
    observation, _ = env.reset(options={"prompt": ask(images=(png(4, 2),))})
    assert observation["prompt"] == "how many?"
    assert observation["image"].shape == (2, 4, 3) and observation["image"].max() == 7
    assert env.unwrapped.observation_space.contains(observation)
    _, reward, terminated, truncated, info = env.step(render("c", "t", "5.0"))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info == {"accuracy": 1.0, "format": 1.0, "valid": True, "reason": ""}


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


def test_it_is_a_gymnasium_environment():
    class Prompted(AnswerEnvironment):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed, options={"prompt": ask(images=(png(1, 1),))} | (options or {}))

    check_env(Prompted(), skip_render_check=True)


def test_any_text_is_an_action():
    assert AnyText().contains("ünï\ud800 \x00") and not AnyText(3).contains("long") and not AnyText().contains(3)
