"""The coordinator's own work: milliseconds of processor time per trajectory with 1 to 1,000 simulated engines.

    python benchmarks/coordinator.py [--quick] [--updates N] [--profile]

The real `Loop` (gate, buffer, metrics, state) and the real `RolloutPool` (dispatch, weights, watch over every engine)
work on SIMULATED engine actors, prompts, judge, learner and journal, in virtual time: every group takes a random time,
nothing is computed. All the processor time of the process counts, that of the simulation and of asyncio included. What
is left out is Ray's own part of a call; `async_vs_sync.py` measures the coordinator's process with everything in it.

* `by_engines`: 8 groups of 8 trajectories under way on every engine, half of them one batch, so that batches grow with
  the system, up to 4,000 groups with 1,000 engines. An update takes 10 virtual seconds.
* `by_length`: a long run of 16 groups a batch on one engine; its first and its last tenth. What grows with the number
  of updates behind a run shows here.
* `checkpoint`: milliseconds and bytes of writing the loop's own state after so many groups.
* `watching`: processor milliseconds that the watch over all engines costs in a (virtual) second without any work.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import pstats
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from common import conditions, finish, parse
from simulation import in_virtual_time

from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import LoopSettings
from prism_ray.rollout import pool
from prism_ray.runtime import checkpoint
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Ratios, Ticket

GROUP_SIZE, GROUPS_PER_ENGINE, UPDATE_S = 8, 4, 10.0
_DRAW = random.Random(0)
GENERATE_S = [UPDATE_S * _DRAW.lognormvariate(0.0, 0.5) for _ in range(997)]
STATS = {f"rollout/metric_{i}": 1.0 for i in range(8)}
"""As many numbers as the real rooms note on a ticket."""


class Method:
    """A simulated actor's method, called as Ray's are."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: Any) -> Method:
        return self


class SimulatedActor:
    """Stands for a rollout engine's actor: every call comes back after a time, with nothing in it."""

    def __init__(self) -> None:
        self._version = 0
        self.generate = Method(self._generate)
        self.progress = Method(lambda: (_after(0.01, {}), None))
        self.load = Method(self._load)
        self.start = Method(self._load)
        self.alive = Method(lambda: _after(0.001, None))

    def _generate(self, prompt: Any, request: Any, so_far: Any) -> tuple[None, Awaitable[dict[str, Any]]]:
        meta = {"finished": True, "oldest_version": self._version, "tokens": 400, "total_tokens": 420, "stats": STATS}
        return None, _after(GENERATE_S[request.group_id % len(GENERATE_S)], meta)

    def _load(self, *args: Any) -> Awaitable[dict[str, float]]:
        self._version = args[-1]
        return _after(0.1, {"paused_s": 0.1})


async def _after(seconds: float, value: Any) -> Any:
    await asyncio.sleep(seconds)
    return value


class SimulatedPool(pool.RolloutPool):
    """The real pool; new weights go by the name of a folder, so that nothing is put into an object store."""

    async def publish(self, weights: Any, version: int) -> dict[str, float]:
        return await self.load("weights", version)


