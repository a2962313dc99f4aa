"""Ids that come twice: training counts prompts by them, so of the rows of one id only the first is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from prism_ray.corpora.census import hash_of
from prism_ray.corpora.files import CorpusError, Fragment
from prism_ray.corpora.quarantine import Quarantined
from prism_ray.corpora.reader import Piece, read_piece
from prism_ray.corpora.rows import ID_COLUMNS, BadRow, id_of

_REASON = "id: used before"
_RECENT = 1 << 16
"""Ids that are held in a dict before they join the sorted arrays."""
_ROW_BITS = 44


class Ids:
    """The ids that were seen, each with the row that had it first: 16 bytes an id.

    They are held as digests of 63 bits; among a million ids two that differ are taken for one with a chance of 1e-7.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._units: list[str] = []
        self._digests, self._places = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._recent: dict[int, int] = {}

    def read(self, pieces: Iterable[Piece]) -> None:
        """Take in the rows of these pieces; only what an id is read from is read of them."""
        for piece in pieces:
            for _, row, columns in read_piece(piece, ID_COLUMNS):
                self._first(id_said(columns), self._place(piece.fragment.file, row, piece.fragment.unit))

    def again(self, said: str, file: str, row: int, unit: str) -> Quarantined | None:
        """What goes into quarantine of a row whose id (`said`) another had first; None if it is the first, or says
        none."""
        place = self._place(file, row, unit)
        if (first := self._first(said, place)) == place:
            return None
        number, first_row = first >> _ROW_BITS, first & ((1 << _ROW_BITS) - 1)
        at = f"{self._units[number]} {first_row} of {list(self._files)[number]}"
        return Quarantined(file, row, _REASON, f"{said[:80]}, first seen at {at}", unit)

    def _first(self, said: str, place: int) -> int:
        """The place of the first row with this id."""
        if not said:
            return place
        digest = hash_of(said.encode()) >> 1
        if (known := self._recent.get(digest)) is not None:
            return known
        at = int(np.searchsorted(self._digests, digest))
        if at < len(self._digests) and self._digests[at] == digest:
            return int(self._places[at])
        self._recent[digest] = place
        if len(self._recent) >= _RECENT:
            self._settle()
        return place

    def _place(self, file: str, row: int, unit: str) -> int:
        if file not in self._files:
            self._files[file] = len(self._files)
            self._units.append(unit)
        return self._files[file] << _ROW_BITS | row

    def _settle(self) -> None:
        digests = np.concatenate([self._digests, np.fromiter(self._recent.keys(), np.int64)])
        places = np.concatenate([self._places, np.fromiter(self._recent.values(), np.int64)])
        order = digests.argsort(kind="stable")
        self._digests, self._places = digests[order], places[order]
        self._recent = {}


def id_said(row: dict[str, Any] | BadRow) -> str:
    """The id that a row (as `read_piece` gave it) has of its own; "" where it says none that can be read."""
    try:
        return row.id if isinstance(row, BadRow) else id_of(row)
    except BadRow:
        return ""


def refuse_twice(fragments: Iterable[Fragment]) -> None:
    """Raise `CorpusError` for a file that is named twice."""
    seen: set[tuple[str, int]] = set()
    for fragment in fragments:
        if (fragment.file, fragment.first) in seen:
            raise CorpusError(f"{fragment.file}: named twice; every prompt is used once an epoch, so name it once")
        seen.add((fragment.file, fragment.first))
