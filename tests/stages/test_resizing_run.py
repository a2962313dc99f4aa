"""A real alignment whose resize.yaml is edited: vLLM engines and scorers come and go, and the learner never stops.

Weights go over gloo: an engine that joins fetches those that the learner has set aside.
"""

import asyncio
import logging

import pytest

from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.report.metrics import read_metrics
from prism_ray.stages.phase import Phase
from tests.chaos import world as chaos
from tests.chaos.world import World

pytestmark = pytest.mark.long
SMALL = (
    "rollout.engines=1", "rollout.weights=gloo", "learner.ranks=1", "discriminator.scorers=1",
    "cluster.resize_poll_s=0.2", "cluster.pending_timeout_s=20",
)  # fmt: skip
UPDATES = 20


async def align(world, name, faults):
    """A stage as the job runs it, with its scorers following the file."""

    async def judge():
        settings = world.settings
        return await DiscriminatorPool.start(world.judge, settings.discriminator, settings.rollout.max_prompt_tokens)

    start, corpus, settings = world.policy, [world.corpus("align")], world.settings.align
    follow = world.session.follow_scorers
    found = await world._run(Phase(name, start, corpus, settings, UPDATES, judge, True, follow=follow), faults)
    found.check_exactly_once()
    return found


@pytest.mark.timeout(1200)
def test_engines_and_scorers_of_a_run_come_and_go_with_its_file(cluster, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(chaos, "UPDATES", UPDATES)
    world = World(tmp_path, *SMALL)
    file, stages = world.session.folder / "resize.yaml", []

    def ask(text):
        def write():
            file.write_text(text)  # and returns nothing: what a fault returns is waited for

        return write

    def grown():
        return {f"{name} is 2 instead of 1" in caplog.text for name in ("rollout.engines", "discriminator.scorers")}

    async def scene():
        try:
            faults = {1: ask("rollout: {engines: 2}\ndiscriminator: {scorers: 2}\n")}
            while grown() != {True}:  # on a busy machine an engine takes longer than a stage
                stages.append(f"grows-{len(stages)}")
                await align(world, stages[-1], faults)
                faults = {}
            stages.append("shrinks")
            shrink = {2: ask("rollout: {engines: nonsense}\n"), 4: file.unlink}
            found = await align(world, stages[-1], shrink)
            found.check_cause('rollout.engines is "nonsense"', "resize.yaml is not used")
            async with asyncio.timeout(60):
                while "rollout.engines is 1 instead of 2" not in caplog.text:
                    await asyncio.sleep(0.1)
        finally:
            await world.close()

    with caplog.at_level(logging.INFO, "prism_ray"):
        asyncio.run(scene())
    rows = read_metrics(world.session.folder / "metrics.jsonl")
    for stage in stages:
        assert [row["step"] for row in rows if row["stage"] == stage] == list(range(1, UPDATES + 1))
    engines = [row["rollout/engines"] for row in rows if "rollout/engines" in row]
    assert max(engines) == 2 and engines[0] == 1
