"""Dynamic sampling in the loop, against a simulated world (named so): what is trained does not depend on durations."""

import asyncio
import heapq
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_ray.config.runtime import HIGHEST, LOWEST, LoopSettings
from prism_ray.runtime.checkpoint import Remaining, first_open, usable
from prism_ray.runtime.informative import TooFewInformative
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Ticket


class World:
    """Prompts, engines, judge, learner and keeper in one. A prompt's length and value are a function of its position;
    a group takes as long as its responses are."""

    version, wants_ratios = 0, False

    def __init__(self, seed: int, informative: float = 0.5, unit: float = 2e-5, start: int = 0):
        self.seed, self.share, self.unit = seed, informative, unit
        self.position, self.engine_version, self.learner_version = start, 0, 0
        self.journal: dict[int, Ticket] = {}
        self.trained: list[int] = []

    def drawn(self, position: int) -> tuple[float, bool]:
        """Length in tokens (log-normal, 10..1000) and whether the group is informative: independent of each other."""
        rng = random.Random(f"{self.seed}/{position}")
        return min(1000.0, max(10.0, rng.lognormvariate(4.0, 1.0))), rng.random() < self.share

    async def take(self):
        self.position += 1
        return f"p{self.position}", self.position - 1, None

    async def generate(self, ticket: Ticket) -> Ticket:
        version = self.engine_version
        await asyncio.sleep(self.drawn(ticket.position)[0] * self.unit)
        return replace(ticket, oldest_version=version)

    async def judge(self, ticket: Ticket) -> Ticket:
        high = 1.0 if self.drawn(ticket.position)[1] else 0.0
        return replace(ticket, stats={f"{LOWEST}accuracy": 0.0, f"{HIGHEST}accuracy": high})

    async def append(self, ticket: Ticket) -> None:
        await asyncio.sleep(0)
        self.journal[ticket.id] = ticket

    async def learn(self, tickets, version, ratios=None):
        return {}

    def ratios(self):
        raise AssertionError("nobody wants them")

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        assert version == self.learner_version
        assert all(t.id in self.journal for t in tickets)
        await asyncio.sleep(50 * self.unit)
        self.trained += [t.position for t in tickets]
        self.learner_version += 1
        return {}

    async def weights(self):
        return self.learner_version

    async def publish(self, weights, version):
        await asyncio.sleep(20 * self.unit)
        self.engine_version = version
        return {}


def train(world, state, updates, step, staleness, prompts=None, restored=(), on_step=None, limit=50):
    rows = []

    async def noted(state, metrics):
        rows.append(metrics)
        if on_step is not None:
            on_step(state)

    sampled = LoopSettings(
        groups_per_step=step,
        max_staleness=staleness,
        stall_timeout_s=5.0,
        dynamic_sampling="accuracy",
        dynamic_sampling_limit=limit,
    )
    loop = Loop(prompts or world, world, world, world, world, sampled, noted)
    return asyncio.run(loop.run(updates, state, list(restored))), rows


def first_informative(world: World, count: int) -> list[int]:
    """The first so many informative positions of the stream."""
    found, position = [], 0
    while len(found) < count:
        if world.drawn(position)[1]:
            found.append(position)
        position += 1
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    step=st.integers(1, 4),
    staleness=st.integers(0, 3),
    share=st.sampled_from([0.2, 0.5, 1.0]),
)
def test_the_first_informative_groups_of_the_stream_train_whatever_their_length(seed, step, staleness, share):
    """Whoever finishes first: each informative group submitted trains once, within the bound, and none is left over."""
    world = World(seed, share, unit=2e-6)
    state, rows = train(world, LoopState(), 6, step, staleness)
    assert Counter(world.trained) == Counter(first_informative(world, 6 * step))
    assert max(row["staleness/max"] for row in rows) <= staleness
    assert sorted(state.consumed) == list(range(world.position)), "every prompt taken is accounted for, once"
    assert len(state.groups) == 6 * step
    assert not any(world.drawn(t.position)[1] is False for t in world.journal.values()), (
        "a dropped group was journalled"
    )


