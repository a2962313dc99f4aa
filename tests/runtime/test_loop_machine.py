"""The loop as a state machine: hypothesis decides what ends when, what fails and when a recovery goes back.

Loop, gate, buffer, dynamic sampling, the choice of what survives and the checkpoint's bookkeeping are the real ones.
The rooms are simulated: nothing in them ends before a rule says so. Weights are marks that no other weights have, so
that a number which was given twice cannot deceive.
"""

import asyncio
import copy
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prism_ray.config.runtime import HIGHEST, LOWEST, LoopSettings
from prism_ray.runtime import checkpoint, journal
from prism_ray.runtime.gate import submission_limit
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Ticket

ENDLESS = 10**6


@dataclass
class SimulatedGroup:
    """Which weights sampled it (version and mark of the oldest token), and which gave the verdicts."""

    sampled: tuple[int, int]
    judged: tuple[int, int] = (-1, -1)

    @property
    def newest_version(self) -> int:
        return self.sampled[0]


@dataclass
class Pending:
    """Something that a rule may end."""

    what: str
    ticket: Ticket | None
    future: asyncio.Future[Any]
    then: Any = None


@dataclass
class SimulatedRooms:
    """Everything around the loop. `policy` and `judge_weights` are the marks of versions 0, 1, …"""

    marks: Any = field(default_factory=itertools.count)
    pending: list[Pending] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    position: int = 0
    given_back: int = 0
    wants_ratios: bool = False
    lags: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.policy, self.judge_weights = [next(self.marks)], [next(self.marks)]
        self.engine_version = 0
        self.settings: LoopSettings

    @property
    def version(self) -> int:
        return len(self.judge_weights) - 1

    @property
    def held(self) -> set[int]:
        """Ids of the groups that the journal has."""
        return {entry["ticket"]["id"] for entry in self.entries if "group" in entry}

    async def _until_ended(self, what: str, ticket: Ticket | None = None, then: Any = None) -> Any:
        one = Pending(what, ticket, asyncio.get_running_loop().create_future(), then)
        self.pending.append(one)
        return await one.future

    async def take(self):
        self.position += 1
        return f"p{self.position - 1}", self.position - 1, None

    async def generate(self, ticket: Ticket) -> Ticket:
        return await self._until_ended("generate", ticket, self.engine_version)

    async def judge(self, ticket: Ticket) -> Ticket:
        version = self.version
        group = replace(ticket.ref, judged=(version, self.judge_weights[version]))
        varied = await self._until_ended("judge", ticket)
        stats = {f"{LOWEST}reward": 0.0, f"{HIGHEST}reward": float(varied)}
        if not varied:
            self.dropped.add(ticket.position)
        return replace(ticket, ref=group, judge_version=version, stats=stats)

    async def append(self, ticket: Ticket) -> None:
        meta = {"id": ticket.id, "position": ticket.position, "prompt_id": ticket.prompt_id}
        meta |= {"oldest_version": ticket.oldest_version, "judge_version": ticket.judge_version}
        entry = {"ticket": meta, "group": ticket.ref}
        await self._until_ended("append", ticket, lambda: self.entries.append(entry))

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        assert version == len(self.policy) - 1 and len(tickets) == self.settings.groups_per_step
        done = {position for batch in self.trained for position in batch}
        for ticket in tickets:
            sampled, mark = ticket.ref.sampled
            assert self.policy[sampled] == mark, "trained on what undone weights sampled"
            assert 0 <= version - sampled <= self.settings.max_staleness, "too old"
            assert ticket.id in self.held, "trained before it was in the journal"
            assert ticket.position not in done | self.dropped, "trained twice, or though it was dropped"
        await self._until_ended("update")
        self.policy.append(next(self.marks))
        self.trained.append([ticket.position for ticket in tickets])
        return {}

    async def learn(self, tickets: list[Ticket], version: int, ratios: Any = None) -> dict[str, float]:
        for ticket in tickets:
            judged, mark = ticket.ref.judged
            assert judged == ticket.judge_version and self.judge_weights[judged] == mark, "verdicts of an undone judge"
            assert 0 <= self.version - judged <= self.settings.max_judge_lag, "verdicts too old"
        await self._until_ended("learn")
        self.judge_weights.append(next(self.marks))
        return {}

    def ratios(self):
        raise AssertionError("nobody wants them")

    async def weights(self) -> int:
        return len(self.policy) - 1

    async def publish(self, weights: int, version: int) -> dict[str, float]:
        assert weights == version
        await self._until_ended("publish", None, version)
        self.engine_version = version
        return {}

    # As the journal's keeper, when a stage is taken up again

    last_id: int = -1

    async def restore(self, consumed: set[int], version: int, judge_version: int) -> list[Ticket]:
        entries = copy.deepcopy(self.entries)
        found, last = journal.surviving(entries, consumed, version, judge_version, lambda group: group)
        self.last_id = max(self.last_id, last)
        return [Ticket(ref=group, **meta) for meta, group in found]

    async def resume(self, version: int, judge_version: int, used: Any) -> None:
        self.entries.append({"resumed": version, "judge": judge_version, "groups": list(used)})


