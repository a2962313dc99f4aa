"""The loop against a simulated world (named so): everything it promises that needs no engine."""

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from prism_ray.config.runtime import LoopSettings
from prism_ray.records import UNDONE
from prism_ray.runtime.buffer import StallError
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Ticket


class SimulatedWorld:
    """Prompts, rollouts, judge, learner and keeper in one: engines with random delays and a version each."""

    version, wants_ratios = 0, False

    def __init__(self, seed: int = 0, fail: str = "", delay: float = 0.002):
        self.random, self.fail, self.delay = random.Random(seed), fail, delay
        self.position, self.engine_version, self.learner_version = 0, 0, 0
        self.trained: list[int] = []
        self.kept: list[int] = []
        self.judged_after_update: list[int] = []
        self.generating, self.overlapped = 0, False

    async def take(self) -> tuple[str, int, object]:
        self.position += 1
        return f"p{self.position}", self.position - 1, None

    async def generate(self, ticket: Ticket) -> Ticket:
        version = self.engine_version
        self.generating += 1
        await asyncio.sleep(self.random.random() * self.delay)
        self.generating -= 1
        if self.fail == "generate" and ticket.id == 5:
            raise RuntimeError("engine 0 died: out of memory")
        return Ticket(ticket.id, ticket.prompt_id, ticket.position, None, version, 10, {"reward/mean": 1.0})

    async def publish(self, weights: int, version: int) -> dict[str, float]:
        await asyncio.sleep(self.random.random() * self.delay)
        if self.fail == "publish" and version == 2:
            raise RuntimeError("engine 0 took no weights")
        assert weights == version
        self.engine_version = version
        return {"weights/publish_s": 0.0}

    async def judge(self, ticket: Ticket) -> Ticket:
        await asyncio.sleep(self.random.random() * self.delay)
        return ticket

    async def learn(self, tickets: list[Ticket], version: int, ratios=None) -> dict[str, float]:
        return {"judge/version": float(version)}

    def ratios(self):
        raise AssertionError("nobody wants them")

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        assert version == self.learner_version
        assert {t.id for t in tickets} <= set(self.kept), "a group trained before it was in the journal"
        await asyncio.sleep(self.random.random() * self.delay)
        self.overlapped |= self.generating > 0
        self.trained += [t.id for t in tickets]
        self.learner_version += 1
        return {"policy/loss": 0.0}

    async def weights(self) -> int:
        return self.learner_version

    async def append(self, ticket: Ticket) -> None:
        self.kept.append(ticket.id)


def run(world: SimulatedWorld, staleness: int, updates: int = 12, step: int = 4, stall: float = 20.0, on=None):
    rows: list[dict[str, float]] = []

    async def on_step(state: LoopState, metrics: dict[str, float]) -> None:
        rows.append(metrics)
        if on:
            on(state)

    settings = LoopSettings(groups_per_step=step, max_staleness=staleness, stall_timeout_s=stall)
    loop = Loop(world, world, world, world, world, settings, on_step)
    return asyncio.run(loop.run(updates, LoopState())), rows


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_each_prompt_trains_once_within_the_bound(staleness, seed):
    world = SimulatedWorld(seed)
    state, rows = run(world, staleness)
    assert state.version == 12 and len(rows) == 12
    assert Counter(world.trained) == Counter(range(48))
    assert sorted(state.consumed) == list(range(48))
    assert max(r["staleness/max"] for r in rows) <= staleness


def test_staleness_zero_is_synchronous_and_one_overlaps():
    synchronous, asynchronous = SimulatedWorld(1), SimulatedWorld(1)
    run(synchronous, 0)
    run(asynchronous, 1)
    assert not synchronous.overlapped
    assert asynchronous.overlapped


