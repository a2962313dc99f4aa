"""Scenes and their images: a small grid of coloured cells, each with a bold white digit.

A cell is 32 x 32 pixels, which is one merged visual token of Qwen3-VL (patch 16, merge 2).
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from prism_ray.testbed.words import COLOURS, DIGITS

CELL = 32
"""Side of a cell in pixels."""
PIXEL_NOISE, COLOUR_JITTER, POSITION_JITTER = 16.0, 25.0, 2.0
"""Spread of the pixel noise and of a cell's colour (levels of 0-255), reach of a digit's displacement (pixels)."""

_RGB = {"red": (200, 50, 50), "green": (40, 160, 60), "blue": (50, 80, 205)}
_INK = 255.0

_FONT = {
    1: ("..#..", ".##..", "..#..", "..#..", "..#..", "..#..", ".###."),
    2: (".###.", "#...#", "....#", "...#.", "..#..", ".#...", "#####"),
    3: (".###.", "#...#", "....#", "..##.", "....#", "#...#", ".###."),
    4: ("...#.", "..##.", ".#.#.", "#..#.", "#####", "...#.", "...#."),
    5: ("#####", "#....", "####.", "....#", "....#", "#...#", ".###."),
    6: ("..##.", ".#...", "#....", "####.", "#...#", "#...#", ".###."),
    7: ("#####", "....#", "...#.", "..#..", "..#..", ".#...", ".#..."),
    8: (".###.", "#...#", "#...#", ".###.", "#...#", "#...#", ".###."),
    9: (".###.", "#...#", "#...#", ".####", "....#", "...#.", ".##.."),
}
_SCALE = 3

Cells = tuple[tuple[str, int], ...]
"""The content of a scene in reading order: (colour, digit) per cell."""


def random_cells(rng: np.random.Generator, count: int) -> Cells:
    """`count` cells, colour and digit uniform and independent."""
    colours = rng.integers(len(COLOURS), size=count)
    digits = rng.integers(len(DIGITS), size=count)
    return tuple((COLOURS[c], DIGITS[d]) for c, d in zip(colours, digits, strict=True))


def labels(cells: Cells) -> list[int]:
    """Class indices for the vision pre-training: colour, digit, colour, digit … in reading order."""
    return [index for colour, digit in cells for index in (COLOURS.index(colour), DIGITS.index(digit))]


def draw(cells: Cells, rows: int, columns: int, hardness: float, rng: np.random.Generator) -> np.ndarray:
    """The image of a scene: uint8 [rows * 32, columns * 32, 3]; `hardness` scales all three kinds of disturbance."""
    if len(cells) != rows * columns:
        raise ValueError(f"{len(cells)} cells do not fill a grid of {rows} x {columns}")
    image = np.empty((rows * CELL, columns * CELL, 3), dtype=np.float32)
    reach = round(POSITION_JITTER * hardness)
    shifts = rng.integers(-reach, reach + 1, size=(len(cells), 2))
    tints = rng.normal(0.0, COLOUR_JITTER * hardness, size=(len(cells), 3))
    for index, (colour, digit) in enumerate(cells):
        top, left = (index // columns) * CELL, (index % columns) * CELL
        tile = image[top : top + CELL, left : left + CELL]
        tile[:] = np.asarray(_RGB[colour]) + tints[index]
        tile[_glyph(digit, int(shifts[index, 0]), int(shifts[index, 1]))] = _INK
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(PIXEL_NOISE * hardness)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    """`image` (uint8 [H, W, 3]) as PNG, not compressed: noise hardly compresses, and it doubles the time to read."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


@lru_cache(maxsize=2048)
def _glyph(digit: int, down: int, right: int) -> np.ndarray:
    """Where a cell carries ink: bool [32, 32], the digit scaled, one pixel bolder, centred, displaced."""
    small = np.array([[char == "#" for char in row] for row in _FONT[digit]])
    large = np.kron(small, np.ones((_SCALE, _SCALE), dtype=bool)).astype(bool)
    mask = np.zeros((CELL, CELL), dtype=bool)
    top, left = (CELL - large.shape[0]) // 2, (CELL - large.shape[1]) // 2
    mask[top : top + large.shape[0], left : left + large.shape[1]] = large
    mask[:, 1:] |= mask[:, :-1].copy()
    return np.roll(mask, (down, right), axis=(0, 1))
