"""What is asked of an engine, and how its failure looks; free of Ray and vLLM, so that every side can import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_ray.records import Rollout


@dataclass(frozen=True)
class Sampling:
    """How to sample a group: `n` responses of at most `max_tokens` tokens; temperature 0 is greedy."""

    n: int
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Request:
    """One group asked of one engine. `key` is unique in a pool's life; `era` counts how often everything in flight was
    abandoned (the policy went back to an older version)."""

    key: int
    group_id: int
    era: int
    sampling: Sampling


@dataclass(frozen=True)
class Turn:
    """What a later turn of a group's episodes goes on from: a reference to a group whose unfinished rollouts end with
    the environment's answer, its `tokens`, and the era in which they were sampled."""

    so_far: Any
    tokens: int
    era: int


class EngineFailed(RuntimeError):
    """An engine that cannot go on; the message names it."""


class Abandoned(RuntimeError):
    """What an episode's turn goes on from was sampled by a policy that has been taken back; the episode begins anew."""


class Garbage(EngineFailed):
    """An engine returned what no policy can have sampled; the message says what."""


def versions_of(spans: Sequence[Any], tokens: int) -> np.ndarray:
    """The version of each token, int32 [tokens], from the engine's spans; they must cover the tokens without a gap."""
    edges = [0, *(span.end for span in spans)]
    if edges[-1] != tokens or [span.start for span in spans] != edges[:-1]:
        raise RuntimeError(f"the engine attributed {[(s.version, s.start, s.end) for s in spans]} to {tokens} tokens")
    return np.repeat([int(span.version) for span in spans], np.diff(edges)).astype(np.int32)


def check_rollouts(rollouts: Sequence[Rollout], sampling: Sampling, vocabulary: int, newest: int | None) -> None:
    """Raise `Garbage` unless these can be the `n` rollouts of a group by a policy of `vocabulary` tokens.

    `newest` is the version that the engine holds now: no token can be of a later one. None: the group was abandoned.
    Then it may be unfinished, and the engine may hold an older version already.
    """
    if [r.index for r in rollouts] != list(range(sampling.n)):
        raise Garbage(f"rollouts {[r.index for r in rollouts]} where {sampling.n} were asked for")
    for rollout in rollouts:
        if wrong := _wrong(rollout, sampling, vocabulary, newest):
            raise Garbage(f"rollout {rollout.index} of prompt {rollout.prompt_id} with {wrong}")


def _wrong(rollout: Rollout, sampling: Sampling, vocabulary: int, newest: int | None) -> str:
    ids, logp, versions = rollout.token_ids, rollout.logp, rollout.versions
    if not len(ids) == len(logp) == len(versions) <= sampling.max_tokens:
        lengths = f"{len(ids)} tokens, {len(logp)} log-probs and {len(versions)} versions"
        return f"{lengths}, at most {sampling.max_tokens} of each"
    if rollout.finish_reason == "abort" and newest is not None:
        return f"an end after {len(ids)} tokens that nobody asked for"
    if not len(ids):
        return "" if rollout.finish_reason == "abort" else "no token"
    if ids.min() < 0 or ids.max() >= vocabulary:
        return f"token {ids.min() if ids.min() < 0 else ids.max()} in a vocabulary of {vocabulary}"
    if not np.isfinite(logp).all():
        return "a log-prob that is not finite"
    if logp.max() > 1e-3:  # rounding may leave a certain token a little above 0
        return f"a log-prob of {logp.max():g}"
    if versions.min() < 0 or (newest is not None and versions.max() > newest):
        return f"versions {versions.min()} to {versions.max()} while it held {newest}"
    return ""
