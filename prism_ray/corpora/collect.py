"""The collection itself: many questions at a time, within limits and caps, until every prompt has its answer."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from prism_ray.config.collect import CollectSettings
from prism_ray.corpora.collect_client import Answer, Lost, Teacher, Unsent
from prism_ray.corpora.collect_journal import CollectError, Journal, Tokens
from prism_ray.corpora.collect_pace import Pace, backoff, verdict_on
from prism_ray.corpora.collect_request import build_request, estimate_tokens, fault_of, key_of, read_reply
from prism_ray.records import Prompt

_MAYBE_PAID = {408, 504, 524}
"""The endpoint's front gave up while something behind it may have gone on."""
_LONG_WAIT_S = 60.0
_LOOK_AGAIN_S = 1.0
"""What others turn out to have cost may shorten a wait meanwhile."""

log = logging.getLogger(__name__)


class CapReached(CollectError):
    """The money or the tokens are used up."""


class Fatal(CollectError):
    """The endpoint would answer no prompt."""


@dataclass
class Tally:
    """What became of the prompts in this run."""

    known: int = 0
    """Had their answer before."""
    answered: int = 0
    unanswered: dict[str, str] = field(default_factory=dict)
    """Prompt id -> why it has no answer."""
    reasons: Counter[str] = field(default_factory=Counter)
    """The same, counted by kind."""

    @property
    def done(self) -> int:
        return self.known + self.answered + len(self.unanswered)


