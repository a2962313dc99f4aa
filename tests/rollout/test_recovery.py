"""An engine that goes on with old keys and values, and one that is killed: a second pool, started once for both."""

import asyncio
import os
import signal
import time

import numpy as np
import psutil
import pytest
import ray

from prism_ray.rollout.pool import RolloutPool
from prism_ray.rollout.sampling import EngineFailed
from prism_ray.runtime.protocols import Ticket

LONG = {"max_response_tokens": 250, "kv_on_update": "keep"}


@pytest.fixture(scope="module")
def mortal(cluster, run, folder, settings):
    """One engine that may be replaced once, with responses long enough to be interrupted."""
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


def test_a_killed_engine_is_replaced_once_and_its_groups_are_sampled_again(mortal, run, reference, tickets):
    new = reference.changed(seed=2)
    run(mortal.publish(new, 2))
    pid = run(_pid(mortal))
    children = psutil.Process(pid).children(recursive=True)

    async def kill():
        os.kill(pid, signal.SIGKILL)

    done = run(_interrupted(mortal, tickets, kill))
    _check(reference, done, new, 2)  # the successor holds what was published last
    assert run(_pid(mortal)) != pid and children
    deadline = time.monotonic() + 60
    while any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children):
        assert time.monotonic() < deadline, "vLLM's processes outlived their actor"
        time.sleep(0.2)

    # It may not be replaced again: whoever needs it next is told so, by name.
    os.kill(run(_pid(mortal)), signal.SIGKILL)
    with pytest.raises(EngineFailed, match="rollout engine 0 died after 1 restarts"):
        run(mortal.publish(new, 3))
    with pytest.raises(EngineFailed, match="rollout engine 0 died"):
        run(mortal.generate(tickets[0]))
