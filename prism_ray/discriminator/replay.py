"""Older pairs of (reference, rollout), kept so that the discriminator does not forget what it has already learned.

A policy that comes back to an old fault meets a judge that still knows it. In a replication of GAD 4,096 pairs of which
half of every update was drawn halved the discriminator's collapses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from prism_ray.codec import decode, encode
from prism_ray.records import Group, Prompt, Rollout

REPLAY_FILE = "replay-{}.msgpack"
"""Name of a rank's pairs in a checkpoint."""


@dataclass(frozen=True, eq=False)
class _Pair:
    group_id: int
    prompt: Prompt
    rollout: Rollout


class Replay:
    """The last `pairs` pairs; the oldest give way. What is drawn depends on the seed, the contents and `turn` alone."""

    def __init__(self, pairs: int, seed: int) -> None:
        self.seed = seed
        self._pairs: deque[_Pair] = deque(maxlen=pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, groups: Sequence[Group]) -> None:
        """Keep every rollout of these groups with its reference: its text, and the version of its oldest token."""
        for group in groups:
            self._pairs.extend(_Pair(group.id, group.prompt, _slim(rollout)) for rollout in group.rollouts)

    def draw(self, fresh: int, share: float, turn: int) -> list[Group]:
        """Pairs that, beside `fresh` new ones, make up `share` of them all; fewer while the buffer fills.

        They come as groups, those of one group together. `turn` sets one draw apart from the next.
        """
        count = min(len(self), round(fresh * share / (1 - share)))
        random = np.random.default_rng((self.seed, turn))
        rows = np.sort(random.choice(len(self), count, replace=False)) if count else []
        return _groups([self._pairs[i] for i in rows])

    def save(self, folder: Path, rank: int = 0) -> None:
        """Write the pairs into `folder` as those of this rank, for `load`."""
        (folder / REPLAY_FILE.format(rank)).write_bytes(encode(_groups(list(self._pairs))))

    def load(self, folder: Path, rank: int = 0, ranks: int = 1) -> None:
        """Hold what this rank saved, as far as there is room; nothing where nothing was saved (replay was off then).

        What another number of ranks saved is dealt out to these.
        """
        self._pairs.clear()
        own, saved = folder / REPLAY_FILE.format(rank), len(list(folder.glob(REPLAY_FILE.format("*"))))
        if saved == ranks:
            self.add(decode(own.read_bytes()))
        elif saved:
            files = [folder / REPLAY_FILE.format(i) for i in range(saved)]
            self.add([group for file in files for group in decode(file.read_bytes())][rank::ranks])


def _groups(pairs: Sequence[_Pair]) -> list[Group]:
    """Neighbours of the same group and prompt as one group: a prompt's image is then encoded, and written, once."""
    done = []
    for _, members in groupby(pairs, key=lambda p: (p.group_id, p.prompt.id)):
        first, *others = members
        done.append(Group(first.group_id, first.prompt, tuple(p.rollout for p in (first, *others))))
    return done


def _slim(rollout: Rollout) -> Rollout:
    ids, logp = np.zeros(0, np.int32), np.zeros(0, np.float32)
    version = np.array([rollout.oldest_version], np.int32)
    return replace(rollout, prompt_token_ids=ids, token_ids=ids, logp=logp, versions=version)
