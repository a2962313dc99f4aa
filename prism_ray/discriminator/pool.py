"""The judge of alignment: a pool in front of the discriminator's processes, which fulfils the loop's `Judge` protocol.

The pool moves references and small numbers; groups stay in Ray's object store. Groups wait here, never in a process:
one that judges has one batch at a time. Scorers judge where there are any, else the ranks between their updates.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.dispatch import Seat, share_out
from prism_ray.discriminator.group import (
    NO_PLACES,
    JudgePlaces,
    ScorerGroup,
    TrainerGroup,
    answer,
    scorer_maker,
    split_groups,
)
from prism_ray.discriminator.guards import Gate, Truth, frozen_views
from prism_ray.discriminator.probes import Examination
from prism_ray.discriminator.worker import Said
from prism_ray.records import Group, Ticket
from prism_ray.runtime.protocols import Ratios
from prism_ray.runtime.supervision import Lost

log = logging.getLogger(__name__)

POOL_FILE = "pool.json"
"""What a checkpoint holds of the pool itself: the gate."""

Job = tuple[Ticket, asyncio.Future[Ticket]]
T = TypeVar("T")


class DiscriminatorPool:
    """Judges groups and learns from them. `version` counts the discriminator's updates.

    A scorer that dies or hangs is replaced and its groups are judged by another; of a rank's end everybody who waits
    hears by `Lost`, and the pool is of no more use.
    """

    def __init__(self, trainer: TrainerGroup, scorers: ScorerGroup | None, settings: DiscriminatorSettings) -> None:
        """Use `start`."""
        self.settings = settings
        self.version = 0
        self._trainer, self._scorers = trainer, scorers
        self._gate = Gate(settings.gate, settings.view_names) if settings.gate else None
        self._frozen: set[str] = set()
        self._waiting: list[Job] = []
        self._failure: Exception | None = None
        self._changed = asyncio.Event()
        self._dispatching = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._resizing = asyncio.Lock()
        self._learned = 0
        self._load = _Load()

    @classmethod
    async def start(
        cls,
        folder: str | Path,
        settings: DiscriminatorSettings,
        max_prompt_tokens: int,
        options: dict[str, Any] | None = None,
        seed: int = 0,
        truth: Truth | None = None,
        places: JudgePlaces = NO_PLACES,
    ) -> DiscriminatorPool:
        """Start all processes on the warmed-up discriminator in `folder` and wait until they are ready.

        `options` are Ray actor options beside those that the settings give, `places` those of each actor. Prompts of
        more than `max_prompt_tokens` tokens are refused. `seed` decides which older pairs are replayed; with `truth`
        the metrics say whether scores agree with it.
        """
        path, more = str(Path(folder).resolve()), options or {}
        creating = TrainerGroup.create(path, settings, max_prompt_tokens, seed, truth, more, places.ranks)
        if not settings.scorers:
            pool = cls(await creating, None, settings)
            pool._vouch()
            return pool
        make = scorer_maker(path, settings, max_prompt_tokens, truth, more, places.scorers)
        scorers = ScorerGroup(make, settings, lambda: pool._wake())
        trainer = await creating
        pool = cls(trainer, scorers, settings)
        try:
            await scorers.resize(settings.scorers)
        except BaseException:
            pool.shutdown()
            raise
        return pool

    @property
    def wants_ratios(self) -> bool:
        """Whether `learn` is to be given the learner's ratios."""
        return self.settings.importance_cap is not None

    # Judging

    async def judge(self, ticket: Ticket) -> Ticket:
        """The ticket of the same group with verdicts (in place of those it had) and their version; its stats gain the
        group's gap and pair accuracy per view.

        Groups that wait for a process go to it together: one large batch costs less than many small ones.
        """
        self._check()
        future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._waiting.append((ticket, future))
        self._wake()
        return await future

    @property
    def _seats(self) -> list[Seat]:
        return self._trainer.seats if self._scorers is None else list(self._scorers.seats.values())

    def _wake(self) -> None:
        """Something has changed: work, or who can do it. What changes at once is looked at together."""
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        self._tell()
        if self._scorers is not None and self._scorers.failure is not None:
            self._fail(self._scorers.failure)
        self._waiting = [job for job in self._waiting if not job[1].cancelled()]
        self._load.waited(len(self._waiting))
        free = [s for s in self._seats if s.may_work(self.version, self.settings.max_scorer_lag)]
        batches = share_out([ticket.total_tokens for ticket, _ in self._waiting], len(free))
        taken = {index for batch in batches for index in batch}
        for seat, batch in zip(free, batches, strict=True):
            if batch:
                seat.groups = len(batch)
                self._load.lagged(self.version - seat.version)
                self._spawn(self._serve(seat, [self._waiting[i] for i in batch]))
        self._waiting = [job for i, job in enumerate(self._waiting) if i not in taken]

    async def _serve(self, seat: Seat, batch: list[Job]) -> None:
        try:
            done: Sequence[Any] = await self._judge(seat, [ticket for ticket, _ in batch])
        except Lost as error:
            if self._scorers is None:
                self._fail(error)
            else:
                self._waiting[:0] = batch
                self._scorers.lose(seat, error)
                return
            done = [error] * len(batch)
        except Exception as error:  # whatever it is, every caller of this batch is to get it
            done = [error] * len(batch)
        finally:
            seat.groups = 0
            self._wake()
        for (_, future), result in zip(batch, done, strict=True):
            _settle(future, result)

    async def _judge(self, seat: Seat, tickets: list[Ticket]) -> list[Ticket]:
        gate = (self._gate.weights() if self._gate else {}) | dict.fromkeys(self._frozen, 0.0)
        call = seat.actor.judge.options(num_returns=len(tickets) + 1)
        ref, *groups = call.remote(gate, *[t.ref for t in tickets])
        what = f"judge group {', '.join(str(t.id) for t in tickets)}"
        said: Said = await answer(seat.watched, ref, what, self.settings)
        if self._gate:
            self._gate.see(said.told_apart)
        self._load.scored(sum(t.total_tokens for t in tickets))
        judged = zip(tickets, groups, said.metrics, strict=True)
        return [
            replace(ticket, ref=group, judge_version=said.version, stats={**ticket.stats, **own})
            for ticket, group, own in judged
        ]

    async def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        """Gap and pair accuracy per view of the newest weights over these groups, without learning from them."""
        return await self._ask(f"measure {len(groups)} groups", lambda actor: actor.measure.remote(*groups))

    async def examine(self, groups: Sequence[Group], worst: int) -> Examination:
        """Accuracy, calibration and shortcuts over these groups, and the `worst` pairs of each view."""
        what = f"examine {len(groups)} groups"
        return await self._ask(what, lambda actor: actor.examine.remote(*groups, worst=worst))

    async def _ask(self, what: str, call: Callable[[Any], Any]) -> Any:
        """What a process that holds the newest weights answers."""
        while True:
            seat = await self._until(self._newest, f"a process with weights of version {self.version} to {what}")
            try:
                return await answer(seat.watched, call(seat.actor), what, self.settings)
            except Lost as error:
                if self._scorers is None:
                    raise
                self._scorers.lose(seat, error)

    def _newest(self) -> Seat | None:
        able = (s for s in self._seats if s.version == self.version and not s.leaving and not s.watched.is_lost)
        return min(able, key=lambda seat: seat.groups, default=None)

    async def _until(self, find: Callable[[], T | None], what: str) -> T:
        limit = self.settings.timeout_s
        try:
            async with asyncio.timeout(limit):
                while (found := find()) is None:
                    self._check()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"waited {limit:g} s for {what}; raise discriminator.timeout_s") from None
        return found

    # Learning

    async def learn(self, tickets: list[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        """Train on the groups the policy of `version` is about to learn from; returns metrics, and logs alarms.

        Scorers are given the new weights while training goes on.
        """
        ids, tokens = [t.id for t in tickets], [t.total_tokens for t in tickets]
        metrics, notices = await self._learn(ids, tokens, [t.ref for t in tickets], False, ratios)
        for sentence in notices:
            log.warning("policy version %d: %s", version, sentence)
        self._frozen = frozen_views(metrics, self.settings.guard)
        return metrics | (self._gate.metrics() if self._gate else {}) | self._load.metrics()

    async def warm_up(self, groups: Sequence[Group]) -> dict[str, float]:
        """One update on these groups before alignment, with the router's load balanced; returns metrics."""
        tokens = [sum(len(rollout.text) for rollout in group.rollouts) for group in groups]
        metrics, _ = await self._learn([g.id for g in groups], tokens, [ray.put(g) for g in groups], True, None)
        return metrics

    async def _learn(
        self, ids: list[int], tokens: list[int], refs: list[Any], warming: bool, ratios: Ratios | None
    ) -> tuple[dict[str, float], list[str]]:
        self._check()
        shares = [[refs[i] for i in part] for part in split_groups(ids, tokens, self.settings.ranks)]
        due = self._scorers is not None and self._learned % self.settings.canary_every == 0
        self._learned += 1
        canary = {"discriminator/canary_gap": await self._canary(refs[0])} if due else {}
        metrics, notices = await self._trainer.learn(shares, warming, ratios)
        self.version = int(metrics["discriminator/version"])
        self._hand_out()
        return metrics | canary, notices

    async def _canary(self, ref: Any) -> float:
        return await self._ask("check that equal texts score alike", lambda actor: actor.canary.remote(ref))

    def _hand_out(self) -> None:
        """The ranks hold the newest weights; scorers are sent them, which nobody waits for."""
        if self._scorers is None:
            self._vouch()
        else:
            weights, there = self._trainer.weights()  # asked for before the ranks are given more to learn
            self._spawn(self._publish(self._scorers, self.version, weights, there))

    async def _publish(self, scorers: ScorerGroup, version: int, weights: Any, there: Awaitable[Any]) -> None:
        try:
            await there
        except Exception as error:  # nobody waits for this, but everybody must hear of it
            self._fail(error)
        else:
            scorers.publish(weights, version)

    def _vouch(self) -> None:
        for seat in self._trainer.seats:
            seat.version = self.version
        self._wake()

    # Life

    async def resize(self, scorers: int) -> None:
        """Add scorers, or remove some (each after its batch), until there are so many; judging and learning go on.

        ValueError where the ranks themselves judge, or for fewer than 1.
        """
        if self._scorers is None or scorers < 1:
            raise ValueError(
                f"a pool that was started with discriminator.scorers = {self.settings.scorers} cannot be resized to "
                f"{scorers}; start with 1 or more, and keep at least 1"
            )
        async with self._resizing:
            await self._scorers.resize(scorers)

    async def save(self, folder: str | Path) -> None:
        """Write weights, optimiser, version, replay buffer and what gate and alarms know into `folder`, for `load`."""
        gate = self._gate.state() if self._gate else None
        await self._trainer.save(folder)
        (Path(folder) / POOL_FILE).write_text(json.dumps({"gate": gate, "frozen": sorted(self._frozen)}))

    async def load(self, folder: str | Path) -> int:
        """Go on from what `save` wrote; returns the discriminator's version."""
        self.version = await self._trainer.load(folder)
        state = json.loads((Path(folder) / POOL_FILE).read_text())
        self._frozen = set(state["frozen"])
        if self._gate is not None and state["gate"] is not None:
            self._gate.restore(state["gate"])
        if self._scorers is not None:
            self._scorers.forget_weights()
        self._hand_out()
        return self.version

    async def export(self, folder: str | Path) -> None:
        """Write the discriminator as a Hugging Face folder."""
        await self._trainer.export(folder)

    def shutdown(self) -> None:
        """End all processes; whoever still waits is told so."""
        self._fail(RuntimeError("the discriminator's pool was shut down"))
        for task in self._tasks:
            task.cancel()
        if self._scorers is not None:
            self._scorers.close()
        self._trainer.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: Exception) -> None:
        """There will be no more verdicts."""
        self._failure = self._failure or error
        for _, future in self._waiting:
            _settle(future, self._failure)
        self._waiting = []
        self._tell()

    def _tell(self) -> None:
        """Let whoever waits for a change look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Load:
    """How busy the judging processes were since the last step."""

    def __init__(self) -> None:
        self._reset()

    def waited(self, groups: int) -> None:
        self._waiting = max(self._waiting, groups)

    def lagged(self, versions: int) -> None:
        self._lag = max(self._lag, versions)

    def scored(self, tokens: int) -> None:
        self._tokens += tokens

    def metrics(self) -> dict[str, float]:
        """The figures, which begin anew: tokens of prompts and responses (as tickets count them) judged a second, most
        groups that waited at once, and by how many updates the weights of a process were behind when it got work."""
        metrics = {
            "discriminator/scoring_tokens_per_second": self._tokens / max(time.monotonic() - self._since, 1e-9),
            "discriminator/waiting_groups": float(self._waiting),
            "discriminator/scorer_lag_max": float(self._lag),
        }
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._since, self._tokens, self._waiting, self._lag = time.monotonic(), 0, 0, 0


def _settle(future: asyncio.Future[Ticket], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
