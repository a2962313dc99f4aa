"""The journal's actor: fetches judged groups from the object store and writes them, so the coordinator never does."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import ray

from prism_ray.config.runtime import JournalSettings
from prism_ray.runtime import journal
from prism_ray.runtime.protocols import Ticket

log = logging.getLogger(__name__)


class JournalKeeper:
    """Writes judged groups to a stage's journal and reads them back on resume."""

    def __init__(self, folder: Path, settings: JournalSettings, timeout_s: float):
        self._folder, self._timeout_s = folder, timeout_s
        self._actor: Any = ray.remote(_Keeper).options(num_cpus=0).remote(folder, settings)
        self._segments: dict[int, int] = {}
        self.last_id = -1
        """The highest group id in the journal when it was read; ids must not come twice."""

    async def append(self, ticket: Ticket) -> None:
        """Write the ticket's group; returns once the operating system has it."""
        meta = {"id": ticket.id, "prompt_id": ticket.prompt_id, "position": ticket.position, "stats": ticket.stats}
        meta |= {name: getattr(ticket, name) for name in ("oldest_version", "tokens", "total_tokens")}
        number = await self._wait(self._actor.append.remote(meta, ticket.ref), f"to take group {ticket.id}")
        self._segments[ticket.id] = number

    async def forget(self, ticket_ids: list[int]) -> None:
        """These groups are in a checkpoint: segments that hold only such groups are deleted."""
        for ticket_id in ticket_ids:
            self._segments.pop(ticket_id, None)
        if self._segments:
            await self._wait(self._actor.remove_before.remote(min(self._segments.values())), "to remove old segments")

    async def restore(self, consumed: set[int], version: int) -> list[Ticket]:
        """Tickets of journalled groups that no checkpointed update has consumed, sampled up to this policy version.

        Later versions are of updates that the crash undid: their numbers will name other weights.
        """
        reading = self._actor.restore.remote(consumed, version)
        entries, self.last_id = await self._wait(reading, "to read its segments")
        self._segments |= {meta["id"]: 0 for meta, _ in entries}  # keeps the old segments until these are consumed
        return [Ticket(ref=ref, **meta) for meta, ref in entries]

    async def close(self) -> None:
        try:
            await self._wait(self._actor.close.remote(), "to close")
        except Exception as error:  # every entry was flushed when it was appended
            log.warning("%s", error)
        ray.kill(self._actor)

    async def _wait(self, reference: Any, what: str) -> Any:
        try:
            return await asyncio.wait_for(reference, self._timeout_s)
        except TimeoutError:
            raise TimeoutError(f"waited {self._timeout_s:.0f} s for the journal in {self._folder} {what}") from None


class _Keeper:
    def __init__(self, folder: Path, settings: JournalSettings):
        self._folder = folder
        self._journal = journal.Journal(folder, settings.segment_mb, settings.fsync)

    def append(self, meta: dict[str, Any], group: Any) -> int:
        return self._journal.append({"ticket": meta, "group": group})

    def remove_before(self, number: int) -> None:
        self._journal.remove_before(number)

    def restore(self, consumed: set[int], version: int) -> tuple[list[tuple[dict[str, Any], Any]], int]:
        kept, last_id = [], -1
        for entry in journal.read(self._folder):
            last_id = max(last_id, entry["ticket"]["id"])
            if entry["ticket"]["id"] not in consumed and entry["group"].newest_version <= version:
                kept.append((entry["ticket"], ray.put(entry["group"])))
        return kept, last_id

    def close(self) -> None:
        self._journal.close()
