"""Small corpora with the published columns, and a private Ray for this room."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.response import render

IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
SCHEMA = pa.schema(
    [
        ("images", IMAGES),
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("teacher_caption", pa.string()),
        ("teacher_cot", pa.string()),
        ("teacher_response", pa.string()),
        ("answer", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.string()),
    ]
)


def png(seed: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def row(index: int = 0, **changes):
    good = {
        "images": [{"bytes": png(index), "path": None}],
        "data_source": "mm_gad",
        "prompt": [{"role": "system", "content": "be exact"}, {"role": "user", "content": f"<image>what is {index}"}],
        "teacher_caption": "<caption>a picture</caption>",
        "teacher_cot": f"<think>look</think><answer>{index}</answer>",
        "teacher_response": render("a picture", "look", str(index)),
        "answer": str(index),
        "reward_model": {"ground_truth": str(index), "style": "rule"},
        "extra_info": json.dumps({"id": f"row-{index}", "split": "train"}),
    }
    return good | changes


def write(path, rows, group=8, schema=SCHEMA):
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=group)
    return path


@pytest.fixture
def make():
    """The functions that make rows, images and files."""
    return SimpleNamespace(row=row, png=png, write=write)
