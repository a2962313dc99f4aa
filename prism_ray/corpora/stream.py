"""`PromptStream`: the loop's endless, resumable stream of prompts.

Ray Data runs inside an actor, so the loop's event loop never waits for it; prompts come back as the actor's return
values, which the loop owns, so they outlive the actor. The actor keeps no state that matters: it is told the position
to read from, and one that was killed is started again by Ray and goes on there; one that hangs is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import RayActorError

from prism_ray.config.corpora import CorporaSettings
from prism_ray.corpora.checks import Requirements, check
from prism_ray.corpora.files import Source, names_of
from prism_ray.corpora.identity import Ids, id_said, refuse_twice
from prism_ray.corpora.quarantine import Quarantine, Quarantined
from prism_ray.corpora.reader import (
    Pace,
    Piece,
    RowOrder,
    find_fragments,
    prepared,
    prompt_at,
    read_piece,
    reading_error,
)
from prism_ray.corpora.rows import BadRow
from prism_ray.records import Prompt

RESTARTS = 3
"""How often Ray starts a reader that died again: it keeps nothing, so the fault is hardly in what it was doing."""
HEALTH_S = 30.0
"""A reader that keeps somebody waiting for so long is asked whether it lives, and may take as long again to say so."""

log = logging.getLogger(__name__)


class Read(NamedTuple):
    """A row that was read: its position in the stream, where it lies, the id it says ("": none), and the prompt, or
    what goes into quarantine."""

    position: int
    file: str
    row: int
    unit: str
    id: str
    item: Prompt | Quarantined

    def among(self, ids: Ids) -> Prompt | Quarantined:
        """The item, unless another row has its id already, which is noted in `ids`: then what goes into quarantine."""
        again = ids.again(self.id, self.file, self.row, self.unit)
        return self.item if again is None or isinstance(self.item, Quarantined) else again


def read_prompts(piece: Piece, needs: Requirements) -> Iterator[Read]:
    """The prompts of a piece; ids are not compared."""
    fragment = piece.fragment
    for position, row, columns in read_piece(piece):
        item: Prompt | Quarantined
        try:
            item, _ = check(prompt_at(fragment.file, row, columns), needs)
            item = item if needs.fit is None else needs.fit(item)
        except BadRow as bad:
            item = Quarantined(fragment.file, row, bad.reason, bad.detail, fragment.unit)
        yield Read(position, fragment.file, row, fragment.unit, id_said(columns), item)


@dataclass(frozen=True)
class _Reading:
    """The work of a Ray Data task: positions `start` … `stop`-1 -> one row each."""

    order: RowOrder
    needs: Requirements

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for piece in self.order.pieces(task["start"], task["stop"]):
            for read in read_prompts(piece, self.needs):
                item = pickle.dumps(read.item, protocol=pickle.HIGHEST_PROTOCOL)
                yield read._asdict() | {"item": item}


class PromptReader:
    """Ray actor that reads prompts from any position on."""

    def __init__(
        self, order: RowOrder, needs: Requirements, settings: CorporaSettings, name: str, quarantine: Path | None
    ) -> None:
        self._order = order
        self._needs = needs
        self._settings = settings
        self._bad = Quarantine(name, order.about, settings.max_bad_share)
        self._quarantine = quarantine
        self._position = -1
        self._rows: Iterator[Read] = iter(())
        self._ids = Ids()

    @ray.method(concurrency_group="health")
    def alive(self) -> None:
        """Answers, also while it reads."""

    def next(self, position: int, count: int) -> tuple[Any, ...]:
        """The next `count` usable prompts from `position` on: first the process's number, a list of (id, position) and
        what is to be said of bad rows ("" if there are none), then the prompts."""
        if position != self._position:
            self._rows = self._read(position)
        prompts: list[Prompt] = []
        places: list[tuple[str, int]] = []
        known = len(self._bad)
        try:
            for read in self._rows:
                self._position = read.position + 1
                item = read.among(self._ids) if self._needs.unique else read.item
                if isinstance(item, Quarantined):
                    self._bad.add([item])
                    continue
                prompts.append(item)
                places.append((item.id, read.position))
                if len(prompts) == count:
                    break
        except Exception as error:
            self._position = -1
            raise reading_error(error) or error from None
        finally:
            if self._quarantine is not None and len(self._bad) > known:
                self._bad.write(self._quarantine)
        return (os.getpid(), places, self._bad.summary() if len(self._bad) else ""), *prompts

    def _read(self, position: int) -> Iterator[Read]:
        """Endless. Of what came before only the ids are read, those of the first epoch: whichever row had an id first
        there is the one that has it in all epochs."""
        self._ids = Ids()
        if self._needs.unique:
            self._ids.read(self._order.pieces(0, self._order.first(position)))
        pace = Pace(self._settings)
        for row in prepared(self._tasks(position, pace), _Reading(self._order, self._needs), self._settings):
            pace.note(1, len(row["item"]))
            yield Read(**row | {"item": pickle.loads(row["item"])})

    def _tasks(self, start: int, pace: Pace) -> Iterator[dict[str, int]]:
        while True:
            stop = start + pace.rows
            self._order.count_to(stop)
            yield {"start": start, "stop": stop}
            start = stop


class PromptStream:
    """Fulfils `runtime.protocols.Prompts` over files of any known format.

    Endless, epoch after epoch, in an order that depends on the files and `seed` alone. `position` is the place of the
    next row (epoch times rows of the corpus plus row); a stream made with it yields exactly what remained. Rows that
    cannot be used, and (`needs.unique`) those with the id of another before them, are skipped, written to `quarantine`
    and counted (`shutdown` logs how many, by reason); too many of them, or a damaged file, make `take` raise
    `CorpusError`. Files are looked at (footers only) when the stream is made, so that a missing one fails early.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        needs: Requirements,
        settings: CorporaSettings,
        seed: int,
        position: int = 0,
        quarantine: Path | None = None,
    ) -> None:
        fragments = find_fragments(sources, settings=settings)
        if needs.unique:
            refuse_twice(fragments)
        self.order = RowOrder(fragments, seed)
        self.position = position
        self._requested = position
        self._chunk = max(1, settings.look_ahead // 2)  # one half is handed out while the other is read
        self._ready: deque[tuple[str, int, Any]] = deque()
        self._pending: list[ray.ObjectRef] | None = None
        self._lock = asyncio.Lock()
        self._bad = ""
        self._name, self._timeout_s = names_of(sources), settings.timeout_s
        self._start = lambda: _READER.remote(self.order, needs, settings, self._name, quarantine)
        self._reader: Any = self._start()
        self._process: int | None = None
        self._request()

    @property
    def rows(self) -> int:
        """Rows of one epoch; of JSON Lines they are counted for it."""
        return self.order.rows

    async def take(self) -> tuple[str, int, Any]:
        """The next prompt: its id, its position and an `ObjectRef` of the `Prompt`."""
        async with self._lock:
            if not self._ready:
                await self._receive()
            prompt_id, place, ref = self._ready.popleft()
            self.position = place + 1
            return prompt_id, place, ref

    def shutdown(self) -> None:
        """Stop reading."""
        if self._bad:
            log.warning("%s", self._bad)
        ray.kill(self._reader)

    def _request(self) -> None:
        method = self._reader.next.options(num_returns=1 + self._chunk)
        self._pending = method.remote(self._requested, self._chunk)

    async def _receive(self) -> None:
        for _ in range(RESTARTS + 1):
            if (answer := await self._answer()) is not None:
                break
            log.warning("the reader of %s hangs; another one goes on from position %d", self._name, self._requested)
            ray.kill(self._reader)
            self._reader, self._process = self._start(), None
            self._request()
        else:
            raise RuntimeError(f"the reader of {self._name} hung {RESTARTS + 1} times; its worker's log may say why")
        (process, places, self._bad), refs = answer
        if self._process not in (None, process):
            log.warning("the reader of %s died; another one went on from position %d", self._name, self._requested)
        self._process = process
        self._ready.extend((i, place, ref) for (i, place), ref in zip(places, refs, strict=True))
        self._requested = places[-1][1] + 1
        self._request()

    async def _answer(self) -> tuple[tuple[int, list[tuple[str, int]], str], list[Any]] | None:
        """What `PromptReader.next` says of the prompts asked for, and references to them; None if the reader hangs."""
        assert self._pending is not None
        said, *refs = self._pending
        coming, deadline = asyncio.wrap_future(said.future()), time.monotonic() + self._timeout_s
        try:
            while not (await asyncio.wait({coming}, timeout=min(HEALTH_S, self._timeout_s)))[0]:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"waited {self._timeout_s:.0f} s for prompts of {self._name}; does the cluster have "
                        "corpora.reader_cpus to spare, and is the storage reachable?"
                    )
                if not await self._lives():
                    return None
            return coming.result(), refs
        except RayActorError as error:
            raise RuntimeError(
                f"the reader of {self._name} died more than {RESTARTS} times; its worker's log says why"
            ) from error
        except Exception as error:
            raise reading_error(error) or error from None
        finally:
            coming.cancel()

    async def _lives(self) -> bool:
        """Whether it answers, which it does in a thread of its own; one that is only being started counts as alive."""
        if self._process is None:
            return True
        alive = asyncio.wrap_future(self._reader.alive.remote().future())
        try:
            await asyncio.wait({alive}, timeout=HEALTH_S)
            if alive.done():
                alive.exception()  # whoever waits for the prompts meets it, too
            return alive.done()
        finally:
            alive.cancel()


_READER: Any = cast(Any, ray.remote)(
    num_cpus=0, max_restarts=RESTARTS, max_task_retries=RESTARTS, concurrency_groups={"health": 1}
)(PromptReader)
