"""The pool over simulated engines (real actors without vLLM): losses, resizing, going back, garbage."""

import asyncio
import logging
import os
import signal

import numpy as np
import psutil
import pytest
import ray

from prism_ray.config.rollout import RolloutSettings
from prism_ray.records import Ticket
from prism_ray.rollout import pool as pool_module
from prism_ray.rollout.pool import RolloutPool
from prism_ray.rollout.sampling import EngineFailed
from prism_ray.runtime.placement import Anywhere
from tests.rollout.simulated_engine import GARBAGE, SIMULATED_ACTOR

QUICK = RolloutSettings(
    engines=2,
    cpus_per_engine=0.1,
    group_size=2,
    max_response_tokens=40,
    max_restarts=1,
    heartbeat_s=1.5,
    progress_s=0.1,
    start_timeout_s=60,
    control_timeout_s=30,
)


@pytest.fixture
def make(cluster, run, tmp_path, monkeypatch):
    """Makes pools of simulated engines, all ended after the test."""
    monkeypatch.setattr(pool_module, "ENGINE_ACTOR", SIMULATED_ACTOR)
    pools = []

    def make(**changes):
        pools.append(run(RolloutPool.create(tmp_path, QUICK.model_copy(update=changes))))
        return pools[-1]

    yield make
    for pool in pools:
        run(pool.shutdown())


def groups(pool, count, first=0):
    """Tasks that sample so many groups."""
    tickets = [Ticket(i, f"p{i}", i, ray.put("prompt")) for i in range(first, first + count)]
    return [asyncio.create_task(pool.generate(t)) for t in tickets]


def actor(pool, index):
    return pool._ready[index].watched.actor


async def behave(pool, index, what, pace_s=0.02):
    await actor(pool, index).behave.remote(what, pace_s)


async def under_way(pool):
    """Until the engines have told of some tokens of what they have now."""
    first = {i: e.told for i, e in pool._ready.items()}
    await until(lambda: all(pool._ready[i].told >= n + 3 for i, n in first.items()))


async def until(met):
    async with asyncio.timeout(60):
        while not met():
            await asyncio.sleep(0.02)


def check(done, versions=(0,), length=QUICK.max_response_tokens):
    """Every group once, every token where it belongs."""
    assert len({t.id for t in done}) == len(done)
    for ticket in done:
        group = ray.get(ticket.ref)
        assert group.id == ticket.id and [r.index for r in group.rollouts] == [0, 1]
        for r in group.rollouts:
            positions = np.arange(length)
            assert r.token_ids.tolist() == ((7 * r.index + positions) % 50).tolist() and r.finish_reason == "length"
            np.testing.assert_allclose(r.logp, -(r.versions + 0.001 * positions), rtol=1e-5)
            assert set(r.versions.tolist()) <= set(versions)


async def _freeze(pool):
    os.kill((await actor(pool, 0).health.remote())["pid"], signal.SIGSTOP)


async def _kill(pool):
    os.kill((await actor(pool, 0).health.remote())["pid"], signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (_kill, "died"),
        (_freeze, "has not answered for 1.5 s"),
        (lambda pool: behave(pool, 0, "hang"), "has not answered for 1.5 s"),
        (lambda pool: behave(pool, 0, "fail"), "failed: simulated"),
        (lambda pool: behave(pool, 0, "sick"), "is not well"),
    ],
    ids=["killed", "stopped", "hangs", "fails", "sick"],
)
def test_a_lost_engine_is_replaced_and_what_was_known_of_its_groups_goes_on(make, run, caplog, fault, cause):
    pool = make()

    async def scene():
        process = psutil.Process((await actor(pool, 0).health.remote())["pid"])
        tasks = groups(pool, 4)
        await under_way(pool)
        await fault(pool)
        done = await asyncio.gather(*tasks)
        await until(lambda: 0 in pool._ready)
        return done, process, await asyncio.gather(*groups(pool, 4, first=4))

    with caplog.at_level(logging.WARNING):
        done, process, after = run(asyncio.wait_for(scene(), 120))
    check(done), check(after)
    losses = [t.stats["rollout/losses"] for t in done]
    assert sorted(losses) == [0, 0, 1, 1]
    assert all((t.stats["rollout/kept_tokens"] > 0) == bool(t.stats["rollout/losses"]) for t in done)
    assert {t.stats["engine"] for t in after} == {0, 1}, "the successor got nothing to do"
    fault_words, recovery_words = (record.getMessage() for record in caplog.records)
    assert "rollout engine 0" in fault_words and cause in fault_words and "2 groups go elsewhere" in fault_words
    assert "rollout engine 0 is back" in recovery_words
    run(asyncio.wait_for(_gone(process), 30))


async def _gone(process):
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        await asyncio.sleep(0.1)


def test_regenerated_groups_begin_at_the_beginning(make, run):
    pool = make(partial="regenerate")

    async def scene():
        tasks = groups(pool, 4)
        await asyncio.sleep(0.3)
        await _kill(pool)
        return await asyncio.gather(*tasks)

    done = run(asyncio.wait_for(scene(), 60))
    check(done)
    assert sorted(t.stats["rollout/losses"] for t in done) == [0, 0, 1, 1]
    assert not any(t.stats["rollout/kept_tokens"] for t in done)


