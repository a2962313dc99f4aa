"""Parquet: a fragment is a row group; only footers are read to know them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from prism_ray.config.corpora import SourceSettings
from prism_ray.corpora.files import CorpusError, Fragment, first_words


def parquet_fragments(file: str, source: SourceSettings) -> tuple[list[Fragment], list[str]]:
    """A file's row groups and the names of its columns.

    Raises `CorpusError` for a file that is missing, not Parquet, truncated or empty.
    """
    try:
        with _open(file) as parquet:
            names, meta = parquet.schema_arrow.names, parquet.metadata
    except FileNotFoundError as error:
        raise CorpusError(f"{file}: no such file; correct the path, or make the corpus first") from error
    except (pa.ArrowException, OSError) as error:
        cause = first_words(error)
        raise CorpusError(f"{file}: not a readable Parquet file ({cause}); download or write it again") from error
    counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    if not sum(counts):
        raise CorpusError(f"{file}: no rows; write the corpus again")
    firsts = np.cumsum([0, *counts])
    return [Fragment(file, i, int(firsts[i]), n, source=source) for i, n in enumerate(counts) if n], names


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
