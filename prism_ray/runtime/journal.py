"""The journal: judged groups on disk before they count, so that a killed run loses none.

A folder of numbered segments; each record is framed as `<length, crc32>` little-endian followed by codec bytes. A
record cut short by a crash at the end of the newest segment is dropped silently (it never counted); damage anywhere
else is an error that names the file.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prism_ray import codec

_FRAME = struct.Struct("<II")
_SUFFIX = ".journal"


class JournalError(RuntimeError):
    """A journal that cannot be written or read; the message names the file and the cure."""


class Journal:
    """Appends entries to the newest segment of a folder; a restart begins a new segment."""

    def __init__(self, folder: Path, segment_mb: float, fsync: bool):
        self._folder, self._limit, self._fsync = folder, int(segment_mb * 2**20), fsync
        folder.mkdir(parents=True, exist_ok=True)
        self._number = max((_number(p) for p in segments(folder)), default=0)
        self._file: BinaryIO | None = None

    def append(self, entry: dict[str, Any]) -> int:
        """Write one entry and hand it to the operating system; returns its segment's number."""
        data = codec.encode(entry)
        try:
            file = self._segment()
            file.write(_FRAME.pack(len(data), zlib.crc32(data)) + data)
            file.flush()
            if self._fsync:
                os.fsync(file.fileno())
        except OSError as error:
            raise JournalError(f"cannot write the journal in {self._folder}: {error}; free disk space there") from error
        return self._number

    def remove_before(self, number: int) -> None:
        """Delete the segments that no checkpoint needs any more."""
        for path in segments(self._folder):
            if _number(path) < number:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _segment(self) -> BinaryIO:
        """The segment to append to: a new one at the start and when the last is full."""
        if self._file is None or self._file.tell() >= self._limit:
            self.close()
            self._number += 1
            self._file = open(self._folder / f"{self._number:06d}{_SUFFIX}", "ab")  # noqa: SIM115 (held across appends)
        return self._file


def segments(folder: Path) -> list[Path]:
    """The journal's files, oldest first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries, oldest first. A torn record may end any segment (each crash leaves one); other damage raises."""
    for path in segments(folder):
        yield from _read_segment(path)


def _read_segment(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    at = 0
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(body) < length or not length:  # a crash of the system may leave zeros
            return
        if zlib.crc32(body) != checksum:
            if at + _FRAME.size + length == len(data):
                return
            raise JournalError(f"{path} is damaged at byte {at}: the checksum is wrong; delete that file to go on")
        yield codec.decode(body)
        at += _FRAME.size + length


def _number(path: Path) -> int:
    return int(path.name.removesuffix(_SUFFIX))
