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
    width = SIGNATURE // _BANDS
    for band in range(_BANDS):
        text = signature_NS[rows, band * width : (band + 1) * width]
        for word in range(PICTURE_WORDS):
            found.append(rows[_neighbours(np.column_stack([text, picture_NW[rows, word]]).astype(np.uint64))])
    near = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return Pairs(exact, near[_alike(near, signature_NS, picture_NW)])


def _repeated(key_N: np.ndarray) -> np.ndarray:
    """(first row with this key, row) for every later row with it."""
    _, first, inverse = np.unique(key_N, return_index=True, return_inverse=True)
    of = first[inverse]
    rows = np.flatnonzero(of != np.arange(len(key_N)))
    return np.column_stack([of[rows], rows])


def _neighbours(key_NK: np.ndarray) -> np.ndarray:
    """Pairs of rows with equal keys that follow one another when sorted."""
    order = np.lexsort(key_NK.T)
    same = (key_NK[order[1:]] == key_NK[order[:-1]]).all(axis=1)
    return np.column_stack([order[:-1][same], order[1:][same]])


def _alike(pairs: np.ndarray, signature_NS: np.ndarray, picture_NW: np.ndarray) -> np.ndarray:
    first, second = pairs.T
    text = (signature_NS[first] == signature_NS[second]).mean(axis=1)
    bits = np.bitwise_count(picture_NW[first] ^ picture_NW[second]).sum(axis=1)
    return (text >= ALIKE_TEXT) & (bits <= ALIKE_BITS)
