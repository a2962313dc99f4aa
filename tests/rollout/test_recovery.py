"""An engine that goes on with old keys and values, and one that dies or hangs: a second pool, started once for all."""

import asyncio
import os
import signal

import numpy as np
import psutil
import pytest
import ray

from prism_ray.rollout.pool import RolloutPool
from prism_ray.rollout.sampling import Sampling
from prism_ray.runtime.protocols import Ticket

LONG = {"max_response_tokens": 250, "kv_on_update": "keep", "progress_s": 0.1, "heartbeat_s": 4.0, "max_restarts": 2}


@pytest.fixture(scope="module")
def mortal(cluster, run, folder, settings):
    """One engine that may be replaced twice, with responses long enough to be interrupted."""
    pool = run(RolloutPool.create(folder, settings.model_copy(update=LONG)))
    yield pool
    run(pool.shutdown())


@pytest.fixture
def tickets(ask):
    return [Ticket(i, f"p{i}", i, ray.put(ask(f"p{i}", seed=i))) for i in range(4)]


async def _pid(pool):
    return (await pool.health())["rollout engine 0"]["pid"]


async def _interrupted(pool, tickets, interrupt):
    """Tickets whose groups are sampled while something happens to the engine."""
    tasks = [asyncio.create_task(pool.generate(t)) for t in tickets]
    while not (await pool.health())["rollout engine 0"]["running"]:
        await asyncio.sleep(0.01)
    assert not any(t.done() for t in tasks)
    await interrupt()
    return await asyncio.gather(*tasks)


def _check(reference, done, weights, version):
    for ticket in done:
        group = ray.get(ticket.ref)
        for r in group.rollouts:
            assert set(r.versions.tolist()) == {version}
            np.testing.assert_allclose(r.logp, reference.logp(r, group.prompt, weights), atol=1e-4)


def test_kept_keys_and_values_are_not_used_for_new_rollouts(mortal, run, reference, tickets):
    new = reference.changed(seed=1)
    done = run(_interrupted(mortal, tickets, lambda: mortal.publish(new, 1)))
    assert {v for t in done for r in ray.get(t.ref).rollouts for v in r.versions.tolist()} <= {0, 1}
    # The same prompts and images again: caches of the old weights would show.
    _check(reference, run(_interrupted(mortal, tickets, mortal.health)), new, 1)


def test_a_killed_engine_is_replaced_and_its_rollouts_go_on_where_they_were(mortal, run, ask, reference):
    """Greedy decoding that was interrupted by a death equals the uninterrupted one, to the token."""
    new = reference.changed(seed=2)
    run(mortal.publish(new, 2))
    prompts = [ask(f"p{i}", seed=i) for i in range(4)]
    whole = run(mortal.sample(prompts, greedy=True, max_tokens=250))
    pid = run(_pid(mortal))
    children = psutil.Process(pid).children(recursive=True)

    async def kill():
        engine, told = mortal._ready[0], mortal._ready[0].told
        tasks = [asyncio.create_task(mortal._sampled(p, i, Sampling(1, 0.0, 250))) for i, p in enumerate(prompts)]
        while engine.told < told + 3:
            await asyncio.sleep(0.01)
        for child in children:
            child.suspend()  # so that it ends only if the kernel ends it with its parent
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)

    kept = 0
    for (group, meta), original in zip(run(asyncio.wait_for(kill(), 300)), whole, strict=True):
        kept += meta["stats"]["rollout/kept_tokens"]
        assert meta["stats"]["rollout/losses"] <= 1, "0: it had ended before"
        for rollout, uncut in zip(ray.get(group).rollouts, original.rollouts, strict=True):
            assert rollout.token_ids.tolist() == uncut.token_ids.tolist()
            assert (rollout.text, set(rollout.versions.tolist())) == (uncut.text, {2})
            np.testing.assert_allclose(rollout.logp, uncut.logp, atol=1e-4)
    assert kept > 8 and run(_pid(mortal)) != pid and children
    run(asyncio.wait_for(_ended(children), 60))


@pytest.mark.long
def test_a_stopped_vllm_process_is_found_and_replaced(mortal, run, reference, tickets):
    """Its actor still runs, and answers."""
    new = reference.changed(seed=3)
    run(mortal.publish(new, 3))
    children = psutil.Process(run(_pid(mortal))).children(recursive=True)

    async def stop():
        for child in children:
            child.suspend()

    done = run(asyncio.wait_for(_interrupted(mortal, tickets, stop), 300))
    assert all(t.stats["rollout/losses"] == 1 for t in done) and children
    _check(reference, done, new, 3)  # the successor holds what was published last
    run(asyncio.wait_for(_ended(children), 60))


async def _ended(processes):
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        await asyncio.sleep(0.2)
