"""Writing prompts and references as Parquet with the published columns, such as `rows.py` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray.records import Prompt

FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("id", pa.string()),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ("data_source", pa.string()),
    ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("teacher_caption", pa.string()),
    ("teacher_cot", pa.string()),
    ("teacher_response", pa.string()),
    ("answer", pa.string()),
    ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
    ("extra_info", pa.string()),
)

_ROWS_PER_GROUP = 256
"""Rows of a row group, which is what is held in memory at a time: images make rows large."""


def row_of(prompt: Prompt, reference: str | None = None) -> dict[str, Any]:
    """A prompt's row, with this reference in place of its own."""
    reference = prompt.reference if reference is None else reference
    caption, cot = views_of(reference)
    return {
        "id": prompt.id,
        "images": [{"bytes": image, "path": None} for image in prompt.images],
        "data_source": prompt.data_source,
        "prompt": [dict(turn) for turn in prompt.messages],
        "teacher_caption": caption,
        "teacher_cot": cot,
        "teacher_response": reference,
        "answer": prompt.ground_truth,
        "reward_model": {"ground_truth": prompt.ground_truth, "style": "rule"},
        "extra_info": json.dumps(prompt.extra, ensure_ascii=False, default=str),
    }


def views_of(response: str) -> tuple[str, str]:
    """The caption and the rest of a response that keeps the format, tags included; both empty where it does not."""
    at = response.find("<think>")
    return (response[:at].strip(), response[at:].strip()) if at >= 0 else ("", "")


class RowWriter:
    """Writes rows, a row group at a time."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.rows = 0
        self._writer, self._schema = writer, schema
        self._held: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self._held.append(row)
        if len(self._held) >= _ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_pylist(self._held, self._schema))
            self._held = []

    def note(self, facts: Mapping[str, Any]) -> None:
        """Put facts into the file's metadata, as JSON under `prism_ray`."""
        self._writer.add_key_value_metadata({"prism_ray": json.dumps(facts)})


@contextmanager
def writing(path: Path, *extra: tuple[str, pa.DataType]) -> Iterator[RowWriter]:
    """A writer of `FIELDS` and these further columns. The file is there, whole, once the context ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema, partial = pa.schema([*FIELDS, *extra]), path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, schema) as writer:
        rows = RowWriter(writer, schema)
        yield rows
        rows.flush()
    partial.replace(path)


def facts_of(path: Path) -> dict[str, Any]:
    """What `RowWriter.note` put into a file."""
    return json.loads((pq.read_metadata(path).metadata or {}).get(b"prism_ray", b"{}"))
