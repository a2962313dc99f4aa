"""Parquet files, the order in which their rows are read, and the Ray Data pipeline that reads them.

The order is a pure function of the files and a seed, so a position (an integer that counts rows through the epochs)
is all there is to save: whoever resumes reads on from there, without reading what came before. Ray Data has no such
state of its own.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pyarrow import fs

from prism_ray.config.corpora import CorporaSettings
from prism_ray.corpora.rows import COLUMNS, REQUIRED_COLUMNS


class CorpusError(ValueError):
    """A corpus that cannot be read, in one sentence that names the file and the cure."""


@dataclass(frozen=True)
class Fragment:
    """A row group of a file: what is read at once. `first` is the position of its first row in the file."""

    file: str
    group: int
    first: int
    rows: int


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one fragment, in reading order: `rows` int64 [n] counts within the fragment, `position` is the first's
    place in the stream."""

    fragment: Fragment
    rows: np.ndarray
    position: int


def find_fragments(paths: Sequence[str | Path], columns: Sequence[str] = REQUIRED_COLUMNS) -> list[Fragment]:
    """The row groups of Parquet files, folders of them or glob patterns; only the files' footers are read.

    Raises `CorpusError` for a file that is missing, not Parquet, truncated, empty or without the named columns.
    """
    return [fragment for file in _files(paths) for fragment in _footer(file, tuple(columns))]


def _files(paths: Sequence[str | Path]) -> list[str]:
    files: list[str] = []
    for path in map(str, paths):
        if "://" in path or Path(path).is_file():
            found = [path]
        elif Path(path).is_dir():
            found = sorted(str(p) for p in Path(path).rglob("*.parquet"))
        else:
            found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise CorpusError(f"{path}: no Parquet file there; correct the path, or make the corpus first")
        files += found
    if not files:
        raise CorpusError("no corpus given; name at least one Parquet file")
    return files


def _open(file: str) -> pq.ParquetFile:
    if "://" not in file:
        return pq.ParquetFile(file, memory_map=True)
    system, path = fs.FileSystem.from_uri(file)
    return pq.ParquetFile(system.open_input_file(path))


def _footer(file: str, columns: Sequence[str]) -> list[Fragment]:
    try:
        with _open(file) as parquet:
            names, meta = parquet.schema_arrow.names, parquet.metadata
    except FileNotFoundError as error:
        raise CorpusError(f"{file}: no such file; correct the path, or make the corpus first") from error
    except (pa.ArrowException, OSError) as error:
        cause = str(error).split("\n")[0].rstrip(".")
        raise CorpusError(f"{file}: not a readable Parquet file ({cause}); download or write it again") from error
    missing = [c for c in columns if c not in names]
    if missing:
        wanted = ", ".join(missing)
        raise CorpusError(f"{file}: no column {wanted} (it has {', '.join(names)}); rename the columns as published")
    counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    if not sum(counts):
        raise CorpusError(f"{file}: no rows; write the corpus again")
    firsts = np.cumsum([0, *counts])
    return [Fragment(file, i, int(firsts[i]), n) for i, n in enumerate(counts) if n]


class RowOrder:
    """The endless order of a corpus's rows: in every epoch each row once, fragments and the rows in them shuffled.

    Deterministic in `seed`; position p is row p % rows of epoch p // rows.
    """

    def __init__(self, fragments: Sequence[Fragment], seed: int) -> None:
        self.fragments = list(fragments)
        self.seed = seed
        self.rows = sum(f.rows for f in self.fragments)
        """Rows of one epoch."""
        self._epoch = lru_cache(maxsize=2)(self._shuffled)
        self._inside = lru_cache(maxsize=4)(self._permuted)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Where the rows at positions start … stop-1 lie, in order."""
        pieces: list[Piece] = []
        while start < stop:
            epoch, row = divmod(start, self.rows)
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, row, side="right"))
            index = int(order[place])
            first = row - (int(ends[place]) - self.fragments[index].rows)
            count = min(stop - start, int(ends[place]) - row)
            pieces.append(Piece(self.fragments[index], self._inside(epoch, index)[first : first + count], start))
            start += count
        return pieces

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.fragments))
        return order, np.cumsum([self.fragments[i].rows for i in order])

    def _permuted(self, epoch: int, index: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, index]).permutation(self.fragments[index].rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"fragments": self.fragments, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def read_piece(piece: Piece, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The rows of a piece: position in the stream, row in the file, and those of `columns` that the file has.

    Raises `CorpusError` where the file is damaged inside.
    """
    table = _table(piece.fragment, tuple(columns))
    for start in range(0, len(piece.rows), 64):
        rows = piece.rows[start : start + 64]
        for offset, row in enumerate(table.take(pa.array(rows)).to_pylist()):
            yield piece.position + start + offset, piece.fragment.first + int(rows[offset]), row


@lru_cache(maxsize=2)
def _table(fragment: Fragment, columns: tuple[str, ...]) -> pa.Table:
    """A fragment's table; a reading task takes several pieces of the same fragment one after the other."""
    try:
        with _open(fragment.file) as parquet:
            held = [c for c in columns if c in parquet.schema_arrow.names]
            return parquet.read_row_group(fragment.group, columns=held, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        cause = str(error).split("\n")[0].rstrip(".")
        where = f"{fragment.file}: row group {fragment.group}"
        raise CorpusError(f"{where} is damaged ({cause}); download or write the file again") from error


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
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
    try:
        while True:
            window = list(islice(remaining, settings.readers))
            coming: Future[list[Any]] | None = thread.submit(_execute, window, work, settings) if window else None
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
) -> list[Any]:
    """References to the Arrow tables that hold the rows of these tasks."""
    source = ray.data.from_items(list(tasks), override_num_blocks=len(tasks))
    pool = ray.data.TaskPoolStrategy(size=settings.readers)
    made = source.flat_map(work, num_cpus=settings.reader_cpus, compute=pool)
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
