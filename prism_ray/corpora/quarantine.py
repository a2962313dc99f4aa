"""Rows that cannot be used: kept with reason, file and row, counted by reason, and too many of them stop the run."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray.corpora.files import CorpusError, first_words

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quarantined:
    """A bad row: where it lies, the short reason it is counted by, and what is particular to it.

    `unit` is what `row` counts: rows of the file, or of JSON the byte where the row begins (`tail -c +N file | head -1`
    shows the row at byte N - 1).
    """

    file: str
    row: int
    reason: str
    detail: str = ""
    unit: str = "row"


_SCHEMA = pa.schema([(name, pa.int64() if name == "row" else pa.string()) for name in Quarantined.__annotations__])


class Quarantine:
    """Collects the bad rows of a corpus of (about) `rows` rows; more than `max_share` of them is an error.

    A row counts once, however often it returns.
    """

    def __init__(self, name: str, rows: int, max_share: float) -> None:
        self.name = name
        self.rows = rows
        self.max_share = max_share
        self._bad: dict[tuple[str, int], Quarantined] = {}

    def add(self, bad: list[Quarantined]) -> None:
        """Take in bad rows; raises `CorpusError` once there are too many."""
        self.note(bad)
        if self.too_many:
            raise CorpusError(self.verdict())

    def note(self, bad: list[Quarantined]) -> None:
        """Take in bad rows, however many there are."""
        for item in bad:
            self._bad.setdefault((item.file, item.row), item)

    @property
    def too_many(self) -> bool:
        """Whether the run must stop."""
        return len(self._bad) > self.max_share * self.rows

    def verdict(self) -> str:
        """The sentence that says there are too many."""
        worst = ", ".join(f"{reason}: {n}" for reason, n in self.counts.most_common(3))
        example = next(iter(self._bad.values()))
        return (
            f"{self.name}: more than {self.max_share:.1%} of its {self.rows} rows cannot be used ({worst}; for example "
            f"{example.unit} {example.row} of {example.file}); repair them or raise corpora.max_bad_share"
        )

    @property
    def counts(self) -> Counter[str]:
        """Bad rows by reason."""
        return Counter(item.reason for item in self._bad.values())

    def __len__(self) -> int:
        return len(self._bad)

    def summary(self) -> str:
        """One line for the log."""
        counts = ", ".join(f"{reason}: {n}" for reason, n in self.counts.most_common())
        return f"{self.name}: {len(self)} of {self.rows} rows quarantined" + (f" ({counts})" if counts else "")

    def write(self, path: Path) -> None:
        """Write (or complete) `quarantine.parquet`, as a whole or not at all; nothing is written where there is nothing
        to say. One that cannot be read is set aside."""
        if not self._bad:
            return
        merged = {(item["file"], item["row"]): item for item in _kept(path)}
        merged |= {key: asdict(item) for key, item in self._bad.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(list(merged.values()), schema=_SCHEMA), partial)
        partial.replace(path)


def _kept(path: Path) -> list[dict[str, Any]]:
    """What a quarantine holds already."""
    if not path.exists():
        return []
    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        aside = path.with_name(f"{path.name}.unreadable")
        log.warning("%s cannot be read (%s) and is set aside as %s", path, first_words(error), aside.name)
        path.replace(aside)
        return []
