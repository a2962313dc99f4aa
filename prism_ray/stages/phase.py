"""Alignment and RLVR: the same loop with another judge, corpus and advantage estimator.

This module builds the rooms, restores what a killed run left, runs the loop and hands over a Hugging Face checkpoint.
Where a learner rank or the judge's trainer is lost on the way, learner and judge are built again from the last
checkpoint and the stage goes on from there; the engines stay, and get that checkpoint's weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ray.exceptions import ObjectLostError

from prism_ray.config.run import RunSettings
from prism_ray.config.stages import PhaseSettings
from prism_ray.corpora.files import Source
from prism_ray.corpora.stream import PromptStream
from prism_ray.learner.group import LearnerGroup
from prism_ray.learner.step import Recipe
from prism_ray.report.progress import Progress
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime import checkpoint
from prism_ray.runtime.elastic import Following
from prism_ray.runtime.keeper import JournalKeeper
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Judge, Ratios, Rollouts, Ticket
from prism_ray.runtime.supervision import Lost
from prism_ray.stages.pipeline import Outcome
from prism_ray.stages.samples import SampleLog
from prism_ray.stages.session import CLEANING_S, Interrupted, Session
from prism_ray.weights.transports import Superseded, Wire

log = logging.getLogger(__name__)

GONE = (Lost, ObjectLostError, Superseded)
"""What ends an attempt at a phase, but not the phase: a rank of the learner or the judge's trainer died or hangs (an
engine that fetches its weights may be the first to notice), or the object store lost a group (with its node, or under
pressure)."""


@runtime_checkable
class Stateful(Protocol):
    """A judge that learns has its own part of a checkpoint."""

    async def save(self, folder: Path) -> None: ...
    async def load(self, folder: Path) -> Any: ...


@runtime_checkable
class Plays(Protocol):
    """A judge that answers the policy in the middle of its rollouts: it stands between the loop and the engines."""

    def over(self, engines: RolloutPool) -> Rollouts: ...


class StageJudge(Judge, Protocol):
    """A judge as a stage uses it: it has actors to end."""

    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class Phase:
    """One stage of the loop: where it starts, what it reads, who judges."""

    name: str
    start: Path
    """Hugging Face folder of the policy it starts from."""
    corpus: Sequence[Source]
    settings: PhaseSettings
    updates: int
    make_judge: Callable[[], Awaitable[StageJudge]]
    needs_reference: bool
    on_end: Callable[[StageJudge], Awaitable[None]] | None = None
    """Awaited with the judge once training is over (alignment exports the discriminator there)."""
    follow: Callable[[StageJudge], Following] | None = None
    """What changes the judge while it works, for as long as it is there (the number of scorers)."""


def recipe_of(settings: RunSettings, phase: PhaseSettings) -> Recipe:
    """What the policy's loss is made of in this phase of a run."""
    longest = phase.response_limit(settings.rollout)
    return Recipe(
        phase.advantage,
        phase.objective.model_copy(update={"max_response_tokens": longest}),
        phase.correction,
        settings.rollout.temperature,
        settings.learner.micro_batch_tokens,
        settings.discriminator.views,
    )


async def run_phase(session: Session, phase: Phase) -> Outcome:
    """Run the phase to its end, from its beginning or from its last checkpoint; returns its checkpoint folder.

    Raises Interrupted, with the state saved, when the session is asked to stop.
    """
    rooms = _Rooms(session, phase)
    try:
        await rooms.run()
    finally:
        await rooms.close()
    return Outcome(phase.updates, session.checkpoint(phase.name))


class _Learner:
    """The learner as the loop gets it: the journal is told of each update, samples are kept, and `busy` says that one
    is under way (from its start until `on_step` is done), when learner, judge and loop are not of one version."""

    def __init__(self, learner: LearnerGroup, keeper: JournalKeeper, samples: SampleLog, sleeper: RolloutPool | None):
        """`sleeper` are engines that share the learner's GPUs: they sleep from here until they get new weights."""
        self._learner, self._keeper, self._samples, self._sleeper = learner, keeper, samples, sleeper
        self.busy = False

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        self.busy = True
        await self._keeper.trained(version, tickets)
        if self._sleeper is not None:
            await self._sleeper.sleep()
        metrics = await self._learner.update(tickets, version)
        await self._samples.note(tickets, version)
        return metrics

    def ratios(self) -> Ratios:
        return self._learner.ratios()

    async def weights(self) -> Any:
        return await self._learner.weights()


class _Recoveries:
    """Counts how often a phase was taken up again from one checkpoint."""

    def __init__(self, name: str, most: int):
        self._name, self._most = name, most
        self._version, self._count = -1, 0

    def note(self, lost: Exception, version: int) -> None:
        """Something was lost, and the phase shall go on from `version`; raises RuntimeError if it did so too often."""
        sentence = _sentence(lost)
        self._count = self._count + 1 if version == self._version else 1
        self._version = version
        if self._count > self._most:
            raise RuntimeError(
                f"{sentence}; {self._name} was taken up again {self._most} times from update {version} "
                "(cluster.max_recoveries) and got no further; look into that actor's log"
            ) from lost
        log.warning("%s: %s; the stage goes on from update %d", self._name, sentence, version)


def _sentence(lost: Exception) -> str:
    """What was lost, on one line. Of an object Ray tells first how to find out where it was made, then the cause."""
    paragraphs = [paragraph.split("\n", 1)[0] for paragraph in str(lost).strip().split("\n\n")]
    if not isinstance(lost, ObjectLostError):
        return paragraphs[0].rstrip(".")
    return f"a group is gone from the object store: {paragraphs[min(1, len(paragraphs) - 1)].split('. ', 1)[0]}"


