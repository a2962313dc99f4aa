"""What is to be known of each row to describe a corpus and to find rows that say the same; pure.

A row becomes some numbers of fixed size, so that millions of rows fit into memory: a key of its text and images,
equal for equal ones; a MinHash signature of its text (Broder, 1997: the share of equal entries estimates the Jaccard
similarity of two texts' sets of shingles); and a difference hash of its first image, of which resized and recompressed
copies keep nearly all bits.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from prism_ray.corpora.checks import KINDS
from prism_ray.corpora.rows import MARKER
from prism_ray.records import Prompt

SIGNATURE = 16
"""Entries of a signature; the similarity of two texts is known to about +-.1."""
PICTURE_WORDS = 4
"""64-bit words of an image's hash: 16 x 16 comparisons."""
_SHINGLE = 8
"""Characters of a shingle: longer than most words, so that common words alone make no likeness."""
_SIDE = 16
_MOST_SHINGLED = 20_000
"""Characters of a text that are looked at for its signature."""
_SEEDS = np.random.default_rng(0).integers(1, 2**61 - 1, (2, SIGNATURE), dtype=np.uint64)


@dataclass(frozen=True)
class Facts:
    """A row in numbers. `key` and `identity` are 64-bit hashes of what is asked and of the id; `signature` uint32
    [SIGNATURE]; `picture` uint64 [PICTURE_WORDS] (zeros without an image); `sizes` width and height of each image."""

    key: int
    identity: int
    signature: np.ndarray
    picture: np.ndarray
    prompt_characters: int
    response_characters: int
    sizes: tuple[tuple[int, int], ...] = field(default=())


def facts_of(prompt: Prompt) -> Facts:
    """The facts of a prompt whose images decode."""
    return Facts(
        key=key_of(prompt),
        identity=hash_of(prompt.id.encode()),
        signature=signature_of(asked(prompt)),
        picture=picture_of(prompt.images[0]) if prompt.images else np.zeros(PICTURE_WORDS, np.uint64),
        prompt_characters=sum(len(turn["content"]) for turn in prompt.messages),
        response_characters=len(prompt.reference),
        sizes=tuple(_size(image) for image in prompt.images),
    )


def key_of(prompt: Prompt) -> int:
    """A hash of what is asked, text and images."""
    images = b"".join(hashlib.blake2b(image, digest_size=16).digest() for image in prompt.images)
    return hash_of(asked(prompt).encode() + b"\0" + images)


def asked(prompt: Prompt) -> str:
    """What the prompt asks, without what all prompts share (system turn, markers) and without layout and case."""
    said = " ".join(turn["content"] for turn in prompt.messages if turn["role"] != "system")
    return re.sub(r"\s+", " ", said.replace(MARKER, " ")).strip().casefold()


def hash_of(data: bytes) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def signature_of(text: str) -> np.ndarray:
    """The MinHash signature of a text's shingles, uint32 [SIGNATURE]."""
    codes = np.frombuffer(text[:_MOST_SHINGLED].encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < _SHINGLE:
        codes = np.pad(codes, (0, _SHINGLE - len(codes)))
    rolled = np.zeros(len(codes) - _SHINGLE + 1, np.uint64)
    for offset in range(_SHINGLE):
        rolled = rolled * np.uint64(0x100000001B3) + codes[offset : offset + len(rolled)]
    shingles = np.unique(_mixed(rolled))
    least = [_mixed(shingles * a + b).min() for a, b in _SEEDS.T]
    return (np.array(least, np.uint64) >> np.uint64(32)).astype(np.uint32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of x (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def picture_of(image: bytes) -> np.ndarray:
    """The difference hash of an image, uint64 [PICTURE_WORDS]: of a 17 x 16 grey thumbnail, whether each pixel is
    darker than its right neighbour."""
    with Image.open(io.BytesIO(image), formats=KINDS) as opened:
        opened.draft("L", (8 * _SIDE, 8 * _SIDE))  # a JPEG is decoded no larger than needed
        small = opened.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    return np.packbits(grey[:, :-1] < grey[:, 1:]).view(np.uint64)


def _size(image: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(image), formats=KINDS) as opened:
        return opened.size
