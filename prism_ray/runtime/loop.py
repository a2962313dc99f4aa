"""The actor-learner loop: the whole of the asynchrony on one page.

Alignment and RLVR run this same loop with another judge. It knows four protocols (`protocols.py`) and none of the
rooms behind them. Three things happen at once:

* `_submit` takes prompts from the stream whenever the gate allows, and sends each on its way;
* `_carry` takes one group through generation, verdict and journal into the buffer (or drops it, where all its
  rollouts were judged alike and `dynamic_sampling` asks for others: `informative.py`);
* `_train` takes complete batches, updates policy and judge, and publishes the new weights to the engines, which go on
  decoding under them.

With `max_staleness: 0` the gate admits exactly one batch a version and the same code is synchronous training.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from prism_ray.config.runtime import LoopSettings
from prism_ray.runtime.buffer import GENERATION, JOURNAL, VERDICT, Buffer, StallError
from prism_ray.runtime.gate import submission_limit
from prism_ray.runtime.informative import Informative
from prism_ray.runtime.protocols import Judge, Learner, Prompts, Ratios, Rollouts, Ticket

log = logging.getLogger(__name__)


class Keeper(Protocol):
    """Where judged groups are kept before they count (`runtime/keeper.py`)."""

    async def append(self, ticket: Ticket) -> None: ...


@dataclass
class LoopState:
    """What a checkpoint holds of the loop itself; everything else is the rooms' own.

    `consumed` are the stream positions of the prompts trained on or dropped so far, `groups` the ids of the groups
    trained on (dropped ones were never in the journal).
    """

    version: int = 0
    next_id: int = 0
    consumed: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


_Prompt = tuple[str, int, Any]
"""Its id, its position in the stream and a reference to it, as `Prompts.take` gives them."""

MOST_STALE = 100
"""Groups with older tokens than an engine should know; a few may follow a fault, more are a fault themselves."""

OnStep = Callable[[LoopState, dict[str, float]], Awaitable[None]]


class Loop:
    """One stage's loop. `on_step` is awaited after every update, before the next batch is taken: it logs,
    checkpoints, and may raise to end the loop."""

    def __init__(
        self,
        prompts: Prompts,
        rollouts: Rollouts,
        judge: Judge,
        learner: Learner,
        keeper: Keeper,
        settings: LoopSettings,
        on_step: OnStep,
    ):
        self.prompts, self.rollouts, self.judge, self.learner = prompts, rollouts, judge, learner
        self.keeper, self.settings, self.on_step = keeper, settings, on_step
        self._gate = asyncio.Event()

    async def run(self, updates: int, state: LoopState, restored: list[Ticket] | None = None) -> LoopState:
        """Train until `updates` optimiser steps are done; `restored` are judged groups from the journal.

        The engines must hold the weights of `state.version`. The first failure of any task ends the loop and is
        raised as it is.
        """
        self.state, self.updates = state, updates
        self.buffer = Buffer(self.settings.groups_per_step, self.settings.max_staleness)
        self.informative = Informative(self.settings)
        self._engine_version = state.version
        self._given_back: list[_Prompt] = []
        self._stale = 0
        self._taken = state.version * self.settings.groups_per_step
        for ticket in restored or []:
            self.buffer.start(ticket.id, ticket.oldest_version)
            self.buffer.add(ticket)
        self._gate.set()
        own: Exception | None = None  # the cause where there is one: the tasks then fail while they are being ended
        try:
            async with asyncio.TaskGroup() as tasks:
                submitting = tasks.create_task(self._submit(tasks))
                try:
                    await self._train(tasks)
                except Exception as error:
                    own = error
                    raise
                submitting.cancel()
        except BaseExceptionGroup as group:
            raise own or _first(group) from group
        return self.state

    def _may_submit(self) -> bool:
        """The gate: counted from the version that every engine holds, so that no token is older than its group."""
        total = self._taken + self.buffer.in_flight + self.buffer.ready
        limit = submission_limit(self._engine_version, self.settings.max_staleness, self.settings.groups_per_step)
        return total < min(limit, self.updates * self.settings.groups_per_step)

    async def _submit(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            while not self._may_submit():
                self._gate.clear()
                await self._gate.wait()
            prompt = self._given_back.pop() if self._given_back else await self.prompts.take()
            ticket = Ticket(self.state.next_id, *prompt)
            self.state.next_id += 1
            self.buffer.start(ticket.id, self._engine_version)
            tasks.create_task(self._carry(ticket, prompt, self._engine_version))

    async def _carry(self, ticket: Ticket, prompt: _Prompt, submitted: int) -> None:
        ticket = await self.rollouts.generate(ticket)
        if ticket.oldest_version < submitted:
            return self._give_back(ticket, prompt, submitted)
        self.buffer.moved(ticket.id, VERDICT)
        ticket = await self.judge.judge(ticket)
        if not self.informative.keeps(ticket):
            return self._drop(ticket)
        self.buffer.moved(ticket.id, JOURNAL)
        await self.keeper.append(ticket)
        self.buffer.add(ticket)

    def _drop(self, ticket: Ticket) -> None:
        """The group's prompt counts as used, and its place at the gate is free for the next one."""
        self.buffer.drop(ticket.id)
        self.state.consumed.append(ticket.position)
        self._gate.set()

    def _give_back(self, ticket: Ticket, prompt: _Prompt, submitted: int) -> None:
        """An engine sampled with weights older than those it was said to hold: what the bound counts with is not true
        of this group. It does not train; its prompt is the next to be sent again."""
        self._stale += 1
        log.warning(
            "group %d has tokens of version %d although every engine held version %d; prompt %s is sampled again",
            ticket.id, ticket.oldest_version, submitted, ticket.prompt_id,
        )  # fmt: skip
        if self._stale > MOST_STALE:
            raise RuntimeError(
                f"{self._stale} groups came with tokens of versions that no engine should hold any more; new weights "
                "do not reach the engines, look into their logs"
            )
        self.buffer.drop(ticket.id)
        self._given_back.append(prompt)
        self._gate.set()

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        publishing: asyncio.Task[dict[str, float]] | None = None
        while self.state.version < self.updates:
            began = time.monotonic()
            batch = await self._take()
            waited = time.monotonic() - began
            under_way = self._under_way()
            metrics = await self._update(batch) | under_way
            if publishing is not None:
                metrics |= await publishing
            weights = await self.learner.weights()
            publishing = tasks.create_task(self._publish(weights, self.state.version))
            if self.settings.max_staleness == 0:
                await publishing
            busy = time.monotonic() - began
            metrics |= {"learner/wait_share": waited / busy, "time/step_s": busy} | self._waits()
            metrics |= _batch_metrics(batch, self.state.version - 1) | self.informative.metrics()
            metrics |= {"staleness/given_back": float(self._stale)}
            await self.on_step(self.state, metrics)
        if publishing is not None:
            await publishing

    def _under_way(self) -> dict[str, float]:
        """Where the groups are that are not ready: what the learner has to wait for next."""
        phases = {"loop/generating": GENERATION, "loop/judging": VERDICT}
        return {name: float(self.buffer.waiting_for(phase)) for name, phase in phases.items()}

    def _waits(self) -> dict[str, float]:
        """Since the last update, the share of time in which no group was being sampled (the gate waits for new weights,
        or the stream for prompts), and that in which the judge neither judged nor learned."""
        shares = self.buffer.idle.shares(GENERATION, VERDICT)
        return {"rollout/wait_share": shares[GENERATION], "judge/wait_share": shares[VERDICT]}

    async def _take(self) -> list[Ticket]:
        batch = await self.buffer.take(self.state.version, self.settings.stall_timeout_s)
        self._taken += len(batch)
        return batch

    async def _fresh(self, batch: list[Ticket]) -> tuple[list[Ticket], dict[str, float]]:
        """The batch with verdicts within `max_judge_lag`, and metrics of how old they are.

        A verdict by weights that were undone (the judge went back to a checkpoint) is too old as well.
        """
        now = self.judge.version
        recent = range(max(0, now - self.settings.max_judge_lag), now + 1)  # UNDONE is below
        late = [ticket for ticket in batch if ticket.judge_version not in recent]
        if late:
            anew = {t.id: t for t in await self._judged_anew(late)}
            batch = [anew.get(ticket.id, ticket) for ticket in batch]
        lags = [now - t.judge_version for t in batch]
        metrics = {"staleness/judge_max": float(max(lags)), "staleness/judge_mean": sum(lags) / len(lags)}
        return batch, metrics | {"staleness/judged_again": float(len(late))}

    async def _judged_anew(self, late: list[Ticket]) -> list[Ticket]:
        limit = self.settings.stall_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await asyncio.gather(*(self.judge.judge(t) for t in late))
        except TimeoutError:
            raise StallError(
                f"update {self.state.version + 1} waited {limit:.0f} s for new verdicts on groups "
                f"{[t.id for t in late][:8]}, whose own were too old. Look at the judge's log, or raise this stage's "
                "loop.stall_timeout_s"
            ) from None

    async def _learn(self, batch: list[Ticket]) -> dict[str, float]:
        """One step of the policy and one of the judge, at the same time unless the judge needs the policy's ratios:
        both see the scores from before it."""
        version = self.state.version
        if self.judge.wants_ratios:
            policy = await self.learner.update(batch, version)
            return policy | await self._teach(batch, version, self.learner.ratios())
        policy, judge = await asyncio.gather(self.learner.update(batch, version), self._teach(batch, version))
        return policy | judge

    async def _teach(self, batch: list[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        self.buffer.idle.enter(VERDICT)  # the judge is at work
        try:
            return await self.judge.learn(batch, version, ratios)
        finally:
            self.buffer.idle.leave(VERDICT)

    async def _update(self, batch: list[Ticket]) -> dict[str, float]:
        """The next version of policy and judge."""
        batch, ages = await self._fresh(batch)
        metrics = await self._learn(batch) | ages
        # In place: these grow with the run, and copying them at every update would cost more and more.
        self.state.version += 1
        self.state.consumed += [t.position for t in batch]
        self.state.groups += [t.id for t in batch]
        return metrics

    async def _publish(self, weights: Any, version: int) -> dict[str, float]:
        metrics = await self.rollouts.publish(weights, version)
        self._engine_version = version
        self._gate.set()
        return metrics


def _batch_metrics(batch: list[Ticket], version: int) -> dict[str, float]:
    """Staleness of the batch trained at `version`, and the mean of whatever the rooms noted on its tickets."""
    ages = [version - t.oldest_version for t in batch]
    metrics = {"staleness/max": float(max(ages)), "staleness/mean": sum(ages) / len(ages)}
    for name in sorted({name for t in batch for name in t.stats}):
        values = [t.stats[name] for t in batch if name in t.stats]
        metrics[name] = sum(values) / len(values)
    return metrics


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure itself: a person wants its sentence, not a tree of tasks."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
