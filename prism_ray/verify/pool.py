"""`VerifierPool`: fulfils the loop's `Judge` with a Gymnasium environment (contract: `verify/environment.py`).

Groups are judged in actors, one at a time in each: an answer that hangs a verifier costs its group, when the time is up
and the actor is replaced, and nothing else. Actors and not tasks, because a burst of tasks makes Ray start (and later
stop) a process for each, which costs far more than the judging.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import gymnasium
import ray
from ray.exceptions import RayActorError, RayTaskError

from prism_ray.config.runtime import HIGHEST, LOWEST
from prism_ray.config.verify import VerifySettings
from prism_ray.records import Group, Ticket, Verdict

_PARTS = ("accuracy", "format")
_KNOWN = (*_PARTS, "valid", "reason")


class BrokenEnvironment(ValueError):
    """An environment that does not keep the contract."""


def make_environment(environment: str) -> gymnasium.Env[Any, Any]:
    """The environment of this id; ValueError with a sentence where it cannot be made."""
    try:
        return gymnasium.make(environment, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        cause = str(error).split("\n")[0].rstrip(".")
        form = "name a registered environment as module:namespace/Name-v0"
        raise ValueError(f"verify.environment: {environment} cannot be made ({cause}); {form}") from error


def judge_group(group: Group, env: gymnasium.Env[Any, Any]) -> Group:
    """The group with a verdict for each rollout; an environment that raises is worth 0, with the error as reason.

    BrokenEnvironment where its `info` lacks what the contract promises.
    """
    return group.judged([_verdict(rollout.text, group, env) for rollout in group.rollouts])


def _verdict(text: str, group: Group, env: gymnasium.Env[Any, Any]) -> Verdict:
    try:
        env.reset(options={"prompt": group.prompt})
        _, reward, _, _, info = env.step(text)
    except Exception as error:  # a user's verifier must not take the loop down
        return _refused(f"verifier failed: {type(error).__name__}: {error}")
    if missing := [name for name in _KNOWN if name not in info]:
        named = f"{type(env.unwrapped).__name__}.step gives no info[{missing[0]!r}]"
        raise BrokenEnvironment(f"verify.environment: {named}; keep to the contract in prism_ray/verify/environment.py")
    parts = {name: float(info[name]) for name in _PARTS}
    extra = {k: float(v) for k, v in info.items() if k not in _KNOWN and isinstance(v, bool | int | float)}
    return Verdict(float(reward), bool(info["valid"]), str(info["reason"]), parts=parts | extra)


def _refused(reason: str) -> Verdict:
    return Verdict(0.0, False, reason, parts=dict.fromkeys(_PARTS, 0.0) | {"failed": 1.0})


class _Verifier:
    """The actor: one environment."""

    def __init__(self, environment: str) -> None:
        self._environment = make_environment(environment)

    def ready(self) -> None:
        """Answers once the process is up, which the time limit of a group does not count."""

    def judge(self, group: Group) -> tuple[Group, dict[str, float]]:
        judged = judge_group(group, self._environment)
        return judged, _stats(judged)

    def refuse(self, group: Group, reason: str) -> tuple[Group, dict[str, float]]:
        judged = group.judged([_refused(reason)] * len(group.rollouts))
        return judged, _stats(judged)


def _stats(group: Group) -> dict[str, float]:
    """Means of the reward and its parts, and their ranges for dynamic sampling; a part that is missing counts as 0."""
    rows = [v.parts | {"reward": v.reward} for v in group.verdicts]
    columns = {name: [row.get(name, 0.0) for row in rows] for name in {"reward", "failed"}.union(*rows)}
    stats = {f"verify/{name}": sum(values) / max(1, len(values)) for name, values in columns.items()}
    for name, values in columns.items():
        stats |= {f"{LOWEST}{name}": min(values, default=0.0), f"{HIGHEST}{name}": max(values, default=0.0)}
    return stats


class VerifierPool:
    """Judges groups with the environment named in the settings; an environment that cannot be made fails here."""

    def __init__(self, settings: VerifySettings) -> None:
        make_environment(settings.environment).close()
        self._settings = settings
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._all = {self._start() for _ in range(settings.workers)}
        for verifier in self._all:
            self._idle.put_nowait(verifier)

    async def judge(self, ticket: Ticket) -> Ticket:
        """The ticket with `ref` to the judged group and the means of the reward and its parts as stats."""
        verifier = await self._idle.get()
        try:
            return await self._judge(verifier, ticket)
        except TimeoutError:
            reason = f"verifier took longer than {self._settings.timeout_s:g} s"
        except RayActorError:
            reason = "verifier crashed"
        except RayTaskError as error:
            self._idle.put_nowait(verifier)
            raise error.cause from None
        return await self._refuse(self._replace(verifier), ticket, reason)

    async def learn(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        """Nothing: rules do not learn."""
        return {}

    def shutdown(self) -> None:
        """End the actors."""
        for verifier in self._all:
            ray.kill(verifier)
        self._all.clear()

    async def _judge(self, verifier: Any, ticket: Ticket) -> Ticket:
        await self._up(verifier)
        ref, stats_ref = verifier.judge.options(num_returns=2).remote(ticket.ref)
        stats = await asyncio.wait_for(asyncio.wrap_future(stats_ref.future()), self._settings.timeout_s)
        self._idle.put_nowait(verifier)
        return replace(ticket, ref=ref, stats=ticket.stats | stats)

    async def _refuse(self, verifier: Any, ticket: Ticket, reason: str) -> Ticket:
        ref, stats_ref = verifier.refuse.options(num_returns=2).remote(ticket.ref, reason)
        await self._up(verifier)
        stats = await asyncio.wait_for(asyncio.wrap_future(stats_ref.future()), self._settings.start_timeout_s)
        self._idle.put_nowait(verifier)
        return replace(ticket, ref=ref, stats=ticket.stats | stats)

    async def _up(self, verifier: Any) -> None:
        limit = self._settings.start_timeout_s
        try:
            await asyncio.wait_for(asyncio.wrap_future(verifier.ready.remote().future()), limit)
        except TimeoutError:
            raise RuntimeError(
                f"waited {limit:g} s for a verifier process; has the cluster verify.worker_cpus?"
            ) from None

    def _start(self) -> Any:
        actor: Any = ray.remote(_Verifier).options(num_cpus=self._settings.worker_cpus)
        return actor.remote(self._settings.environment)

    def _replace(self, verifier: Any) -> Any:
        ray.kill(verifier)
        self._all.discard(verifier)
        new = self._start()
        self._all.add(new)
        return new