def test_a_group_that_takes_too_long_has_its_engine_replaced(make, run, caplog):
    pool = make(generate_timeout_s=3.0)

    async def scene():
        await behave(pool, 0, "deaf")
        return await asyncio.gather(*groups(pool, 2))

    with caplog.at_level(logging.WARNING):
        done = run(asyncio.wait_for(scene(), 60))
    check(done)
    assert "waited 3 s for rollout engine 0 to sample group" in caplog.text


def test_the_pool_goes_on_without_an_engine_whose_restarts_are_spent_and_ends_with_the_last(make, run, caplog):
    pool = make(max_restarts=0)

    async def one_left():
        await behave(pool, 0, "fail")
        return await asyncio.gather(*groups(pool, 4))

    with caplog.at_level(logging.WARNING):
        check(run(asyncio.wait_for(one_left(), 60)))
    assert "rollout engine 0 is not restarted again (rollout.max_restarts = 0); 1 engines go on" in caplog.text

    async def none_left():
        await behave(pool, 1, "fail")
        await asyncio.gather(*groups(pool, 2))

    with pytest.raises(EngineFailed, match="engine 1 is not restarted again .* simulated"):
        run(asyncio.wait_for(none_left(), 60))
    with pytest.raises(EngineFailed, match="engine 1 is not restarted again"):
        run(pool.publish({}, 1))


def test_restarts_are_forgotten_after_a_while(make, run):
    pool = make(engines=1, restart_window_s=1.0)

    async def die_often():
        for _ in range(3):
            tasks = groups(pool, 1)
            await behave(pool, 0, "fail")
            await asyncio.gather(*tasks)
            await asyncio.sleep(1.0)

    run(asyncio.wait_for(die_often(), 120))


def test_a_group_that_loses_every_engine_is_named(make, run):
    pool = make(max_losses=0)

    async def scene():
        await asyncio.gather(*(behave(pool, i, "fail") for i in (0, 1)))
        await asyncio.gather(*groups(pool, 1, first=17))

    with pytest.raises(EngineFailed, match="group 17 lost its engine 1 times .*max_losses.*simulated"):
        run(asyncio.wait_for(scene(), 60))


def test_garbage_is_refused_and_sampled_once_more_elsewhere(make, run, caplog):
    pool = make(max_restarts=len(GARBAGE), max_response_tokens=10)

    async def scene(kind):
        await until(lambda: len(pool._ready) == 2)
        await behave(pool, 0, kind)
        return await asyncio.gather(*groups(pool, 2))

    for kind, words in {
        "too few tokens": "9 tokens, 10 log-probs and 10 versions",
        "no number": "a log-prob that is not finite",
        "certain": "a log-prob of 1.0",
        "foreign token": "token 59 in a vocabulary of 50",
        "from the future": "versions 1 to 1 while it held 0",
        "given up": "an end after 0 tokens that nobody asked for",
    }.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            done = run(asyncio.wait_for(scene(kind), 60))
        check(done, length=10)
        assert sorted(t.stats["rollout/refused"] for t in done) == [0, 1], kind
        assert f"rollout engine 0 returned garbage: rollout 0 of prompt p with {words}" in caplog.text, kind


def test_garbage_twice_ends_with_the_engines_name(make, run):
    pool = make()

    async def scene():
        await asyncio.gather(*(behave(pool, i, "no number") for i in (0, 1)))
        await asyncio.gather(*groups(pool, 1))

    with pytest.raises(EngineFailed, match=r"rollout engine \d returned garbage: rollout 0 .*, again"):
        run(asyncio.wait_for(scene(), 60))


def test_a_new_engine_takes_over_waiting_work_and_a_removed_one_hands_back_what_it_has(make, run):
    pool = make(engines=1, max_concurrent=2)

    async def grow():
        await behave(pool, 0, "", pace_s=0.2)  # slow enough for the other to start meanwhile
        tasks = groups(pool, 6)
        await asyncio.sleep(0.1)
        assert len(pool._queue) == 4, "two groups fit into the engine, the others wait in the pool"
        await pool.resize(2)
        return await asyncio.gather(*tasks)

    done = run(asyncio.wait_for(grow(), 60))
    check(done)
    assert {t.stats["engine"] for t in done} == {0, 1}

    async def shrink():
        tasks = groups(pool, 4)
        await under_way(pool)
        await pool.resize(1)
        assert list(pool._ready) == [0] and not all(t.done() for t in tasks)
        return await asyncio.gather(*tasks)

    done = run(asyncio.wait_for(shrink(), 60))
    check(done)
    assert {t.stats["engine"] for t in done} == {0}
    kept = [t.stats["rollout/kept_tokens"] for t in done]
    assert sum(k > 0 for k in kept) == 2 and not any(t.stats["rollout/losses"] for t in done)