class Machine(RuleBasedStateMachine):
    @initialize(
        step=st.integers(1, 3),
        staleness=st.integers(0, 3),
        lag=st.integers(0, 4),
        every=st.integers(1, 3),
        dynamic=st.booleans(),
    )
    def begin(self, step, staleness, lag, every, dynamic):
        self.settings = LoopSettings(
            groups_per_step=step,
            max_staleness=staleness,
            max_judge_lag=lag,
            dynamic_sampling="reward" if dynamic else None,
            dynamic_sampling_limit=ENDLESS,
        )
        self.rooms, self.every = SimulatedRooms(), every
        self.rooms.settings = self.settings
        self.saved, self.judge_then, self.next_id = LoopState(), 0, 0
        self.rows: list[dict[str, float]] = []
        self.given_back_before = self.recoveries = 0
        self.events = asyncio.new_event_loop()
        self.start(LoopState(), [], set())

    def start(self, state: LoopState, restored: list[Ticket], done: set[int]) -> None:
        rooms = self.rooms
        remaining = checkpoint.Remaining(rooms, done)
        self.loop = Loop(remaining, rooms, rooms, rooms, rooms, self.settings, self.on_step)
        self.running = self.events.create_task(self.loop.run(ENDLESS, state, restored))
        self.settle()

    async def on_step(self, state: LoopState, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)
        if state.version % self.every == 0:
            self.saved, self.judge_then = copy.deepcopy(state), self.rooms.version

    def settle(self) -> None:
        """Let the loop go on until it waits for something that a rule must end."""
        for _ in range(12):
            self.events.run_until_complete(asyncio.sleep(0))

    @rule(data=st.data(), things=st.integers(1, 12))
    def things_end(self, data, things):
        """Whichever of those under way, one after the other; one in ten in the way that is not hoped for."""
        for _ in range(things):
            one = data.draw(st.sampled_from(self.rooms.pending), label="ends")
            self.rooms.pending.remove(one)
            ends = {"generate": self.sampled, "judge": self.judged, "append": self.written}.get(one.what, self.done)
            ends(one, data, data.draw(st.integers(0, 9), label="odd") == 9)
            self.settle()
            self.nobody_waits_for_nothing()

    def sampled(self, one: Pending, data, forgetful: bool) -> None:
        """Its oldest token is of a version that its engine held since then; or of an older one, by an engine that did
        not take what it was given."""
        rooms = self.rooms
        oldest = data.draw(st.integers(one.then, rooms.engine_version), label="oldest token")
        if forgetful and one.then > 0:
            oldest = data.draw(st.integers(0, one.then - 1), label="older token")
            rooms.given_back += 1
        group = SimulatedGroup((oldest, rooms.policy[oldest]))
        one.future.set_result(replace(one.ticket, ref=group, oldest_version=oldest))

    def judged(self, one: Pending, data, alike: bool) -> None:
        """A group that is judged again has varied rewards, as it had before."""
        again = one.ticket.id in self.rooms.held
        one.future.set_result(again or not alike or self.settings.dynamic_sampling is None)

    def written(self, one: Pending, data, odd: bool) -> None:
        one.then()
        one.future.set_result(None)

    def done(self, one: Pending, data, odd: bool) -> None:
        one.future.set_result(None)

    @precondition(lambda self: self.recoveries < 4 and self.rooms.held)
    @rule(data=st.data())
    def a_recovery_goes_back_to_the_checkpoint(self, data):
        """Whatever is under way is lost; of what the journal was to write, some is written."""
        rooms = self.rooms
        self.recoveries += 1
        self.running.cancel()
        for one in [p for p in rooms.pending if p.what == "append" and data.draw(st.booleans(), label="written")]:
            one.then()
        self.settle()
        assert self.running.cancelled()
        rooms.pending.clear()
        next_id, state = self.loop.state.next_id, copy.deepcopy(self.saved)
        del rooms.policy[state.version + 1 :], rooms.trained[state.version :]
        del rooms.judge_weights[self.judge_then + 1 :]
        rooms.engine_version = state.version
        rooms.dropped &= set(state.consumed)
        self.given_back_before, self.rows = rooms.given_back, []
        state.next_id = max(state.next_id, next_id)
        taking = checkpoint.take_up(rooms, state, rooms.version, self.settings)
        restored, done = self.events.run_until_complete(taking)
        rooms.position = checkpoint.first_open(done)
        self.start(state, restored, done)

    @invariant()
    def nobody_waits_for_nothing(self):
        if self.running.done():
            self.running.result()
        assert self.rooms.pending, "nothing is under way, and nothing can come"

    @invariant()
    def the_gate_holds(self):
        buffer, state = self.loop.buffer, self.loop.state
        there = buffer.in_flight + buffer.ready
        limit = submission_limit(self.rooms.engine_version, self.settings.max_staleness, self.settings.groups_per_step)
        assert self.loop._taken + there <= limit
        assert len(state.groups) <= self.loop._taken <= len(state.groups) + self.settings.groups_per_step

    @invariant()
    def every_prompt_is_in_one_place(self):
        rooms, loop = self.rooms, self.loop
        trained = [position for batch in rooms.trained for position in batch]
        consumed = loop.state.consumed
        assert sorted(consumed) == sorted({*consumed}) and {*trained[: len(loop.state.groups)]} <= {*consumed}
        assert {*consumed} == {*trained[: len(loop.state.groups)]} | (rooms.dropped & {*consumed})
        waiting = [one.ticket.position for one in rooms.pending if one.ticket is not None]
        ready = [ticket.position for _, ticket in loop.buffer._ready.values()]
        back = [position for _, position, _ in loop._given_back]
        assert len({*consumed, *ready, *back}) == len(consumed) + len(ready) + len(back)
        training = loop._taken - len(loop.state.groups)  # taken by the update under way, from whom it may wait
        flying = {*waiting} - {*consumed, *ready, *back}
        missing = {*range(rooms.position)} - {*consumed, *ready, *back} - flying
        assert len(missing) <= training, "a prompt was lost"

    @invariant()
    def what_came_too_old_is_counted(self):
        if self.rows:
            assert self.rows[-1]["staleness/given_back"] <= self.rooms.given_back - self.given_back_before
            assert max(row["staleness/max"] for row in self.rows) <= self.settings.max_staleness

    def teardown(self):
        if hasattr(self, "events"):
            self.running.cancel()
            self.settle()
            self.events.close()


TestLoopMachine = Machine.TestCase
TestLoopMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
