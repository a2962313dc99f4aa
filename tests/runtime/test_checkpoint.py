"""A resume finds the newest complete checkpoint and uses every prompt exactly once."""

import asyncio
import os
from pathlib import Path

import pytest

from prism_ray.runtime.checkpoint import (
    CheckpointError,
    Remaining,
    commit,
    first_open,
    folder_for,
    latest,
    settle,
    usable,
)
from prism_ray.runtime.loop import LoopState
from prism_ray.runtime.protocols import Ticket


def ticket(number: int, oldest: int) -> Ticket:
    return Ticket(number, f"p{number}", number, None, oldest_version=oldest)


def test_the_newest_committed_checkpoint_is_found_and_older_ones_removed(tmp_path):
    for version in (1, 2):
        folder_for(tmp_path, version).mkdir(parents=True)
        commit(tmp_path, LoopState(version, 7, [1, 2], [0, 1]))
    folder_for(tmp_path, 3).mkdir()  # written by the rooms, but the process died before the commit
    assert latest(tmp_path) == LoopState(2, 7, [1, 2], [0, 1])
    assert not folder_for(tmp_path, 1).exists()


def test_the_disk_has_a_checkpoint_before_the_older_one_goes(tmp_path, monkeypatch):
    """What was synced, in the order of it, against when the older folder went."""
    synced: list[tuple[str, bool]] = []
    real, older = os.fsync, folder_for(tmp_path, 1)

    def noting(handle):
        synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, older.exists()))
        real(handle)

    older.mkdir(parents=True)
    commit(tmp_path, LoopState(1))
    monkeypatch.setattr("os.fsync", noting)
    part = folder_for(tmp_path, 2) / "learner" / "weights"
    part.parent.mkdir(parents=True)
    part.write_text("x")
    settle(tmp_path, 2)
    commit(tmp_path, LoopState(2))
    assert {name for name, _ in synced[:3]} == {"weights", "learner", "000002"}
    assert [name for name, _ in synced[3:]] == ["latest.json.new", tmp_path.name]
    assert all(there for _, there in synced) and not older.exists()


def test_no_checkpoint_is_none_and_a_damaged_one_is_named(tmp_path):
    assert latest(tmp_path) is None
    (tmp_path / "latest.json").write_text("{")
    with pytest.raises(CheckpointError, match="latest.json is damaged"):
        latest(tmp_path)


def test_restored_groups_keep_the_bound():
    tickets = [ticket(i, oldest) for i, oldest in enumerate([4, 5, 5, 6, 5, 5, 3])]
    kept = usable(tickets, version=5, groups_per_step=2, max_staleness=1)
    assert [t.id for t in kept] == [0, 1, 2, 4, 3]
    ages = [5 + k // 2 - t.oldest_version for k, t in enumerate(kept)]
    assert max(ages) <= 1


def test_what_remains_of_a_stream_is_every_open_position_once():
    class Stream:
        position = 0

        async def take(self):
            self.position += 1
            return f"p{self.position}", self.position - 1, None

    async def drive():
        stream = Remaining(Stream(), {0, 1, 3})
        return [(await stream.take())[1] for _ in range(3)]

    assert asyncio.run(drive()) == [2, 4, 5]
    assert first_open({0, 1, 3}) == 2
    assert first_open([]) == 0
