"""The loop's checkpoints: which update they are of, what was consumed, and what a resumed run may still use."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from prism_ray.config.runtime import LoopSettings
from prism_ray.runtime.journal import sync
from prism_ray.runtime.loop import LoopState
from prism_ray.runtime.protocols import Prompts, Ticket

_LATEST = "latest.json"

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names it and the cure."""


def folder_for(state_folder: Path, version: int) -> Path:
    """Where the rooms write their part of the checkpoint of this version."""
    return state_folder / f"{version:06d}"


def settle(state_folder: Path, version: int) -> None:
    """Have the disk hold what the rooms wrote of a checkpoint, before `commit` removes the older ones: a crash of the
    system loses what is only in memory. May take as long as writing it."""
    folder = folder_for(state_folder, version)
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def commit(state_folder: Path, state: LoopState) -> None:
    """Make the checkpoint of `state.version` the one a resume finds, then remove the older ones.

    The rooms have written theirs by now, and the disk has it (`settle`); the pointer is replaced in one step, so a
    crash leaves the old or the new.
    """
    state_folder.mkdir(parents=True, exist_ok=True)
    temporary = state_folder / (_LATEST + ".new")
    with temporary.open("w") as file:
        file.write(json.dumps(vars(state)))  # at once: streaming takes many times longer, and the loop waits
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(state_folder / _LATEST)
    sync(state_folder)
    current = folder_for(state_folder, state.version)
    for old in state_folder.iterdir():
        if old.is_dir() and old != current:
            shutil.rmtree(old, ignore_errors=True)


def latest(state_folder: Path) -> LoopState | None:
    """The state of the newest complete checkpoint, or None where there is none."""
    path = state_folder / _LATEST
    if not path.exists():
        return None
    try:
        return LoopState(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete {state_folder} to start the stage again") from error


def usable(tickets: Iterable[Ticket], version: int, groups_per_step: int, max_staleness: int) -> list[Ticket]:
    """The journalled groups a run resumed at `version` can train on within the staleness bound.

    They train oldest first, `groups_per_step` a step; the others' prompts are generated again.
    """
    kept: list[Ticket] = []
    for ticket in sorted(tickets, key=lambda t: (t.oldest_version, t.id)):
        trained_at = version + len(kept) // groups_per_step
        if trained_at - ticket.oldest_version <= max_staleness:
            kept.append(ticket)
    return kept


class Restoring(Protocol):
    """What is needed here of the journal's keeper."""

    last_id: int

    async def restore(self, consumed: set[int], version: int, judge_version: int) -> list[Ticket]: ...
    async def resume(self, version: int, judge_version: int, used: Iterable[int]) -> None: ...


async def take_up(
    keeper: Restoring, state: LoopState, judge_version: int, settings: LoopSettings
) -> tuple[list[Ticket], set[int]]:
    """The journalled groups that a run resumed at `state`, with a judge of that version, trains on, and the stream
    positions that are used by them or were before. Later resumes will not find the other groups; `state.next_id` is set
    past all ids that were given."""
    found = await keeper.restore(set(state.groups), state.version, judge_version)
    restored = usable(found, state.version, settings.groups_per_step, settings.max_staleness)
    await keeper.resume(state.version, judge_version, [t.id for t in restored])
    state.next_id = max(state.next_id, keeper.last_id + 1)
    if state.version or found:
        log.info("%d of %d judged groups in the journal are used", len(restored), len(found))
    return restored, {*state.consumed, *(t.position for t in restored)}


class Remaining:
    """A stream without the prompts already used: fulfils `Prompts`."""

    def __init__(self, stream: Prompts, done: Iterable[int]):
        self._stream, self._done = stream, set(done)

    async def take(self) -> tuple[str, int, Any]:
        while True:
            prompt_id, position, ref = await self._stream.take()
            if position not in self._done:
                return prompt_id, position, ref


def first_open(done: Iterable[int]) -> int:
    """The first stream position that is not done: where a resumed stream starts reading."""
    used = set(done)
    position = 0
    while position in used:
        position += 1
    return position
