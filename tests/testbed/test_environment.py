"""The Gymnasium environment: its contract, its rewards, its truth."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import prism_ray.testbed.environment as environment


@pytest.fixture
def env():
    made = gymnasium.make(environment.ID)
    yield made
    made.close()


def test_it_keeps_gymnasiums_contract(env):
    check_env(env.unwrapped, skip_render_check=True)


def test_the_reference_earns_everything(env):
    observation, info = env.reset(seed=1)
    assert observation["image"].shape == (64, 96, 3)
    assert observation["prompt"].startswith(" ")
    _, reward, terminated, truncated, info = env.step(info["reference"])
    assert reward == pytest.approx(1.0)
    assert terminated and not truncated
    assert all(info["truth"].values())


@pytest.mark.parametrize(
    ("action", "reward"),
    [("", 0.0), ("<caption> A</caption><think> A</think><answer> red</answer>", 0.2), ("<answer> 1 2 3</answer>", 0.0)],
)
def test_wrong_answers_earn_the_format_at_most(env, action: str, reward: float):
    env.reset(seed=1)
    assert env.step(action)[1] == pytest.approx(reward)


def test_episodes_are_deterministic_in_the_seed(env):
    first, _ = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    other, _ = env.reset(seed=4)
    assert np.array_equal(first["image"], again["image"]) and first["prompt"] == again["prompt"]
    assert not np.array_equal(first["image"], other["image"])


def test_the_family_can_be_chosen(env):
    _, info = env.reset(seed=0, options={"family": "each range"})
    assert info["extra"]["family"] == "each range"


def test_a_prompt_of_the_corpus_is_judged_by_its_own_scene(tmp_path):
    import pyarrow.parquet as pq

    from prism_ray.config.testbed import TestbedSettings
    from prism_ray.corpora.rows import prompt_from_row
    from prism_ray.testbed.corpora import write_corpora

    sizes = dict.fromkeys(["pretrain", "base", "sft", "align", "evaluate", "evaluate_unseen"], 1)
    paths = write_corpora(tmp_path, TestbedSettings(rlvr=4, **sizes), seed=0)
    made = gymnasium.make(environment.ID)
    for row in pq.read_table(paths["rlvr"]).to_pylist():
        prompt = prompt_from_row(row)
        observation, _ = made.reset(options={"prompt": prompt})
        assert observation["prompt"] in prompt.messages[-1]["content"]
        _, reward, terminated, _, info = made.step(row["teacher_response"])
        assert (reward, terminated, info["accuracy"], info["valid"], info["reason"]) == (1.0, True, 1.0, True, "")
        made.reset(options={"prompt": prompt})
        _, reward, _, _, info = made.step("no tags")
        assert (reward, info["format"], info["valid"]) == (0.0, 0.0, False) and "missing" in info["reason"]
