"""Rows as others write them -> the published columns, which `rows.py` reads.

Known without being told: the published columns themselves; ShareGPT as LLaMA-Factory reads it (`conversations` with
`from` and `value`, or `messages` with `role` and `content`; `images` are paths); a plain `question` with `image` or
`images`; and warm-up pairs (`question`, `image`, `teacher_caption`, `teacher_cot`, `student_caption`, `student_cot`).
Any other name is given to ours by `SourceSettings.columns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prism_ray.config.corpora import FIELDS, SourceSettings
from prism_ray.corpora.rows import MARKER, BadRow, is_list, text_of

_TURNS = ("conversations", "messages")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_STANDS_FOR = {
    "prompt": ("prompt", "question", *_TURNS),
    "teacher_response": ("teacher_response", "teacher_cot", *_TURNS),
    "reward_model": ("reward_model", "answer", "extra_info"),
    "student_cot": ("student_cot",),
}
"""What a stage may require of a corpus, and the columns that can hold it."""
_OBJECTS = ("reward_model", "extra_info")


def columns_to_read(columns: Iterable[str], source: SourceSettings) -> tuple[str, ...]:
    """The file's columns that these published ones are made of."""
    wanted = dict.fromkeys(columns)
    if "prompt" in wanted:
        wanted |= dict.fromkeys((*FIELDS, "messages"))
    elif "images" in wanted:
        wanted |= {"image": None}
    places = (_place(name, source) for name in wanted)
    return tuple(dict.fromkeys(place[0] for place in places if place))


def missing(required: Iterable[str], names: Iterable[str], source: SourceSettings) -> list[str]:
    """Those of the required columns that a file with columns of these names has nothing for."""
    there = set(names)
    return [r for r in required if not any(there & {*_place(n, source)[:1]} for n in _STANDS_FOR.get(r, (r,)))]


def _place(name: str, source: SourceSettings) -> list[str]:
    """The file's column for a name of ours, and the way inside it; nothing where that column is mapped to another."""
    if name in source.columns:
        return source.columns[name].split(".")
    return [] if name in _taken(source) else [name]


def _taken(source: SourceSettings) -> set[str]:
    """The file's columns that names of ours are mapped from. An object of ours, of which only a part is, stays one."""
    columns = ((place.partition(".")[0], place) for place in source.columns.values())
    return {place if column in _OBJECTS else column for column, place in columns}


def named(raw: Mapping[str, Any], columns: Iterable[str], source: SourceSettings) -> dict[str, Any]:
    """These columns of a row, by our names."""
    return {name: _found(raw, _place(name, source)) for name in columns}


def published(raw: Mapping[str, Any], source: SourceSettings) -> dict[str, Any]:
    """A row with the published columns. Raises `BadRow`."""
    taken = _taken(source)
    row = {name: value for name, value in raw.items() if name not in taken}
    for name in source.columns:
        row[name] = _found(raw, _place(name, source))
    if row.get("images") is None and row.get("image") not in (None, ""):
        row["images"] = row["image"] if is_list(row["image"]) else [row["image"]]
    elif isinstance(row.get("images"), str | Mapping):
        row["images"] = [row["images"]]
    if row.get("prompt") is None:
        row |= _turns_of(row)
    if isinstance(row.get("student_caption"), str) and isinstance(row.get("student_cot"), str):
        row["student_response"] = row["student_caption"] + row["student_cot"]
    if source.system and is_list(row.get("prompt")):
        turns = list(row["prompt"])
        told = any(isinstance(turn, Mapping) and turn.get("role") == "system" for turn in turns)
        row["prompt"] = turns if told else [{"role": "system", "content": source.system}, *turns]
    return row


def _found(raw: Mapping[str, Any], place: list[str]) -> Any:
    value: Any = raw if place else None
    for step in place:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _turns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """`prompt`, and what else the turns say."""
    for name in _TURNS:
        if row.get(name) is not None:
            return _conversation(name, row)
    if row.get("question") is None:
        return {}
    question = row["question"]
    if not isinstance(question, str):
        raise BadRow("question: not text")
    if not question.strip():
        raise BadRow("question: empty")
    images = row.get("images")
    count = len(images) if is_list(images) else 0
    marked = question if MARKER in question else MARKER * count + question
    return {"prompt": [*_system_of(row), {"role": "user", "content": marked}]}


def _conversation(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The turns before the last answer are the prompt, that answer is the reference."""
    if not is_list(row[name]):
        raise BadRow(f"{name}: not a list of turns")
    turns = [*_system_of(row), *(_turn(name, turn) for turn in row[name])]
    if turns and turns[-1]["role"] == "assistant":
        answer = turns.pop()["content"]
        return {"prompt": turns, "teacher_response": row.get("teacher_response") or text_of(answer)}
    return {"prompt": turns}


def _turn(name: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{name}: a turn that is no object")
    role = turn.get("from", turn.get("role"))
    if role not in _ROLES:
        raise BadRow(f"{name}: a turn of nobody known", f"{role!r}; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": turn.get("value", turn.get("content"))}


def _system_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
