import io

import gymnasium
import numpy as np
import pytest
from PIL import Image

import prism_ray.testbed.turns  # noqa: F401  (registers the id)
from prism_ray.records import Prompt
from prism_ray.testbed.environment import TestbedEnv
from prism_ray.testbed.questions import question_from
from prism_ray.testbed.scene import draw, encode_png, random_cells
from prism_ray.testbed.teacher import teach

QUESTION = {"family": "each", "operation": "max", "colours": ["red", "green", "blue"], "cell": 0}


def asked(seed):
    rng = np.random.default_rng(seed)
    cells = random_cells(rng, 6)
    picture = encode_png(draw(cells, 2, 3, TestbedEnv().settings.hardness, rng))
    extra = {**QUESTION, "cells": [list(cell) for cell in cells]}
    return Prompt("p", ({"role": "user", "content": "<image> max of red green blue"},), (picture,), extra=extra)


def taught(extra):
    return teach(tuple((colour, digit) for colour, digit in extra["cells"]), question_from(extra)).text


def played(prompt, first, second):
    """The two steps of an episode; True stands for the teacher's response, False for one to another scene."""
    env = gymnasium.make("prism/TestbedTurns-v0")
    env.reset(options={"prompt": prompt})
    steps = []
    for right in (first, second):
        response = (
            taught(env.unwrapped._extra) if right is True else taught(asked(99).extra) if right is False else right
        )
        steps.append(env.step(response))
    return steps


@pytest.mark.parametrize(
    ("first", "second", "rewards"),
    [(True, True, (0.5, 0.5)), (False, True, (0.1, 0.5)), (True, False, (0.5, 0.1)), ("no format", True, (0.0, 0.5))],
)
def test_each_response_is_worth_half(first, second, rewards):
    (_, r1, over1, _, _), (_, r2, over2, _, info) = played(asked(0), first, second)
    assert (r1, r2) == pytest.approx(rewards) and (over1, over2) == (False, True)
    rights = [float(r is True) for r in (first, second)]
    assert [info["accuracy_first"], info["accuracy_second"]] == rights and info["accuracy"] == sum(rights) / 2
    assert info["valid"] == (first != "no format") and bool(info["reason"]) == (first == "no format")


def test_the_second_picture_is_another_and_the_same_whenever_the_episode_is_played_again():
    prompt = asked(0)
    answers = [played(prompt, response, True)[0][4] for response in (True, "anything")]
    assert answers[0]["images"] == answers[1]["images"] != prompt.images
    assert answers[0]["message"] == {"role": "user", "content": "<image> max of red green blue"}
    assert Image.open(io.BytesIO(answers[0]["images"][0])).size == Image.open(io.BytesIO(prompt.images[0])).size
    assert played(asked(1), True, True)[0][4]["images"] != answers[0]["images"]


def test_the_environment_keeps_gymnasiums_rules_and_begins_again():
    env = gymnasium.make("prism/TestbedTurns-v0")
    for _ in range(2):
        observation, _ = env.reset(seed=3)
        assert env.observation_space.contains(observation)
        observation, _, over, _, _ = env.step("nothing")
        assert not over and env.observation_space.contains(observation)
        *_, over, _, _ = env.step("nothing")
        assert over
