"""Every recipe over every base gives the published numbers, and touches nothing but RLVR."""

from pathlib import Path

import pytest

from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.config.stages import PhaseSettings
from prism_ray.config.views import shares_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OTHERS = {"cluster_gcp", "job", "serve"}
"""Files that configure no run."""
BASES = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - OTHERS)
RECIPES = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))
PAPER = ["qwen3_vl_4b", "qwen3_vl_8b"]


def loaded(*names: str, overrides: tuple[str, ...] = ()) -> RunSettings:
    files = [CONFIGS / ("recipes" if name in RECIPES else "") / f"{name}.yaml" for name in names]
    return load_config(RunSettings, files, overrides)


def numbers(settings: RunSettings, phase: PhaseSettings) -> dict:
    learner = phase.optimiser.over(settings.learner, phase.updates)
    return {
        "estimator": phase.advantage.estimator,
        "kind": phase.objective.kind,
        "clip": phase.objective.clip,
        "aggregation": phase.objective.reduction,
        "overlong": (phase.advantage.overlong_share, phase.advantage.overlong_factor),
        "kl": phase.objective.kl_coef,
        "entropy": phase.objective.entropy_coef,
        "dynamic_sampling": phase.loop.dynamic_sampling,
        "weight_decay": learner.weight_decay,
        "warmup_steps": learner.warmup_steps,
        "lr": learner.lr,
        "schedule": learner.schedule,
    }


COMMON = {
    "overlong": (0.0, 1.0),
    "estimator": "grpo",
    "kl": 0.0,
    "entropy": 0.0,
    "dynamic_sampling": None,
    "schedule": "constant",
}
PUBLISHED = {
    "grpo": {"kind": "ppo", "clip": (0.2, 0.2), "aggregation": "token_mean", "weight_decay": 0.01, "warmup_steps": 0},
    "dapo": {
        "kind": "ppo",
        "clip": (0.2, 0.28),
        "aggregation": "token_mean",
        "weight_decay": 0.1,
        "warmup_steps": 10,
        "dynamic_sampling": "accuracy",
        "overlong": (0.5, 1.0),
    },
    "gspo": {
        "kind": "gspo",
        "clip": (3e-4, 4e-4),
        "aggregation": "seq_mean_token_mean",
        "weight_decay": 0.1,
        "warmup_steps": 75,
    },
    "cispo": {
        "kind": "cispo",
        "clip": (1.0, 4.0),
        "aggregation": "token_mean",
        "weight_decay": 0.01,
        "warmup_steps": 0,
    },
    "dr_grpo": {
        "kind": "ppo",
        "clip": (0.2, 0.2),
        "aggregation": "dr_grpo",
        "weight_decay": 0.01,
        "warmup_steps": 0,
        "estimator": "dr_grpo",
    },
}
DUAL_CLIP = {"grpo": 3.0, "dapo": 10.0, "dr_grpo": None}


def test_there_is_a_recipe_for_every_published_line():
    assert set(RECIPES) == set(PUBLISHED)
    assert set(BASES) == {"tiny", *PAPER}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_the_published_numbers_over_any_base(recipe, base):
    settings = loaded(base, recipe)
    expected = COMMON | PUBLISHED[recipe] | {"lr": settings.learner.lr}
    if recipe == "gspo" and base not in PAPER:
        expected["warmup_steps"] = 2  # 5 % of 35 updates
    assert numbers(settings, settings.rlvr) == expected
    if recipe in DUAL_CLIP:
        assert settings.rlvr.objective.dual_clip == DUAL_CLIP[recipe]
    if recipe == "dapo" and base in PAPER:
        assert settings.rlvr.advantage.overlong_share * settings.rlvr.response_limit(settings.rollout) == 4096
        assert (settings.rlvr.loop.dynamic_sampling_limit + 1) * settings.rlvr.loop.groups_per_step == 96 * 10


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_rlvr_alone(recipe, base):
    plain, laid = loaded(base).model_dump(), loaded(base, recipe).model_dump()
    assert {name for name in plain if plain[name] != laid[name]} <= {"rlvr"}


@pytest.mark.parametrize("under", RECIPES)
@pytest.mark.parametrize("over", RECIPES)
def test_a_recipe_laid_over_another_leaves_nothing_of_it(over, under):
    mixed, pure = loaded("tiny", under, over), loaded("tiny", over)
    if over != "dapo":  # a limit without dynamic sampling says nothing
        mixed, pure = (s.rlvr.model_copy(update={"loop": s.rlvr.loop.dynamic_sampling}) for s in (mixed, pure))
    assert mixed == pure


