"""What only shows when the rooms' settings stand together."""

import pytest

from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.run import RunSettings


def test_responses_longer_than_the_objective_knows_are_refused():
    with pytest.raises(ConfigError, match="align.objective.max_response_tokens is 128"):
        load_config(RunSettings, None, ["rollout.max_response_tokens=200", "rollout.max_model_len=300"])


def test_an_objective_that_counts_a_ratio_twice_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="dppo_tv already uses the ratio"):
        load_config(RunSettings, None, ["rlvr.objective.kind=dppo_tv"])


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match="stages"):
        load_config(RunSettings, None, ["stages=[algin]"])
