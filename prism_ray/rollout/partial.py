"""What is known of unfinished rollouts outside the engine that samples them, and what can be made of it.

Engines tell their news in pieces (`Piece`); whoever keeps them puts them together when the engine is gone. A rollout
under way is a `Rollout` with finish reason `abort`, whose prompt's tokens and text the next engine fills in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prism_ray.records import Rollout

UNFINISHED = "abort"


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens `start` and on of rollout `index`: int32, float32 and int32 arrays of one length. `finish_reason` is
    `UNFINISHED` where more are to come."""

    index: int
    start: int
    token_ids: np.ndarray
    logp: np.ndarray
    versions: np.ndarray
    finish_reason: str


def assembled(prompt_id: str, so_far: Sequence[Rollout], pieces: Iterable[Piece]) -> tuple[Rollout, ...]:
    """The rollouts of a group with all that is known: those of `so_far`, and `pieces` in the order they were told.

    A piece that does not join on to what is known of its rollout (one before it was lost) is left out, and so are
    those that follow. Rollouts without a token are left out.
    """
    known = {r.index: r for r in so_far}
    for piece in pieces:
        begun = known.get(piece.index) or nothing(prompt_id, piece.index)
        if piece.start == len(begun.token_ids):
            known[piece.index] = joined(begun, _rollout(prompt_id, piece))
    return tuple(known[i] for i in sorted(known) if len(known[i].token_ids))


def joined(begun: Rollout, rest: Rollout) -> Rollout:
    """One rollout of a beginning and its continuation; text and prompt tokens are those of `rest`."""
    mask = begun.mask
    if mask is not None:
        mask = np.concatenate([mask, np.ones(len(rest.token_ids), np.bool_)])
    return replace(
        begun,
        prompt_id=rest.prompt_id,
        prompt_token_ids=rest.prompt_token_ids,
        token_ids=np.concatenate([begun.token_ids, rest.token_ids]),
        logp=np.concatenate([begun.logp, rest.logp]),
        versions=np.concatenate([begun.versions, rest.versions]),
        text=rest.text,
        finish_reason=rest.finish_reason,
        mask=mask,
    )


def tokens_in(rollouts: Iterable[Rollout]) -> int:
    return sum(len(r.token_ids) for r in rollouts)


def nothing(prompt_id: str, index: int) -> Rollout:
    """A rollout of which nothing is known yet."""
    ints = np.zeros(0, np.int32)
    return Rollout(prompt_id, index, ints, ints, np.zeros(0, np.float32), ints, "", UNFINISHED)


def _rollout(prompt_id: str, piece: Piece) -> Rollout:
    arrays = (piece.token_ids, piece.logp, piece.versions)
    return Rollout(prompt_id, piece.index, np.zeros(0, np.int32), *arrays, "", piece.finish_reason)
