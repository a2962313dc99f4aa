"""Who waits for whom: where groups are when the learner has its batch, against a simulated world (named so)."""

import asyncio

import pytest

from prism_ray.config.runtime import LoopSettings
from prism_ray.runtime.buffer import Buffer
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Ticket


class SimulatedRooms:
    """All rooms in one: engines, judge and learner, of which one can be made slow."""

    version, wants_ratios = 0, False

    def __init__(self, slow: str) -> None:
        self.slow, self.position, self.engine_version = slow, 0, 0

    async def pause(self, room: str) -> None:
        await asyncio.sleep(0.01 if room == self.slow else 0)

    async def take(self):
        self.position += 1
        return f"p{self.position}", self.position - 1, None

    async def generate(self, ticket: Ticket) -> Ticket:
        version = self.engine_version
        await self.pause("engines")
        return Ticket(ticket.id, ticket.prompt_id, ticket.position, None, version)

    async def judge(self, ticket: Ticket) -> Ticket:
        await self.pause("judge")
        return ticket

    async def append(self, ticket: Ticket) -> None:
        pass

    async def learn(self, tickets, version, ratios=None):
        return {}

    async def update(self, tickets, version):
        await self.pause("learner")
        return {}

    async def weights(self):
        return None

    async def publish(self, weights, version):
        self.engine_version = version
        return {}


@pytest.mark.parametrize(("slow", "where"), [("engines", "generating"), ("judge", "judging")])
def test_groups_are_where_the_slow_room_is(slow, where):
    rows = []

    async def on_step(state, metrics):
        rows.append(metrics)

    rooms = SimulatedRooms(slow)
    loop = Loop(rooms, rooms, rooms, rooms, rooms, LoopSettings(groups_per_step=2, max_staleness=3), on_step)
    asyncio.run(loop.run(6, LoopState()))
    found = {name: sum(row[f"loop/{name}"] for row in rows) for name in ("generating", "judging")}
    assert found.pop(where) > 0 and sum(found.values()) == 0


@pytest.mark.parametrize(
    ("slow", "staleness", "waits"),
    [("rollout", 3, "judge"), ("learner", 0, "rollout"), ("learner", 0, "judge"), ("judge", 0, "rollout")],
)
def test_a_room_waits_for_the_slow_one(slow, staleness, waits):
    rows = []

    async def on_step(state, metrics):
        rows.append(metrics)

    rooms = SimulatedRooms("engines" if slow == "rollout" else slow)
    loop = Loop(rooms, rooms, rooms, rooms, rooms, LoopSettings(groups_per_step=2, max_staleness=staleness), on_step)
    asyncio.run(loop.run(6, LoopState()))
    waited = {room: [row[f"{room}/wait_share"] for row in rows] for room in ("learner", "rollout", "judge")}
    assert all(0 <= share <= 1 for shares in waited.values() for share in shares)
    assert sum(waited[waits]) > sum(waited[slow])


def test_a_judge_that_learns_does_not_wait():
    rows = []

    async def on_step(state, metrics):
        rows.append(metrics)

    class Learning(SimulatedRooms):
        async def learn(self, tickets, version, ratios=None):
            await asyncio.sleep(0.01)
            return {}

    rooms = Learning("nobody")
    loop = Loop(rooms, rooms, rooms, rooms, rooms, LoopSettings(groups_per_step=2, max_staleness=0), on_step)
    asyncio.run(loop.run(6, LoopState()))
    assert sum(row["judge/wait_share"] for row in rows) < sum(row["rollout/wait_share"] for row in rows)
    assert sum(row["loop/judging"] for row in rows) == 0, "a judge that learns judges no group"


def test_a_group_counts_for_what_it_waits_for_and_for_nothing_once_it_is_ready():
    buffer = Buffer(groups_per_step=2, max_staleness=1)
    for number in (1, 2):
        buffer.start(number, 0)
    buffer.moved(2, "verdict")
    assert (buffer.waiting_for("generation"), buffer.waiting_for("verdict")) == (1, 1)
    buffer.add(Ticket(2, "p", 0, None))
    assert buffer.waiting_for("verdict") == 0