class Collector:
    """Asks a teacher for the answer to every prompt, and has the journal keep it.

    `on_change` is called whenever a prompt is done that was not done before; `shown` makes of a prompt what the teacher
    sees of it (in a thread).
    """

    def __init__(
        self,
        settings: CollectSettings,
        journal: Journal,
        teacher: Teacher,
        on_change: Callable[[], None],
        shown: Callable[[Prompt], Prompt],
    ) -> None:
        self.tally, self._shown = Tally(), shown
        self._settings, self._journal, self._teacher, self._on_change = settings, journal, teacher, on_change
        self._pace, self._rng = Pace(settings.asking), random.Random()
        self._seen: set[str] = set()
        self._ended: CollectError | None = None
        self._failures = 0
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()

    def stop(self) -> None:
        """Ask nothing more; `run` returns when what is under way has come, or the grace is over."""
        self._stopping.set()
        self._changed.set()

    async def run(self, prompts: AsyncIterator[Prompt]) -> None:
        """Collect until the prompts end or `stop` is called. Raises CapReached or Fatal once what was under way has
        come."""
        turn = asyncio.Lock()
        workers = [asyncio.create_task(self._work(prompts, turn)) for _ in range(self._settings.asking.concurrency)]
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            pending: set[asyncio.Task] = set(workers)
            while pending and not self._stopping.is_set():
                done, pending = await asyncio.wait({*pending, stopped}, return_when=asyncio.FIRST_COMPLETED)
                pending.discard(stopped)
                for task in done - {stopped}:
                    task.result()
            if pending:
                await asyncio.wait(pending, timeout=self._settings.asking.stop_grace_s)
        finally:
            everything: list[asyncio.Task] = [*workers, stopped]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
        if self._ended:
            raise self._ended

    async def _work(self, prompts: AsyncIterator[Prompt], turn: asyncio.Lock) -> None:
        while not self._over:
            async with turn:
                prompt = await anext(prompts, None)
            if prompt is None:
                return
            await self._collect(prompt)

    @property
    def _over(self) -> bool:
        return self._stopping.is_set() or self._ended is not None

    async def _collect(self, prompt: Prompt) -> None:
        """Ask until there is an answer that can be used, or no hope of one."""
        key, state, asking = key_of(prompt), self._journal.state, self._settings.asking
        if key in state.answers or key in self._seen:
            self.tally.known += 1
            return
        self._seen.add(key)
        attempts = 0
        while state.malformed[key] <= asking.reasks:
            outcome = await self._asked(prompt, key)
            if outcome.kind == "usable":
                self.tally.answered += 1
                self._failures = 0
                return self._on_change()
            if outcome.kind == "over":
                return
            if outcome.kind == "refused":
                return self._fail(prompt, "refused", outcome.reason)
            if outcome.kind == "failed":
                attempts += 1
                if attempts >= asking.attempts:
                    return self._fail(prompt, "no answer", f"{attempts} attempts, the last: {outcome.reason}")
                await self._wait_again(attempts, outcome)
        self._failures = 0
        self._give_up(prompt, "malformed", state.faults[key])

    async def _asked(self, prompt: Prompt, key: str) -> _Outcome:
        """One request and what came of it."""
        about = estimate_tokens(prompt, self._settings)
        shown = await asyncio.to_thread(self._shown, prompt)
        if (cost := await self._admitted(about)) is None:
            return _Outcome("over")
        number = self._journal.ask(key, prompt.id, cost, about)
        self._pace.sent(time.monotonic(), cost.input)
        try:
            fault = self._journal.state.faults.get(key, "")
            answer = await self._teacher.ask(build_request(shown, self._settings.teacher, fault))
            return self._judged(number, answer, cost)
        except Unsent as error:
            self._journal.free(number, str(error))
            return _Outcome("failed", str(error))
        except Lost as error:
            self._journal.lost(number, str(error), error.body)
            return _Outcome("failed", str(error))
        finally:
            self._changed.set()

    def _judged(self, number: int, answer: Answer, cost: Tokens) -> _Outcome:
        verdict = verdict_on(answer.status, answer.body)
        if verdict == "good":
            reply = read_reply(answer.body)
            fault = fault_of(reply)
            spent = self._journal.answered(number, answer.body, reply, fault)
            self._pace.charge(time.monotonic(), spent.total - cost.input)
            return _Outcome("malformed" if fault else "usable")
        reason = f"HTTP {answer.status}: {_message(answer.body)}"
        note = self._journal.lost if answer.status in _MAYBE_PAID else self._journal.free
        note(number, reason, answer.body)
        if verdict == "fatal":
            self._end(Fatal(f"the teacher refuses every question ({reason}); check teacher.* and the account"))
            return _Outcome("over")
        return _Outcome("refused" if verdict == "refused" else "failed", reason, answer.retry_after)

    async def _admitted(self, about: int) -> Tokens | None:
        """Wait until a question of about so many tokens may go, by rate and caps; what it may cost. None: no more."""
        state = self._journal.state
        while not self._over:
            cost = Tokens(math.ceil(about * state.excess), self._settings.teacher.max_answer_tokens)
            if (delay := self._pace.delay(time.monotonic())) > 0:
                await self._sleep(min(delay, _LOOK_AGAIN_S))
            elif (state.at_most + cost).within(self._settings.spending):
                return cost
            elif state.under_way:  # it may cost less than it can
                self._changed.clear()
                await self._changed.wait()
            else:
                self._end(CapReached(self._cap_sentence(cost)))
        return None

    def _cap_sentence(self, cost: Tokens) -> str:
        spending, state = self._settings.spending, self._journal.state
        spent, lost = state.at_most, state.uncertain.total
        return (
            f"the spending cap is reached: {spent.total} tokens (money: {spent.money(spending):.2f}) are spent"
            + (f", up to {lost} of them on answers that were lost," if lost else "")
            + f" and the next question may take {cost.total} (money: {cost.money(spending):.2f}); raise "
            "spending.max_tokens or spending.max_money and run the same command to go on"
        )

    async def _wait_again(self, attempts: int, failed: _Outcome) -> None:
        if failed.retry_after:
            self._pace.pause(time.monotonic() + failed.retry_after)
            if failed.retry_after > _LONG_WAIT_S:
                log.warning("the teacher wants no question for %.0f s (%s)", failed.retry_after, failed.reason)
        await self._sleep(backoff(attempts, self._settings.asking, self._rng))

    def _give_up(self, prompt: Prompt, kind: str, reason: str) -> None:
        self.tally.unanswered[prompt.id] = f"{kind}: {reason}"
        self.tally.reasons[kind] += 1
        self._on_change()

    def _fail(self, prompt: Prompt, kind: str, reason: str) -> None:
        """Give up a prompt for a reason that others may share."""
        self._give_up(prompt, kind, reason)
        self._failures += 1
        if self._failures >= self._settings.asking.max_failures:
            self._end(
                Fatal(
                    f"{self._failures} prompts in a row got no answer (the last: {reason}); see that the endpoint is "
                    "up and knows teacher.options, then run the same command again, or raise asking.max_failures"
                )
            )

    def _end(self, why: CollectError) -> None:
        self._ended = self._ended or why
        self._changed.set()

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the end."""
        deadline = time.monotonic() + seconds
        while not self._over and (left := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._stopping.wait(), min(left, 1.0))
            except TimeoutError:
                continue


@dataclass(frozen=True)
class _Outcome:
    """What came of one request; `over`: none was sent, or none should be sent any more."""

    kind: Literal["usable", "malformed", "failed", "refused", "over"]
    reason: str = ""
    retry_after: float | None = None


def _message(body: str) -> str:
    """The sentence in an error's body, as far as there is one."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body
    return " ".join(str(text).split())[:200]
