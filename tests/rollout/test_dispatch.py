import asyncio

import pytest

from prism_ray.config.rollout import RolloutSettings
from prism_ray.rollout.pool import RolloutPool, _Engine
from prism_ray.rollout.sampling import EngineFailed
from prism_ray.runtime.protocols import Ticket


def test_the_engine_with_the_fewest_outstanding_tokens_is_next(tmp_path):
    async def chosen():
        pool = RolloutPool(tmp_path, RolloutSettings(engines=3), 0)
        for index, tokens in enumerate((700, 300, 500)):
            pool._ready[index] = _Engine(index, f"rollout engine {index}", None, tokens)
        return (await pool._least_loaded()).index

    assert asyncio.run(chosen()) == 1


def test_waiting_for_an_engine_that_never_comes_ends_with_a_sentence(tmp_path):
    pool = RolloutPool(tmp_path, RolloutSettings(engines=2, start_timeout_s=0.01), 0)
    with pytest.raises(TimeoutError, match="waited 0 s for any of 2 rollout engines"):
        asyncio.run(pool.generate(Ticket(0, "p", 0, None)))


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
