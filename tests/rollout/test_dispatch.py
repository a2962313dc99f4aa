"""Which group goes where: random schedules against what must hold at every moment."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_ray.rollout.dispatch import Job, Load, Queue
from prism_ray.rollout.sampling import Abandoned, Sampling, Turn

PLACES = 8
LOOP = asyncio.new_event_loop()


def job(key, n=2, tokens=10):
    return Job(key, key, None, Sampling(n, 1.0, tokens), 0, LOOP.create_future())


def test_the_engine_with_the_fewest_outstanding_tokens_is_next():
    engines = [Load(outstanding=700), Load(outstanding=300), Load(outstanding=500)]
    queue = Queue(PLACES)
    queue.put(job(0))
    assert [engine for _, engine in queue.assign(engines)] == [engines[1]]
    engines[1].told_of(0, 5)
    assert engines[1].outstanding == 305


def test_an_idle_engine_takes_a_group_that_is_larger_than_its_places():
    queue, engine = Queue(PLACES), Load()
    queue.put(job(0, n=99))
    queue.put(job(1))
    assert [j.key for j, _ in queue.assign([engine])] == [0]


def test_what_nobody_waits_for_any_more_is_not_begun():
    queue, engine = Queue(PLACES), Load()
    gone, wanted = job(0), job(1)
    for j in (gone, wanted):
        queue.put(j)
    gone.done.cancel()
    assert [j.key for j, _ in queue.assign([engine])] == [1]


def test_a_turn_of_an_episode_begins_again_where_it_began_but_not_under_a_policy_that_was_taken_back():
    turn = job(0)
    turn.go_on_from(Turn("the turns before", 40, era=0))
    turn.so_far = "and some of this one"
    turn.forget(0)
    assert turn.so_far == "the turns before" and not turn.done.done()
    turn.forget(1)
    with pytest.raises(Abandoned, match="group 0 would go on from what a policy sampled that has been taken back"):
        turn.done.result()
    with pytest.raises(Abandoned):
        job(1).go_on_from(Turn("the turns before", 40, era=1))
    first = job(2)
    first.forget(1)
    assert not first.done.done(), "a first turn is sampled anew"


steps = st.lists(st.tuples(st.sampled_from(["put", "first", "done", "told", "close", "open"]), st.integers(0, 99)))


@settings(deadline=None)
@given(steps)
def test_every_job_is_in_one_place_and_loads_are_what_jobs_make_them(schedule):
    queue, engines, waiting, seats, key = Queue(PLACES), [Load() for _ in range(3)], [], {}, 0
    for what, number in schedule:
        engine = engines[number % 3]
        if what in ("put", "first"):
            new, key = job(key, n=1 + number % 4, tokens=1 + number), key + 1
            queue.put(new, first=what == "first")
            waiting.insert(0 if what == "first" else len(waiting), new)
        elif what in ("close", "open"):
            engine.open = what == "open"
        elif engine.jobs:
            some = list(engine.jobs.values())[number % len(engine.jobs)]
            if what == "told":
                engine.told_of(some.key, number % 7)
            else:
                engine.leave(some)
                del seats[some.key]
        for chosen, seat in queue.assign(engines):
            assert chosen is waiting.pop(0), "out of turn"
            assert seat.open and (len(seat.jobs) == 1 or seat.sequences <= PLACES)
            seats[chosen.key] = seat
        assert list(queue) == waiting
        for seat in engines:
            assert set(seat.jobs) == {k for k, s in seats.items() if s is seat}
            assert seat.outstanding == sum(j.outstanding for j in seat.jobs.values())
            assert seat.sequences == sum(j.sampling.n for j in seat.jobs.values())
        idle = [e for e in engines if e.open and not e.jobs]
        assert not (idle and waiting), "an idle engine while groups wait"
