"""A new engine takes what the others hold, whatever is published or replaced while it does; simulated engine."""

import asyncio
from types import SimpleNamespace

import pytest

from prism_ray.rollout.life import Weights, catch_up
from prism_ray.weights.transports import Superseded

STARTED = Weights(0)


class NewEngine:
    """Takes weights as an actor under watch; `then` is called with the version it was given."""

    def __init__(self, then=lambda version: None):
        self.given, self.then = [], then
        self.actor = SimpleNamespace(update=SimpleNamespace(remote=self.take))

    async def take(self, arrays, version):
        self.given.append(version)
        self.then(version)

    async def answer(self, call, what, limit_s):
        return await call


class Published:
    """What the pool holds at a time."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def caught_up(engine, published, limit_s=60.0):
    asyncio.run(asyncio.wait_for(catch_up(engine, STARTED, published, limit_s), 30))
    return engine.given


def test_an_engine_that_was_started_with_what_the_others_hold_is_given_nothing():
    assert caught_up(NewEngine(), Published(STARTED)) == []


def test_what_is_published_while_it_takes_weights_is_given_as_well():
    published = Published(Weights(1, arrays="one"))

    def publish(version):
        if version == 1:
            published.now = Weights(2, arrays="two")

    assert caught_up(NewEngine(publish), published) == [1, 2]


def test_an_offer_that_was_replaced_is_waited_out():
    published = Published(Weights(1, arrays="one"))

    def replaced(version):
        if version == 1:
            loop = asyncio.get_running_loop()
            loop.call_later(0.1, lambda: setattr(published, "now", Weights(2, arrays="two")))
            raise Superseded("learner rank 0 has replaced the weights")

    assert caught_up(NewEngine(replaced), published) == [1, 2]


def test_a_learner_that_never_publishes_what_replaced_an_offer_is_an_error():
    def replaced(version):
        raise Superseded("the learner died")

    with pytest.raises(Superseded, match="the learner died"):
        caught_up(NewEngine(replaced), Published(Weights(1, arrays="one")), limit_s=0.01)
