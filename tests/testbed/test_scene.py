"""Scenes and images: shape, determinism, and that a picture shows what its cells say."""

import io

import numpy as np
import pytest
from PIL import Image

from prism_ray.testbed.scene import CELL, draw, encode_png, labels, random_cells
from prism_ray.testbed.words import COLOURS, DIGITS


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_image_has_one_visual_token_of_pixels_per_cell():
    image = draw(random_cells(rng(), 6), 2, 3, 1.0, rng())
    assert image.shape == (2 * CELL, 3 * CELL, 3)
    assert image.dtype == np.uint8


def test_png_keeps_every_pixel():
    image = draw(random_cells(rng(), 6), 2, 3, 1.3, rng())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image)))), image)


def test_drawing_is_deterministic_in_its_generator():
    cells = random_cells(rng(), 6)
    first, again, other = (draw(cells, 2, 3, 1.3, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("hardness", [1.0, 1.3])
def test_colour_and_digit_can_be_read_off_a_cell(hardness: float):
    """Nearest noiseless cell, over displacements: a plain reader is nearly always right, so the labels are true."""
    reader = {
        (colour, digit): draw(((colour, digit),), 1, 1, 1e-9, rng()).astype(float)
        for colour in COLOURS
        for digit in DIGITS
    }
    right, generator = 0, rng(3)
    for _ in range(60):
        cells = random_cells(generator, 1)
        image = draw(cells, 1, 1, hardness, generator).astype(float)
        shifted = [np.roll(image, (-down, -across), (0, 1)) for down in range(-3, 4) for across in range(-3, 4)]
        best = min(reader, key=lambda cell: min(np.square(s - reader[cell]).mean() for s in shifted))
        right += best == cells[0]
    assert right >= 57


def test_hardness_scales_the_disturbance():
    cells = random_cells(rng(), 6)
    calm = draw(cells, 2, 3, 1e-9, rng()).astype(float)
    mild, hard = (np.abs(draw(cells, 2, 3, h, rng(5)).astype(float) - calm).mean() for h in (0.5, 1.5))
    assert hard > 2 * mild > 0


def test_a_grid_that_the_cells_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="5 cells do not fill a grid of 2 x 3"):
        draw(random_cells(rng(), 5), 2, 3, 1.0, rng())


def test_labels_index_colour_and_digit():
    assert labels((("green", 1), ("blue", 9))) == [1, 0, 2, 8]
