"""What an environment makes of the rollouts of a group, pure: verdicts, whatever the environment or a response does.

`verify/environment.py` says what an environment promises. One that raises, or gives a number that is none, costs the
rollout it judged; one that breaks its promises for every rollout is an error of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium

from prism_ray.config.runtime import HIGHEST, LOWEST
from prism_ray.records import Group, Prompt, Verdict
from prism_ray.verify.answer import AnswerEnvironment  # which also registers the ids of this room

PARTS = ("accuracy", "format")
_KNOWN = (*PARTS, "valid", "reason")
_MAX_REASON = 500


class BrokenEnvironment(ValueError):
    """An environment that does not keep the contract."""


def make_environment(environment: str, options: Mapping[str, Any] | None = None) -> gymnasium.Env[Any, Any]:
    """The environment of this id, made with `options`; ValueError with a sentence where it cannot be made."""
    try:
        return gymnasium.make(environment, disable_env_checker=True, **(options or {}))
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        cause = str(error).split("\n")[0].rstrip(".")
        form = "name a registered environment as module:namespace/Name-v0, with verify.options that it takes"
        raise ValueError(f"verify.environment: {environment} cannot be made ({cause}); {form}") from error


def truth_refusal(environment: str, options: Mapping[str, Any] | None = None) -> Callable[[Prompt], str] | None:
    """What says why this environment cannot judge answers to a prompt's ground truth ("" if it can); None for one of
    another room, whose truths may be anything. ValueError with a sentence where it cannot be made."""
    env = make_environment(environment, options)
    try:
        made = type(env.unwrapped)
        return made.refusal if issubclass(made, AnswerEnvironment) else None
    finally:
        env.close()


def judge_group(group: Group, env: gymnasium.Env[Any, Any]) -> Group:
    """The group with a verdict for each rollout (`judge_text`); verdicts that it has already are replaced."""
    return group.judged([judge_text(rollout.text, group.prompt, env) for rollout in group.rollouts])


def judge_text(text: str, prompt: Prompt, env: gymnasium.Env[Any, Any]) -> Verdict:
    """What an environment says of one response. One that raises, or whose numbers are not finite, is worth 0.

    BrokenEnvironment where it does not give what the contract promises.
    """
    try:
        env.reset(options={"prompt": prompt})
        _, reward, terminated, truncated, info = env.step(text)
    except Exception as error:  # a user's verifier must not take the loop down
        return refused(f"verifier failed: {type(error).__name__}: {error}")
    if not (terminated or truncated):
        raise _broken(env, "asks for another turn, but a rollout is one response; set verify.max_turns")
    return verdict_of(reward, info, env)


def verdict_of(reward: Any, info: Mapping[str, Any], env: gymnasium.Env[Any, Any]) -> Verdict:
    """The verdict that a step's reward and `info` are; further numbers in `info` become further parts."""
    if missing := [name for name in _KNOWN if name not in info]:
        raise _broken(env, f"gives no info[{missing[0]!r}]")
    numbers = {"reward": reward} | {name: info[name] for name in PARTS}
    numbers |= {k: v for k, v in info.items() if k not in _KNOWN and isinstance(v, bool | int | float)}
    try:
        parts = {name: float(value) for name, value in numbers.items()}
    except (TypeError, ValueError) as error:
        raise _broken(env, f"gives no number for reward, accuracy or format ({error})") from error
    if wrong := [name for name, value in parts.items() if not math.isfinite(value)]:
        return refused(f"verifier gave {wrong[0]} {parts[wrong[0]]}")
    return Verdict(parts.pop("reward"), bool(info["valid"]), str(info["reason"])[:_MAX_REASON], parts=parts)


def refused(reason: str) -> Verdict:
    """The verdict on a rollout that could not be judged: worth 0, with the part `failed`."""
    return Verdict(0.0, False, reason[:_MAX_REASON], parts=dict.fromkeys(PARTS, 0.0) | {"failed": 1.0})


def stats_of(group: Group) -> dict[str, float]:
    """Means of the reward and its parts, and their ranges for dynamic sampling; a part that is missing counts as 0."""
    rows = [v.parts | {"reward": v.reward} for v in group.verdicts]
    columns = {name: [row.get(name, 0.0) for row in rows] for name in {"reward", "failed"}.union(*rows)}
    stats = {f"verify/{name}": sum(values) / max(1, len(values)) for name, values in columns.items()}
    for name, values in columns.items():
        stats |= {f"{LOWEST}{name}": min(values, default=0.0), f"{HIGHEST}{name}": max(values, default=0.0)}
    return stats


def _broken(env: gymnasium.Env[Any, Any], what: str) -> BrokenEnvironment:
    step = f"{type(env.unwrapped).__name__}.step"
    contract = "keep to the contract in prism_ray/verify/environment.py"
    return BrokenEnvironment(f"verify.environment: {step} {what}; {contract}")
