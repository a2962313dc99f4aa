"""Parquet: a fragment is a row group; only footers are read to know them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from prism_ray.config.corpora import SourceSettings
from prism_ray.corpora.files import CorpusError, Fragment, first_words

_SMALL_MB = 64
"""Row groups of files that are written anew."""


def parquet_fragments(file: str, source: SourceSettings, max_mb: float) -> tuple[list[Fragment], list[str]]:
    """A file's row groups and the names of its columns.

    Raises `CorpusError` for a file that is missing, not Parquet, truncated or empty, or has a row group of more than
    `max_mb`.
    """
    try:
        with _open(file) as parquet:
            names, meta = parquet.schema_arrow.names, parquet.metadata
    except FileNotFoundError as error:
        raise CorpusError(f"{file}: no such file; correct the path, or make the corpus first") from error
    except (pa.ArrowException, OSError) as error:
        cause = first_words(error)
        raise CorpusError(f"{file}: not a readable Parquet file ({cause}); download or write it again") from error
    _refuse_large(file, meta, max_mb)
    counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    if not sum(counts):
        raise CorpusError(f"{file}: no rows; write the corpus again")
    firsts = np.cumsum([0, *counts])
    return [Fragment(file, i, int(firsts[i]), n, source=source) for i, n in enumerate(counts) if n], names


def _refuse_large(file: str, meta: pq.FileMetaData, max_mb: float) -> None:
    sizes = [meta.row_group(i).total_byte_size / 2**20 for i in range(meta.num_row_groups)]
    group = int(np.argmax(sizes)) if sizes else 0
    if not sizes or sizes[group] <= max_mb:
        return
    name, rows = Path(file).name, meta.row_group(group).num_rows
    few = max(1, int(rows * min(_SMALL_MB, max_mb / 2) / sizes[group]))
    small = f"{Path(file).stem}_small.parquet"
    raise CorpusError(
        f"{file}: row group {group} holds {sizes[group]:.0f} MB (corpora.max_row_group_mb is {max_mb:g}) and is read "
        "as a whole; name in its place a file with smaller ones, which "
        f"`python -c \"import pyarrow.parquet as p; f = p.ParquetFile('{name}'); w = p.ParquetWriter('{small}', "
        f'f.schema_arrow); [w.write_batch(b) for b in f.iter_batches({few})]; w.close()"` writes'
    )


def _open(file: str) -> pq.ParquetFile:
    if "://" not in file:
        return pq.ParquetFile(file, memory_map=True)
    system, path = fs.FileSystem.from_uri(file)
    return pq.ParquetFile(system.open_input_file(path))


@lru_cache(maxsize=1)
def table_of(fragment: Fragment, columns: tuple[str, ...]) -> pa.Table:
    """Those of these columns that the row group has; a reading task takes several pieces of it one after the other.

    Raises `CorpusError` where the file is damaged inside.
    """
    try:
        with _open(fragment.file) as parquet:
            held = [c for c in columns if c in parquet.schema_arrow.names]
            return parquet.read_row_group(fragment.group, columns=held, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        where = f"{fragment.file}: row group {fragment.group}"
        raise CorpusError(f"{where} is damaged ({first_words(error)}); download or write the file again") from error