def test_a_successor_that_is_no_longer_wanted_gives_up_its_place_and_keeps_nobody_from_it(make, run):
    pool, left = make(engines=2), []
    pool._places = type("Noted", (Anywhere,), {"leave": lambda _, index: left.append(index)})()

    async def scenario():
        os.kill((await actor(pool, 1).health.remote())["pid"], signal.SIGKILL)
        await until(lambda: 1 in pool._restarting)
        await pool.resize(1)
        assert (list(pool._ready), left) == ([0], [1])
        await pool.resize(2)
        assert (sorted(pool._ready), left) == ([0, 1], [1])
        return await asyncio.gather(*groups(pool, 4))

    check(run(asyncio.wait_for(scenario(), 60)))


def test_a_pool_of_no_engines_is_refused(make, run):
    with pytest.raises(ValueError, match="rollout.engines is 0"):
        run(make(engines=1).resize(0))


def test_going_back_abandons_everything_in_flight(make, run, caplog):
    pool = make(max_concurrent=2)

    async def scene():
        await pool.publish({}, 7)
        tasks = groups(pool, 6)
        await under_way(pool)
        await pool.publish({}, 5)
        await pool.publish({}, 6)
        return await asyncio.gather(*tasks)

    with caplog.at_level(logging.WARNING):
        done = run(asyncio.wait_for(scene(), 60))
    check(done, versions=(5, 6))
    assert not any(t.stats["rollout/kept_tokens"] for t in done)
    assert any(t.stats["rollout/lost_tokens"] for t in done)
    assert "went back to version 5: 6 groups are sampled anew" in caplog.text


def test_a_group_that_ends_after_the_policy_went_back_is_sampled_anew(make, run):
    pool = make()

    async def scene():
        await asyncio.gather(*(behave(pool, i, "stubborn") for i in (0, 1)))
        await pool.publish({}, 7)
        tasks = groups(pool, 4)
        await under_way(pool)
        await pool.publish({}, 5)
        return await asyncio.gather(*tasks)

    done = run(asyncio.wait_for(scene(), 60))
    check(done, versions=(5,))
    assert all(t.stats["rollout/lost_tokens"] == 80 for t in done)


def test_an_engine_lost_while_the_policy_goes_back_keeps_nothing(make, run):
    pool = make()

    async def scene():
        await pool.publish({}, 7)
        tasks = groups(pool, 4)
        await under_way(pool)
        await asyncio.gather(_kill(pool), pool.publish({}, 5))
        return await asyncio.gather(*tasks)

    check(run(asyncio.wait_for(scene(), 60)), versions=(5,))


def test_a_successor_holds_what_was_published_while_it_started(make, run):
    pool = make(engines=1)

    async def scene():
        tasks = groups(pool, 2)
        await under_way(pool)
        await _kill(pool)
        await until(lambda: pool._restarting)
        await asyncio.sleep(0)  # its start has begun, with the weights of now
        await pool.publish({}, 3)
        return await asyncio.gather(*tasks)

    done = run(asyncio.wait_for(scene(), 60))
    check(done, versions=(0, 3))
    assert all(3 in ray.get(t.ref).rollouts[0].versions for t in done)


def test_refused_weights_leave_the_engines_as_they_are(make, run):
    pool = make()

    async def scene():
        await pool.publish({}, 2)
        tasks = groups(pool, 2)
        with pytest.raises(ValueError, match="weights of version 1: simulated refusal"):
            await pool.publish({"refused": True}, 1)
        done = await asyncio.gather(*tasks)
        await _kill(pool)
        await until(lambda: 0 not in pool._ready)  # though it has nothing to do
        await until(lambda: 0 in pool._ready)
        return done, await pool.health()

    done, health = run(asyncio.wait_for(scene(), 60))
    check(done, versions=(2,))
    assert {engine["version"] for engine in health.values()} == {2}, "a successor was given the refused ones"


def test_a_slow_engine_holds_up_nothing_but_what_it_has(make, run):
    pool = make(max_concurrent=2)

    async def scene():
        await behave(pool, 0, "", pace_s=0.3)
        return await asyncio.gather(*groups(pool, 12))

    done = run(asyncio.wait_for(scene(), 120))
    assert sum(t.stats["engine"] == 1 for t in done) >= 8


def test_waiting_for_an_engine_that_never_comes_ends_with_a_sentence(tmp_path):
    async def wait():
        pool = RolloutPool(tmp_path, RolloutSettings(engines=2, start_timeout_s=0.01), 0)
        await pool.generate(Ticket(0, "p", 0, None))

    with pytest.raises(TimeoutError, match="waited 0.01 s for any of 2 rollout engines"):
        asyncio.run(wait())


def test_an_engine_that_cannot_start_says_why(cluster, run, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no config.json"):
        run(RolloutPool.create(tmp_path, RolloutSettings(engines=2, cpus_per_engine=0.5)))


def test_a_pool_that_was_shut_down_says_so(tmp_path):
    async def use_after_shutdown():
        pool = RolloutPool(tmp_path, RolloutSettings(), 0)
        waiting = asyncio.create_task(pool.generate(Ticket(0, "p", 0, None)))
        await asyncio.sleep(0)
        await pool.shutdown()
        await waiting

    with pytest.raises(EngineFailed, match="shut down"):
        asyncio.run(use_after_shutdown())
