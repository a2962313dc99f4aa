"""The journal: judged groups on disk before they count, so that a killed run loses none.

A folder of numbered segments. Each record is framed as `<length, checksum of the body, checksum of these eight bytes>`
(three little-endian uint32, the checksums CRC-32), followed by codec bytes. A record that is cut short or wrong at the
end of a segment is dropped silently: it never counted. Damage anywhere else is an error that names file and byte.

Three kinds of entry (`runtime/keeper.py` writes them):

* `{"ticket": …, "group": Group}`: a judged group. The same id again replaces it (a repeated append, or new verdicts).
* `{"update": version, "groups": [id]}`: these groups trained the update that starts from this version.
* `{"resumed": version, "judge": version, "groups": [id]}`: a checkpoint of this version, with a judge of that one, was
  taken up. Of the groups before this entry only these still count, without verdicts of later versions of the judge, and
  of the updates those from lower versions.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prism_ray import codec
from prism_ray.records import UNDONE

KEPT = "kept"
"""Folder inside the journal's for segments that no checkpoint needs any more, where they are kept at all."""

_FRAME = struct.Struct("<III")
_SUMMED = struct.Struct("<II")
_SUFFIX = ".journal"

log = logging.getLogger(__name__)


class JournalError(RuntimeError):
    """A journal that cannot be written or read; the message names the file and the cure."""


class Journal:
    """Appends entries to the newest segment of a folder; a restart begins a new segment."""

    def __init__(self, folder: Path, segment_mb: float, fsync: bool, keep: bool = False):
        """`keep`: segments that are no longer needed go to the folder KEPT instead of being deleted."""
        self._folder, self._limit, self._fsync, self._keep = folder, int(segment_mb * 2**20), fsync, keep
        folder.mkdir(parents=True, exist_ok=True)
        self._number = max((_number(p) for f in (folder, folder / KEPT) for p in segments(f)), default=0)
        self._file: BinaryIO | None = None

    def append(self, entry: dict[str, Any]) -> int:
        """Write one entry and hand it to the operating system; returns its segment's number.

        Where that fails (a full disk), nothing of the entry stays and JournalError says so.
        """
        data = codec.encode(entry)
        summed = _SUMMED.pack(len(data), zlib.crc32(data))
        try:
            file = self._segment()
            self._write(file, summed + zlib.crc32(summed).to_bytes(4, "little") + data)
        except OSError as error:
            self.close()
            raise JournalError(
                f"cannot write the journal in {self._folder}: {error}; free disk space there and run the same command "
                "again, which goes on from the last checkpoint"
            ) from error
        return self._number

    def _write(self, file: BinaryIO, record: bytes) -> None:
        whole = os.fstat(file.fileno()).st_size
        try:
            rest = memoryview(record)
            while rest:  # a disk that has just become full takes a part before it refuses
                rest = rest[file.write(rest) :]
            if self._fsync:
                os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), whole)  # a piece of a record, with others after it, would look like damage
            raise

    def remove_before(self, number: int | None) -> None:
        """Delete (or put away) the segments before this one, or all but the newest: no checkpoint needs them."""
        for path in segments(self._folder):
            if _number(path) < (self._number if number is None else number):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        if not self._keep:
            return path.unlink(missing_ok=True)
        (self._folder / KEPT).mkdir(exist_ok=True)
        path.rename(self._folder / KEPT / path.name)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _segment(self) -> BinaryIO:
        """The segment to append to: a new one at the start and when the last is full."""
        if self._file is None or self._file.tell() >= self._limit:
            self.close()
            self._file = self._next()
            if self._fsync:
                sync(self._folder)  # its name, too
        return self._file

    def _next(self) -> BinaryIO:
        """A segment nobody has begun: a writer that was replaced because it hung may still have its own open."""
        while True:
            self._number += 1
            try:
                return open(self._folder / f"{self._number:06d}{_SUFFIX}", "xb", buffering=0)
            except FileExistsError:
                continue


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything that comes after."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def segments(folder: Path) -> list[Path]:
    """The journal's files, oldest first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def read(folder: Path, salvage: bool = False) -> Iterator[dict[str, Any]]:
    """The entries, oldest first. A torn record may end any segment (each crash leaves one); other damage raises
    JournalError, or with `salvage` costs what it hit and is told to the log."""
    for path in segments(folder):
        yield from _read_segment(path, salvage)


def surviving(
    entries: Iterable[dict[str, Any]],
    consumed: Container[int],
    version: int,
    judge_version: int,
    hold: Callable[[Any], Any],
) -> tuple[list[tuple[dict[str, Any], Any]], int]:
    """What a stage that goes on at `version`, with a judge of `judge_version`, may use: tickets and groups (each as
    `hold` puts it away) that no update has `consumed` and that were sampled up to that version; and the highest id
    there was, or -1.

    Later versions are of updates that were undone: their numbers will name other weights. Where they are the judge's,
    the ticket's `judge_version` is UNDONE.
    """
    found: dict[int, tuple[dict[str, Any], Any]] = {}
    last_id = -1
    for entry in entries:
        if "resumed" in entry:
            known = entry.get("judge", 0)  # not in older journals; what a judge that learns said is then asked anew
            found = {i: _judged_until(known, found[i]) for i in entry["groups"] if i in found}
        elif "group" in entry:
            ticket, group = entry["ticket"], entry["group"]
            last_id = max(last_id, ticket["id"])
            if ticket["id"] not in consumed and group.newest_version <= version:
                found[ticket["id"]] = (ticket, hold(group))
    return [_judged_until(judge_version, one) for one in found.values()], last_id


def _judged_until(version: int, found: tuple[dict[str, Any], Any]) -> tuple[dict[str, Any], Any]:
    """A ticket and its group; a judge's version after this one becomes UNDONE."""
    ticket, group = found
    return (ticket if ticket["judge_version"] <= version else ticket | {"judge_version": UNDONE}), group


def _read_segment(path: Path, salvage: bool) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    at = 0
    while at + _FRAME.size <= len(data) and any(data[at : at + _FRAME.size]):  # a crash of the system may leave zeros
        length, checksum, own = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if zlib.crc32(data[at : at + _SUMMED.size]) != own:
            _damaged(path, at, "the length of a record", f"the other {len(data) - at} bytes of the file are", salvage)
            return
        if len(body) < length:
            return
        if zlib.crc32(body) == checksum:
            yield codec.decode(body)
        elif at + _FRAME.size + length < len(data):  # at the end it is what a crash of the system leaves
            _damaged(path, at, "a record", "that record is", salvage)
        at += _FRAME.size + length


def _damaged(path: Path, at: int, what: str, left_out: str, salvage: bool) -> None:
    sentence = f"{path} is damaged at byte {at}: {what} does not match its checksum"
    if not salvage:
        raise JournalError(f"{sentence}; set journal.salvage to go on without what is damaged")
    log.warning("%s; %s left out, and its prompts are sampled again", sentence, left_out)


def _number(path: Path) -> int:
    return int(path.name.removesuffix(_SUFFIX))
