"""What failed and was recovered: every warning and error of a run's process, kept in `incidents.jsonl`.

Rooms report a fault, and how it was mended, as one sentence of their log; nothing else is asked of them.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_ray.report.metrics import open_to_append

FILE = "incidents.jsonl"
MOST_ROWS = 2000
"""Rows the file may hold. Then it is thinned to half: of every kind of incident the newest remain, the same number of
each, so that a warning of every step does not push out the one engine that died."""
MOST_CHARACTERS = 1000
"""Of one sentence; what is longer has a traceback in it, which log.txt has whole."""

Incident = dict[str, Any]
"""`time` (seconds since 1970), `stage` ("" outside of any), `level`, `room`, `what` (a sentence); `before`, where it is
there, counts older incidents of the same kind that were dropped."""


class IncidentLog(logging.Handler):
    """A handler that appends to `folder/incidents.jsonl`; a context manager that listens to the package's log."""

    def __init__(
        self,
        folder: Path,
        stage: Callable[[], str],
        tell: Callable[[str, str], None] = lambda level, room: None,
        most_rows: int = MOST_ROWS,
    ) -> None:
        """`stage` tells what the run is at, "" between stages; `tell` hears the level and the room of each incident."""
        super().__init__(logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self._stage, self._tell, self._path, self._most = stage, tell, folder / FILE, most_rows
        self._file = open_to_append(self._path)
        self._rows = len(read_incidents(folder))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; a disk that is full or gone costs the incident, not the run."""
        try:
            parts = record.name.split(".")
            row: Incident = {
                "time": round(record.created, 3),
                "stage": self._stage(),
                "level": record.levelname,
                "room": parts[1] if len(parts) > 1 else parts[0],
                "what": _what(record),
            }
            self._tell(row["level"], row["room"])
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._rows += 1
            if self._rows > self._most:
                self._thin()
        except Exception:
            self.handleError(record)

    def _thin(self) -> None:
        kept = thinned(read_incidents(self._path.parent), self._most // 2)
        new = self._path.with_name(FILE + ".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file.close()
        new.replace(self._path)
        self._file = open_to_append(self._path)
        self._rows = len(kept)

    def close(self) -> None:
        self._file.close()
        super().close()

    def __enter__(self) -> IncidentLog:
        logging.getLogger("prism_ray").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("prism_ray").removeHandler(self)
        self.close()


def reason(error: BaseException) -> str:
    """What went wrong on one line; of an error in an actor its own words, without Ray's traceback before them."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def read_incidents(folder: Path) -> list[Incident]:
    """The incidents of a run, oldest first; lines that are broken are left out."""
    path = folder / FILE
    if not path.exists():
        return []
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("what"), str) and isinstance(row.get("time"), (int, float)):
                found.append(row)
    return found


def kind_of(incident: Incident) -> tuple[str, str, str]:
    """What makes two incidents the same kind: level, room and sentence, whatever the numbers in it."""
    what = re.sub(r"-?\d+(?:\.\d+)?", "#", incident["what"])
    return str(incident.get("level")), str(incident.get("room")), what


def thinned(incidents: Iterable[Incident], most: int) -> list[Incident]:
    """The newest of each kind, as many of each as makes no more than `most` in all; the oldest kinds go where there are
    more kinds than that. The first that remains of a kind counts what was dropped before it."""
    kinds: dict[tuple[str, str, str], list[Incident]] = defaultdict(list)
    for incident in incidents:
        kinds[kind_of(incident)].append(incident)
    newest = sorted(kinds.values(), key=lambda rows: rows[-1]["time"])[-most:]
    each = max(1, most)
    while sum(min(each, len(rows)) for rows in newest) > most:
        each -= max(1, each // 8)
    kept = []
    for rows in newest:
        dropped = _count(rows[:-each])
        last = rows[-each:]
        kept += [last[0] | {"before": dropped} if dropped else last[0], *last[1:]]
    return sorted(kept, key=lambda row: row["time"])


@dataclass(frozen=True)
class Kind:
    """Incidents of one kind: how often, from when to when, at which stages, and the newest of them."""

    count: int
    first: float
    newest: Incident
    stages: tuple[str, ...]


def kinds(incidents: Iterable[Incident]) -> list[Kind]:
    """The incidents by kind, the kind that happened last first."""
    found: dict[tuple[str, str, str], list[Incident]] = defaultdict(list)
    for incident in incidents:
        found[kind_of(incident)].append(incident)
    listed = [
        Kind(_count(rows), rows[0]["time"], rows[-1], tuple(dict.fromkeys(str(r.get("stage") or "") for r in rows)))
        for rows in found.values()
    ]
    return sorted(listed, key=lambda kind: -kind.newest["time"])


def _count(rows: list[Incident]) -> int:
    return len(rows) + sum(before for row in rows if isinstance(before := row.get("before", 0), int))


def _what(record: logging.LogRecord) -> str:
    what = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        what = f"{what}: {reason(record.exc_info[1])}"
    return what if len(what) <= MOST_CHARACTERS else what[:MOST_CHARACTERS] + " …"
