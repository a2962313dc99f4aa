"""Run by test_placement.py in a process of its own: a cluster of a head and two nodes with pretended GPUs.

Prints one JSON object, which the test looks at."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.planning.layout import Bundle, Group, Layout
from prism_ray.runtime import placement
from prism_ray.runtime.cluster import ClusterError
from prism_ray.runtime.placement import EnginePlaces, Placement

ROOT = Path(__file__).resolve().parents[2]
MEMORY: dict[str, Any] = {"object_store_memory": 100 * 2**20}


@ray.remote
class Probe:
    """Says where it is and which GPUs it was given."""

    def where(self) -> tuple[str, list[str]]:
        context = ray.get_runtime_context()
        return context.get_node_id()[:8], sorted(context.get_accelerator_ids()["GPU"])


def probe(options: dict[str, Any], gpus: float) -> Any:
    return Probe.options(**{"num_cpus": 1, "num_gpus": gpus} | options).remote()


def asked(*probes: Any) -> list[tuple[str, list[str]]]:
    return ray.get([p.where.remote() for p in probes], timeout=60)


def refused(work: Callable[[], Any]) -> tuple[str, float]:
    """The sentence that it fails with, and after how many seconds."""
    began = time.monotonic()
    try:
        work()
    except ClusterError as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def free_gpus() -> float:
    """Once Ray has heard of what was given back."""
    for _ in range(100):
        time.sleep(0.1)
        if ray.available_resources().get("GPU") == 8:
            break
    return ray.available_resources().get("GPU", 0.0)


async def split(settings: ClusterSettings) -> dict[str, Any]:
    """Engines of two GPUs, four learner ranks, and a judge and its scorer on one GPU."""
    rollout = RolloutSettings(engines=1, gpus_per_engine=2)
    engine = Group("engine 0", (Bundle(1, 2),), "anywhere", "rollout.engines = 1")
    learner = Group("learner", (Bundle(1, 1),) * 4, "pack", "learner.ranks = 4")
    judge = Group("judge ranks", (Bundle(0, 0.75),), "pack", "discriminator.ranks = 1")
    scorer = Group("scorer 0", (Bundle(0.5, 0.25),), "anywhere", "discriminator.scorers = 1")
    held = Placement(settings, [engine, learner, judge, scorer])
    places = EnginePlaces(held, [engine], False, rollout)
    engines = [probe(await places.take(0), 2)]
    empty = Group("scorer 1", (Bundle(0),), "anywhere", "discriminator.scorers = 1")
    await held.reserve([learner, judge, scorer, empty])
    ranks = [probe(options, 1) for options in held.all_options("learner")]
    small = [Probe.options(**{"num_gpus": 0.75, "num_cpus": 0} | held.options("judge ranks")).remote()]
    small.append(Probe.options(**{"num_gpus": 0.25, "num_cpus": 0.5} | held.options("scorer 0")).remote())
    found = {"engine": asked(*engines), "learner": asked(*ranks), "judge": asked(*small)}
    found["nothing to reserve"] = held.options("scorer 1")
    more = [Group("engine 9", (Bundle(1, 2),), "anywhere", "rollout.engines = 2")]
    sentence, seconds = await asyncio.to_thread(refused, lambda: asyncio.run(held.reserve(more)))
    found["pending"], found["pending_s"] = sentence, seconds
    for actor in (*engines, *ranks, *small):
        ray.kill(actor)
    successor = probe(await places.take(0), 2)
    found["successor"] = asked(successor)
    places.leave(0)
    held.release()
    found["free after"] = free_gpus()
    return found


async def occupied(settings: ClusterSettings) -> dict[str, Any]:
    """Somebody else has the GPUs of the node that the plan would choose."""
    first = next(node for node in placement.nodes() if node.gpus)
    there = NodeAffinitySchedulingStrategy(first.id, soft=False)
    other = Probe.options(num_cpus=0, num_gpus=4, scheduling_strategy=there).remote()
    found: dict[str, Any] = {"other": asked(other)}
    learner = Group("learner", (Bundle(1, 1),) * 4, "pack", "learner.ranks = 4")
    held = Placement(settings, [learner])
    await held.reserve([learner])
    found["learner"] = asked(*(probe(options, 1) for options in held.all_options("learner")))
    ray.kill(other)
    held.release()
    return found | {"free after": free_gpus()}


async def colocated(settings: ClusterSettings) -> dict[str, Any]:
    rollout = RolloutSettings(engines=2, gpus_per_engine=1)
    groups = [Group(f"engine {i}", (Bundle(2, 1),), "anywhere", "rollout.engines = 2") for i in range(2)]
    held = Placement(settings, groups)
    places = EnginePlaces(held, groups, True, rollout)
    taken = [await places.take(i) for i in range(2)]
    pairs = [[probe(options, 1), probe(options, 1)] for options in taken]  # the options make it half of one each
    found = {"pairs": [asked(*pair) for pair in pairs]}
    held.release()
    return found | {"free after": free_gpus()}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0} | MEMORY)
    for _ in range(2):
        cluster.add_node(num_cpus=6, num_gpus=4, **MEMORY)
    ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    settings = ClusterSettings(address=cluster.address, pending_timeout_s=1.0)
    found: dict[str, Any] = {"nodes": [(n.cpus, n.gpus, n.head) for n in placement.nodes()]}
    found["split"] = asyncio.run(split(settings))
    found["colocated"] = asyncio.run(colocated(settings))
    found["occupied"] = asyncio.run(occupied(settings.model_copy(update={"pending_timeout_s": 20.0})))

    large = [Layout("align", (Group("learner", (Bundle(1, 1),) * 12, "pack", "learner.ranks = 12"),))]
    found["refused"], found["refused_s"] = refused(lambda: placement.check(large, settings))
    alone = ClusterSettings(pending_timeout_s=30.0)
    found["refused at once"], found["at once_s"] = refused(lambda: placement.check(large, alone))
    growing = ClusterSettings(address=cluster.address, pending_timeout_s=120.0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(refused, lambda: placement.check(large, growing))
        time.sleep(2.0)
        cluster.add_node(num_cpus=6, num_gpus=4, **MEMORY)  # here: a node dies with the thread that started it
        found["grown"], found["grown_s"] = waiting.result()
    found["head"] = placement.nodes()[0].name
    command = [sys.executable, str(ROOT / "jobs" / "plan.py"), "--cluster", "live"]
    done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": cluster.address}, capture_output=True, text=True)
    found["live"] = [done.returncode, done.stdout, done.stderr]
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
