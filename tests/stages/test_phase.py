"""A real phase, small: vLLM, DeepSpeed, Ray Data and a verifier, with settings of its own and dynamic sampling."""

import asyncio
from pathlib import Path

import pytest

from prism_ray.config.load import load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.run import RunSettings
from prism_ray.learner.group import LearnerGroup
from prism_ray.models.tiny import build_tiny
from prism_ray.report.metrics import MetricsLog, read_metrics
from prism_ray.report.summary import Summary
from prism_ray.runtime import checkpoint
from prism_ray.stages.phase import Phase, run_phase
from prism_ray.stages.session import Interrupted, Session
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary
from prism_ray.verify.pool import VerifierPool

SMALL = [
    "verify.environment=slow_environment:prism-test/Parity-v0",
    "rollout.cpus_per_engine=0.5", "rollout.kv_cache_gb=0.1", "learner.cpus_per_rank=0.5", "rollout.group_size=2",
    "rollout.max_response_tokens=48", "rlvr.max_response_tokens=20",
    "rlvr.updates=3", "rlvr.loop.groups_per_step=4", "rlvr.loop.checkpoint_every=1",
    "rlvr.loop.dynamic_sampling=accuracy",
    "learner.lr=1e-3", "rlvr.optimiser.lr=4e-4", "rlvr.optimiser.warmup_steps=4",
    *(f"testbed.{split}=8" for split in ("pretrain", "base", "sft", "align", "evaluate", "evaluate_unseen")),
    "testbed.rlvr=64",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_phase_has_its_own_length_optimiser_and_groups_and_is_resumed_with_them(cluster, tmp_path, monkeypatch):
    recipes = []
    create = LearnerGroup.create

    async def watched(folder, settings, recipe, *rest, **more):
        recipes.append(recipe)
        return await create(folder, settings, recipe, *rest, **more)

    monkeypatch.setattr(LearnerGroup, "create", watched)
    settings = load_config(RunSettings, None, [f"runs={tmp_path}", *SMALL])
    state = asyncio.run(interrupted_and_continued(settings, tmp_path))

    rows = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["policy/lr"] for row in rows] == pytest.approx([1e-4, 2e-4, 3e-4])
    assert [r.objective.max_response_tokens for r in recipes] == [20, 20, 20]
    assert all(row["rollout/response_tokens"] <= 20 for row in rows)
    assert any(row["rollout/truncated_share"] > 0 for row in rows), "nothing was cut, so nothing was tested"
    assert all(row["reward/equal_groups"] == 0 and row["group/highest/accuracy"] == 1 for row in rows)
    assert any(row.get("reward/dropped_share", 0) > 0 for row in rows), "nothing was dropped, so nothing was tested"
    assert len(state.groups) == 12 < len(state.consumed)
    assert sorted(state.consumed) == list(range(len(state.consumed))), "every prompt was used once"


async def interrupted_and_continued(settings: RunSettings, folder: Path):
    """RLVR on the untrained tiny model, stopped after its first update and again while it waits for groups, then run to
    its end; the loop's last state."""
    build_tiny(folder / "policy", vocabulary(), TinyModelSettings(), seed=0)
    corpus = write_corpora(folder / "corpora", settings.testbed, seed=0)["rlvr"]

    stop_when_judging = asyncio.Event()

    class StoppingVerifiers(VerifierPool):
        async def judge(self, ticket):
            if stop_when_judging.is_set():
                session.stop.set()
                await asyncio.Event().wait()
            return await super().judge(ticket)

    async def judge():
        return StoppingVerifiers(settings.verify)

    class Stopping(MetricsLog):
        """Whoever watches the metrics presses Ctrl-C after the first row."""

        def write(self, stage, step, numbers):
            super().write(stage, step, numbers)
            if step == 1:
                session.stop.set()

    metrics = Stopping(folder / "tiny")
    session = Session(settings, metrics, Summary(folder / "tiny", "tiny"))
    phase = Phase("rlvr", folder / "policy", [corpus], settings.rlvr, 3, judge, needs_reference=False)
    try:
        with pytest.raises(Interrupted):
            await run_phase(session, phase)
        session.stop.clear()
        stop_when_judging.set()
        with pytest.raises(Interrupted):
            await run_phase(session, phase)
        session.stop.clear()
        stop_when_judging.clear()
        await run_phase(session, phase)
    finally:
        await session.close()
        metrics.close()
    return checkpoint.latest(session.stage_folder("rlvr") / "state")
