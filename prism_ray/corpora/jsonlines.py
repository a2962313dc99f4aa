"""JSON Lines, and `.json` arrays: a fragment is a range of bytes.

Of JSON Lines every range of `FRAGMENT_BYTES` is one, and the lines that begin in it are its rows: nothing of the file
needs to be read to know the fragments, and one that is read needs no other. How many rows a fragment has is counted
when the order first comes to it. An array has no such landmarks, so it is gone through once, up to a stated size.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from prism_ray.config.corpora import SourceSettings
from prism_ray.corpora.files import CorpusError, Fragment, open_binary, size_of
from prism_ray.corpora.rows import BadRow

FRAGMENT_BYTES = 4 * 2**20
"""Positions depend on it: it must stay what it is."""
MAX_LINE_BYTES = 64 * 2**20
"""Longest row; what is longer is not held in memory but quarantined."""

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "compressed (gzip)", b"PK": "a ZIP archive"}
_BOM = b"\xef\xbb\xbf"
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)
_SPACE = b" \t\r\n"


def json_fragments(file: str, source: SourceSettings, array: bool, max_mb: float) -> list[Fragment]:
    """A file's fragments. Raises `CorpusError` for a file that is missing, empty, compressed or not UTF-8, and for an
    array that is too large or broken."""
    size = size_of(file)
    with open_binary(file) as opened:
        head = opened.read(64)
    for mark, kind in _MARKS.items():
        if head.startswith(mark):
            raise CorpusError(f"{file}: it is {kind}; write it as plain UTF-8, so that it can be read from any place")
    if not head.removeprefix(_BOM).strip() and size <= len(head):
        raise CorpusError(f"{file}: no rows; write the corpus again")
    if array and head.removeprefix(_BOM).lstrip().startswith(b"["):
        return _array_fragments(file, source, size, max_mb)
    ranges = range(0, size, FRAGMENT_BYTES)
    ends = [min(start + FRAGMENT_BYTES, size) for start in ranges]
    return [Fragment(file, i, a, None, b, "jsonl", source) for i, (a, b) in enumerate(zip(ranges, ends, strict=True))]


def count_rows(fragment: Fragment) -> int:
    """How many rows a fragment has."""
    return len(_lines(fragment))


def json_rows(fragment: Fragment, rows: list[int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """These rows of a fragment, each with the byte that it begins at; one that cannot be read is the `BadRow` that says
    why."""
    lines = _lines(fragment)
    for row in rows:
        start, line = lines[row]
        yield start, _parsed(line)


def _parsed(line: bytes | None) -> dict[str, Any] | BadRow:
    if line is None:
        return BadRow("line: too long", f"more than {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("line: not UTF-8", f"byte {error.start} of the line")
    except RecursionError:
        return BadRow("line: nested too deeply")
    except ValueError as error:
        return BadRow("line: not JSON", str(error))
    return value if isinstance(value, dict) else BadRow("line: not an object", type(value).__name__)


@lru_cache(maxsize=1)
def _lines(fragment: Fragment) -> list[tuple[int, bytes | None]]:
    """Where each row of a fragment begins, and its bytes (None: too many)."""
    try:
        with open_binary(fragment.file) as file:
            if fragment.format == "json":
                file.seek(fragment.first)
                return _elements(file.read(fragment.stop - fragment.first), fragment.first)
            return list(_lines_of(file, fragment))
    except OSError as error:
        where = f"{fragment.file}: bytes {fragment.first} to {fragment.stop}"
        raise CorpusError(f"{where} cannot be read ({error.strerror or error}); is the file still there?") from error


def _lines_of(file: Any, fragment: Fragment) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in the fragment's range, but not the blank ones."""
    before = max(fragment.first - 1, 0)  # a line begins behind a newline, which may be the last byte before the range
    file.seek(before)
    data = file.read(fragment.stop - before)
    start = data.find(b"\n") + 1 if fragment.first else len(_BOM) * data.startswith(_BOM)
    if fragment.first and not start:
        return
    while start < len(data):
        end = data.find(b"\n", start)
        line = data[start : end if end >= 0 else None]
        whole = line if end >= 0 else _finished(file, line)
        if whole is None or whole.strip():
            yield before + start, whole
        if end < 0:
            return
        start = end + 1


def _finished(file: Any, begun: bytes) -> bytes | None:
    """A line whose end lies behind the range; None where it is too long."""
    parts, length = [begun], len(begun)
    while length <= MAX_LINE_BYTES:
        more = file.read(FRAGMENT_BYTES)
        end = more.find(b"\n")
        parts.append(more if end < 0 else more[:end])
        length += len(parts[-1])
        if end >= 0 or not more:
            return b"".join(parts) if length <= MAX_LINE_BYTES else None
    return None


def _array_fragments(file: str, source: SourceSettings, size: int, max_mb: float) -> list[Fragment]:
    if size > max_mb * 2**20 or "://" in file:
        why = f"{size / 2**20:.0f} MB in one JSON array" if "://" not in file else "a JSON array that lies elsewhere"
        name = Path(file).stem
        raise CorpusError(
            f"{file}: {why} (corpora.max_json_mb is {max_mb:g}, for local files); make it a line for each row with "
            f"`jq -c '.[]' {name}.json > {name}.jsonl`"
        )
    cuts: list[tuple[int, int, int]] = []  # first, stop, rows
    for start, end in _spans(file):
        if cuts and end - cuts[-1][0] <= FRAGMENT_BYTES:
            cuts[-1] = (cuts[-1][0], end, cuts[-1][2] + 1)
        else:
            cuts.append((start, end, 1))
    if not cuts:
        raise CorpusError(f"{file}: no rows; write the corpus again")
    return [Fragment(file, i, a, n, b, "json", source) for i, (a, b, n) in enumerate(cuts)]


def _spans(file: str) -> Iterator[tuple[int, int]]:
    """Where the objects of the array that a file consists of begin and end; the file is mapped, not held."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        depth, start = 0, 0
        for token in _TOKEN.finditer(data):
            kind = token.group()
            if kind in (b"{", b"["):
                depth += 1
                start = token.start() if depth == 2 else start
            elif kind in (b"}", b"]"):
                depth -= 1
                if depth == 1:
                    yield start, token.end()
                elif depth == 0:
                    return
    raise CorpusError(f"{file}: the array does not end, so the file is cut or broken; download or write it again")


def _elements(data: bytes, first: int) -> list[tuple[int, bytes | None]]:
    """The objects in a range of an array."""
    found: list[tuple[int, bytes | None]] = []
    depth = start = 0
    for token in _TOKEN.finditer(data):
        kind = token.group()
        if kind in (b"{", b"["):
            start = token.start() if depth == 0 else start
            depth += 1
        elif kind in (b"}", b"]"):
            depth -= 1
            if depth == 0:
                whole = data[start : token.end()]
                found.append((first + start, whole if len(whole) <= MAX_LINE_BYTES else None))
    return found
