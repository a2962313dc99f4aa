"""Alignment and RLVR: the same loop with another judge, corpus and advantage estimator.

This module builds the rooms, restores what a killed run left, runs the loop and hands over a Hugging Face checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from prism_ray.config.stages import PhaseSettings
from prism_ray.corpora.stream import PromptStream
from prism_ray.learner.group import LearnerGroup
from prism_ray.learner.step import Recipe
from prism_ray.report.progress import Progress
from prism_ray.runtime import checkpoint
from prism_ray.runtime.keeper import JournalKeeper
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Judge
from prism_ray.stages.pipeline import Outcome
from prism_ray.stages.session import Interrupted, Session

log = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """A judge that learns has its own part of a checkpoint."""

    async def save(self, folder: Path) -> None: ...
    async def load(self, folder: Path) -> Any: ...


class StageJudge(Judge, Protocol):
    """A judge as a stage uses it: it has actors to end."""

    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class Phase:
    """One stage of the loop: where it starts, what it reads, who judges."""

    name: str
    start: Path
    """Hugging Face folder of the policy it starts from."""
    corpus: list[Path]
    settings: PhaseSettings
    updates: int
    make_judge: Callable[[], Awaitable[StageJudge]]
    needs_reference: bool
    on_end: Callable[[StageJudge], Awaitable[None]] | None = None
    """Awaited with the judge once training is over (alignment exports the discriminator there)."""


async def run_phase(session: Session, phase: Phase) -> Outcome:
    """Run the phase to its end, from its beginning or from its last checkpoint; returns its checkpoint folder.

    Raises Interrupted, with the state saved, when the session is asked to stop.
    """
    async with _Rooms(session, phase) as rooms:
        with Progress(phase.name, phase.updates) as progress:
            await rooms.run(progress)
        output = session.checkpoint(phase.name)
        await rooms.learner.export(output)
        if phase.on_end is not None:
            await phase.on_end(rooms.judge)
    return Outcome(phase.updates, output)


class _Rooms:
    """The actors of one phase, built on entry and ended on exit."""

    def __init__(self, session: Session, phase: Phase):
        self.session, self.phase = session, phase
        self.state_folder = session.stage_folder(phase.name) / "state"
        self._built: list[Any] = []
        self.journal_folder = session.journal(phase.name)

    async def __aenter__(self) -> _Rooms:
        try:
            return await self._build()
        except BaseException:
            await self.__aexit__()
            raise

    async def _build(self) -> _Rooms:
        phase, settings = self.phase, self.session.settings
        found = checkpoint.latest(self.state_folder)
        self.state = found or LoopState()
        longest = phase.settings.response_limit(settings.rollout)
        recipe = Recipe(
            phase.settings.advantage,
            phase.settings.objective.model_copy(update={"max_response_tokens": longest}),
            phase.settings.correction,
            settings.rollout.temperature,
            settings.learner.micro_batch_tokens,
        )
        self.judge = await phase.make_judge()
        self._built.append(self.judge)
        limit = settings.rollout.max_prompt_tokens
        learner = phase.settings.optimiser.over(settings.learner, phase.updates)
        self.learner = await LearnerGroup.create(phase.start, learner, recipe, limit, phase.updates)
        self._built.append(self.learner)
        if found is not None:
            folder = checkpoint.folder_for(self.state_folder, found.version)
            await self.learner.load(folder / "learner")
            if isinstance(self.judge, Stateful):
                await self.judge.load(folder / "judge")
        self.engines = await self.session.engines(phase.start, self.state.version, longest)
        if found is not None:
            await self.engines.publish(await self.learner.weights(), self.state.version)
        self.keeper = JournalKeeper(self.journal_folder, settings.journal, timeout_s=120.0)
        self._built.append(self.keeper)
        await self._restore()
        return self

    async def __aexit__(self, *_: object) -> None:
        for room in reversed(self._built):
            if isinstance(room, JournalKeeper):
                await room.close()
            else:
                room.shutdown()

    async def _restore(self) -> None:
        """Judged groups from the journal that still count, and a stream without what was or will be used."""
        loop, settings = self.phase.settings.loop, self.session.settings
        found = await self.keeper.restore(set(self.state.groups), self.state.version)
        self.restored = checkpoint.usable(found, self.state.version, loop.groups_per_step, loop.max_staleness)
        used = {t.id for t in self.restored}
        await self.keeper.forget([t.id for t in found if t.id not in used])
        self.state.next_id = max(self.state.next_id, self.keeper.last_id + 1)
        if self.state.version or found:
            log.info(
                "%s goes on at update %d; %d of %d judged groups in the journal are used",
                self.phase.name, self.state.version, len(self.restored), len(found),
            )  # fmt: skip
        done = {*self.state.consumed, *(t.position for t in self.restored)}
        self.prompts = PromptStream(
            self.phase.corpus,
            self.session.requirements(
                self.phase.start, reference=self.phase.needs_reference, ground_truth=not self.phase.needs_reference
            ),
            settings.corpora,
            settings.seed,
            position=checkpoint.first_open(done),
            quarantine=self.session.quarantine,
        )
        self._built.append(self.prompts)
        self.remaining = checkpoint.Remaining(self.prompts, done)

    async def run(self, progress: Progress) -> None:
        self._progress = progress
        loop = Loop(
            self.remaining, self.engines, self.judge, self.learner, self.keeper, self.phase.settings.loop, self._on_step
        )
        await loop.run(self.phase.updates, self.state, self.restored)

    async def _on_step(self, state: LoopState, metrics: dict[str, float]) -> None:
        self.session.metrics.write(self.phase.name, state.version, metrics)
        self._progress.update(state.version, **metrics)
        stopping = self.session.stop.is_set()
        if stopping or state.version % self.phase.settings.loop.checkpoint_every == 0:
            await self._checkpoint(state)
        if stopping:
            raise Interrupted

    async def _checkpoint(self, state: LoopState) -> None:
        folder = checkpoint.folder_for(self.state_folder, state.version)
        folder.mkdir(parents=True, exist_ok=True)
        saving = [self.learner.save(folder / "learner")]
        if isinstance(self.judge, Stateful):
            saving.append(self.judge.save(folder / "judge"))
        await asyncio.gather(*saving)
        checkpoint.commit(self.state_folder, state)
        await self.keeper.forget(state.groups)
