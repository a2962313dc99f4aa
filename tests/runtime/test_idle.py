import pytest

from prism_ray.runtime.idle import Idle


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def idle(clock):
    return Idle(lambda: clock[0])


def test_a_place_is_idle_while_nothing_is_there(idle, clock):
    clock[0] += 2
    idle.enter("a")
    clock[0] += 1
    idle.enter("a")
    idle.leave("a")
    clock[0] += 5
    idle.leave("a")
    clock[0] += 2
    assert idle.shares("a", "b") == {"a": pytest.approx(0.4), "b": 1.0}


def test_what_was_told_is_not_told_again(idle, clock):
    clock[0] += 10
    assert idle.shares("a", "b") == {"a": 1.0, "b": 1.0}
    clock[0] += 1
    idle.enter("a")
    clock[0] += 3
    assert idle.shares("a", "b") == {"a": 0.25, "b": 1.0}
    clock[0] += 3
    assert idle.shares("a", "b") == {"a": 0.0, "b": 1.0}, "work that goes on is no waiting"
    clock[0] += 1
    idle.leave("a")
    clock[0] += 1
    assert idle.shares("a")["a"] == 0.5


def test_it_counts_what_is_there(idle):
    idle.enter("a")
    idle.enter("a")
    idle.leave("a")
    assert (idle.count("a"), idle.count("b")) == (1, 0)


def test_no_time_is_no_waiting(idle):
    assert idle.shares("a") == {"a": 0.0}
