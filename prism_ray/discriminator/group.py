"""The discriminator's processes: the ranks that train it, and the scorers, which come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.dispatch import UNKNOWN, Seat
from prism_ray.discriminator.guards import Truth
from prism_ray.discriminator.worker import RANK_ACTOR, SCORER_ACTOR
from prism_ray.models.packing import balance
from prism_ray.records import Ratios
from prism_ray.runtime.supervision import Lost, Watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgePlaces:
    """Ray's options for the actor of each rank and of each scorer; empty: wherever Ray finds room."""

    ranks: Sequence[Mapping[str, Any]] = ()
    scorers: Sequence[Mapping[str, Any]] = ()


NO_PLACES = JudgePlaces()


async def answer(watched: Watched, call: Any, what: str, settings: DiscriminatorSettings) -> Any:
    """`Watched.answer` within `discriminator.timeout_s`; TimeoutError says what to do."""
    try:
        return await watched.answer(call, what, settings.timeout_s)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; raise discriminator.timeout_s or look into that actor's log") from None


def split_groups(ids: Sequence[int], tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the groups of each rank, with about equal tokens, those of a rank in the order of their ids.

    Raises ValueError if a rank would have none.
    """
    if len(ids) < ranks:
        raise ValueError(
            f"{len(ids)} groups cannot be split over {ranks} ranks; lower discriminator.ranks, or raise the groups "
            "or prompts of a step"
        )
    return [sorted(part, key=lambda i: ids[i]) for part in balance([max(t, 1) for t in tokens], ranks)]


class TrainerGroup:
    """The ranks. A rank that dies or hangs is `Lost`: what the group held is gone, and another must be made from a
    checkpoint."""

    def __init__(self, actors: list[Any], settings: DiscriminatorSettings) -> None:
        self.settings = settings
        self.seats = [
            Seat(Watched(f"discriminator rank {i}", actor, settings.heartbeat_s), actor, UNKNOWN)
            for i, actor in enumerate(actors)
        ]

    @classmethod
    async def create(
        cls,
        folder: str,
        settings: DiscriminatorSettings,
        max_prompt_tokens: int,
        seed: int,
        truth: Truth | None,
        options: dict[str, Any],
        places: Sequence[Mapping[str, Any]] = (),
    ) -> TrainerGroup:
        """Start the ranks on the discriminator in `folder`; `options` go to Ray for all of them, and of `places` those
        of each."""
        needs = {"num_cpus": settings.cpus_per_rank, "num_gpus": settings.gpus_per_rank} | options
        where = places or [{}] * settings.ranks
        actors = [RANK_ACTOR.options(**needs | dict(where[rank])) for rank in range(settings.ranks)]
        group = cls([actor.remote(folder, settings, max_prompt_tokens, truth) for actor in actors], settings)
        try:
            host, port = (await group._all("address"))[0]
            for seat in group.seats:
                seat.watched.begin()
            calls = [s.actor.connect.remote(i, host, port, seed) for i, s in enumerate(group.seats)]
            await group._together(calls, f"load {folder}")
        except BaseException:
            group.close()
            raise
        return group

    async def learn(
        self, shares: Sequence[Sequence[Any]], warming: bool, ratios: Ratios | None
    ) -> tuple[dict[str, float], list[str]]:
        """Train on references to groups, a share for each rank; returns metrics and notices of alarms."""
        calls = [s.actor.learn.remote(warming, ratios, *share) for s, share in zip(self.seats, shares, strict=True)]
        return (await self._together(calls, "learn"))[0]

    def weights(self) -> tuple[Any, asyncio.Task[Any]]:
        """A reference to the weights as they are after the calls made so far, and a task that ends when it is there."""
        calls = [seat.actor.weights.options(num_returns=2).remote() for seat in self.seats]
        return calls[0][0], asyncio.create_task(self._together([done for _, done in calls], "give its weights"))

    async def save(self, folder: str | Path) -> None:
        await self._all("save", _absolute(folder))

    async def load(self, folder: str | Path) -> int:
        """Go on from what `save` wrote; returns the version."""
        return (await self._all("load", _absolute(folder)))[0]

    async def export(self, folder: str | Path) -> None:
        await self._all("export", _absolute(folder))

    def close(self) -> None:
        """End the actors; safe to call twice."""
        for seat in self.seats:
            _end(seat)
        self.seats = []

    async def _all(self, method: str, *args: Any) -> list[Any]:
        what = " ".join((method, *map(str, args)))
        return await self._together([getattr(seat.actor, method).remote(*args) for seat in self.seats], what)

    async def _together(self, calls: Sequence[Any], what: str) -> list[Any]:
        """The results of a call to each rank."""
        pairs = zip(self.seats, calls, strict=True)
        tasks = [asyncio.create_task(answer(seat.watched, call, what, self.settings)) for seat, call in pairs]
        try:
            return await asyncio.gather(*tasks)
        except RuntimeError as error:
            raise await self._cause(error, tasks) from error.__cause__
        finally:
            for task in tasks:
                task.cancel()

    async def _cause(self, error: RuntimeError, tasks: list[asyncio.Task[Any]]) -> RuntimeError:
        """The error itself, or the loss of another rank: those that compute with it fail first, in the collective."""
        if len(tasks) > 1 and not isinstance(error, Lost):
            await asyncio.wait(tasks, timeout=2 * self.settings.heartbeat_s)
        found = (task.exception() for task in tasks if task.done() and not task.cancelled())
        return next((e for e in found if isinstance(e, Lost)), error)


class ScorerGroup:
    """The scorers: each is given every new version of the weights, replaced when it is lost, and admitted when it holds
    what the others hold. `seats` are those that are admitted; `failure` is set once there can be no more work."""

    def __init__(
        self, make: Callable[[int], Any], settings: DiscriminatorSettings, changed: Callable[[], None]
    ) -> None:
        """`make` starts the actor of the scorer of a number; `changed` is called whenever a seat comes, goes or takes
        weights."""
        self.settings = settings
        self.seats: dict[int, Seat] = {}
        self.failure: Exception | None = None
        self._make, self._changed = make, changed
        self._held: tuple[Any, int] = (None, 0)
        self._restarts: dict[int, int] = {}
        """Of every scorer that there should be, how often it was replaced."""
        self._successors: dict[int, asyncio.Task[None]] = {}
        """Of every scorer that was replaced, the last start of another."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._couriers: dict[int, asyncio.Task[None]] = {}
        self._guards: dict[int, asyncio.Task[None]] = {}

    async def resize(self, count: int) -> None:
        """Add scorers, or drain and end those with the highest numbers, until there are `count`."""
        while len(self._restarts) > count:
            index = max(self._restarts)
            del self._restarts[index]
            await self._remove(index)
        new = [i for i in range(count) if i not in self._restarts]
        self._restarts |= dict.fromkeys(new, 0)
        starts = [asyncio.create_task(self._start(i)) for i in new]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for index, start in zip(new, starts, strict=True):
                start.cancel()
                if index not in self.seats:
                    self._restarts.pop(index, None)
            await asyncio.gather(*starts, return_exceptions=True)
            raise

    def publish(self, weights: Any, version: int) -> None:
        """Give every scorer a reference to weights, each as soon as it has done its batch and has taken older ones."""
        self._held = (weights, version)
        for index in self.seats:
            if index not in self._couriers or self._couriers[index].done():
                self._couriers[index] = self._spawn(self._deliver(index))

    def forget_weights(self) -> None:
        """What the scorers hold counts no more, whatever its version; they get no work until the next `publish`."""
        for seat in self.seats.values():
            seat.version = UNKNOWN

    def lose(self, lost: Seat, error: Exception) -> None:
        """Take out a scorer that died or hangs, and start its successor; told again of the same one, do nothing."""
        index = next((i for i, seat in self.seats.items() if seat is lost), None)
        if index is None:
            return
        del self.seats[index]
        _end(lost)
        self._replace(index, error, lost.groups)
        self._changed()

    def close(self) -> None:
        """End all scorers."""
        self._restarts.clear()
        for task in self._tasks:
            task.cancel()
        for seat in self.seats.values():
            _end(seat)
        self.seats.clear()

    def _replace(self, index: int, error: Exception, groups: int) -> None:
        if index not in self._restarts:  # it was leaving
            log.warning("%s; it was leaving, its %d groups go to other scorers", error, groups)
            return
        done, most = self._restarts[index], self.settings.max_restarts
        if done >= most:
            what = f"{error}, after {done} restarts (discriminator.max_restarts); look into its log"
            return self._fail(RuntimeError(what))  # not Lost: to begin anew would end here again
        self._restarts[index] += 1
        log.warning("%s; its %d groups go to others, restart %d of at most %d", error, groups, done + 1, most)
        self._successors[index] = self._spawn(self._restart(index))

    async def _restart(self, index: int) -> None:
        try:
            seat = await self._start(index)
        except Exception as error:  # whatever it is, there is no scorer yet
            self._replace(index, error, 0)
        else:
            log.warning("%s is back, with weights of version %d", seat.name, seat.version)

    async def _start(self, index: int) -> Seat:
        """Start a scorer and admit it once it holds the weights that the others are given."""
        actor = self._make(index)
        seat = Seat(Watched(f"scorer {index}", actor, self.settings.heartbeat_s), actor, UNKNOWN)
        try:
            await self._answer(seat, actor.alive.remote(), "start")
            seat.watched.begin()
            weights, version = self._held
            await self._answer(seat, actor.start.remote(version), "load its weights")
            seat.version = version if weights is None else UNKNOWN
            await self._catch_up(seat)
            if index not in self._restarts:
                raise asyncio.CancelledError
        except BaseException:
            _end(seat)
            raise
        self.seats[index] = seat
        self._guards[index] = self._spawn(self._guard(seat))
        self._changed()
        return seat

    async def _catch_up(self, seat: Seat) -> None:
        while seat.version != self._held[1]:
            weights, version = self._held
            await self._answer(seat, seat.actor.update.remote(weights, version), f"take weights of version {version}")
            seat.version = version
            self._changed()

    async def _deliver(self, index: int) -> None:
        seat = self.seats[index]
        try:
            await self._catch_up(seat)
        except Lost as error:
            self.lose(seat, error)
        except Exception as error:  # a scorer that cannot take weights would wait for them for ever
            self._fail(error)

    async def _guard(self, seat: Seat) -> None:
        """Notice the loss of a scorer that has nothing to do."""
        try:
            await seat.watched.answer(asyncio.get_running_loop().create_future(), "wait for work", float("inf"))
        except Lost as error:
            self.lose(seat, error)

    async def _remove(self, index: int) -> None:
        seat = self.seats.get(index)
        if seat is None:
            if index in self._successors:
                self._successors[index].cancel()
            return
        seat.leaving = True
        while seat.groups and self.seats.get(index) is seat:
            await asyncio.sleep(0.05)
        if self.seats.pop(index, None) is not None:
            self._guards.pop(index).cancel()
            _end(seat)

    async def _answer(self, seat: Seat, call: Any, what: str) -> Any:
        return await answer(seat.watched, call, what, self.settings)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._changed()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def scorer_maker(
    folder: str,
    settings: DiscriminatorSettings,
    max_prompt_tokens: int,
    truth: Truth | None,
    options: dict[str, Any],
    places: Sequence[Mapping[str, Any]] = (),
) -> Callable[[int], Any]:
    """What starts the actor of a scorer of the discriminator in `folder`, given its number; `options` go to Ray, and
    of `places` those of its number (a scorer beyond them goes wherever Ray finds room)."""
    needs = {"num_cpus": settings.cpus_per_scorer, "num_gpus": settings.gpus_per_scorer} | options

    def make(index: int) -> Any:
        where = dict(places[index]) if index < len(places) else {}
        return SCORER_ACTOR.options(**needs | where).remote(folder, settings, max_prompt_tokens, truth)

    return make


def _end(seat: Seat) -> None:
    seat.watched.close()
    ray.kill(seat.actor)


def _absolute(folder: str | Path) -> str:
    """Actors have working directories of their own."""
    return str(Path(folder).resolve())