class Rooms:
    """Simulated prompts, judge, learner and journal in one."""

    version, wants_ratios = 0, False

    def __init__(self) -> None:
        self._position = 0

    async def take(self) -> tuple[str, int, Any]:
        self._position += 1
        return "prompt", self._position - 1, None

    async def judge(self, ticket: Ticket) -> Ticket:
        return await _after(0.01, ticket)

    async def append(self, ticket: Ticket) -> None:
        await asyncio.sleep(0.001)

    async def update(self, tickets: Sequence[Ticket], version: int) -> dict[str, float]:
        return await _after(UPDATE_S, {})

    async def learn(self, tickets: Sequence[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        return {}

    def ratios(self) -> Ratios:
        return {}

    async def weights(self) -> None:
        return None


class _Actors:
    """Stands for the class of engine actors."""

    @staticmethod
    def options(**_: Any) -> type[_Actors]:
        return _Actors

    @staticmethod
    def remote(*_: Any) -> SimulatedActor:
        return SimulatedActor()


pool.ENGINE_ACTOR = _Actors


async def started(engines: int) -> SimulatedPool:
    settings = RolloutSettings(engines=engines, group_size=GROUP_SIZE)
    made = SimulatedPool(Path("policy"), settings, 0)
    await made.resize(engines)
    return made


def train(engines: int, groups_per_step: int, updates: int) -> tuple[LoopState, list[float]]:
    """A whole run; returns the state it ends in, and processor seconds of each update."""
    times: list[float] = []

    async def on_step(state: LoopState, metrics: dict[str, float]) -> None:
        times.append(time.process_time())

    async def run() -> LoopState:
        rooms, engine_pool = Rooms(), await started(engines)
        settings = LoopSettings(groups_per_step=groups_per_step, max_staleness=1, stall_timeout_s=1e6)
        times.append(time.process_time())
        return await Loop(rooms, engine_pool, rooms, rooms, rooms, settings, on_step).run(updates, LoopState())

    gc.collect()
    state = in_virtual_time(run())
    return state, [after - before for before, after in zip(times, times[1:], strict=False)]


def milliseconds_per_trajectory(seconds: Sequence[float], groups_per_step: int) -> float:
    return 1e3 * sum(seconds) / len(seconds) / (groups_per_step * GROUP_SIZE)


def by_engines(engines: int, trajectories: int, repetitions: int) -> dict[str, float]:
    """The least of several runs; the first updates, which fill the pipeline, do not count."""
    groups = GROUPS_PER_ENGINE * engines
    updates = max(6, trajectories // (groups * GROUP_SIZE))
    runs = [train(engines, groups, updates)[1][2:] for _ in range(repetitions)]
    return {
        "ms_per_trajectory": min(milliseconds_per_trajectory(run, groups) for run in runs),
        "groups_per_step": groups,
        "updates": updates,
    }


def by_length(updates: int) -> dict[str, float]:
    """The first and the last tenth of a long run."""
    seconds, tenth = train(1, 16, updates)[1], updates // 10
    return {
        "updates": updates,
        "first_ms_per_trajectory": milliseconds_per_trajectory(seconds[2:tenth], 16),
        "last_ms_per_trajectory": milliseconds_per_trajectory(seconds[-tenth:], 16),
    }


def checkpoint_cost(groups: int) -> dict[str, float]:
    """Writing the state of a loop that has trained on so many groups."""
    state, _ = train(100, 1000, max(1, groups // 1000))
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        checkpoint.commit(Path(folder), state)
        seconds = time.process_time() - began
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {"groups": groups, "ms": 1e3 * seconds, "bytes": size}


def watching(engines: int, seconds: float) -> dict[str, float]:
    """The watch over engines that have nothing to do."""

    async def run() -> float:
        await started(engines)
        began = time.process_time()
        await asyncio.sleep(seconds)
        return time.process_time() - began

    return {"engines": engines, "ms_per_second": 1e3 * in_virtual_time(run()) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--updates", type=int, default=3000, help="length of the long run")
    parser.add_argument("--profile", action="store_true", help="show where the largest system's time goes")
    options = parse(__doc__, parser)
    trajectories, repetitions, groups = 40_000, 3, 100_000
    if options.quick:
        options.engines, options.updates, trajectories, repetitions, groups = [1, 100], 100, 1000, 1, 2_000
    if options.profile:
        with cProfile.Profile() as profile:
            train(options.engines[-1], GROUPS_PER_ENGINE * options.engines[-1], 6)
        pstats.Stats(profile).sort_stats("tottime").print_stats(16)
    sizes = {str(n): by_engines(n, trajectories, repetitions) for n in options.engines}
    for engines, row in sizes.items():
        print(f"{engines} simulated engines: {row['ms_per_trajectory']:.4f} ms per trajectory", flush=True)
    found: dict[str, Any] = {"by_engines": sizes, "target_ms_per_trajectory": 1.0}
    found["by_length"] = long = by_length(options.updates)
    found["checkpoint"] = checkpoint_cost(groups)
    found["watching"] = watching(options.engines[-1], 60.0)
    for name in ("by_length", "checkpoint", "watching"):
        print(name, found[name], flush=True)
    least, most = sizes[str(options.engines[0])], sizes[str(options.engines[-1])]
    ratios = {
        "most_engines_over_fewest": most["ms_per_trajectory"] / least["ms_per_trajectory"],
        "last_tenth_over_first": long["last_ms_per_trajectory"] / long["first_ms_per_trajectory"],
    }
    finish("coordinator", ratios, found, {**conditions(), "group_size": GROUP_SIZE, "engines": "simulated"})


if __name__ == "__main__":
    main()
