"""What only shows when the rooms' settings stand together."""

import pytest

from prism_ray.config.learner import LearnerSettings
from prism_ray.config.load import ConfigError, load_config, to_yaml
from prism_ray.config.run import RunSettings
from prism_ray.config.stages import PhaseOptimiserSettings


def test_a_phase_has_its_own_longest_response_or_the_engines():
    settings = load_config(RunSettings, None, ["align.max_response_tokens=64"])
    assert settings.align.response_limit(settings.rollout) == 64
    assert settings.rlvr.response_limit(settings.rollout) == settings.rollout.max_response_tokens == 96


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["align.max_response_tokens=97"], r"align.max_response_tokens is 97 but .* rollout.max_response_tokens = 96"),
        (["rlvr.objective.max_response_tokens=64"], "the stage sets it to the longest response, 96; remove it"),
        (["rlvr.loop.dynamic_sampling=''"], "rlvr.loop.dynamic_sampling"),
        (["align.loop.dynamic_sampling=reward"], "looks at rewards, which estimator bounded_views does not use"),
        (["rlvr.optimiser.warmup_steps=1", "rlvr.optimiser.warmup_share=0.1"], "say the same thing twice"),
        (["align.objective.kl_coef=0.1", "align.objective.kl_in=reward"], "kl_in: reward needs an estimator of reward"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_runs(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(RunSettings, None, overrides)


def test_a_resolved_configuration_reads_back_equal(tmp_path):
    settings = load_config(RunSettings, None, ["align.max_response_tokens=64", "rlvr.loop.dynamic_sampling=accuracy"])
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    assert load_config(RunSettings, tmp_path / "config.yaml") == settings


def test_a_phase_changes_of_the_optimiser_only_what_it_names():
    learner = LearnerSettings(lr=1e-4, weight_decay=0.01, warmup_steps=3, betas=(0.8, 0.9), ranks=2)
    assert PhaseOptimiserSettings().over(learner, 100) == learner
    own = {"lr": 2e-4, "weight_decay": 0.1, "warmup_steps": 0, "schedule": "cosine", "grad_clip": 0.5}
    for name, value in own.items():
        changed = PhaseOptimiserSettings.model_validate({name: value}).over(learner, 100)
        assert changed == learner.model_copy(update={name: value}) and changed != learner
    assert PhaseOptimiserSettings(warmup_share=0.05).over(learner, 1500).warmup_steps == 75
    assert PhaseOptimiserSettings(warmup_share=0.05).over(learner, 35).warmup_steps == 2, "rounded up"
    assert set(PhaseOptimiserSettings.model_fields) == {*own, "warmup_share"}


def test_an_objective_that_counts_a_ratio_twice_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="dppo_tv already uses the ratio"):
        load_config(RunSettings, None, ["rlvr.objective.kind=dppo_tv"])


@pytest.mark.parametrize("setting", ["discriminator.gate.window=64", "discriminator.guard.on_chance=freeze_policy"])
def test_a_gate_that_the_estimator_would_undo_is_refused_before_anything_runs(setting):
    with pytest.raises(ConfigError, match="prism_paper normalises the sum of the views"):
        load_config(RunSettings, None, ["align.advantage.estimator=prism_paper", setting])
    for estimator in ("grpo", "dr_grpo", "rloo"):
        of_rewards = [f"align.advantage.estimator={estimator}", "align.advantage.credit=all_tokens"]
        with pytest.raises(ConfigError, match=f"{estimator} sees a response's reward alone"):
            load_config(RunSettings, None, [*of_rewards, setting])
        load_config(RunSettings, None, of_rewards)
    with pytest.raises(ConfigError, match="align.judge is serve, a judge that does not learn"):
        load_config(RunSettings, None, ["align.judge=serve", "served.url=http://localhost:8000", setting])
    load_config(RunSettings, None, ["align.advantage.estimator=prism_code", setting])


def test_scorers_that_may_be_older_than_verdicts_may_be_are_refused():
    strict = ["align.loop.max_judge_lag=0", "discriminator.scorers=1"]
    with pytest.raises(ConfigError, match="lets scorers judge with weights that are 1 updates old"):
        load_config(RunSettings, None, strict)
    load_config(RunSettings, None, [*strict, "discriminator.max_scorer_lag=0"])
    load_config(RunSettings, None, ["align.loop.max_judge_lag=0"])


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match="stages"):
        load_config(RunSettings, None, ["stages=[algin]"])