@pytest.mark.parametrize("base", PAPER)
def test_the_bases_have_the_papers_numbers(base):
    s = loaded(base)
    assert (s.align.loop.groups_per_step, s.rlvr.loop.groups_per_step, s.rollout.group_size) == (4, 32, 16)
    assert (s.align.response_limit(s.rollout), s.rlvr.response_limit(s.rollout)) == (6144, 8192)
    assert s.rollout.max_prompt_tokens == 2048
    assert (s.align.updates, s.rlvr.updates) == (500, 1500)
    assert s.rollout.temperature == 1.0
    expected = COMMON | PUBLISHED["grpo"] | {"lr": 1e-6}
    assert numbers(s, s.rlvr) == expected, "without a recipe RLVR is the published GRPO"
    align = numbers(s, s.align)
    assert {name: align[name] for name in ("lr", "weight_decay", "warmup_steps", "schedule", "kl", "entropy")} == {
        "lr": 1e-6, "weight_decay": 0.01, "warmup_steps": 0, "schedule": "constant", "kl": 0.0, "entropy": 0.0
    }  # fmt: skip
    assert (s.learner.precision, s.rollout.dtype, s.trainer.precision) == ("bfloat16",) * 3
    assert s.learner.gradient_checkpointing and s.learner.zero_stage >= 2
    assert (s.sft.lr, s.sft.schedule, s.sft.warmup_share) == (1e-5, "cosine", 0.1)
    assert (s.discriminator.experts, s.discriminator.top_k, s.discriminator.expert_noise) == (4, 2, 0.01)
    assert (s.discriminator.score_clip, s.discriminator.score_reg) == (10.0, 1e-3)
    assert s.warmup.prompts_per_step * s.warmup.rollouts == 128


@pytest.mark.parametrize("base", PAPER)
def test_the_published_judge_and_advantages_are_one_override_each(base):
    text = (CONFIGS / f"{base}.yaml").read_text()
    published = (
        "discriminator.likelihood_weight=0",
        "discriminator.views=[{name: perception, tags: [caption]}, {name: reasoning, tags: [think, answer], "
        "context: none}]",
        "align.advantage.estimator=prism_code",
        "align.loop.max_staleness=0",
        "rlvr.loop.max_staleness=0",
    )
    assert all(override in text for override in published), "the file must name them"
    s = loaded(base, overrides=published)
    assert (s.align.advantage.invalid, s.align.advantage.per_view) == ((1.0, 1.5), False)
    assert [view.context for view in s.discriminator.views][1:] == ["none"]
    assert shares_of(s.discriminator.views) == {"perception": 0.5, "reasoning": 0.5}


@pytest.mark.parametrize("base", PAPER)
def test_the_bases_fit_their_eight_gpus(base):
    s = loaded(base)
    engines = s.rollout.engines * s.rollout.gpus_per_engine
    judge = s.discriminator
    judging = judge.ranks * judge.gpus_per_rank + judge.scorers * judge.gpus_per_scorer
    assert engines + s.learner.ranks * s.learner.gpus_per_rank + judging == 8
    assert judge.gpus_per_rank + judge.gpus_per_scorer <= 1, "they share one"
    assert judge.ranks <= min(s.align.loop.groups_per_step, s.warmup.prompts_per_step)
    assert judge.policy and "2B" in judge.policy.name and judge.micro_batch_tokens >= 2048 + 6144
    assert s.trainer.ranks * s.trainer.gpus_per_rank == 8, "SFT is over when the engines start"
    assert s.learner.ranks <= s.align.loop.groups_per_step, "a group stays on one rank"
    assert s.sft.batch % s.trainer.ranks == 0
    assert s.learner.micro_batch_tokens >= s.rollout.max_model_len
    assert s.data.sft and s.data.align and s.data.rlvr and s.data.evaluate and s.policy


def test_the_8b_base_is_the_4b_base_but_for_what_size_asks():
    small, large = (loaded(base).model_dump() for base in PAPER)
    differing = {name for name in small if small[name] != large[name]}
    assert differing == {"name", "policy", "learner", "trainer", "cluster"}
    for section in ("learner", "trainer"):
        assert {k for k in small[section] if small[section][k] != large[section][k]} == {"zero_stage"}
