"""Long-tailed response lengths at 8 to 512 engines: asynchronous against synchronous and one-step-off training.

    python benchmarks/long_tail.py [--quick] [--engines 8 64 512] [--sigma S]

Everything but the loop is SIMULATED, in virtual time: the real `Loop`, gate and buffer drive engines, judge and learner
of `simulation.py`. Response lengths are log-normal. Engines decode by continuous batching at the speed of a policy of
about 7B parameters on one GPU each (an assumption, see SPEEDS); there are as many learner GPUs as engines, and a batch
has 8 prompts x 16 responses for every engine. Five ways to train, with equal hardware and the same lengths:

* `colocated`: synchronous, all GPUs generate, then all of them train. What peers call their synchronous baseline.
* `sync`: synchronous with engines and learner apart (`max_staleness: 0`), one of them always idle.
* `one_step_off`: a whole batch is generated with weights one version old while the learner trains on the one before.
* `async`: `max_staleness` 1, 2 and 4.

Ratios are trained response tokens per virtual second over those of a baseline, after the first updates.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from common import conditions, finish, parse
from simulation import Speeds, System, in_virtual_time

from prism_ray.config.runtime import LoopSettings
from prism_ray.records import Ticket

SPEEDS = Speeds(step_s=0.008, sequence_s=0.00005, slots=256, learner_tokens_per_s=9000.0, publish_s=1.0)
"""One engine, and one learner GPU. 8 ms is about what reading 7B weights in bfloat16 costs at 3.35 TB/s with something
for launching; at 128 sequences a step takes 14 ms, 8,900 tokens a second. The learner's 9,000 are 6 x 7e9 flops a token
at 380 Tflops."""
GROUPS_PER_ENGINE, GROUP_SIZE = 8, 16
MEDIAN, LONGEST = 2000.0, 20480
"""Tokens of a response; what is longer is cut (DAPO's limit)."""
STALENESS = (1, 2, 4)
SKIPPED = 5
"""Updates at the start (filling the pipeline) that do not count, and as many at the end (draining it)."""

PEERS = {
    "verl one-step-off, FSDP2 / Megatron, H20": "1.23 / 1.40",
    "verl fully async, 7B, 28K responses, 128 H20": "2.35",
    "AReaL, 1.5B / 7B": "2.77 / 2.27",
    "ROLL Flash, RLVR": "2.24",
    "PipelineRL, 128 H100": "about 2",
    "Laminar, up to 1024 GPUs": "up to 5.48",
}
"""Published ratios over synchronous training, each its authors' own (verl docs/advance/{one_step_off,fully_async}.md,
arXiv 2505.24298, 2510.11345, 2509.19128, 2510.12633), on other models, lengths and hardware; none was reproduced."""


def response_lengths(sigma: float, seed: int) -> Callable[[int], list[int]]:
    """The response lengths of the prompt at a position of the stream, the same for every way to train."""

    def of(position: int) -> list[int]:
        drawn = np.random.default_rng((seed, position)).lognormal(np.log(MEDIAN), sigma, GROUP_SIZE)
        return np.clip(drawn.round(), 1, LONGEST).astype(int).tolist()

    return of


def simulate(way: str, engines: int, updates: int, lengths: Callable[[int], Sequence[int]]) -> System:
    """Train one way to the end; returns the system with its updates."""
    gpus = 2 * engines if way == "colocated" else engines
    speeds = replace(SPEEDS, learner_tokens_per_s=SPEEDS.learner_tokens_per_s * gpus)
    groups = GROUPS_PER_ENGINE * engines

    async def run() -> System:
        system = System(gpus, speeds, lengths)
        if way == "one_step_off":
            await one_step_off(system, updates, groups)
        else:
            staleness = int(way.removeprefix("async_")) if way.startswith("async_") else 0
            settings = LoopSettings(groups_per_step=groups, max_staleness=staleness, stall_timeout_s=1e6)
            await system.train(updates, settings)
        return system

    return in_virtual_time(run())


async def one_step_off(system: System, updates: int, groups: int) -> None:
    """The simulated rival: whole batches, the next one generated while this one trains, weights exchanged between."""

    async def batch() -> list[Ticket]:
        taken = [await system.take() for _ in range(groups)]
        tickets = [Ticket(position, prompt, position, None) for prompt, position, _ in taken]
        return list(await asyncio.gather(*(system.generate(ticket) for ticket in tickets)))

    ready = await batch()
    for version in range(updates):
        coming = asyncio.create_task(batch())
        await asyncio.sleep(0)
        await system.update(ready, version)
        ready = await coming
        await system.publish(None, version + 1)


def figures(system: System, updates: int) -> dict[str, Any]:
    """Throughput, idle shares and staleness between the first and the last updates."""
    window = system.updates[SKIPPED : updates - SKIPPED]
    before = system.updates[SKIPPED - 1]
    seconds = window[-1].ended - before.ended
    trained = sum(u.ended - u.began for u in window)
    decoding = (window[-1].engines_busy_s - before.engines_busy_s) / len(system.engines)
    ages = Counter(age for update in window for age in update.ages)
    return {
        "tokens_per_s": sum(u.tokens for u in window) / seconds,
        "step_s": seconds / len(window),
        "learner_idle_share": 1 - trained / seconds,
        "engine_idle_share": 1 - decoding / seconds,
        "staleness": {age: count / ages.total() for age, count in sorted(ages.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--sigma", type=float, default=1.0, help="spread of the logarithm of response lengths")
    options = parse(__doc__, parser)
    if options.quick:
        options.engines, options.updates = [8], 2 * SKIPPED + 6
    ways = ["colocated", "sync", "one_step_off", *(f"async_{bound}" for bound in STALENESS)]
    lengths = response_lengths(options.sigma, seed=0)
    found: dict[str, Any] = {}
    for engines in options.engines:
        for way in ways:
            began = time.process_time()
            found[f"{engines}/{way}"] = row = figures(simulate(way, engines, options.updates, lengths), options.updates)
            shown = {name: round(value, 3) for name, value in row.items() if name != "staleness"}
            print(engines, way, shown, {a: round(s, 3) for a, s in row["staleness"].items()},
                  f"({time.process_time() - began:.0f} s)", flush=True)  # fmt: skip
    ratios = {
        f"{way}_over_{base}_{engines}": found[f"{engines}/{way}"]["tokens_per_s"]
        / found[f"{engines}/{base}"]["tokens_per_s"]
        for engines in options.engines
        for base in ("colocated", "sync", "one_step_off")
        for way in ways[ways.index(base) + 1 :]
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    assumed = {"speeds": vars(SPEEDS), "median": MEDIAN, "longest": LONGEST, "sigma": options.sigma}
    assumed |= {"groups_per_engine": GROUPS_PER_ENGINE, "group_size": GROUP_SIZE, "updates": options.updates}
    finish("long_tail", ratios, {**found, "published_by_peers": PEERS}, {**conditions(), "simulated": assumed})


if __name__ == "__main__":
    main()
