"""A corpus as fragments of files, the order in which their rows are read, and the Ray Data pipeline that reads them.

The order is a pure function of the files and a seed, so a position (an integer that counts rows through the epochs)
is all there is to save: whoever resumes reads on from there, without reading what came before. Ray Data has no such
state of its own.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray
import ray.data

from prism_ray.config.corpora import CorporaSettings, Format, SourceSettings
from prism_ray.corpora.files import CorpusError, Fragment, Source, find_files, short_names
from prism_ray.corpora.jsonlines import count_rows, json_fragments, json_rows
from prism_ray.corpora.layouts import columns_to_read, missing, named, published
from prism_ray.corpora.parquet import parquet_fragments, table_of
from prism_ray.corpora.rows import COLUMNS, ID_COLUMNS, REQUIRED_COLUMNS, BadRow, id_of, prompt_from_row
from prism_ray.records import Prompt

_DEFAULTS = CorporaSettings()
FOLDER, UNIT, NAME = "folder", "unit", "name"
"""Where `read_piece` puts the folder that a row's image paths start in, what its place in the file counts, and what the
file is called."""

_TAKEN = 64
"""Rows that are made Python objects at once."""
_FIRST = 64
"""Rows of the first reading tasks of a stream."""
_LOOKED_AT = 64
"""Rows whose columns are those of a file of JSON: one may lack what the next has."""
_SAMPLED = 4
"""Fragments that an estimate of the number of rows is made from."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one fragment, in reading order: `rows` int64 [n] counts within the fragment, `position` is the first's
    place in the stream."""

    fragment: Fragment
    rows: np.ndarray
    position: int


def find_fragments(
    sources: Sequence[Source], columns: Sequence[str] = REQUIRED_COLUMNS, settings: CorporaSettings = _DEFAULTS
) -> list[Fragment]:
    """The fragments of files, folders of them or glob patterns. Of Parquet only the footers are read, of JSON Lines
    only the first rows; a `.json` array is gone through.

    Raises `CorpusError` for a file that is missing, of another format, truncated, empty, without the named columns, or
    larger in one piece than the settings allow.
    """
    found = find_files(sources)
    names = short_names(file for file, _, _ in found)
    return [
        replace(fragment, name=names[file])
        for file, kind, source in found
        for fragment in _fragments(file, kind, source, tuple(columns), settings)
    ]


def _fragments(
    file: str, kind: Format, source: SourceSettings, columns: Sequence[str], settings: CorporaSettings
) -> list[Fragment]:
    if kind == "parquet":
        found, names = parquet_fragments(file, source, settings.max_row_group_mb)
    else:
        found = json_fragments(file, source, kind == "json", settings.max_json_mb)
        first = [row for _, row in json_rows(found[0], list(range(min(_LOOKED_AT, count_rows(found[0])))))]
        names = list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row)) or None
    if names is not None and (absent := missing(columns, names, source)):
        raise CorpusError(
            f"{file}: no column {', '.join(absent)} (it has {', '.join(names)}); say which of them it is in `columns`"
        )
    return found


def rows_of(fragment: Fragment) -> int:
    """Rows of a fragment, counted if nobody has."""
    return count_rows(fragment) if fragment.rows is None else fragment.rows


def counted(fragments: Sequence[Fragment]) -> list[Fragment]:
    """Fragments whose rows are all known; files of JSON Lines are read for it."""
    return [replace(fragment, rows=rows_of(fragment)) for fragment in fragments]


class RowOrder:
    """The endless order of a corpus's rows: in every epoch each row once, fragments and the rows in them shuffled.

    Deterministic in `seed`; position p is row p % rows of epoch p // rows. Rows of a fragment that nobody has counted
    are counted when the order comes to it, so reading begins at once wherever it stands.
    """

    def __init__(self, fragments: Sequence[Fragment], seed: int, counts: Sequence[int | None] = ()) -> None:
        self.fragments = list(fragments)
        self.seed = seed
        self._counts = list(counts) or [f.rows for f in self.fragments]
        self._total: int | None = None
        self._epoch = lru_cache(maxsize=2)(self._begun)
        self._inside = lru_cache(maxsize=4)(self._permuted)

    @property
    def rows(self) -> int:
        """Rows of one epoch; every fragment is counted for it."""
        if self._total is None:
            self._total = sum(self._count(i) for i in range(len(self.fragments)))
            if not self._total:
                raise CorpusError(f"{self.fragments[0].file}: no rows; write the corpus again")
        return self._total

    @property
    def about(self) -> int:
        """About the rows of one epoch: exact where it costs nothing, else from the first fragments in the order. The
        same whenever it is asked."""
        known = [f.rows for f in self.fragments if f.rows is not None]
        uncounted = [i for i in self._epoch(0)[0] if self.fragments[i].rows is None]
        seen, looked = 0, 0
        for number, index in enumerate(uncounted):
            if seen and number >= _SAMPLED:
                break
            seen += self._count(index)
            looked += _bytes(self.fragments[index])
        whole = sum(_bytes(self.fragments[i]) for i in uncounted)
        return max(1, sum(known) + (round(seen * whole / looked) if looked else 0))

    def first(self, count: int) -> int:
        """`count`, or the rows of one epoch if it has fewer; counts no more than it takes."""
        ends = self._reach(0, count - 1) if count > 0 else []
        return min(count, ends[-1] if ends else 0)

    def count_to(self, stop: int) -> None:
        """Count what positions below `stop` take, so that whoever gets a copy of this order has not to."""
        self.pieces(max(stop - 1, 0), stop)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Where the rows at positions start … stop-1 lie, in order."""
        pieces: list[Piece] = []
        while start < stop:
            epoch, row = self._split(start)
            order, _ = self._epoch(epoch)
            ends = self._reach(epoch, row)
            place = bisect_right(ends, row)
            index = order[place]
            first = row - (ends[place] - self._count(index))
            count = min(stop - start, ends[place] - row)
            pieces.append(Piece(self.fragments[index], self._inside(epoch, index)[first : first + count], start))
            start += count
        return pieces

    def _split(self, position: int) -> tuple[int, int]:
        """Epoch and row of a position."""
        if self._total is None and self._reach(0, position)[-1] > position:
            return 0, position
        return divmod(position, self.rows)

    def _begun(self, epoch: int) -> tuple[list[int], list[int]]:
        """The fragments of an epoch in order, and how many rows end with each of those that were reached."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.fragments))
        return order.tolist(), []

    def _reach(self, epoch: int, row: int) -> list[int]:
        """The rows that end with each fragment of an epoch, up to the one that holds `row` or to the last."""
        order, ends = self._epoch(epoch)
        while len(ends) < len(order) and not (ends and ends[-1] > row):
            ends.append((ends[-1] if ends else 0) + self._count(order[len(ends)]))
        return ends

    def _count(self, index: int) -> int:
        count = self._counts[index]
        if count is None:
            count = self._counts[index] = count_rows(self.fragments[index])
        return count

    def _permuted(self, epoch: int, index: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, index]).permutation(self._count(index))

    def __getstate__(self) -> dict[str, Any]:
        return {"fragments": self.fragments, "seed": self.seed, "counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _bytes(fragment: Fragment) -> int:
    return fragment.stop - fragment.first


def read_piece(piece: Piece, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[int, int, dict[str, Any] | BadRow]]:
    """The rows of a piece: position in the stream, row in the file (of JSON the byte where it begins), and those of
    `columns` that the file has, with `folder` where image paths start; a row that cannot be read is a `BadRow`.

    Raises `CorpusError` where the file is damaged inside.
    """
    fragment = piece.fragment
    for number, (place, raw) in enumerate(_raw_rows(piece, columns)):
        yield piece.position + number, place, _published(raw, fragment)


def _raw_rows(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    fragment = piece.fragment
    if fragment.format != "parquet":
        yield from json_rows(fragment, piece.rows.tolist())
        return
    table = table_of(fragment, columns_to_read(columns, fragment.source))
    for start in range(0, len(piece.rows), _TAKEN):
        rows = piece.rows[start : start + _TAKEN]
        taken = table.take(pa.array(rows)).to_pylist()
        yield from ((fragment.first + int(row), raw) for row, raw in zip(rows, taken, strict=True))


def _published(raw: dict[str, Any] | BadRow, fragment: Fragment) -> dict[str, Any] | BadRow:
    try:
        if isinstance(raw, BadRow):
            raise raw
        about = {FOLDER: fragment.folder, UNIT: fragment.unit, NAME: fragment.name}
        return published(raw, fragment.source) | about
    except BadRow as bad:
        bad.unit = fragment.unit
        if isinstance(raw, dict):
            bad.id = _id_of(raw, fragment)
        return bad


def _id_of(raw: dict[str, Any], fragment: Fragment) -> str:
    """The id of a row whose other columns cannot be read."""
    try:
        return id_of(named(raw, ID_COLUMNS, fragment.source))
    except BadRow:
        return ""


def unit_of(row: dict[str, Any] | BadRow) -> str:
    """What the place of a row that `read_piece` gave counts."""
    return row.unit if isinstance(row, BadRow) else row.get(UNIT, "row")


def prompt_at(file: str, place: int, row: dict[str, Any] | BadRow) -> Prompt:
    """The prompt of a row that `read_piece` gave. Raises `BadRow`."""
    about = {} if isinstance(row, BadRow) else row
    return prompt_from_row(row, f"{about.get(NAME) or Path(file).stem}:{place}", about.get(FOLDER))


class Pace:
    """How many rows the next reading task works through: what `corpora.task_mb` holds of rows like those before it, but
    at most `corpora.rows_per_task`. The first are few: nothing is known of their size, and somebody waits for them."""

    def __init__(self, settings: CorporaSettings) -> None:
        self._most, self._bytes_at_once = settings.rows_per_task, settings.task_mb * 2**20
        self._rows, self._bytes = 0.0, 0.0

    def note(self, rows: int, size: int) -> None:
        """So many rows came, and had so many bytes. What came long ago counts less and less."""
        self._rows, self._bytes = self._rows + rows, self._bytes + size
        if self._rows > 2 * self._most:
            self._rows, self._bytes = self._rows / 2, self._bytes / 2

    @property
    def rows(self) -> int:
        """Rows of the next task."""
        if not self._rows:
            return min(_FIRST, self._most)
        return max(1, min(self._most, int(self._bytes_at_once * self._rows / max(1.0, self._bytes))))


def prepared(
    tasks: Iterable[dict[str, Any]],
    work: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    settings: CorporaSettings,
) -> Iterator[dict[str, Any]]:
    """The rows that `work` makes of each of `tasks`, in the order of the tasks, made by Ray Data ahead of need.

    `settings.readers` tasks at a time are one execution, run to its end while the rows of the one before are consumed;
    so at most two executions' rows are held. One execution over everything, held back by its consumer, would stream
    too, but Ray Data's executor then polls without pause, and that thread takes half a core from whoever consumes.
    """
    remaining, ahead = iter(tasks), None
    execute = partial(_execute, work=work, settings=settings, identity=uuid4().hex)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
    try:
        while True:
            window = list(islice(remaining, settings.readers))
            coming: Future[list[Any]] | None = thread.submit(execute, window) if window else None
            for ref in _within(settings.timeout_s, ahead.result) if ahead is not None else []:
                table: Any = _within(settings.timeout_s, partial(ray.get, ref))
                yield from table.to_pylist()
            if coming is None:
                return
            ahead = coming
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _within(limit_s: float, wait: Callable[..., Any]) -> Any:
    """What `wait(timeout=…)` returns; TimeoutError says what did not come."""
    try:
        return wait(timeout=limit_s)
    except TimeoutError:
        raise TimeoutError(
            f"waited {limit_s:g} s for Ray Data to read rows (corpora.timeout_s); does the cluster have "
            "corpora.reader_cpus to spare, and is the storage reachable?"
        ) from None


def _execute(
    tasks: Sequence[dict[str, Any]],
    work: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    settings: CorporaSettings,
    identity: str,
) -> list[Any]:
    """References to the Arrow tables that hold the rows of these tasks.

    Executions that come one after the other pass for one dataset, `identity`: for each that it has seen Ray keeps a log
    file and some fifty gauges (in its statistics actor and in the node's agent) as long as the cluster runs.
    """
    source = ray.data.from_items(list(tasks), override_num_blocks=len(tasks))
    pool = ray.data.TaskPoolStrategy(size=settings.readers)
    made = source.flat_map(work, num_cpus=settings.reader_cpus, compute=pool)
    made._set_uuid(identity)
    made.context.execution_options.preserve_order = True
    made.context.enable_progress_bars = False
    made.context.issue_detectors_config.detectors = []  # they advise on memory that the settings already bound
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    made.context.target_max_block_size = int(settings.block_mb * 2**20)
    made.context.target_min_block_size = 1
    return made.to_arrow_refs()


def reading_error(error: BaseException) -> CorpusError | None:
    """The `CorpusError` inside what Ray Data raised, if that is what it was."""
    found: CorpusError | None = None
    seen: BaseException | None = error
    while seen is not None:  # Ray's wrapper passes for the error it wraps, so take the innermost
        found = seen if isinstance(seen, CorpusError) else found
        seen = getattr(seen, "cause", None) or seen.__cause__
    return found