def first_to_finish(world: World, batches: int, step: int, excess: int) -> tuple[list[int], list[int]]:
    """The naive form: submit `excess` batches, keep the first batch of informative groups to finish, cancel the rest.
    Returns the positions trained on, and all informative ones that were submitted."""
    trained, submitted, position = [], [], 0
    for _ in range(batches):
        running = [(world.drawn(p)[0], p) for p in range(position, position + excess * step)]
        position += excess * step
        submitted += [p for _, p in running if world.drawn(p)[1]]
        heapq.heapify(running)
        batch: list[int] = []
        while running and len(batch) < step:
            _, p = heapq.heappop(running)
            batch += [p] if world.drawn(p)[1] else []
        trained += batch
    return trained, submitted


def test_there_is_no_bias_toward_short_responses_where_the_naive_form_has_one():
    def mean(positions):
        return sum(world.drawn(p)[0] for p in positions) / len(positions)

    world = World(3, informative=0.5, unit=1e-5)
    state, _ = train(world, LoopState(), 20, 8, 1)
    offered = [p for p in range(world.position) if world.drawn(p)[1]]
    assert sorted(world.trained) == offered, "the very same groups, hence the same lengths"
    trained, submitted = first_to_finish(world, 20, 8, 3)
    assert mean(trained) < 0.8 * mean(submitted)
    assert len(trained) > 0.9 * len(world.trained)


def test_killed_and_resumed_every_prompt_is_used_once_and_what_was_dropped_stays_dropped():
    """A kill after update 3, with the last checkpoint at update 2: as stages/phase.py restores it."""

    class Killed(Exception):
        pass

    saved: list[LoopState] = []

    def watch(state: LoopState) -> None:
        if state.version == 2:
            saved.append(replace(state, consumed=list(state.consumed), groups=list(state.groups)))
        if state.version == 3:
            raise Killed

    for seed in range(5):
        saved.clear()
        world = World(seed)
        with pytest.raises(Killed):
            train(world, LoopState(), 6, 4, 1, on_step=watch)
        state = saved[0]
        assert len(state.consumed) > len(state.groups), "this world drops groups before update 2"
        found = [t for t in world.journal.values() if t.id not in state.groups and t.oldest_version <= 2]
        restored = usable(found, 2, 4, 1)
        done = {*state.consumed, *(t.position for t in restored)}
        resumed = World(seed, start=first_open(done))
        resumed.learner_version = resumed.engine_version = 2
        resumed.journal = {t.id: t for t in restored}
        state = replace(state, next_id=max(world.journal) + 1)
        before = list(state.consumed)
        end, rows = train(resumed, state, 6, 4, 1, Remaining(resumed, done), restored)
        assert max(Counter(end.consumed).values()) == 1
        assert sorted(end.consumed) == list(range(len(end.consumed)))
        assert not set(resumed.trained) & set(before), "trained or dropped before the checkpoint, and used again"
        trained = [p for p in before if world.drawn(p)[1]] + resumed.trained
        assert sorted(trained) == first_informative(world, 24)
        assert max(row["staleness/max"] for row in rows) <= 1


def test_a_task_without_informative_groups_ends_with_its_own_sentence():
    with pytest.raises(TooFewInformative, match="13 groups were alike .*0 all right, 13 all wrong.*too hard"):
        train(World(0, informative=0.0), LoopState(), 3, 4, 1, limit=3)


def test_the_shares_dropped_are_among_the_metrics():
    world = World(1, informative=0.4)
    state, rows = train(world, LoopState(), 10, 4, 1)
    assert all({"reward/dropped_share", "reward/dropped_wrong_share"} <= set(row) for row in rows)
    assert max(row["reward/dropped_share"] for row in rows) > 0.3
    assert all(row["group/highest/accuracy"] == 1 for row in rows), "only groups that vary are trained on"
