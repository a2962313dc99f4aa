"""What a corpus is made of, whatever its format: files, and fragments of them that are read at once."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, cast

from pyarrow import fs

from prism_ray.config.corpora import Format, SourceSettings

Source = str | Path | SourceSettings
"""A corpus as it is named: a path, or a path with what must be said about it."""

_ENDINGS: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
_CALLED = {"parquet": "Parquet", "jsonl": "JSON Lines", "json": "JSON"}


class CorpusError(ValueError):
    """A corpus that cannot be read, in one sentence that names the file and the cure."""


@dataclass(frozen=True)
class Fragment:
    """A part of a file that is read at once.

    Of Parquet it is row group `group`, whose first row is row `first` of the file; of JSON it is the rows that begin in
    the bytes [first, stop). `rows` is None where nobody has counted yet. `source` says how its rows are to be
    understood, `name` is what rows without an id are called by.
    """

    file: str
    group: int
    first: int
    rows: int | None
    stop: int = 0
    format: Format = "parquet"
    source: SourceSettings = field(default=SourceSettings(path=Path()), compare=False)
    name: str = field(default="", compare=False)

    @property
    def unit(self) -> Literal["row", "byte"]:
        """What places in the file count."""
        return "row" if self.format == "parquet" else "byte"

    @property
    def folder(self) -> Path | None:
        """Where image paths start; None for a corpus that lies elsewhere and has no images beside it."""
        if self.source.images is not None:
            return self.source.images
        return None if "://" in self.file else Path(self.file).parent


def path_of(source: Source) -> Path:
    """Where a corpus lies."""
    return source.path if isinstance(source, SourceSettings) else Path(source)


def absolute(source: Source) -> Source:
    """The same corpus for processes with another working folder."""
    if not isinstance(source, SourceSettings):
        return source if "://" in str(source) else Path(source).resolve()
    images = source.images and source.images.resolve()
    return source.model_copy(update={"path": source.path.resolve(), "images": images})


def names_of(sources: Sequence[Source]) -> str:
    """Corpora by their paths, for messages."""
    return ", ".join(str(source.path if isinstance(source, SourceSettings) else source) for source in sources)


def find_files(sources: Sequence[Source]) -> list[tuple[str, Format, SourceSettings]]:
    """The files of these corpora, in order, each with its format. Raises `CorpusError`."""
    found = []
    for source in sources:
        settings = source if isinstance(source, SourceSettings) else SourceSettings(path=Path(source))
        path = str(source.path if isinstance(source, SourceSettings) else source)
        found += [(file, format_of(file, settings), settings) for file in _files(path, settings)]
    if not found:
        raise CorpusError("no corpus given; name at least one file")
    return found


def short_names(files: Iterable[str]) -> dict[str, str]:
    """What each file is called: its name without the ending, with as many folders before it as tell it from others."""
    unnamed, names = {file: Path(file).with_suffix("").parts for file in files}, {}
    for length in range(1, max(map(len, unnamed.values())) + 1):
        tails = {file: parts[-length:] for file, parts in unnamed.items()}
        times = Counter(tails.values())
        names |= {file: "/".join(tail) for file, tail in tails.items() if times[tail] == 1}
        unnamed = {file: parts for file, parts in unnamed.items() if file not in names}
    return names | {file: file for file in unnamed}


def _files(path: str, settings: SourceSettings) -> list[str]:
    if "://" in path or Path(path).is_file():
        return [path]
    found = _inside(Path(path), settings) if Path(path).is_dir() else sorted(glob.glob(path, recursive=True))
    if not found:
        kind = settings.format or _ENDINGS.get(Path(path).suffix.lower(), "parquet")
        raise CorpusError(f"{path}: no {_CALLED[kind]} file there; correct the path, or make the corpus first")
    return found


def _inside(folder: Path, settings: SourceSettings) -> list[str]:
    """A folder's files of the wanted format; without one its Parquet files, else its JSON Lines (a `.json` in a folder
    is mostly a description of the data)."""
    for kind in (settings.format,) if settings.format else ("parquet", "jsonl"):
        endings = {ending for ending, known in _ENDINGS.items() if known == kind}
        if found := sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in endings):
            return found
    return []


def format_of(file: str, settings: SourceSettings) -> Format:
    """The format of a file, as configured or by its ending."""
    if settings.format is not None:
        return settings.format
    ending = Path(file).suffix.lower()
    if ending not in _ENDINGS:
        known = ", ".join(_ENDINGS)
        raise CorpusError(f"{file}: not known what {ending or 'no ending'} is (known: {known}); name it as `format`")
    return _ENDINGS[ending]


def open_binary(file: str) -> BinaryIO:
    """The file's bytes, wherever it lies; may be sought in."""
    if "://" not in file:
        return open(file, "rb")
    system, path = fs.FileSystem.from_uri(file)
    return cast(BinaryIO, system.open_input_file(path))


def size_of(file: str) -> int:
    """Bytes of a file. Raises `CorpusError` where it is missing."""
    try:
        if "://" not in file:
            return Path(file).stat().st_size
        system, path = fs.FileSystem.from_uri(file)
        size = system.get_file_info(path).size
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read ({error.strerror or error}); correct the path") from error
    if size is None:
        raise CorpusError(f"{file}: no such file; correct the path, or make the corpus first")
    return size


def first_words(error: BaseException) -> str:
    """An error's first line, to be put in brackets."""
    return str(error).split("\n")[0].rstrip(".")
