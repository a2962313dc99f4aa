"""The testbed's corpora, written as Parquet with the columns of the published PRISM data.

Each split has its own random stream, so changing one split's size leaves the others as they were; a scene with its
question is used once in all splits together.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray.config.testbed import TestbedSettings
from prism_ray.testbed.noise import careless
from prism_ray.testbed.questions import CELL, EACH, EACH_RANGE, ONE_COLOUR, Question, answer, random_question
from prism_ray.testbed.scene import Cells, draw, encode_png, labels, random_cells
from prism_ray.testbed.teacher import STYLES, Response, teach

DATA_SOURCE = "prism_testbed"
SPLITS = ("evaluate", "evaluate_unseen", "align", "rlvr", "sft", "base", "pretrain")
"""In the order they are drawn: the held-out ones first, so that they never depend on the training splits' sizes."""

_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
SCHEMA = pa.schema(
    [
        ("images", _IMAGES),
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
"""`teacher_caption` and `teacher_cot` carry their tags and join to `teacher_response`; `extra_info` is JSON: id, the
question (family, operation, colours, cell), `cells` as [colour, digit] in reading order, and `damage` (SFT)."""
PRETRAIN_SCHEMA = pa.schema([("images", _IMAGES), ("labels", pa.list_(pa.int32())), ("extra_info", pa.string())])
"""`labels` are class indices: colour, digit, colour, digit … of the cells in reading order."""

_ROWS_PER_GROUP = 512
"""Rows of a Parquet row group: small enough that readers can split a file among themselves."""


def write_corpora(folder: Path, settings: TestbedSettings, seed: int) -> dict[str, Path]:
    """Write every split to `folder/<split>.parquet` and return the paths by split. Deterministic in `seed`."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[tuple[Cells, Question | None]] = set()
    paths = {}
    for split in SPLITS:
        paths[split] = folder / f"{split}.parquet"
        rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
        _write(paths[split], split, _rows(split, settings, rng, seen))
    return paths


def _write(path: Path, split: str, rows: Iterator[dict[str, Any]]) -> None:
    schema = PRETRAIN_SCHEMA if split == "pretrain" else SCHEMA
    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, schema, compression="none") as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    partial.replace(path)


def _rows(
    split: str, settings: TestbedSettings, rng: np.random.Generator, seen: set[tuple[Cells, Question | None]]
) -> Iterator[dict[str, Any]]:
    count = settings.rows * settings.columns
    hardness = settings.base_hardness if split == "base" else settings.hardness
    for index in range(getattr(settings, split)):
        cells, question = _fresh(split, settings, count, rng, seen)
        image = encode_png(draw(cells, settings.rows, settings.columns, hardness, rng))
        extra: dict[str, Any] = {"id": f"{split}-{index:06d}", "cells": cells}
        if question is None:
            yield {"images": [_image(image)], "labels": labels(cells), "extra_info": json.dumps(extra)}
            continue
        style = STYLES[int(rng.integers(settings.teacher_styles))]
        if split == "sft":
            response, damage = careless(cells, question, settings.noise, rng, style)
            extra["damage"] = damage
        else:
            response = teach(cells, question, style)
        yield _row(image, question, cells, response, extra | question.as_dict())


def _fresh(
    split: str,
    settings: TestbedSettings,
    count: int,
    rng: np.random.Generator,
    seen: set[tuple[Cells, Question | None]],
) -> tuple[Cells, Question | None]:
    """A scene and question that no split has had."""
    for _ in range(1000):
        cells = random_cells(rng, count)
        question = None if split == "pretrain" else random_question(rng, _family(split, settings, rng), count)
        if (cells, question) not in seen:
            seen.add((cells, question))
            return cells, question
    raise ValueError(f"testbed.{split}: the grid has too few different scenes; ask for fewer rows or a larger grid")


def _family(split: str, settings: TestbedSettings, rng: np.random.Generator) -> str:
    if split == "evaluate_unseen":
        return EACH_RANGE
    if split == "base" and rng.random() < settings.simple_questions:
        return CELL if rng.random() < settings.cell_questions else ONE_COLOUR
    return EACH


def _row(image: bytes, question: Question, cells: Cells, response: Response, extra: dict[str, Any]) -> dict[str, Any]:
    text, truth = response.text, answer(question, cells)
    cut = text.index("<think>")
    return {
        "images": [_image(image)],
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"<image>{question.text}"}],
        "teacher_caption": text[:cut],
        "teacher_cot": text[cut:],
        "teacher_response": text,
        "answer": truth,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": json.dumps(extra),
    }


def _image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}
