"""Scorers that come and go, as small actors in their place: none is forgotten that was started."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayActorError

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.group import ScorerGroup
from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP


@ray.remote(concurrency_groups=HEALTH_GROUP, num_cpus=0)
class Standin:
    """Answers as a scorer does; it is long in starting while there is a file `slow`."""

    def __init__(self, slow: Path) -> None:
        self._slow = slow

    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> None:
        pass

    def start(self, version: int) -> None:
        while self._slow.exists():
            time.sleep(0.02)


async def until(met) -> None:
    async with asyncio.timeout(120):
        while not met():
            await asyncio.sleep(0.02)


async def ended(actor) -> None:
    """Until it has."""
    async with asyncio.timeout(120):
        with pytest.raises(RayActorError):
            while True:
                await actor.alive.remote()
                await asyncio.sleep(0.02)


def test_a_successor_that_is_no_longer_wanted_is_ended_and_never_takes_anothers_place(cluster, tmp_path):
    slow, made = tmp_path / "slow", []

    def make(index: int):
        made.append(Standin.remote(slow))
        return made[-1]

    async def scenario() -> None:
        group = ScorerGroup(make, DiscriminatorSettings(scorers=2, heartbeat_s=60), lambda: None)
        await group.resize(2)
        slow.touch()
        group.lose(group.seats[1], RuntimeError("scorer 1 died"))
        await until(lambda: len(made) == 3)
        await group.resize(1)
        growing = asyncio.create_task(group.resize(2))
        await until(lambda: len(made) == 4)
        await ended(made[2])
        slow.unlink()
        await growing
        assert [group.seats[i].actor for i in sorted(group.seats)] == [made[0], made[3]]
        group.close()
        for actor in made:
            await ended(actor)

    asyncio.run(scenario())