class _Rooms:
    """The actors of one phase. The engines are the session's; the journal's keeper lives as long as the phase, the
    others until they are lost."""

    def __init__(self, session: Session, phase: Phase):
        self.session, self.phase = session, phase
        self.state_folder = session.stage_folder(phase.name) / "state"
        self.keeper = JournalKeeper(session.journal(phase.name), session.settings.journal)
        self.engines: RolloutPool | None = None
        self._built: list[Any] = []
        self._next_id = 0
        self._recoveries = _Recoveries(phase.name, session.settings.cluster.max_recoveries)

    async def run(self) -> None:
        """Train to the end and hand over; again from the last checkpoint whenever something is lost that only the
        checkpoint and the journal still have."""
        while True:
            try:
                await self.session.until_stopped(self._build())
                await self._train()
                return await self._hand_over()
            except GONE as lost:
                self._end()
                found = checkpoint.latest(self.state_folder)
                self._recoveries.note(lost, found.version if found else 0)

    async def close(self) -> None:
        self._end()
        await self.keeper.close()

    def _end(self) -> None:
        for room in reversed(self._built):
            room.shutdown()
        self._built.clear()
        self.session.leave_places()

    async def _build(self) -> None:
        phase, settings = self.phase, self.session.settings
        found = checkpoint.latest(self.state_folder)
        self.state = found or LoopState()
        longest = phase.settings.response_limit(settings.rollout)
        self.judge = await phase.make_judge()
        self._built.append(self.judge)
        if phase.follow is not None:
            self._built.append(phase.follow(self.judge))
        limit = settings.rollout.max_prompt_tokens
        learner = phase.settings.optimiser.over(settings.learner, phase.updates)
        recipe = recipe_of(settings, phase.settings)
        places = await self.session.learner_places()
        wire = Wire.of(settings.rollout)
        self.learner = await LearnerGroup.create(phase.start, learner, recipe, limit, phase.updates, places, wire)
        self._built.append(self.learner)
        if found is not None:
            folder = checkpoint.folder_for(self.state_folder, found.version)
            await self.learner.load(folder / "learner")
            if isinstance(self.judge, Stateful):
                await self.judge.load(folder / "judge")
        if self.engines is None:
            self.engines = await self.session.engines(phase.start, self.state.version, longest)
        elif found is None:
            await self.engines.load(phase.start, 0)
        if found is not None:
            await self.engines.publish(await self.learner.weights(), self.state.version)
        await self._restore()

    async def _restore(self) -> None:
        """Judged groups from the journal that still count, and a stream without what was or will be used."""
        settings = self.session.settings
        # An id that was given away may still be known to an engine, which the journal does not know.
        self.state.next_id = max(self.state.next_id, self._next_id)
        loop = self.phase.settings.loop
        self.restored, done = await checkpoint.take_up(self.keeper, self.state, self.judge.version, loop)
        if self.state.version:
            log.info("%s goes on at update %d", self.phase.name, self.state.version)
        self.prompts = PromptStream(
            self.phase.corpus,
            self.session.requirements(
                self.phase.start,
                reference=self.phase.needs_reference,
                judged_by=None if self.phase.needs_reference else "verifier",
            ),
            settings.corpora,
            settings.seed,
            position=checkpoint.first_open(done),
            quarantine=self.session.quarantine,
        )
        self._built.append(self.prompts)
        self.remaining = checkpoint.Remaining(self.prompts, done)

    async def _train(self) -> None:
        assert self.engines is not None
        phase = self.phase
        samples = SampleLog(self.session.stage_folder(phase.name), phase.updates)
        sleeper = self.engines if self.session.colocated else None
        self._learner = _Learner(self.learner, self.keeper, samples, sleeper)
        rollouts = self.judge.over(self.engines) if isinstance(self.judge, Plays) else self.engines
        rooms = self.remaining, rollouts, self.judge, self._learner, self.keeper
        loop = Loop(*rooms, phase.settings.loop, self._on_step)
        with Progress(phase.name, phase.updates) as self._progress:
            running = asyncio.create_task(loop.run(phase.updates, self.state, self.restored))
            stopping = asyncio.create_task(self.session.stop.wait())
            try:
                await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not running.done() and not self._learner.busy:  # otherwise `_on_step` ends it
                    running.cancel()
                await asyncio.wait({running})
            finally:
                stopping.cancel()
                running.cancel()
                await asyncio.wait({running}, timeout=CLEANING_S)
                self._next_id = loop.state.next_id
            if running.cancelled():
                await self._checkpoint(loop.state)
                raise Interrupted
            running.result()

    async def _hand_over(self) -> None:
        await self.learner.export(self.session.checkpoint(self.phase.name))
        if self.phase.on_end is not None:
            await self.phase.on_end(self.judge)

    async def _on_step(self, state: LoopState, metrics: dict[str, float]) -> None:
        self.session.metrics.write(self.phase.name, state.version, metrics)
        self._progress.update(state.version, **{"policy/version": float(state.version)} | metrics)
        due = state.version % self.phase.settings.loop.checkpoint_every == 0
        if due:
            await self._checkpoint(state)
        if self.session.stop.is_set():
            if not due:
                await self._checkpoint(state)
            raise Interrupted
        self._learner.busy = False

    async def _checkpoint(self, state: LoopState) -> None:
        folder = checkpoint.folder_for(self.state_folder, state.version)
        folder.mkdir(parents=True, exist_ok=True)
        saving = [self.learner.save(folder / "learner")]
        if isinstance(self.judge, Stateful):
            saving.append(self.judge.save(folder / "judge"))
        await asyncio.gather(*saving)
        await asyncio.to_thread(checkpoint.settle, self.state_folder, state.version)
        checkpoint.commit(self.state_folder, state)
        await self.keeper.forget(state.groups)