@pytest.mark.parametrize(("fail", "sentence"), [("generate", "out of memory"), ("publish", "took no weights")])
def test_a_failure_anywhere_ends_the_loop_with_its_own_sentence(fail, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        run(SimulatedWorld(fail=fail), staleness=1)


def test_a_stop_in_on_step_ends_everything():
    class Stopped(Exception):
        pass

    def stop(state: LoopState) -> None:
        if state.version == 3:
            raise Stopped

    world = SimulatedWorld()
    with pytest.raises(Stopped):
        run(world, 1, on=stop)
    assert world.learner_version == 3


def test_restored_groups_train_before_new_ones_and_none_twice():
    world = SimulatedWorld()
    world.position, world.kept = 3, [0, 1, 2]
    restored = [Ticket(i, f"p{i}", i, None, 0) for i in range(3)]

    async def on_step(state, metrics):
        pass

    loop = Loop(world, world, world, world, world, LoopSettings(groups_per_step=3, max_staleness=1), on_step)
    state = asyncio.run(loop.run(3, LoopState(next_id=3), restored))
    assert Counter(world.trained) == Counter(range(9))
    assert sorted(world.trained[:3]) == [0, 1, 2]
    assert sorted(state.consumed) == list(range(9))


def test_a_stop_is_reported_even_where_a_group_fails_while_it_is_being_ended():
    class Stopped(Exception):
        pass

    class Fragile(SimulatedWorld):
        async def generate(self, ticket: Ticket) -> Ticket:
            try:
                await asyncio.sleep(10.0 if ticket.id >= 4 else 0.0)  # the second batch is under way
                return await super().generate(ticket)
            except asyncio.CancelledError:
                raise RuntimeError("the engine minded being interrupted") from None

    def stop(state: LoopState) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(Fragile(), 1, on=stop)


class LearningJudge(SimulatedWorld):
    """Its judge has versions: one update beside each of the policy's, and scores that carry the version."""

    def __init__(self, seed: int = 0, slow: float = 0.0, wants_ratios: bool = False, version: int = 7):
        super().__init__(seed)
        self.version, self.wants_ratios, self.slow = version, wants_ratios, slow
        self.judged: Counter[int] = Counter()
        self.lags: list[int] = []
        self.given: list[object] = []

    async def judge(self, ticket: Ticket) -> Ticket:
        self.judged[ticket.id] += 1
        version = self.version
        await asyncio.sleep(self.slow if ticket.id == 1 and self.judged[1] == 1 else 0.0)
        return replace(ticket, judge_version=version)

    async def learn(self, tickets: list[Ticket], version: int, ratios=None) -> dict[str, float]:
        self.lags += [self.version - t.judge_version for t in tickets]
        self.given.append(ratios)
        self.version += 1
        return {}

    def ratios(self):
        return {"of update": self.learner_version}


def looped(world: SimulatedWorld, updates: int = 6, restored: tuple[Ticket, ...] = (), **settings):
    rows: list[dict[str, float]] = []

    async def on_step(state: LoopState, metrics: dict[str, float]) -> None:
        rows.append(metrics)

    loop = Loop(world, world, world, world, world, LoopSettings(groups_per_step=4, **settings), on_step)
    start = LoopState(next_id=len(restored))
    return asyncio.run(loop.run(updates, start, list(restored))), rows


def test_the_lag_of_the_judge_is_measured_and_bounded():
    world = LearningJudge()
    _, rows = looped(world, max_staleness=3, max_judge_lag=9)
    assert max(r["staleness/judge_max"] for r in rows) == max(world.lags) > 1, "a long queue makes old verdicts"
    assert all(r["staleness/judged_again"] == 0 for r in rows) and set(world.judged.values()) == {1}
    strict = LearningJudge()
    _, rows = looped(strict, max_staleness=3, max_judge_lag=1)
    assert max(strict.lags) <= 1 and max(r["staleness/judge_max"] for r in rows) <= 1
    again = sum(r["staleness/judged_again"] for r in rows)
    assert again == sum(n - 1 for n in strict.judged.values()) > 0


def test_verdicts_of_a_judge_that_went_back_to_a_checkpoint_are_given_anew():
    world = LearningJudge(version=7)
    world.position, world.kept = 4, [0, 1, 2, 3]
    restored = tuple(Ticket(i, f"p{i}", i, None, 0, judge_version=UNDONE) for i in range(4))
    _, rows = looped(world, 1, restored)
    assert world.judged == Counter(range(4)) and world.lags == [0] * 4
    assert rows[0]["staleness/judged_again"] == 4


def test_verdicts_that_are_to_be_given_anew_are_waited_for_so_long_and_no_longer():
    class Silent(LearningJudge):
        async def judge(self, ticket: Ticket) -> Ticket:
            return await asyncio.Event().wait() if ticket.id < 4 else await super().judge(ticket)

    world = Silent()
    world.position, world.kept = 4, [0, 1, 2, 3]
    restored = tuple(Ticket(i, f"p{i}", i, None, 0, judge_version=UNDONE) for i in range(4))
    with pytest.raises(StallError, match=r"update 1 waited 0 s for new verdicts on groups \[0, 1, 2, 3\]"):
        looped(world, 2, restored, stall_timeout_s=0.2)


def test_ratios_are_those_of_the_update_just_made_and_only_for_a_judge_that_wants_them():
    wanting, other = LearningJudge(wants_ratios=True), LearningJudge()
    looped(wanting, 3)
    looped(other, 3)
    assert wanting.given == [{"of update": n} for n in (1, 2, 3)]
    assert other.given == [None] * 3


def test_a_group_sampled_by_an_engine_with_forgotten_weights_does_not_train_and_its_prompt_does():
    class Forgetful(SimulatedWorld):
        async def generate(self, ticket: Ticket) -> Ticket:
            done = await super().generate(ticket)
            return replace(done, oldest_version=0) if ticket.id in (9, 13, 14) else done

    world = Forgetful()
    state, rows = run(world, staleness=1)
    assert not {9, 13, 14} & set(world.trained) and rows[-1]["staleness/given_back"] == 3
    assert sorted(state.consumed) == list(range(48)), "each prompt once, those of the three among them"
    assert max(r["staleness/max"] for r in rows) <= 1


def test_engines_that_never_get_new_weights_end_the_run_with_a_sentence():
    class Stuck(SimulatedWorld):
        async def generate(self, ticket: Ticket) -> Ticket:
            return replace(await super().generate(ticket), oldest_version=0)

    with pytest.raises(RuntimeError, match="new weights do not reach the engines"):
        run(Stuck(), staleness=0)
