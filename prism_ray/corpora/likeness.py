"""Rows that say the same, exactly or nearly, found in arrays of facts by sorting; pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prism_ray.corpora.census import PICTURE_WORDS, SIGNATURE

ALIKE_TEXT = 0.75
"""Least share of equal entries of two signatures."""
ALIKE_BITS = 12
"""Most different bits, of 256, of two images' hashes."""
_BANDS = 4
_COMPARED = 64
"""Training rows that a held-out row is compared with, of those that are alike in the same quarters."""


Facts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of each row the key, uint64 [N], the signature, uint32 [N, SIGNATURE], and the picture, uint64 [N, PICTURE_WORDS]."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows (first, second), int64 [n, 2], first < second."""

    exact: np.ndarray
    near: np.ndarray


def find_pairs(key_N: np.ndarray, signature_NS: np.ndarray, picture_NW: np.ndarray) -> Pairs:
    """Each row that equals an earlier one, with the first such; and pairs that are nearly alike: texts that share at
    least `ALIKE_TEXT` of their signatures and images that differ in at most `ALIKE_BITS` bits, but are not equal.

    Rows are near candidates if a quarter of the text's signature and a quarter of the image's hash are the same; of
    many candidates that are alike in the same quarters only neighbours are compared: chains are found, not all pairs.
    """
    exact = _repeated(key_N)
    rows = np.setdiff1d(np.arange(len(key_N)), exact[:, 1]) if len(exact) else np.arange(len(key_N))
    found: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
    for band in range(_BANDS):
        for word in range(PICTURE_WORDS):
            found.append(rows[_neighbours(_quarters(signature_NS[rows], picture_NW[rows], band, word))])
    near = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return Pairs(exact, near[_alike(near, (signature_NS, picture_NW), (signature_NS, picture_NW))])


def find_shared(held_out: Facts, training: Facts) -> Pairs:
    """Held-out rows that are among the training rows too, each with the
    first training row that equals it, or else with one that is nearly alike.

    Candidates are those of `find_pairs`, whatever the other held-out rows are; of the training rows that are alike in
    the same quarters a held-out row is compared with `_COMPARED`.
    """
    order, same = np.argsort(training[0], kind="stable"), np.isin(held_out[0], training[0])
    exact = np.column_stack([np.flatnonzero(same), order[np.searchsorted(training[0][order], held_out[0][same])]])
    found, missing = [np.zeros((0, 2), np.int64)], np.flatnonzero(~same)
    for band in range(_BANDS):
        for word in range(PICTURE_WORDS):
            quarters = (_quarters(signature, picture, band, word) for _, signature, picture in (held_out, training))
            pairs = _near(missing, held_out, training, *quarters)
            found.append(pairs)
            missing = np.setdiff1d(missing, pairs[:, 0])
    near = np.concatenate(found)
    return Pairs(exact, near[np.argsort(near[:, 0])])


def _near(missing: np.ndarray, held_out: Facts, training: Facts, wanted: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Of these held-out rows those that are nearly alike a training row of the same quarters, each with one."""
    order = np.argsort(there, kind="stable")
    first, last = (np.searchsorted(there[order], wanted[missing], side) for side in ("left", "right"))
    found = [np.zeros((0, 2), np.int64)]
    for step in range(min(_COMPARED, int((last - first).max(initial=0)))):
        left = first + step < last
        missing, first, last = missing[left], first[left], last[left]
        pairs = np.column_stack([missing, order[first + step]])
        alike = _alike(pairs, held_out[1:], training[1:])
        found.append(pairs[alike])
        missing, first, last = missing[~alike], first[~alike], last[~alike]
    return np.concatenate(found)


def _quarters(signature_NS: np.ndarray, picture_NW: np.ndarray, band: int, word: int) -> np.ndarray:
    """A number for a quarter of the text and one of the image; where they are the same, so is the number."""
    width = SIGNATURE // _BANDS
    number = picture_NW[:, word].copy()
    for column in signature_NS[:, band * width : (band + 1) * width].T:
        number = (number ^ column) * np.uint64(0x9E3779B97F4A7C15)
    return number


def _repeated(key_N: np.ndarray) -> np.ndarray:
    """(first row with this key, row) for every later row with it."""
    _, first, inverse = np.unique(key_N, return_index=True, return_inverse=True)
    of = first[inverse]
    rows = np.flatnonzero(of != np.arange(len(key_N)))
    return np.column_stack([of[rows], rows])


def _neighbours(key_N: np.ndarray) -> np.ndarray:
    """Pairs of rows with equal keys that follow one another when sorted."""
    order = np.argsort(key_N, kind="stable")
    same = key_N[order[1:]] == key_N[order[:-1]]
    return np.column_stack([order[:-1][same], order[1:][same]])


def _alike(pairs: np.ndarray, some: tuple[np.ndarray, ...], others: tuple[np.ndarray, ...]) -> np.ndarray:
    """Which pairs (row of `some`, row of `others`) are alike; both are signatures and pictures."""
    first, second = pairs.T
    text = (some[0][first] == others[0][second]).mean(axis=1)
    bits = np.bitwise_count(some[1][first] ^ others[1][second]).sum(axis=1)
    return (text >= ALIKE_TEXT) & (bits <= ALIKE_BITS)
