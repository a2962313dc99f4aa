"""New weights travel to the engines while the next update is under way, in the loop's simulated world."""

import asyncio

from tests.runtime.test_loop import SimulatedWorld, run


class SlowWay(SimulatedWorld):
    """The way to the engines takes until the learner has begun its next update, or has nothing left to do."""

    def __init__(self, updates):
        super().__init__(seed=1)
        self.updates, self.way, self.met = updates, 0, 0
        self.begun = asyncio.Event()

    async def publish(self, weights, version):
        assert weights == version, "the learner went on before these weights were set aside"
        self.way += 1
        assert self.way == 1, "two publications at a time"
        if version < self.updates:
            await self.begun.wait()
        self.way -= 1
        return await super().publish(weights, version)

    async def update(self, tickets, version):
        self.met += self.way
        self.begun.set()
        metrics = await super().update(tickets, version)
        self.begun.clear()
        return metrics


def test_the_learner_begins_its_next_update_before_the_engines_have_the_weights_of_the_last():
    """With a bound of 1 the batch for it is there already: the gate let in two before the first update."""
    world = SlowWay(updates=2)
    state, _ = run(world, staleness=1, updates=2)
    assert state.version == 2 and world.met == 1
