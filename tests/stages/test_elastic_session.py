"""A session whose resize.yaml is edited while its engines work: simulated engines, the real pool, the real Ray."""

import asyncio
import logging

import pytest
import ray

from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.records import Ticket
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary
from prism_ray.rollout import pool as pool_module
from prism_ray.stages import run as run_module
from prism_ray.stages.session import Session
from tests.rollout.simulated_engine import SIMULATED_ACTOR

SMALL = [
    "rollout.engines=1", "rollout.cpus_per_engine=0.5", "rollout.group_size=2", "rollout.max_response_tokens=40",
    "rollout.progress_s=0.1", "rollout.max_concurrent=2", "cluster.resize_poll_s=0.05", "cluster.pending_timeout_s=2",
]  # fmt: skip


async def until(met):
    async with asyncio.timeout(60):
        while not met():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(("judge", "followed"), [("own", True), ("serve", False)])
def test_only_the_scorers_of_a_runs_own_judge_come_and_go(tmp_path, monkeypatch, judge, followed):
    """One that is served elsewhere has none, whatever `discriminator.scorers` says."""
    phases = []

    async def begin(session, phase):
        phases.append(phase)

    monkeypatch.setattr(run_module, "run_phase", begin)
    served = [f"align.judge={judge}", "served.url=http://judge:8000", "discriminator.scorers=1"]
    settings = load_config(RunSettings, None, [f"runs={tmp_path}", *SMALL, *served])
    with MetricsLog(tmp_path / "tiny") as metrics:
        session = Session(settings, metrics, Summary(tmp_path / "tiny", "tiny"))
        session.corpora = {"align": []}
        asyncio.run(run_module._align(session))
    assert [phase.follow is not None for phase in phases] == [followed]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_engines_come_and_go_while_groups_are_sampled_and_too_many_are_refused(cluster, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pool_module, "ENGINE_ACTOR", SIMULATED_ACTOR)
    settings = load_config(RunSettings, None, [f"runs={tmp_path}", *SMALL])
    file = tmp_path / "tiny" / "resize.yaml"

    async def scene():
        with MetricsLog(tmp_path / "tiny") as metrics:
            session = Session(settings, metrics, Summary(tmp_path / "tiny", "tiny"))
            pool = await session.engines(tmp_path)
            number, done, going = 0, [], True

            async def sample():
                nonlocal number
                while going:
                    number += 1
                    done.append(await pool.generate(Ticket(number, "p", number, ray.put("prompt"))))

            work = [asyncio.create_task(sample()) for _ in range(4)]
            try:
                file.write_text("rollout: {engines: 3}")
                await until(lambda: len(pool._ready) == 3)
                await until(lambda: {t.stats["engine"] for t in done} == {0, 1, 2})
                file.write_text("rollout: {engines: -1}")
                await until(lambda: "rollout.engines is -1" in caplog.text)
                file.write_text("rollout: {engines: 1}")
                await until(lambda: list(pool._ready) == [0])
                file.write_text("rollout: {engines: 100}")
                await until(lambda: "100 are wanted" in caplog.text and "has not granted" in caplog.text)
                await until(lambda: len(pool._ready) > 1)
                assert len(pool._ready) < 10, "as many as there is room for"
                file.unlink()
                await until(lambda: list(pool._ready) == [0])
                going = False
                await asyncio.gather(*work)
            finally:
                await session.close()
            return done

    with caplog.at_level(logging.INFO, "prism_ray"):
        done = asyncio.run(scene())
    assert len({t.id for t in done}) == len(done) and not any(t.stats["rollout/losses"] for t in done)
    assert all(t.tokens == 80 for t in done), "a group is missing tokens"
