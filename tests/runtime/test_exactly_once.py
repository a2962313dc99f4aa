"""Killed at random points, again and again, a run trains on every prompt exactly once and never on undone weights.

The world is simulated (engines, judge, learner); loop, journal, keeper and checkpoints are the real ones, the keeper
without its actor.
"""

import asyncio
import json
import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_ray.config.runtime import JournalSettings, LoopSettings
from prism_ray.records import Group, Prompt, Rollout, Ticket, Verdict
from prism_ray.runtime import checkpoint
from prism_ray.runtime.keeper import JournalKeeper, _Keeper
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.stages.replay import read_record

UPDATES, STEP = 8, 3


class Killed(Exception):
    """The process ended here."""


class Fate:
    """Ends the process after a number of events, with a `torn` record if it was writing; nothing happens after."""

    def __init__(self, events: int | None, torn: bool):
        self.left, self.torn, self.dead = events, torn, False

    def tick(self) -> None:
        if self.left is not None:
            self.left -= 1
        self.dead |= self.left == 0
        if self.dead:
            raise Killed


class SimulatedKeeper(JournalKeeper):
    """The keeper with its actor's object called directly; a kill tears the record that is being written."""

    fate: Fate

    def _start(self) -> None:
        self._actor = _Keeper(self._folder, self._settings)

    async def _ask(self, what, method, *args):
        self.fate.tick()
        before = {p: p.stat().st_size for p in self._folder.glob("*.journal")}
        answer = getattr(self._actor, method)(*args)
        try:
            await asyncio.sleep(0)
            self.fate.tick()
        except Killed:
            self._tear(before)
            raise
        return answer

    def _tear(self, before) -> None:
        for path in self._folder.glob("*.journal"):
            grown = path.stat().st_size - before.get(path, 0)
            if grown and self.fate.torn:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size - random.Random(grown).randrange(grown))


class SimulatedWorld:
    """Prompts, engines, judge and learner. Weights are a list: which positions trained each version, and a mark that no
    other weights have; a group notes the mark of the weights that sampled it."""

    def __init__(self, seed: int, fate: Fate, position: int):
        self.random, self.fate, self.position = random.Random(seed), fate, position
        self.version, self.wants_ratios = 0, False
        self.weights_now = [{"mark": 0.0, "trained": []}]
        self.held = list(self.weights_now)

    async def take(self):
        self.position += 1
        return f"p{self.position - 1}", self.position - 1, None

    async def generate(self, ticket: Ticket) -> Ticket:
        held = self.held
        await asyncio.sleep(self.random.random() * 0.002)
        self.fate.tick()
        ids = np.zeros(1, np.int32)
        versions = np.full(1, len(held) - 1, np.int32)
        rollout = Rollout(
            ticket.prompt_id, 0, ids, ids, np.zeros(1, np.float32), versions, str(held[-1]["mark"]), "stop"
        )
        group = Group(ticket.id, Prompt(ticket.prompt_id, ()), (rollout,)).judged([Verdict(1.0, True)])
        return replace(ticket, ref=group, oldest_version=group.oldest_version, tokens=1, total_tokens=2)

    async def publish(self, weights, version):
        await asyncio.sleep(self.random.random() * 0.002)
        self.held = weights
        return {}

    async def judge(self, ticket: Ticket) -> Ticket:
        return ticket

    async def learn(self, tickets, version, ratios=None):
        return {}

    async def update(self, tickets, version):
        self.fate.tick()
        assert version == len(self.weights_now) - 1
        for ticket in tickets:
            sampled = ticket.ref.rollouts[0]
            mark = self.weights_now[sampled.oldest_version]["mark"]
            assert sampled.text == str(mark), f"group {ticket.id} was sampled by weights that were undone"
        await asyncio.sleep(self.random.random() * 0.002)
        row = {"mark": self.random.random(), "trained": [t.position for t in tickets]}
        self.weights_now = [*self.weights_now, row]
        self.fate.tick()
        return {}

    async def weights(self):
        return self.weights_now

    def ratios(self):
        return {}


async def life(folder: Path, seed: int, fate: Fate, staleness: int, every: int) -> SimulatedWorld:
    """One process: takes up what the last one left, and trains to the end or to its own."""
    state_folder, options = folder / "state", LoopSettings(groups_per_step=STEP, max_staleness=staleness)
    state = checkpoint.latest(state_folder) or LoopState()
    SimulatedKeeper.fate = fate
    keeper = SimulatedKeeper(folder / "journal", JournalSettings(segment_mb=0.0005, keep=True))
    restored, done = await checkpoint.take_up(keeper, state, 0, options)
    world = SimulatedWorld(seed, fate, checkpoint.first_open(done))
    if state.version:
        saved = checkpoint.folder_for(state_folder, state.version) / "weights.json"
        world.weights_now = world.held = json.loads(saved.read_text())

    async def on_step(state: LoopState, metrics) -> None:
        if state.version % every:
            return
        fate.tick()
        saving = checkpoint.folder_for(state_folder, state.version)
        saving.mkdir(parents=True, exist_ok=True)
        (saving / "weights.json").write_text(json.dumps(world.weights_now))
        fate.tick()
        checkpoint.commit(state_folder, state)
        fate.tick()
        await keeper.forget(state.groups)

    class Noting:
        """The learner as the stage gives it to the loop."""

        ratios, weights = world.ratios, world.weights

        async def update(self, tickets, version):
            await keeper.trained(version, tickets)
            return await world.update(tickets, version)

    remaining = checkpoint.Remaining(world, done)
    await Loop(remaining, world, world, Noting(), keeper, options, on_step).run(UPDATES, state, restored)
    return world


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    staleness=st.integers(0, 3),
    every=st.sampled_from([1, 2, 3]),
    kills=st.lists(st.tuples(st.integers(1, 120), st.booleans()), max_size=5),
)
def test_every_prompt_trains_exactly_once_whenever_the_process_is_killed(seed, staleness, every, kills):
    put, ray.put = ray.put, lambda group: group  # no object store here
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for number, (events, torn) in enumerate([*kills, (None, False)]):
                try:
                    world = asyncio.run(life(folder, seed + number, Fate(events, torn), staleness, every))
                    break
                except Killed:
                    continue
            check(folder, world)
    finally:
        ray.put = put


def check(folder: Path, world: SimulatedWorld) -> None:
    trained = [position for row in world.weights_now for position in row["trained"]]
    assert Counter(trained) == Counter(range(UPDATES * STEP)), "in the weights themselves"
    record = read_record(folder / "journal")
    noted = [[record.tickets[group]["position"] for group in record.updates[version]] for version in range(UPDATES)]
    assert noted == [row["trained"] for row in world.weights_now[1:]], "the journal tells another story"
