"""Engines that share the learner's resources: a real phase in which they sleep while it trains.

On a CPU vLLM's engines stop and go on as on a GPU, through the same calls; only the memory is not given back there.
"""

import asyncio
import time
from typing import Any

import pytest
import ray

from prism_ray.config.load import load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.run import RunSettings
from prism_ray.learner.group import LearnerGroup
from prism_ray.models.tiny import build_tiny
from prism_ray.report.metrics import MetricsLog, read_metrics
from prism_ray.report.summary import Summary
from prism_ray.stages.phase import Phase, run_phase
from prism_ray.stages.session import Session
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary
from prism_ray.verify.pool import VerifierPool

SMALL = [
    "cluster.layout=colocated", "rlvr.loop.max_staleness=0", "align.loop.max_staleness=0", "rollout.sleep_level=2",
    "verify.environment=slow_environment:prism-test/Parity-v0",
    "rollout.cpus_per_engine=0.5", "rollout.kv_cache_gb=0.05", "learner.cpus_per_rank=0.5", "rollout.group_size=2",
    "rollout.max_response_tokens=24", "rlvr.updates=3", "rlvr.loop.groups_per_step=2", "learner.lr=1e-3",
    *(f"testbed.{split}=8" for split in ("pretrain", "base", "sft", "align", "evaluate", "evaluate_unseen")),
    "testbed.rlvr=16",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(300)
def test_engines_sleep_while_the_learner_trains_and_wake_with_its_weights(cluster, tmp_path, monkeypatch):
    seen: dict[str, list[Any]] = {"asleep": [], "groups": []}
    update = LearnerGroup.update

    async def watched(self, tickets, version):
        (engine,) = session._pool._ready.values()
        seen["asleep"].append((await engine.watched.actor.health.remote())["asleep"])
        seen["groups"].append(held_groups())
        return await update(self, tickets, version)

    monkeypatch.setattr(LearnerGroup, "update", watched)
    settings = load_config(RunSettings, None, [f"runs={tmp_path}", *SMALL])
    others = held_groups()
    metrics = MetricsLog(tmp_path / "tiny")
    session = Session(settings, metrics, Summary(tmp_path / "tiny", "tiny"))
    asyncio.run(three_updates(session, settings, tmp_path))
    metrics.close()

    assert seen["asleep"] == [1, 1, 1]
    assert seen["groups"] == [others + 1] * 3, "engine and learner rank hold one placement group between them"
    for _ in range(100):  # Ray gives it back in its own time
        if held_groups() == others:
            break
        time.sleep(0.1)
    assert held_groups() == others
    rows = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["staleness/max"] == 0 for row in rows)
    assert all(row["rollout/engines"] == 1 for row in rows[1:]), (
        "what is told of the weights comes with the next update"
    )
    assert all(row["correction/log_ppl_abs_gap"] < 1e-4 for row in rows), "it woke with the learner's weights"


def held_groups() -> int:
    """Placement groups that hold resources now."""
    table = ray.util.placement_group_table()
    return sum(group["state"] == "CREATED" for group in table.values())


async def three_updates(session: Session, settings: RunSettings, folder) -> None:
    build_tiny(folder / "policy", vocabulary(), TinyModelSettings(), seed=0)
    corpus = write_corpora(folder / "corpora", settings.testbed, seed=0)["rlvr"]

    async def judge():
        return VerifierPool(settings.verify)

    try:
        phase = Phase("rlvr", folder / "policy", [corpus], settings.rlvr, 3, judge, needs_reference=False)
        await run_phase(session, phase)
    finally:
        await session.close()
