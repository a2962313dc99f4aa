"""The pool on a real actor: verdicts, one update, saving, and what it says when the actor is gone or slow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray

from prism_ray.config.discriminator import GuardSettings
from prism_ray.discriminator.model import load_discriminator, save_discriminator
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.discriminator.scorer import judge
from prism_ray.records import Verdict
from prism_ray.runtime.protocols import Ticket


@pytest.fixture
def folder(build, tiny_folder, tmp_path):
    model = build()
    save_discriminator(dict(model.named_parameters()), model, tmp_path / "warm", like=tiny_folder)
    return tmp_path / "warm"


def ticket_of(group) -> Ticket:
    return Ticket(group.id, group.prompt.id, position=group.id, ref=ray.put(group), stats={"other": 1.0})


def test_the_pool_judges_learns_saves_and_says_who_is_missing(
    cluster, folder, tiny_folder, encoder, settings, group_of, response, tmp_path, caplog
):
    guard = GuardSettings(patience=1, high_accuracy=0.51, low_accuracy=0.52)  # one of the two rings at once
    settings = settings.model_copy(update={"guard": guard})
    groups = [group_of(i, response(), response(" blue two"), "broken", response()) for i in range(3)]

    async def scenario():
        starts = (DiscriminatorPool.start(f, settings, 128, options={"num_cpus": 1}) for f in (folder, tiny_folder))
        pool, failure = await asyncio.gather(*starts, return_exceptions=True)
        assert isinstance(pool, DiscriminatorPool)
        assert isinstance(failure, RuntimeError) and "no discriminator.json" in str(failure)
        first = await asyncio.gather(*(pool.judge(ticket_of(g)) for g in groups))
        metrics = await pool.learn(first, version=0)
        examination = await pool.examine(groups, worst=2)
        second = await pool.judge(ticket_of(groups[0]))
        await pool.save(tmp_path / "state")
        await pool.export(tmp_path / "export")
        await pool.learn(first, version=1)
        version = await pool.load(tmp_path / "state")
        back = await pool.judge(ticket_of(groups[0]))
        hurried = DiscriminatorPool(pool.worker, settings.model_copy(update={"timeout_s": 1e-4}))
        with pytest.raises(TimeoutError, match="discriminator-0 to judge group 0; raise discriminator.timeout_s"):
            await hurried.judge(first[0])
        ray.kill(pool.worker)
        with pytest.raises(RuntimeError, match="discriminator-0 died while it was to judge group 0"):
            await pool.judge(first[0])
        return first, metrics, examination, second, version, back

    first, metrics, examination, second, version, back = asyncio.run(scenario())
    assert "policy version 0: discriminator alarm" in caplog.text
    assert sum(value for name, value in metrics.items() if "/alarm/" in name) >= 1
    assert "discriminator/calibration_error/perception" in examination.metrics and len(examination.worst) <= 4
    expected, *_ = verdicts_of(folder, encoder, groups)
    for ours, theirs in zip(fetched(first[0]), expected, strict=True):
        assert ours.valid == theirs.valid and ours.reason == theirs.reason and ours.judge_version == 0
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-5)
    assert [t.id for t in first] == [g.id for g in groups]
    assert first[0].stats["other"] == 1.0
    gaps = [t.stats["discriminator/gap/reasoning"] for t in first]
    assert gaps[0] != gaps[1]
    assert metrics["discriminator/version"] == 1.0
    updated, restored = fetched(second), fetched(back)
    assert version == 1 and {v.judge_version for v in updated} == {1}
    assert updated[0].scores != expected[0].scores
    assert restored[0].scores == pytest.approx(updated[0].scores, rel=1e-5)
    exported, *_ = verdicts_of(tmp_path / "export", encoder, groups)
    assert exported[0].scores == pytest.approx(updated[0].scores, rel=1e-5)


def verdicts_of(folder, encoder, groups) -> list[tuple[Verdict, ...]]:
    return [j.group.verdicts for j in judge(load_discriminator(folder), encoder, groups, 0)]


def fetched(ticket: Ticket) -> tuple[Verdict, ...]:
    group: Any = ray.get(ticket.ref)
    return group.verdicts
