"""What a whole corpus is like: counts, lengths, rows that say the same, and what it shares with others; pure."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_ray.corpora.census import PICTURE_WORDS, SIGNATURE, Facts
from prism_ray.corpora.files import Fragment
from prism_ray.corpora.likeness import find_pairs, find_shared
from prism_ray.corpora.quarantine import Quarantine, Quarantined

_EXAMPLES = 5
"""Pairs that are named of each kind."""
_SHARES = {"least": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}


@dataclass(frozen=True)
class Row:
    """A usable row: its facts and its lengths in tokens (0 for a response that is not there)."""

    facts: Facts
    data_source: str
    prompt_tokens: int
    response_tokens: int


class Portrait:
    """A corpus as it is gone through; `error` is the sentence that a run would stop with ("" if it would not)."""

    def __init__(self, name: str, bad: Quarantine) -> None:
        self.name, self.bad, self.error = name, bad, ""
        self.fragments: Sequence[Fragment] = ()
        self.rows = 0
        self._fragments, self._places = array("q"), array("q")
        self._keys, self._ids = array("Q"), array("Q")
        self._signatures, self._pictures = bytearray(), bytearray()
        self._lengths: dict[str, array[int]] = {}
        self._sources: Counter[str] = Counter()
        self._images: Counter[int] = Counter()

    def take(self, fragment: int, place: int, item: Row | Quarantined) -> None:
        """Count a row in; `fragment` and `place` say where it lies."""
        self.rows += 1
        if isinstance(item, Quarantined):
            self.bad.note([item])
            return
        facts = item.facts
        self._fragments.append(fragment)
        self._places.append(place)
        self._keys.append(facts.key)
        self._ids.append(facts.identity)
        self._signatures += facts.signature.tobytes()
        self._pictures += facts.picture.tobytes()
        self._sources[item.data_source] += 1
        self._images[len(facts.sizes)] += 1
        self._note("prompt characters", facts.prompt_characters)
        self._note("prompt tokens", item.prompt_tokens)
        if item.response_tokens:
            self._note("response characters", facts.response_characters)
            self._note("response tokens", item.response_tokens)
        for width, height in facts.sizes:
            self._note("image width", width)
            self._note("image height", height)

    def _note(self, name: str, value: int) -> None:
        self._lengths.setdefault(name, array("q")).append(value)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys uint64 [N], signatures uint32 [N, SIGNATURE] and pictures uint64 [N, PICTURE_WORDS] of usable rows."""
        signatures = np.frombuffer(bytes(self._signatures), np.uint32).reshape(-1, SIGNATURE)
        pictures = np.frombuffer(bytes(self._pictures), np.uint64).reshape(-1, PICTURE_WORDS)
        return np.array(self._keys, np.uint64), signatures, pictures

    def at(self, row: int) -> str:
        """Where a person finds a usable row."""
        fragment = self.fragments[self._fragments[row]]
        return f"{fragment.unit} {self._places[row]} of {fragment.file}"

    def described(self) -> dict[str, Any]:
        """The portrait as plain data."""
        pairs = find_pairs(*self.arrays)
        _, first, inverse = np.unique(np.array(self._ids, np.uint64), return_index=True, return_inverse=True)
        again = np.flatnonzero(first[inverse] != np.arange(len(self)))
        repeated = np.column_stack([first[inverse[again]], again])
        return {
            "rows": self.rows,
            "usable": len(self),
            "quarantined": dict(self.bad.counts.most_common()),
            "data_sources": dict(self._sources.most_common()),
            "images_per_prompt": {str(count): n for count, n in sorted(self._images.items())},
            **{name: spread(values) for name, values in self._lengths.items()},
            "duplicates": {"exact": self._told(pairs.exact), "near": self._told(pairs.near)},
            "duplicate_ids": self._told(repeated),
        }

    def _told(self, pairs: np.ndarray) -> dict[str, Any]:
        return {"count": len(pairs), "examples": [[self.at(a), self.at(b)] for a, b in pairs[:_EXAMPLES].tolist()]}


def spread(values: Sequence[int]) -> dict[str, float]:
    """Mean and quantiles."""
    quantiles = np.quantile(values, list(_SHARES.values()), method="inverted_cdf").tolist()
    return {"mean": round(float(np.mean(values)), 1), **dict(zip(_SHARES, quantiles, strict=True))}


def overlap(training: Portrait, held_out: Portrait) -> dict[str, Any]:
    """Held-out rows that a training corpus contains, exactly or nearly."""
    pairs = find_shared(held_out.arrays, training.arrays)
    return {
        "training": training.name,
        "held_out": held_out.name,
        "exact": len(pairs.exact),
        "near": len(pairs.near),
        "examples": [[held_out.at(a), training.at(b)] for a, b in [*pairs.exact, *pairs.near][:_EXAMPLES]],
    }
