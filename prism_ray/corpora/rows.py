"""One row with the published columns -> `Prompt`.

The columns (PRISM, arXiv 2604.28123): `prompt` chat list, `images` list of encoded bytes or `struct<bytes, path>`,
`teacher_caption`, `teacher_cot`, `teacher_response` with or without the format's tags, `answer`,
`reward_model` struct with `ground_truth` and `equivalent_answers`, `extra_info` JSON or struct, `data_source`. Only
`prompt` is required. `student_response` is the other side of a warm-up pair. `layouts.py` makes these of other rows.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from prism_ray.records import Prompt
from prism_ray.response import parse, render

REQUIRED_COLUMNS = ("prompt",)
COLUMNS = (
    "id",
    "data_source",
    "prompt",
    "images",
    "teacher_caption",
    "teacher_cot",
    "teacher_response",
    "answer",
    "reward_model",
    "extra_info",
)
"""The columns that a prompt is made of."""
ID_COLUMNS = ("id", "extra_info")
"""The columns that a row's id is read from."""
STUDENT = "student_response"
"""Where `Prompt.extra` keeps the student's side of a warm-up pair."""
MAX_IMAGE_BYTES = 256 * 2**20
"""Largest image file that is read: what a path names may be anything."""

MARKER = "<image>"


class BadRow(ValueError):
    """A row that cannot be used. `reason` names the column and what is wrong with it, and is short, so that rows can
    be counted by it; `detail` is what is particular to this row, `unit` what its place in the file counts, `id` what
    the row calls itself ("": nothing that can be read)."""

    unit = "row"
    id = ""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def prompt_from_row(row: Mapping[str, Any] | BadRow, default_id: str = "", folder: Path | None = None) -> Prompt:
    """The prompt of a row; `default_id` names it if the row does not, `folder` is where relative image paths start and
    what they may not lead out of (None: no image may be given by its path).

    Raises `BadRow`; a row that could not even be read comes as one.
    """
    if isinstance(row, BadRow):
        raise row
    extra = _extra(row.get("extra_info"))
    messages = _messages(row.get("prompt"))
    images = _images(row.get("images"), folder)
    markers = sum(m["content"].count(MARKER) for m in messages)
    if markers != len(images):
        raise BadRow(f"prompt: {MARKER} markers and images differ in number", f"{markers} and {len(images)}")
    return Prompt(
        id=text_of(row.get("id")) or text_of(extra.get("id")) or default_id,
        messages=messages,
        images=images,
        reference=_reference(row),
        ground_truth=_ground_truth(row, extra),
        data_source=text_of(row.get("data_source")),
        extra=extra | _equivalents(row) | _student(row),
    )


def id_of(row: Mapping[str, Any]) -> str:
    """The id that a row has of its own, or "". Raises `BadRow` where it cannot be read."""
    return text_of(row.get("id")) or text_of(_extra(row.get("extra_info")).get("id"))


def _student(row: Mapping[str, Any]) -> dict[str, str]:
    return {STUDENT: text_of(row[STUDENT])} if row.get(STUDENT) else {}


def _equivalents(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Answers as right as the ground truth, where verifiers look for them."""
    model = row.get("reward_model")
    found = model.get("equivalent_answers") if isinstance(model, Mapping) else None
    return {"equivalent_answers": [text_of(answer) for answer in found]} if is_list(found) and len(found) else {}


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not is_list(value) or len(value) == 0:
        raise BadRow("prompt: not a list of chat turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise BadRow("prompt: a chat turn without a role")
        turns.append({"role": turn["role"], "content": _content(turn.get("content"))})
    if not any(turn["content"].strip() for turn in turns):
        raise BadRow("prompt: empty")
    return tuple(turns)


def _content(value: Any) -> str:
    """A content as text; lists of typed parts become text with `<image>` markers."""
    if isinstance(value, str):
        return text_of(value)
    if not is_list(value) or not all(isinstance(part, Mapping) for part in value):
        raise BadRow("prompt: a chat turn whose content is not text")
    return "".join(MARKER if part.get("type") == "image" else text_of(part.get("text")) for part in value)


def _images(value: Any, folder: Path | None) -> tuple[bytes, ...]:
    if value is None:
        return ()
    if not is_list(value):
        raise BadRow("images: not a list")
    return tuple(_image(item, folder) for item in value)


def _image(item: Any, folder: Path | None) -> bytes:
    data, path = (item.get("bytes"), item.get("path")) if isinstance(item, Mapping) else (item, None)
    if isinstance(data, str):
        data, path = None, data
    if isinstance(data, bytes) and data:
        return data
    if not path or not isinstance(path, str):
        raise BadRow("images: an image with neither bytes nor path")
    return _decoded(path) if path.startswith("data:") else _read(path, folder)


def _decoded(uri: str) -> bytes:
    try:
        return base64.b64decode(uri.partition(";base64,")[2], validate=True)
    except ValueError as error:
        raise BadRow("images: a data URI that is not base64", str(error)) from error


def _read(path: str, folder: Path | None) -> bytes:
    """The file at a path of the corpus. A corpus comes from elsewhere: it may not name files that are none of its."""
    if folder is None:
        raise BadRow("images: a path, but the corpus has no folder here", path)
    try:
        place = (folder / path).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise BadRow("images: a path that leads out of the corpus's folder", path)
        if place.exists() and not place.is_file():
            raise BadRow("images: a path that is no file", path)
        if place.stat().st_size > MAX_IMAGE_BYTES:
            raise BadRow("images: a file that is too large", f"{path}: {place.stat().st_size} bytes")
        return place.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadRow):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRow("images: a file that cannot be read", f"{path}: {reason}") from error


def _reference(row: Mapping[str, Any]) -> str:
    """The teacher's whole response: `teacher_response` if it keeps the format, else put together from the columns.

    What cannot be put together is returned as it stands; whoever requires a reference checks that it parses.
    """
    whole = text_of(row.get("teacher_response"))
    if parse(whole).valid:
        return whole
    cot = text_of(row.get("teacher_cot"))
    caption = _inner("caption", text_of(row.get("teacher_caption"))) or _inner("caption", whole, required=True)
    think = _inner("think", cot) or _inner("think", whole, required=True)
    answer = _inner("answer", cot, required=True) or _inner("answer", whole, required=True)
    answer = answer or text_of(row.get("answer"))
    if not (caption and think and answer):
        return whole
    try:
        return render(caption, think, answer)
    except ValueError:
        return whole


def _inner(tag: str, text: str, required: bool = False) -> str:
    """What stands inside a tag; without the tag the text itself, or nothing where the tag is required."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    if found:
        return found.group(1)
    return "" if required else text


def _ground_truth(row: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    model = row.get("reward_model")
    if isinstance(model, str):
        model = _json("reward_model", model)
    if model is not None and not isinstance(model, Mapping):
        raise BadRow("reward_model: not a struct")
    candidates = ((model or {}).get("ground_truth"), row.get("answer"), extra.get("answer"))
    return next((text_of(c) for c in candidates if c is not None and text_of(c)), "")


def _extra(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json("extra_info", value) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRow("extra_info: not an object")
    return dict(value)


def _json(column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{column}: not JSON", str(error)) from error


def text_of(value: Any) -> str:
    """A value as text, None as "". Half of a surrogate pair, which JSON can spell, is not text: raises `BadRow`."""
    text = "" if value is None else value if isinstance(value, str) else str(value)
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise BadRow("text: half of a surrogate pair", repr(text[:40]))
    return text


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list, as JSON, Arrow or numpy have it."""
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
