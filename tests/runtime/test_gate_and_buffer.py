"""The gate and the buffer together keep every rollout within max_staleness, whatever the schedule."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_ray.runtime.buffer import Buffer, StallError
from prism_ray.runtime.gate import submission_limit
from prism_ray.runtime.protocols import Ticket


def test_the_limit_equals_the_field_number():
    """Golden `areal_capacity` where concurrency does not bind: (staleness, batch, running, accepted, version)."""
    cases = {(0, 8, 0, 0, 0): 8, (2, 8, 0, 0, 0): 24, (2, 8, 5, 19, 0): 0, (2, 8, 5, 24, 1): 3, (4, 16, 10, 80, 3): 38}
    for (staleness, batch, running, accepted, version), expected in cases.items():
        assert submission_limit(version, staleness, batch) - accepted - running == expected


def ticket(number: int, oldest: int = 0) -> Ticket:
    return Ticket(number, f"p{number}", number, None, oldest_version=oldest)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), step=st.integers(1, 4), staleness=st.integers(0, 3))
def test_any_schedule_keeps_the_bound_and_trains_each_group_once(data, step, staleness):
    """Groups finish in any order; the learner trains whenever it may; every group is trained once and in bounds."""

    async def drive() -> None:
        buffer = Buffer(step, staleness)
        version, next_id, flying, trained = 0, 0, {}, []
        for _ in range(60):
            while len(trained) + len(flying) + buffer.ready < submission_limit(version, staleness, step):
                buffer.start(next_id, version)
                flying[next_id] = version
                next_id += 1
            if buffer.ready_for(version) and data.draw(st.booleans()):
                batch = await buffer.take(version, 1.0)
                assert len(batch) == step
                assert all(version - t.oldest_version <= staleness for t in batch)
                trained += [t.id for t in batch]
                version += 1
            elif flying:
                number = data.draw(st.sampled_from(sorted(flying)))
                buffer.add(ticket(number, flying.pop(number)))
            assert len(trained) == len(set(trained))

    asyncio.run(drive())


@settings(max_examples=100, deadline=None)
@given(data=st.data(), step=st.integers(1, 4), staleness=st.integers(0, 3))
def test_dropped_groups_are_replaced_within_the_bound(data, step, staleness):
    """As above, and any group may turn out to be dropped: the learner is never starved, and never trains on one."""

    async def drive() -> None:
        buffer = Buffer(step, staleness)
        version, next_id, flying, trained, dropped = 0, 0, {}, [], []
        for _ in range(80):
            while len(trained) + len(flying) + buffer.ready < submission_limit(version, staleness, step):
                buffer.start(next_id, version)
                flying[next_id] = version
                next_id += 1
            if buffer.ready_for(version) and data.draw(st.booleans()):
                batch = await buffer.take(version, 1.0)
                assert len(batch) == step
                assert all(version - t.oldest_version <= staleness for t in batch)
                trained += [t.id for t in batch]
                version += 1
            elif flying:
                number = data.draw(st.sampled_from(sorted(flying)))
                if data.draw(st.booleans()):
                    buffer.drop(number)
                    flying.pop(number)
                    dropped.append(number)
                else:
                    buffer.add(ticket(number, flying.pop(number)))
            else:
                assert buffer.ready_for(version), "nothing is under way and nothing may train"
            assert len(trained) == len(set(trained))
            assert not set(trained) & set(dropped)

    asyncio.run(drive())


def test_a_batch_that_waits_for_a_straggler_goes_on_when_the_straggler_is_dropped():
    async def drive() -> list[int]:
        buffer = Buffer(groups_per_step=1, max_staleness=0)
        buffer.start(0, 0)
        buffer.start(1, 0)
        buffer.add(ticket(1))
        assert not buffer.ready_for(0)
        asyncio.get_running_loop().call_later(0.01, buffer.drop, 0)
        return [t.id for t in await buffer.take(0, 5.0)]

    assert asyncio.run(drive()) == [1]


def test_only_silence_is_a_stall():
    """A batch may take longer than the time-out as long as groups keep coming, or are dropped."""

    async def drive() -> int:
        buffer = Buffer(groups_per_step=4, max_staleness=0)
        for number in range(5):
            buffer.start(number, 0)
        for number in range(4):
            asyncio.get_running_loop().call_later(0.3 * (number + 1), buffer.add, ticket(number))
        asyncio.get_running_loop().call_later(1.5, buffer.drop, 4)
        return len(await buffer.take(0, 1.0))

    assert asyncio.run(drive()) == 4


def test_a_straggler_holds_up_only_the_batch_that_would_make_it_too_old():
    buffer = Buffer(groups_per_step=1, max_staleness=1)
    for number in range(2):
        buffer.start(number, 0)
    buffer.add(ticket(1))
    assert buffer.ready_for(0), "a finished group need not wait for an older one while the bound allows"
    asyncio.run(buffer.take(0, 1.0))
    buffer.start(2, 1)
    buffer.add(ticket(2, 1))
    assert not buffer.ready_for(1), "group 0 would have staleness 2 in the batch after this one"


def test_the_oldest_groups_train_first():
    buffer = Buffer(groups_per_step=2, max_staleness=2)
    for number, version in ((0, 0), (1, 1), (2, 0)):
        buffer.start(number, version)
    for number in (1, 2, 0):
        buffer.add(ticket(number))
    assert [t.id for t in asyncio.run(buffer.take(1, 1.0))] == [0, 2]


def test_a_stall_says_which_groups_are_where():
    buffer = Buffer(groups_per_step=2, max_staleness=0)
    buffer.start(7, 0)
    buffer.start(8, 0)
    buffer.moved(8, "verdict")
    with pytest.raises(StallError, match=r"generation: groups \[7\].*verdict: groups \[8\]"):
        asyncio.run(buffer.take(0, 0.01))


def test_submitting_a_group_twice_is_refused():
    buffer = Buffer(1, 0)
    buffer.start(0, 0)
    with pytest.raises(ValueError, match="twice"):
        buffer.start(0, 0)
