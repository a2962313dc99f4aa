"""What a changed setting makes run again, in the real run's stages."""

import json

import pytest

from prism_ray.config.load import load_config
from prism_ray.config.run import STAGES, RunSettings
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary
from prism_ray.stages.pipeline import key_of, plan
from prism_ray.stages.run import stages_of
from prism_ray.stages.session import Session

ALL = set(STAGES)


@pytest.fixture
def keys(tmp_path):
    def of(*overrides: str) -> dict[str, str]:
        settings = load_config(RunSettings, None, [f"runs={tmp_path}", *overrides])
        metrics = MetricsLog(tmp_path / "m")
        stages = stages_of(Session(settings, metrics, Summary(tmp_path / "s", "r")))
        metrics.close()
        found: dict[str, str] = {}
        for stage in plan(stages, STAGES):
            json.dumps(stage.depends, default=str)
            found[stage.name] = key_of(stage, found)
        return found

    return of


AFTER_ALIGN = {"align", "rlvr", "evaluate"}
RLVR = {"rlvr", "rlvr-sft", "rlvr-references", "evaluate"}


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("seed=1", ALL),
        ("base.clean.steps=7", ALL),
        ("trainer.precision=bfloat16", ALL),
        ("trainer.freeze=[visual]", ALL),
        ("sft.lr=1e-4", ALL - {"base"}),
        ("testbed.sft=100", ALL - {"base"}),
        ("warmup.max_steps=30", {"warmup"} | AFTER_ALIGN),
        ("discriminator.experts=2", {"warmup"} | AFTER_ALIGN),
        ("discriminator.foreign_references=1", {"warmup"} | AFTER_ALIGN),
        ("discriminator.gate.window=64", AFTER_ALIGN),
        ("discriminator.replay.share=0.25", AFTER_ALIGN),
        ("discriminator.guard.on_drift=lower_rate", AFTER_ALIGN),
        ("discriminator.importance_cap=2", AFTER_ALIGN),
        ("discriminator.updates_per_step=2", AFTER_ALIGN),
        ("discriminator.alignment_balance_coefficient=0.1", AFTER_ALIGN),
        ("align.advantage.estimator=prism_code", AFTER_ALIGN),
        ("align.updates=10", AFTER_ALIGN | {"rlvr-sft"}),
        ("rlvr.updates=10", RLVR),
        ("testbed.rlvr=100", RLVR),
        ("learner.lr=1e-5", {"align"} | RLVR),
        ("learner.freeze=[visual]", {"align"} | RLVR),
        ("align.max_response_tokens=64", AFTER_ALIGN),
        ("align.optimiser.weight_decay=0.1", AFTER_ALIGN),
        ("rlvr.optimiser.warmup_steps=2", RLVR),
        ("rlvr.optimiser.lr=2e-4", set()),
        ("rlvr.loop.dynamic_sampling=accuracy", RLVR),
        ("rlvr.loop.dynamic_sampling_limit=20", set()),
        ("references.steps=3", {"references", "rlvr-references", "evaluate"}),
        ("evaluate.prompts=3", {"evaluate"}),
        ("testbed.evaluate_unseen=3", {"evaluate"}),
        ("rollout.kv_on_update=keep", {"warmup", "align"} | RLVR),
        ("align.loop.stall_timeout_s=9", set()),
        ("rlvr.loop.checkpoint_every=3", set()),
        ("learner.timeout_s=9", set()),
        ("learner.cpus_per_rank=0.5", set()),
        ("learner.micro_batch_tokens=99", set()),
        ("discriminator.timeout_s=9", set()),
        ("discriminator.ranks=2", set()),
        ("discriminator.scorers=2", set()),
        ("discriminator.policy=elsewhere", {"warmup"} | AFTER_ALIGN),
        ("verify.timeout_s=9", set()),
        ("verify.heartbeat_s=9", set()),
        ("verify.options={limit_s: 5}", RLVR),
        ("corpora.look_ahead=9", set()),
        ("rollout.cpus_per_engine=0.5", set()),
        ("cluster.cpus=3", set()),
    ],
)
def test_a_setting_makes_run_again_what_depends_on_it_and_nothing_else(keys, override, again):
    before, after = keys(), keys(override, *(["trainer.zero_stage=1"] if "bfloat16" in override else []))
    assert {name for name in before if before[name] != after[name]} == again


def test_a_learning_rate_that_a_phase_overrides_does_not_make_it_run_again(keys):
    own = ("rlvr.optimiser.lr=1e-5",)
    before, after = keys(*own), keys(*own, "learner.lr=3e-5")
    assert {name for name in before if before[name] != after[name]} == {"align", "rlvr", "evaluate"}
    assert before["rlvr-sft"] == after["rlvr-sft"]


def test_other_contents_of_the_users_own_file_are_noticed(keys, tmp_path):
    file = tmp_path / "own.parquet"
    file.write_bytes(b"a")
    before = keys(f"data.align=[{file}]")
    file.write_bytes(b"ab")
    changed = {name for name, key in keys(f"data.align=[{file}]").items() if key != before[name]}
    assert changed == {"warmup", "align", "rlvr", "references", "rlvr-references", "evaluate"}


def test_a_served_judge_takes_the_place_of_warm_up_and_verifier(keys):
    served = ("served.url=http://host:8000", "align.judge=serve", "rlvr.judge=serve")
    before, after = keys(), keys(*served)
    assert {name for name in before if before[name] != after[name]} == {"align"} | RLVR
    assert keys(*served, "discriminator.experts=2")["align"] == after["align"], "no warm-up is needed"
    assert keys(*served, "verify.options={limit_s: 5}")["rlvr"] == after["rlvr"]
    for other in ("served.url=http://other", "served.version=abc"):
        changed = {name for name, key in keys(*served, other).items() if key != after[name]}
        assert changed == {"align"} | RLVR
    for harmless in ("served.timeout_s=9", "served.concurrency=2"):
        assert keys(*served, harmless) == after
