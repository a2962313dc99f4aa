"""A simulated engine: an actor that answers the pool as `EngineWorker` does, without vLLM, at a pace that tests set.

Token `position` of rollout `index` is `(7 * index + position) % VOCABULARY`, its log-prob
`-(version + 0.001 * position)`.
"""

import asyncio
import os
import sys
import time
from dataclasses import replace

import numpy as np
import ray

from prism_ray.records import Group
from prism_ray.rollout.partial import UNFINISHED, Piece, joined, nothing
from prism_ray.rollout.sampling import EngineFailed, Garbage, check_rollouts
from prism_ray.rollout.worker import CONCURRENCY_GROUPS
from prism_ray.runtime.supervision import HEALTH

VOCABULARY = 50

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def piece(index, begin, end, version):
    positions = np.arange(begin, end)
    tokens = ((7 * index + positions) % VOCABULARY).astype(np.int32)
    logp = -(version + 0.001 * positions).astype(np.float32)
    return Piece(index, begin, tokens, logp, np.full(end - begin, version, np.int32), UNFINISHED)


GARBAGE = {
    "too few tokens": lambda r: replace(r, token_ids=r.token_ids[:-1]),
    "no number": lambda r: replace(r, logp=np.full_like(r.logp, np.nan)),
    "certain": lambda r: replace(r, logp=np.abs(r.logp) + 1),
    "foreign token": lambda r: replace(r, token_ids=r.token_ids + VOCABULARY),
    "from the future": lambda r: replace(r, versions=r.versions + 1),
    "given up": lambda r: nothing("p", r.index),
}
"""What no policy can have sampled: how each kind makes it of a rollout."""


class SimulatedEngine:
    """One token of every rollout each `pace_s`; `behave` makes it misbehave."""

    def __init__(self, name, folder, settings, seed):
        self._name, self._pace_s, self._what, self._era = name, 0.02, "", 0
        self._running, self.begun, self._told = {}, {}, {}

    @ray.method(concurrency_group="generate")
    async def start(self, version):
        self._version = version

    @ray.method(concurrency_group="control")
    async def behave(self, what, pace_s=0.02):
        """`hang`: no token, no answer to pings; `sick`: pings fail; `fail`: groups do; `deaf`: groups never end;
        `stubborn`: no group is ended early; one of GARBAGE: groups are returned so."""
        self._what, self._pace_s = what, pace_s

    @ray.method(concurrency_group="generate")
    async def generate(self, prompt, request, so_far):
        known = so_far.rollouts if isinstance(so_far, Group) else so_far
        begun = {r.index: r for r in known}
        rollouts = {i: begun.get(i) or nothing("p", i) for i in range(request.sampling.n)}
        self._running[request.key] = rollouts
        self.begun[request.group_id] = {i: len(r.token_ids) for i, r in rollouts.items()}
        while self._what == "deaf" or not all(r.finish_reason == "length" for r in rollouts.values()):
            await asyncio.sleep(self._pace_s)
            if self._what == "hang":
                await asyncio.Event().wait()
            if self._what == "fail":
                raise EngineFailed(f"{self._name} failed: simulated")
            if request.era < self._era:
                break
            for i in rollouts:
                self._step(rollouts, i, request.sampling.max_tokens)
        del self._running[request.key]
        try:
            abandoned = request.era < self._era or self._what == "stubborn"
            version = None if abandoned else self._version
            spoil = GARBAGE.get(self._what, lambda r: r)
            rollouts = {i: spoil(r) for i, r in rollouts.items()}
            check_rollouts(list(rollouts.values()), request.sampling, VOCABULARY, version)
        except Garbage as error:
            raise Garbage(f"{self._name} returned garbage: {error}") from None
        group = Group(request.group_id, prompt, tuple(rollouts.values()))
        tokens = sum(len(r.token_ids) for r in rollouts.values())
        finished = all(r.finish_reason == "length" for r in rollouts.values())
        facts = {"oldest_version": group.oldest_version, "tokens": tokens, "total_tokens": tokens}
        return group, facts | {"finished": finished, "stats": {"engine": float(self._name.split()[-1])}}

    def _step(self, rollouts, index, limit):
        old = rollouts[index]
        begin = len(old.token_ids)
        if begin < limit:
            new = piece(index, begin, begin + 1, self._version)
            reason = "length" if begin + 1 == limit else UNFINISHED
            one = nothing("p", index)
            arrays = {"token_ids": new.token_ids, "logp": new.logp, "versions": new.versions, "finish_reason": reason}
            rollouts[index] = joined(old, type(one)(**(vars(one) | arrays)))

    @ray.method(concurrency_group="control")
    async def progress(self):
        news = {}
        for key, rollouts in self._running.items():
            news[key] = []
            for i, r in rollouts.items():
                told = self._told.get((key, i), self.begun_tokens(r))
                news[key].append(Piece(i, told, r.token_ids[told:], r.logp[told:], r.versions[told:], r.finish_reason))
                self._told[key, i] = len(r.token_ids)
        return {key: 1 for key in news}, news

    def begun_tokens(self, rollout):
        return next((b[rollout.index] for b in self.begun.values() if rollout.index in b), 0)

    @ray.method(concurrency_group="control")
    async def end_all(self, before):
        if self._what != "stubborn":
            self._era = max(self._era, before)

    @ray.method(concurrency_group="control")
    async def update(self, weights, version):
        began = time.monotonic()
        if not isinstance(weights, dict) or "refused" in weights:
            raise ValueError(f"weights of version {version}: simulated refusal")
        self._version = version
        return {"paused_s": time.monotonic() - began}

    load = update

    @ray.method(concurrency_group="control")
    async def health(self):
        running = sum(len(r) for r in self._running.values())
        return {"version": self._version, "running": running, "pid": os.getpid(), "groups": len(self._running)}

    @ray.method(concurrency_group=HEALTH)
    async def alive(self):
        if self._what == "sick":
            raise EngineFailed(f"{self._name} failed: simulated")
        if self._what == "hang":
            await asyncio.Event().wait()

    @ray.method(concurrency_group="control")
    async def stop(self):
        pass


SIMULATED_ACTOR = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(SimulatedEngine)
