"""Nothing judged is lost: the journal survives torn tails, and damage elsewhere is named."""

import pytest

from prism_ray.runtime.journal import Journal, JournalError, read, segments


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


@pytest.mark.parametrize("cut", [1, 4, 7, 50, 120])
def test_a_torn_tail_costs_only_its_record(tmp_path, cut):
    write(tmp_path, entries(3))
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read(tmp_path)) == entries(2)
    write(tmp_path, entries(1, start=9))
    assert list(read(tmp_path)) == entries(2) + entries(1, start=9)


def test_damage_inside_names_the_file(tmp_path):
    write(tmp_path, entries(3))
    path = segments(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(JournalError, match=path.name):
        list(read(tmp_path))


def test_old_segments_go_when_no_longer_needed(tmp_path):
    journal = Journal(tmp_path, 100 / 2**20, fsync=False)
    numbers = [journal.append(item) for item in entries(4)]
    journal.remove_before(numbers[2])
    assert list(read(tmp_path)) == entries(2, start=2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    journal = Journal(tmp_path / "a", 1.0, fsync=False)
    (tmp_path / "a").rmdir()
    with pytest.raises(JournalError, match="cannot write the journal"):
        journal.append(entries(1)[0])
