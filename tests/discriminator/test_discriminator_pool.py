"""The pool on real actors: verdicts, updates, weights to scorers, saving, and what it says when a process is gone."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import ray

from prism_ray.config.discriminator import GateSettings, GuardSettings
from prism_ray.discriminator.group import ScorerGroup
from prism_ray.discriminator.guards import Gate, frozen_views
from prism_ray.discriminator.model import load_discriminator, save_discriminator
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.discriminator.scorer import judge
from prism_ray.records import Verdict
from prism_ray.runtime.protocols import Ticket
from prism_ray.runtime.supervision import Lost

SMALL = {"cpus_per_rank": 0.2, "cpus_per_scorer": 0.2}


@pytest.fixture
def folder(build, tiny_folder, tmp_path):
    model = build()
    save_discriminator(dict(model.named_parameters()), model, tmp_path / "warm", like=tiny_folder)
    return tmp_path / "warm"


def ticket_of(group) -> Ticket:
    return Ticket(group.id, group.prompt.id, position=group.id, ref=ray.put(group), total_tokens=50, stats={"other": 1})


def test_ranks_judge_learn_save_and_say_who_is_missing(
    cluster, folder, tiny_folder, encoder, settings, group_of, response, tmp_path, caplog
):
    guard = GuardSettings(  # one of them rings
        patience=1, high_accuracy=0.51, low_accuracy=0.52, gap_closing=None,
        on_separable="freeze_policy", on_chance="freeze_policy",
    )  # fmt: skip
    settings = settings.model_copy(update={"ranks": 2, "guard": guard, "gate": GateSettings(), **SMALL})
    groups = [group_of(i, response(), response(" blue two"), "broken", response()) for i in range(3)]

    async def scenario():
        starts = (DiscriminatorPool.start(f, settings, 128) for f in (folder, tiny_folder))
        pool, failure = await asyncio.gather(*starts, return_exceptions=True)
        assert isinstance(pool, DiscriminatorPool)
        assert isinstance(failure, FileNotFoundError) and "no discriminator.json" in str(failure)
        first = await asyncio.gather(*(pool.judge(ticket_of(g)) for g in groups))
        metrics = await pool.learn(first, version=0)
        examination = await pool.examine(groups, worst=2)
        second = await pool.judge(first[0])
        await pool.save(tmp_path / "state")
        await pool.export(tmp_path / "export")
        await pool.learn(first, version=1)
        gate = pool._gate
        assert gate is not None
        before = gate.state()
        gate.see([dict.fromkeys(settings.view_names, (0.0, 1000))])
        version = await pool.load(tmp_path / "state")
        assert gate.state() == before != Gate(GateSettings(), settings.view_names).state()
        assert pool._frozen == frozen_views(metrics, guard) != set()
        back = await pool.judge(ticket_of(groups[0]))
        with pytest.raises(ValueError, match="cannot be resized to 2"):
            await pool.resize(2)
        ray.kill(pool._trainer.seats[1].actor)
        with pytest.raises(Lost, match="discriminator rank 1 died while it was to learn"):
            await pool.learn(first, version=2)
        pool.shutdown()
        return first, metrics, examination, second, version, back

    first, metrics, examination, second, version, back = asyncio.run(scenario())
    assert "policy version 0: discriminator alarm" in caplog.text
    assert sum(value for name, value in metrics.items() if "/alarm/" in name) >= 1
    assert metrics["discriminator/gate/perception"] <= 1.0 and metrics["discriminator/scorer_lag_max"] == 0.0
    assert metrics["discriminator/waiting_groups"] == 3.0 and metrics["discriminator/scoring_tokens_per_second"] > 0
    assert "discriminator/calibration_error/perception" in examination.metrics and len(examination.worst) <= 4
    expected, *_ = verdicts_of(folder, encoder, groups)
    for ours, theirs in zip(fetched(first[0]), expected, strict=True):
        assert ours.valid == theirs.valid and ours.reason == theirs.reason and ours.judge_version == 0
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-5)
    assert [t.id for t in first] == [g.id for g in groups]
    assert first[0].stats["other"] == 1.0 and "gate/perception" in fetched(first[0])[0].parts
    gaps = [t.stats["discriminator/gap/reasoning"] for t in first]
    assert gaps[0] != gaps[1]
    assert metrics["discriminator/version"] == 1.0
    updated, restored = fetched(second), fetched(back)
    for view in frozen_views(metrics, guard):
        assert fetched(first[0])[0].parts[f"gate/{view}"] == 1.0
        assert updated[0].parts[f"gate/{view}"] == restored[0].parts[f"gate/{view}"] == 0.0
    assert version == 1 and {v.judge_version for v in updated} == {1}
    assert (first[0].judge_version, second.judge_version, back.judge_version) == (0, 1, 1)
    assert updated[0].scores != expected[0].scores, "a second verdict replaces the first"
    assert second.stats["discriminator/gap/reasoning"] != gaps[0]
    assert restored[0].scores == pytest.approx(updated[0].scores, rel=1e-5)
    exported, *_ = verdicts_of(tmp_path / "export", encoder, groups)
    assert exported[0].scores == pytest.approx(updated[0].scores, rel=1e-5)


def test_scorers_get_every_version_are_replaced_and_come_and_go(
    cluster, folder, encoder, settings, group_of, response, tmp_path, caplog
):
    """One life of a pool of two scorers, with a death, a hang and changes of size."""
    changes = {"scorers": 2, "max_scorer_lag": 0, "heartbeat_s": 3.0, "max_restarts": 1, **SMALL}
    settings = settings.model_copy(update=changes)
    groups = [group_of(i, response(), response(" blue two"), "broken", response()) for i in range(6)]

    async def judged(pool):
        return await asyncio.gather(*(pool.judge(ticket_of(g)) for g in groups))

    async def pids(scorers: ScorerGroup) -> dict[int, int]:
        return {i: await seat.actor.alive.remote() for i, seat in scorers.seats.items()}

    async def until(condition):
        async with asyncio.timeout(120):
            while not condition():
                await asyncio.sleep(0.05)

    async def scenario():
        pool = await DiscriminatorPool.start(folder, settings, 128)
        scorers = pool._scorers
        assert scorers is not None
        first = await judged(pool)
        metrics = await pool.learn(first, version=0)
        second = await judged(pool)
        assert {t.judge_version for t in second} == {pool.version} == {1}
        await pool.export(tmp_path / "export")
        await pool.save(tmp_path / "state")

        started = await pids(scorers)
        os.kill(started[0], signal.SIGKILL)
        third = await judged(pool)
        assert {t.judge_version for t in third} == {1}
        await until(lambda: len(scorers.seats) == 2)
        assert {seat.version for seat in scorers.seats.values()} == {1}, "a successor holds current weights"
        assert fetched(third[5])[0].scores == pytest.approx(fetched(second[5])[0].scores, rel=1e-5)

        os.kill(started[1], signal.SIGSTOP)
        fourth = await judged(pool)
        assert [t.id for t in fourth] == [g.id for g in groups]
        await until(lambda: len(scorers.seats) == 2 and not os.path.exists(f"/proc/{started[1]}"))

        await pool.resize(1)
        assert list(scorers.seats) == [0]
        await asyncio.gather(judged(pool), pool.resize(2))
        assert sorted(scorers.seats) == [0, 1]
        assert {seat.version for seat in scorers.seats.values()} == {1}
        await pool.learn(first, version=1)
        assert await pool.load(tmp_path / "state") == 1
        restored = await judged(pool)
        assert fetched(restored[5])[0].scores == pytest.approx(fetched(second[5])[0].scores, rel=1e-5)

        os.kill((await pids(scorers))[0], signal.SIGKILL)
        await until(lambda: scorers.failure is not None)
        with pytest.raises(RuntimeError, match=r"scorer 0 .* after 1 restarts \(discriminator.max_restarts\)"):
            await judged(pool)
        pool.shutdown()
        return first, second, metrics

    first, second, metrics = asyncio.run(scenario())
    assert metrics["discriminator/version"] == 1.0 and metrics["discriminator/canary_gap"] == 0.0
    expected = verdicts_of(tmp_path / "export", encoder, groups)
    for ticket, verdicts in zip(second, expected, strict=True):
        for ours, theirs in zip(fetched(ticket), verdicts, strict=True):
            assert ours.scores == pytest.approx(theirs.scores, rel=1e-5)
    assert fetched(second[0])[0].scores != fetched(first[0])[0].scores
    for index in (0, 1):
        assert caplog.text.count(f"scorer {index} is back, with weights of version 1") == 1
    assert caplog.text.count("restart 1 of at most 1") == 2
    assert "scorer 1 has not answered for 3 s" in caplog.text


def verdicts_of(folder, encoder, groups) -> list[tuple[Verdict, ...]]:
    return [j.group.verdicts for j in judge(load_discriminator(folder), encoder, groups, 0)]


def fetched(ticket: Ticket) -> tuple[Verdict, ...]:
    group: Any = ray.get(ticket.ref)
    return group.verdicts
