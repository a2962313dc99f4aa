"""`PromptStream`: the loop's endless, resumable stream of prompts.

Ray Data runs inside an actor, so the loop's event loop never waits for it; prompts come back as the actor's return
values, which the loop owns, so they outlive the actor. The actor keeps no state that matters: it is told the position
to read from, and one that was killed is started again by Ray and goes on there.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import ray

from prism_ray.config.corpora import CorporaSettings
from prism_ray.corpora.checks import Requirements, check
from prism_ray.corpora.files import Source, names_of
from prism_ray.corpora.quarantine import Quarantine, Quarantined
from prism_ray.corpora.reader import Piece, RowOrder, find_fragments, prepared, prompt_at, read_piece, reading_error
from prism_ray.corpora.rows import BadRow
from prism_ray.records import Prompt

log = logging.getLogger(__name__)


def read_prompts(piece: Piece, needs: Requirements) -> Iterator[tuple[int, Prompt | Quarantined]]:
    """The prompts of a piece with their positions; rows that cannot be used come as what goes into quarantine."""
    file = piece.fragment.file
    for position, row, columns in read_piece(piece):
        try:
            prompt = prompt_at(file, row, columns)
            check(prompt, needs)
            yield position, prompt if needs.fit is None else needs.fit(prompt)
        except BadRow as bad:
            yield position, Quarantined(file, row, bad.reason, bad.detail, piece.fragment.unit)


@dataclass(frozen=True)
class _Reading:
    """The work of a Ray Data task: positions `start` … `stop`-1 -> one row each."""

    order: RowOrder
    needs: Requirements

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for piece in self.order.pieces(task["start"], task["stop"]):
            for position, item in read_prompts(piece, self.needs):
                yield {"position": position, "item": pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)}


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
        self._rows: Iterator[tuple[int, Prompt | Quarantined]] = iter(())

    def next(self, position: int, count: int) -> tuple[Any, ...]:
        """The next `count` usable prompts from `position` on: first a list of (id, position) and what is to be said of
        bad rows ("" if there are none), then the prompts."""
        if position != self._position:
            self._rows = self._read(position)
        prompts: list[Prompt] = []
        places: list[tuple[str, int]] = []
        known = len(self._bad)
        try:
            for place, item in self._rows:
                self._position = place + 1
                if isinstance(item, Quarantined):
                    self._bad.add([item])
                    continue
                prompts.append(item)
                places.append((item.id, place))
                if len(prompts) == count:
                    break
        except Exception as error:
            self._position = -1
            raise reading_error(error) or error from None
        finally:
            if self._quarantine is not None and len(self._bad) > known:
                self._bad.write(self._quarantine)
        return (places, self._bad.summary() if len(self._bad) else ""), *prompts

    def _read(self, position: int) -> Iterator[tuple[int, Prompt | Quarantined]]:
        """Endless."""
        for row in prepared(self._tasks(position), _Reading(self._order, self._needs), self._settings):
            yield row["position"], pickle.loads(row["item"])

    def _tasks(self, position: int) -> Iterator[dict[str, int]]:
        for start in count(position, self._settings.rows_per_task):
            stop = start + self._settings.rows_per_task
            self._order.count_to(stop)
            yield {"start": start, "stop": stop}


class PromptStream:
    """Fulfils `runtime.protocols.Prompts` over files of any known format.

    Endless, epoch after epoch, in an order that depends on the files and `seed` alone. `position` is the place of the
    next row (epoch times rows of the corpus plus row); a stream made with it yields exactly what remained. Rows that
    cannot be used are skipped, written to `quarantine` and counted (`shutdown` logs how many, by reason); too many of
    them, or a damaged file, make `take` raise `CorpusError`. Files are looked at (footers only) when the stream is
    made, so that a missing one fails early.
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
        self.order = RowOrder(find_fragments(sources, max_json_mb=settings.max_json_mb), seed)
        self.position = position
        self._requested = position
        self._chunk = max(1, settings.look_ahead // 2)  # one half is handed out while the other is read
        self._ready: deque[tuple[str, int, Any]] = deque()
        self._pending: list[ray.ObjectRef] | None = None
        self._lock = asyncio.Lock()
        actor = ray.remote(PromptReader).options(num_cpus=0, max_restarts=3, max_task_retries=3)
        self._bad = ""
        self._name, self._timeout_s = names_of(sources), settings.timeout_s
        self._reader: Any = actor.remote(self.order, needs, settings, self._name, quarantine)
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
        assert self._pending is not None
        places_ref, *refs = self._pending
        try:
            places, self._bad = await asyncio.wait_for(asyncio.wrap_future(places_ref.future()), self._timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"waited {self._timeout_s:.0f} s for prompts of {self._name}; does the cluster have "
                "corpora.reader_cpus to spare, and is the storage reachable?"
            ) from None
        except Exception as error:
            raise reading_error(error) or error from None
        self._ready.extend((i, place, ref) for (i, place), ref in zip(places, refs, strict=True))
        self._requested = places[-1][1] + 1
        self._request()
