"""A real alignment whose resize.yaml is edited: vLLM engines and scorers come and go, and the learner never stops."""

import asyncio

import pytest

from prism_ray.report.metrics import read_metrics
from tests.chaos.world import UPDATES, World

pytestmark = pytest.mark.long
SMALL = (
    "rollout.engines=1", "rollout.weights=gloo", "learner.ranks=1", "discriminator.scorers=1",
    "cluster.resize_poll_s=0.2", "cluster.pending_timeout_s=20",
)  # fmt: skip


async def until(met, seconds=240):
    async with asyncio.timeout(seconds):
        while not met():
            await asyncio.sleep(0.1)


@pytest.mark.timeout(900)
def test_engines_and_scorers_of_a_run_come_and_go_with_its_file(cluster, tmp_path):
    world = World(tmp_path, *SMALL)
    file, stages = world.session.folder / "resize.yaml", []

    async def scene():
        try:
            faults = {1: lambda: file.write_text("rollout: {engines: 2}\ndiscriminator: {scorers: 2}\n")}
            while not stages or len(world.session._pool._ready) < 2:  # an engine takes longer than such a stage
                stages.append(f"grows-{len(stages)}")
                (await world.align(stages[-1], faults)).check_exactly_once()
                faults = {}
            pool = world.session._pool
            assert pool is not None

            shrink = {2: lambda: file.write_text("rollout: {engines: nonsense}\n"), 4: file.unlink}
            stages.append("shrinks")
            found = await world.align(stages[-1], shrink)
            found.check_exactly_once()
            found.check_cause('rollout.engines is "nonsense"', "resize.yaml is not used")
            await until(lambda: len(pool._ready) == 1)
        finally:
            await world.close()

    asyncio.run(scene())
    rows = read_metrics(world.session.folder / "metrics.jsonl")
    for stage in stages:
        assert [row["step"] for row in rows if row["stage"] == stage] == list(range(1, UPDATES + 1))
    engines = [row["rollout/engines"] for row in rows if "rollout/engines" in row]
    assert max(engines) == 2 and engines[0] == 1
