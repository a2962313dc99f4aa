"""The journal's actor: fetches judged groups from the object store and writes them, so the coordinator never does."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prism_ray.config.runtime import JournalSettings
from prism_ray.runtime import journal
from prism_ray.runtime.protocols import Ticket
from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP, Lost, Watched

log = logging.getLogger(__name__)

_META = ("id", "prompt_id", "position", "oldest_version", "judge_version", "tokens", "total_tokens", "stats")


class JournalKeeper:
    """Writes judged groups to a stage's journal and reads them back on resume.

    An actor that dies or hangs is replaced and what it was asked is asked once more; an entry that it wrote without
    saying so is then in the journal twice, and counts once.
    """

    def __init__(self, folder: Path, settings: JournalSettings):
        self._folder, self._settings = folder, settings
        self._segments: dict[int, int] = {}
        self._judged: dict[int, int] = {}
        self._newest = 0
        self.last_id = -1
        """The highest group id in the journal when it was read; ids must not come twice."""
        self._start()

    async def append(self, ticket: Ticket) -> None:
        """Write the ticket's group; returns once the operating system has it."""
        meta = {name: getattr(ticket, name) for name in _META}
        self._segments.setdefault(ticket.id, self._newest)  # not removed before it is known where it is
        number = await self._ask(f"write group {ticket.id}", "append", {"ticket": meta}, ticket.ref)
        self._newest = max(self._newest, number)
        self._segments[ticket.id], self._judged[ticket.id] = number, ticket.judge_version

    async def trained(self, version: int, tickets: Sequence[Ticket]) -> None:
        """Note which groups train the update from this version, and their verdicts where they were judged again; only
        where the journal is kept for replays."""
        if not self._settings.keep:
            return
        for ticket in tickets:
            if self._judged.get(ticket.id) != ticket.judge_version:
                await self.append(ticket)
        await self._ask("note an update", "append", {"update": version, "groups": [t.id for t in tickets]})

    async def forget(self, ticket_ids: Iterable[int]) -> None:
        """These groups are in a checkpoint: segments that hold only such groups are deleted, or put away."""
        for ticket_id in ticket_ids:
            self._segments.pop(ticket_id, None)
            self._judged.pop(ticket_id, None)
        await self._ask("remove old segments", "remove_before", min(self._segments.values(), default=None))

    async def restore(self, consumed: set[int], version: int, judge_version: int) -> list[Ticket]:
        """Tickets of journalled groups that no checkpointed update has consumed, sampled up to this policy version; the
        verdicts of some may be UNDONE. `resume` must say afterwards which of them are used."""
        entries, last_id = await self._ask("read its segments", "restore", consumed, version, judge_version)
        self.last_id = max(self.last_id, last_id)
        self._judged = {meta["id"]: meta["judge_version"] for meta, _ in entries}
        return [Ticket(ref=ref, **meta) for meta, ref in entries]

    async def resume(self, version: int, judge_version: int, used: Iterable[int]) -> None:
        """The stage goes on from these versions with these of the restored groups; no other that is in the journal
        counts any more, then and at later resumes."""
        used = list(used)
        entry = {"resumed": version, "judge": judge_version, "groups": used}
        number = await self._ask("note the resume", "append", entry)
        self._newest = max(self._newest, number)
        self._segments = dict.fromkeys(used, 0)  # keeps the old segments until these are consumed

    async def close(self) -> None:
        """End the actor. Every entry reached the operating system when it was appended."""
        self._watched.close()
        ray.kill(self._watched.actor)

    async def _ask(self, what: str, method: str, *args: Any) -> Any:
        watched = self._watched
        try:
            return await self._answer(watched, what, method, *args)
        except Lost as lost:
            if watched is self._watched:  # not replaced yet by another call that noticed
                log.warning("%s; another one takes over and is asked again", lost)
                await self.close()
                self._start()
        try:
            return await self._answer(self._watched, what, method, *args)
        except Lost as lost:
            raise journal.JournalError(f"{lost}, and so did the one before it; look into its log") from lost

    async def _answer(self, watched: Watched, what: str, method: str, *args: Any) -> Any:
        answer = await watched.answer(getattr(watched.actor, method).remote(*args), what, self._settings.timeout_s)
        watched.begin()
        return answer

    def _start(self) -> None:
        # Beside the coordinator, whose folder it writes to and reads again after a crash.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        actor = _KEEPER_ACTOR.options(**options).remote(self._folder, self._settings)
        self._watched = Watched(f"the journal in {self._folder}", actor, self._settings.heartbeat_s)


class _Keeper:
    def __init__(self, folder: Path, settings: JournalSettings):
        self._folder, self._salvage = folder, settings.salvage
        self._journal = journal.Journal(folder, settings.segment_mb, settings.fsync, settings.keep)

    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> None:
        """Answers, also while something is written."""

    def append(self, entry: dict[str, Any], group: Any = None) -> int:
        return self._journal.append(entry if group is None else entry | {"group": group})

    def remove_before(self, number: int | None) -> None:
        self._journal.remove_before(number)

    def restore(
        self, consumed: set[int], version: int, judge_version: int
    ) -> tuple[list[tuple[dict[str, Any], Any]], int]:
        entries = journal.read(self._folder, self._salvage)
        return journal.surviving(entries, consumed, version, judge_version, ray.put)


_KEEPER_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP)(_Keeper)
