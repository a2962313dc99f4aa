import asyncio
import os
import signal
import threading

import numpy as np
import psutil
import pytest
import ray
import torch

from prism_ray.config.learner import LearnerSettings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.learner.group import LearnerGroup, split_by_tokens
from prism_ray.learner.step import Recipe
from prism_ray.models.load import load_policy
from prism_ray.runtime.protocols import Ticket
from prism_ray.runtime.supervision import HEALTH, Lost

RECIPE = Recipe(AdvantageSettings(), ObjectiveSettings(), CorrectionSettings())


def ticket(number, tokens, ref=None):
    return Ticket(id=number, prompt_id=f"p{number}", position=number, ref=ref, oldest_version=2, total_tokens=tokens)


def test_groups_are_split_whole_and_balanced_by_tokens():
    shares = split_by_tokens([ticket(i, n) for i, n in enumerate([10, 90, 20, 80, 30, 70])], 2)
    assert sorted(t.id for share in shares for t in share) == list(range(6))
    loads = [sum(t.total_tokens for t in share) for share in shares]
    assert abs(loads[0] - loads[1]) <= 20
    assert all([t.id for t in share] == sorted(t.id for t in share) for share in shares)


def test_every_rank_gets_a_group_even_without_tokens():
    assert [len(share) for share in split_by_tokens([ticket(i, 0) for i in range(3)], 3)] == [1, 1, 1]


def test_fewer_groups_than_ranks_is_an_error():
    with pytest.raises(ValueError, match="1 groups cannot be split over 2 ranks"):
        split_by_tokens([ticket(0, 5)], 2)


def test_a_group_of_ranks_updates_saves_loads_and_exports(cluster, policy_folder, make_group, tmp_path):
    asyncio.run(life(policy_folder, make_group, tmp_path))


async def life(policy_folder, make_group, tmp_path):
    settings = LearnerSettings(ranks=2, cpus_per_rank=0.5, timeout_s=120, lr=1e-3, zero_stage=1)
    learner = await LearnerGroup.create(policy_folder, settings, RECIPE, max_prompt_tokens=100, total_steps=3)
    groups = [make_group(i, version=2) for i in range(3)]
    tickets = [ticket(g.id, sum(len(r.token_ids) for r in g.rollouts), ray.put(g)) for g in groups]

    start: dict[str, np.ndarray] = ray.get(await learner.weights())
    model = load_policy(policy_folder)
    assert start.keys() == dict(model.named_parameters()).keys()
    assert all(np.array_equal(start[n], p.detach().numpy()) for n, p in model.named_parameters())

    metrics = await learner.update(tickets, version=3)
    assert metrics["staleness/max"] == metrics["staleness/mean"] == 1
    assert metrics["reward/format"] == pytest.approx(0.75)
    assert {"policy/loss", "policy/entropy", "policy/grad_norm", "correction/ess", "reward/mean"} <= metrics.keys()
    assert metrics["policy/skipped_total"] == 0
    assert all(np.isfinite(value) for value in metrics.values())

    first = ray.get(await learner.weights())
    assert all((first[n] != start[n]).any() for n in first)
    await learner.save(tmp_path / "state")
    await learner.export(tmp_path / "hf")
    exported = load_policy(tmp_path / "hf")
    assert all(torch.equal(p, torch.from_numpy(first[n].copy())) for n, p in exported.named_parameters())

    published = await learner.weights()
    await learner.update(tickets, version=4)
    set_aside = ray.get(published)
    assert all(np.array_equal(set_aside[n], first[n]) for n in first), "the step reached what was to be published"
    second = ray.get(await learner.weights())
    assert any((second[n] != first[n]).any() for n in first)
    await learner.load(tmp_path / "state")
    await learner.update(tickets, version=4)
    again = ray.get(await learner.weights())
    assert all(np.array_equal(again[n], second[n]) for n in second)

    with pytest.raises(FileNotFoundError, match="no checkpoint policy"):
        await learner.load(tmp_path / "nowhere")
    learner.shutdown()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_lost_whichever_rank_notices_it_first(cluster, policy_folder, make_group, number):
    asyncio.run(death(policy_folder, make_group, number))


async def death(policy_folder, make_group, number):
    settings = LearnerSettings(ranks=2, cpus_per_rank=0.5, timeout_s=120, heartbeat_s=3)
    learner = await LearnerGroup.create(policy_folder, settings, RECIPE, max_prompt_tokens=100)
    groups = [make_group(i, version=2) for i in range(2)]
    tickets = [ticket(g.id, 9, ray.put(g)) for g in groups]
    pids = [await rank.__ray_call__.remote(lambda _: os.getpid()) for rank in learner.ranks]
    os.kill(pids[1], number)
    with pytest.raises(Lost, match="learner rank 1 (died|has not answered for 3 s) while it was to update"):
        await learner.update(tickets, version=2)
    learner.shutdown()
    await wait_until_ended(pids)


async def wait_until_ended(pids):
    async with asyncio.timeout(60):
        while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            await asyncio.sleep(0.1)


def test_a_rank_answers_while_it_computes_and_computes_in_one_thread_with_its_settings(
    cluster, policy_folder, make_group
):
    asyncio.run(threads(policy_folder))


async def threads(policy_folder):
    settings = LearnerSettings(cpus_per_rank=2, timeout_s=60)
    learner = await LearnerGroup.create(policy_folder, settings, RECIPE, max_prompt_tokens=100)
    (rank,) = learner.ranks
    await rank.__ray_call__.remote(lambda self: setattr(self, "gate", threading.Event()))
    busy = rank.__ray_call__.remote(lambda self: self.gate.wait(120))
    await asyncio.wait_for(rank.alive.remote(), 60)
    open_gate = rank.__ray_call__.options(concurrency_group=HEALTH)
    await open_gate.remote(lambda self: self.gate.set())
    assert await busy, "alive had to wait for the rank's work"
    found = [await rank.__ray_call__.remote(lambda _: (threading.get_ident(), torch.get_num_threads())) for _ in "ab"]
    learner.shutdown()
    assert found[0] == found[1]
    assert found[0][1] == 2


def test_ranks_that_never_start_are_named(cluster, policy_folder):
    settings = LearnerSettings(ranks=1, cpus_per_rank=64, timeout_s=1)
    with pytest.raises(TimeoutError, match="for learner rank 0 to start .* 1 x 64 CPUs"):
        asyncio.run(LearnerGroup.create(policy_folder, settings, RECIPE, max_prompt_tokens=100))
