"""Nothing judged is lost: the journal survives torn tails, and damage elsewhere is named."""

import os
import stat
import subprocess
import sys

import pytest

from prism_ray.runtime.journal import KEPT, Journal, JournalError, read, segments


def entries(count: int, start: int = 0) -> list[dict]:
    return [{"ticket": {"id": i}, "group": "x" * 100} for i in range(start, start + count)]


def write(folder, items, mb=1.0):
    journal = Journal(folder, mb, fsync=True)
    for item in items:
        journal.append(item)
    journal.close()


def test_entries_come_back_in_order_across_segments_and_restarts(tmp_path):
    write(tmp_path, entries(5), mb=200 / 2**20)
    write(tmp_path, entries(2, start=5))
    assert list(read(tmp_path)) == entries(7)
    assert len(segments(tmp_path)) > 2


@pytest.mark.parametrize("cut", [1, 4, 7, 50, 120, 130])
def test_a_torn_tail_costs_only_its_record(tmp_path, cut):
    write(tmp_path, entries(3))
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read(tmp_path)) == entries(2)
    write(tmp_path, entries(1, start=9))
    assert list(read(tmp_path)) == entries(2) + entries(1, start=9)


@pytest.mark.parametrize(
    ("byte", "kept", "what"),
    [(40, [0, 2, 3], "a record"), (2, [], "the length of a record")],
)
def test_damage_names_file_and_byte_and_can_be_salvaged(tmp_path, caplog, byte, kept, what):
    write(tmp_path, entries(4))
    path = segments(tmp_path)[0]
    data = bytearray(path.read_bytes())
    record = len(data) // 4
    at = record + byte if byte == 40 else byte
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    sentence = rf"{path.name} is damaged at byte {at // record * record}: {what} .* journal.salvage"
    with pytest.raises(JournalError, match=sentence):
        list(read(tmp_path))
    assert [entry["ticket"]["id"] for entry in read(tmp_path, salvage=True)] == kept
    assert f"{path.name} is damaged at byte" in caplog.text and "sampled again" in caplog.text


def test_zeros_that_a_crash_of_the_system_left_cost_only_their_record(tmp_path):
    write(tmp_path, entries(3))
    path = segments(tmp_path)[0]
    data = path.read_bytes()
    record = len(data) // 3
    for zeros in (record, record - 50, record - 12):  # the whole last record, or a part of its body
        path.write_bytes(data[: len(data) - zeros] + bytes(zeros))
        assert list(read(tmp_path)) == entries(2)


def test_a_full_disk_is_a_sentence_and_leaves_no_piece_of_a_record(tmp_path):
    """Not a full disk, but the same refusal: no file may grow beyond a limit (in a process of its own)."""
    program = f"""
import resource, sys
from pathlib import Path
from prism_ray.runtime.journal import Journal, JournalError
journal = Journal(Path({str(tmp_path)!r}), 1.0, fsync=False)
entry = lambda i: {{"ticket": {{"id": i}}, "group": "x" * 100}}
journal.append(entry(0))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
try:
    journal.append(entry(1))
except JournalError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
journal.append(entry(2))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot write the journal in" in done.stdout and "free disk space" in done.stdout
    assert list(read(tmp_path)) == [*entries(1), *entries(1, start=2)]
    assert segments(tmp_path)[0].stat().st_size < 200, "a piece of the record stayed"


def test_with_fsync_the_disk_has_each_record_and_each_files_name_before_it_counts(tmp_path, monkeypatch):
    synced: list[tuple[bool, int]] = []
    real = os.fsync

    def noting(handle):
        status = os.fstat(handle)
        synced.append((stat.S_ISDIR(status.st_mode), status.st_size))
        real(handle)

    monkeypatch.setattr("os.fsync", noting)
    journal = Journal(tmp_path, 200 / 2**20, fsync=True)
    sizes = []
    for item in entries(3):
        number = journal.append(item)
        sizes.append(segments(tmp_path)[number - 1].stat().st_size)
    assert [size for folder, size in synced if not folder] == sizes, "not all of a record was there yet"
    assert [folder for folder, _ in synced] == [True, False, False, True, False]
    Journal(tmp_path / "off", 1.0, fsync=False).append(entries(1)[0])
    assert len(synced) == 5


def test_two_writers_never_share_a_segment(tmp_path):
    hung, successor = Journal(tmp_path, 100 / 2**20, fsync=False), Journal(tmp_path, 100 / 2**20, fsync=False)
    own = {hung.append(entries(1, start=number)[0]) for number in range(3)}
    assert own.isdisjoint(successor.append(entries(1, start=10 + number)[0]) for number in range(3))
    assert sorted(e["ticket"]["id"] for e in read(tmp_path)) == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize("keep", [False, True])
def test_old_segments_are_deleted_or_put_away(tmp_path, keep):
    journal = Journal(tmp_path, 100 / 2**20, fsync=False, keep=keep)
    numbers = [journal.append(item) for item in entries(4)]
    journal.remove_before(numbers[2])
    assert list(read(tmp_path)) == entries(2, start=2)
    journal.remove_before(None)
    assert list(read(tmp_path)) == entries(1, start=3)
    assert list(read(tmp_path / KEPT)) == (entries(3) if keep else [])
    assert Journal(tmp_path, 1.0, fsync=False).append(entries(1)[0]) > numbers[-1], "numbers do not come again"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    journal = Journal(tmp_path / "a", 1.0, fsync=False)
    (tmp_path / "a").rmdir()
    with pytest.raises(JournalError, match="cannot write the journal"):
        journal.append(entries(1)[0])
