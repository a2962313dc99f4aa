"""A run: the stages of `configs/*.yaml`, each with what it needs and depends on, run in order and accounted for."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from prism_ray.config.corpora import SourceSettings
from prism_ray.config.judging import JUDGING_FIELDS
from prism_ray.config.learner import LearnerSettings
from prism_ray.config.load import to_yaml
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.run import STAGES, RunSettings
from prism_ray.config.stages import PhaseSettings
from prism_ray.config.supervised import SupervisedSettings
from prism_ray.config.trainer import TrainerSettings
from prism_ray.corpora.files import CorpusError, find_files
from prism_ray.corpora.reader import find_fragments
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.discriminator.start import judge_start
from prism_ray.models.load import check_policy
from prism_ray.models.template import set_system_turn
from prism_ray.models.tiny import build_tiny
from prism_ray.planning.layout import TRAINER, judges_itself, layouts, trainer
from prism_ray.report.html import write_report
from prism_ray.report.incidents import reason
from prism_ray.report.progress import Progress
from prism_ray.rollout.episodes import EpisodePool
from prism_ray.runtime import cluster, placement
from prism_ray.stages import supervised
from prism_ray.stages.batches import verdicts_of
from prism_ray.stages.evaluate import LABELS, UNSEEN, load_truth, run_evaluate
from prism_ray.stages.inputs import COLUMNS_OF, corpora_of
from prism_ray.stages.phase import Phase, StageJudge, run_phase
from prism_ray.stages.pipeline import Outcome, Stage, finish, finished, key_of, plan, prepare
from prism_ray.stages.served import check_served, columns_for, depends_on, served_judge
from prism_ray.stages.session import Interrupted, Session, watched
from prism_ray.stages.warmup import run_warmup
from prism_ray.testbed.corpora import SPLITS
from prism_ray.testbed.words import vocabulary
from prism_ray.verify.pool import VerifierPool, make_environment

log = logging.getLogger(__name__)


class InputError(ValueError):
    """The configuration names something that is not there or not what it should be."""


def stages_of(session: Session) -> dict[str, Stage]:
    """Every stage of a run, each after those it needs."""
    s = session.settings
    base = {"model": s.model, "base": s.base, "policy": s.policy, "seed": s.seed, **_trained_by(s.trainer)}
    base |= {f"corpus/{name}": _corpus(session, name) for name in ("pretrain", "base")}
    sampling = _what_shapes(s.rollout) | {"seed": s.seed}
    judge = {"discriminator": s.discriminator.model_dump(exclude=_WATCHING)}
    warmed_up = {"discriminator": s.discriminator.model_dump(exclude=_WATCHING | _ALIGNING)}
    aligned_by = judge if s.align.judge == "own" else depends_on(s)
    verified_by = {"verify": verdicts_of(s.verify)} if s.rlvr.judge == "own" else depends_on(s)
    full = s.align.updates + s.rlvr.updates
    align = _phase(s.align, s.learner, s.align.updates) | {
        "corpus": _corpus(session, "align"),
        **aligned_by,
        **sampling,
    }
    tasks = {"corpus": _corpus(session, "rlvr"), **verified_by, **sampling}
    rlvr = _phase(s.rlvr, s.learner, s.rlvr.updates) | tasks
    rlvr_only = _phase(s.rlvr, s.learner, full) | tasks
    supervised = {"seed": s.seed, **_trained_by(s.trainer)}
    system = {"system_prompt": s.system_prompt} if s.system_prompt else {}
    evaluated = tuple(name for name in LABELS if name in s.stages) or ("sft",)
    runs: dict[str, tuple[tuple[str, ...], dict[str, Any], Any]] = {
        "base": ((), base, lambda: _base(session)),
        "sft": (
            ("base",),
            supervised | {"sft": s.sft, "corpus": _corpus(session, "sft"), **system},
            lambda: _sft(session, "sft", "base", "sft", s.sft),
        ),
        "warmup": (
            ("sft",),
            {
                "warmup": s.warmup,
                "corpus": _corpus(session, "warmup" if s.data.warmup else "align"),
                "seed": s.seed,
                **warmed_up,
                **_what_shapes(s.rollout),
            },
            lambda: session.until_stopped(_warmup(session)),
        ),
        "align": (("sft", "warmup") if s.align.judge == "own" else ("sft",), align, lambda: _align(session)),
        "rlvr": (("align",), rlvr, lambda: _rlvr(session, "rlvr", "align", s.rlvr.updates)),
        "rlvr-sft": (("sft",), rlvr_only, lambda: _rlvr(session, "rlvr-sft", "sft", full)),
        "references": (
            ("sft",),
            supervised | {"references": s.references, "corpus": _corpus(session, "align")},
            lambda: _sft(session, "references", "sft", "align", s.references),
        ),
        "rlvr-references": (
            ("references",),
            rlvr,
            lambda: _rlvr(session, "rlvr-references", "references", s.rlvr.updates),
        ),
        "evaluate": (
            evaluated,
            {
                "evaluate": s.evaluate,
                "corpora": [_corpus(session, name) for name in ("evaluate", UNSEEN)],
                "seed": s.seed,
                **_what_shapes(s.rollout),
            },
            lambda: session.until_stopped(run_evaluate(session, evaluated)),
        ),
    }
    return {name: Stage(name, *runs[name]) for name in STAGES}


async def run(settings: RunSettings) -> Path:
    """Run the configured stages; returns the run's folder. Raises what failed, or Interrupted with the state saved."""
    folder = settings.runs / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    with watched(settings) as session:
        await _run(session)
    return folder


async def _run(session: Session) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, session)
    status = "failed"
    try:
        session.corpora = await asyncio.to_thread(corpora_of, session.settings)
        await _run_stages(session)
        status = "completed"
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        try:
            await session.close()
        finally:
            session.metrics.close(failed=status == "failed")
            session.summary.finish(status)
            _report(session.folder)


async def _run_stages(session: Session) -> None:
    summary, keys = session.summary, {}
    for stage in plan(stages_of(session), session.settings.stages):
        keys[stage.name] = key_of(stage, keys)
        folder = session.stage_folder(stage.name)
        if prepare(folder, keys[stage.name], session.journal(stage.name)):
            done = finished(folder) or {}
            log.info("%s is up to date", stage.name)
            summary.stage(stage.name, "completed", done["seconds"], done["updates"], done["checkpoint"])
            continue
        session.check_stop()
        summary.discard(stage.name, LABELS.get(stage.name))
        log.info("%s begins", stage.name)
        began = time.monotonic()
        session.stage = stage.name
        try:
            outcome = await session.until_stopped(stage.run(), session.settings.cluster.stop_grace_s)
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            summary.stage(stage.name, status, time.monotonic() - began, 0, None)
            if isinstance(error, Exception) and status == "failed":
                log.error("%s failed: %s", stage.name, reason(error))
            raise
        finally:
            session.stage = ""
        seconds = time.monotonic() - began
        finish(folder, keys[stage.name], outcome, seconds)
        shutil.rmtree(folder / "state", ignore_errors=True)
        summary.stage(stage.name, "completed", seconds, outcome.updates, outcome.checkpoint)
        log.info("%s is done in %.0f s", stage.name, seconds)
        await asyncio.to_thread(_report, session.folder)


def _report(folder: Path) -> None:
    """Write the page; a run is worth more than its page."""
    try:
        write_report(folder)
    except Exception:
        log.warning("%s could not be written", folder / "report.html", exc_info=True)


def _on_signal(session: Session) -> None:
    if session.stop.is_set():
        raise KeyboardInterrupt
    log.warning("stopping, with the state saved; once more to stop at once")
    session.stop.set()


_NOT_SHAPING = {
    "ranks", "cpus_per_rank", "gpus_per_rank", "micro_batch_tokens", "gradient_checkpointing", "zero_stage", "offload",
    "timeout_s", "heartbeat_s", "max_skipped",
}  # fmt: skip
"""Settings of the learner that say where and how fast it computes, not what."""
_WATCHING = {"timeout_s", "micro_batch_tokens", "canary_every", "probe_margin", *JUDGING_FIELDS}
"""Settings of the discriminator that place, bound, cut or watch its work without changing it."""
_ALIGNING = {"gate", "replay", "guard", "importance_cap", "updates_per_step", "alignment_balance_coefficient"}
"""Those that warm-up has no use for."""


def _what_shapes(rollout: RolloutSettings) -> dict[str, Any]:
    """The rollout settings that change what is sampled, not how fast or where."""
    names = {"group_size", "temperature", "max_response_tokens", "max_model_len", "dtype", "kv_on_update", "seed"}
    return {"rollout": rollout.model_dump(mode="json", include=names)}


def _trained_by(trainer: TrainerSettings) -> dict[str, Any]:
    names = {"precision", "max_prompt_tokens", "max_response_tokens", "freeze"}
    return {"trainer": trainer.model_dump(mode="json", include=names)}


def _phase(phase: PhaseSettings, learner: LearnerSettings, updates: int) -> dict[str, Any]:
    """What shapes the policy in a phase of so many updates: its settings, and the learner's as the phase takes them."""
    harmless = {"loop": {"stall_timeout_s", "checkpoint_every", "dynamic_sampling_limit"}, "optimiser": True}
    trained = phase.optimiser.over(learner, updates).model_dump(mode="json", exclude=_NOT_SHAPING)
    return {"phase": phase.model_dump(mode="json", exclude=harmless) | {"updates": updates}, "learner": trained}


def _corpus(session: Session, name: str) -> Any:
    """What identifies a corpus: the user's files by path, size and time, or the testbed's settings for that split."""
    settings = session.settings
    if own := getattr(settings.data, name, []):
        files = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file, _, _ in find_files(own)]
        read_as = [source.model_dump(mode="json") for source in own if isinstance(source, SourceSettings)]
        return sorted(files) + read_as
    sizes: set[str] = {*SPLITS} - {name}
    return {"testbed": settings.testbed.model_dump(mode="json", exclude=sizes), "seed": settings.seed}


async def _base(session: Session) -> Outcome:
    """The user's own policy as it is, or the testbed's base model: built, then trained in two phases of one run."""
    settings = session.settings
    if settings.policy is not None:
        return Outcome(0, session.checkpoint("base"))
    untrained = session.stage_folder("base") / "untrained"
    if not untrained.exists():
        building = untrained.with_suffix(".new")
        await asyncio.to_thread(build_tiny, building, vocabulary(), settings.model, settings.seed)
        building.rename(untrained)
    made = session.corpora
    phases = (
        supervised.Phase("pretrain", tuple(made["pretrain"]), settings.base.pretrain, "cells"),
        supervised.Phase("clean", tuple(made["base"]), settings.base.clean),
    )
    return await _supervised(session, "base", untrained, phases)


async def _sft(session: Session, name: str, start: str, corpus: str, settings: SupervisedSettings) -> Outcome:
    phase = supervised.Phase(name, tuple(session.corpora[corpus]), settings)
    outcome = await _supervised(session, name, session.checkpoint(start), (phase,))
    if session.settings.system_prompt:
        set_system_turn(session.checkpoint(name), session.settings.system_prompt)
    return outcome


async def _supervised(session: Session, name: str, start: Path, phases: tuple[supervised.Phase, ...]) -> Outcome:
    settings = session.settings
    # Ray Train would wait for its ranks' resources for ever; once they are seen to be free they are left to it.
    await session.placement.reserve([trainer(settings.trainer)])
    session.placement.release(TRAINER)
    before = {p.name: sum(q.settings.steps for q in phases[:i]) for i, p in enumerate(phases)}
    with Progress(name, sum(p.settings.steps for p in phases)) as progress:

        def on_metrics(phase: str, step: int, metrics: dict[str, float]) -> None:
            session.metrics.write(phase if phase == name else f"{name}/{phase}", step, metrics)
            progress.update(before[phase] + step, **metrics)

        done = await asyncio.to_thread(
            supervised.train_supervised,
            name,
            start,
            phases,
            session.checkpoint(name),
            session.stage_folder(name) / "state",
            settings.trainer,
            settings.corpora,
            settings.seed,
            on_metrics,
            session.quarantine,
            session.check_stop,
            settings.cluster.stop_grace_s,
        )
    for line in done.quarantined:
        log.warning("%s", line)
    return Outcome(done.steps, session.checkpoint(name))


async def _warmup(session: Session) -> Outcome:
    written = bool(session.settings.data.warmup)
    corpus = session.corpora["warmup" if written else "align"]
    return await run_warmup(session, "warmup", session.checkpoint("sft"), corpus, written)


async def _align(session: Session) -> Outcome:
    settings = session.settings
    itself = judges_itself("align", settings)

    async def judge() -> StageJudge:
        if not itself:
            return await served_judge(settings)
        return await DiscriminatorPool.start(
            session.checkpoint("warmup"),
            settings.discriminator,
            settings.rollout.max_prompt_tokens,
            seed=settings.seed,
            truth=load_truth(settings.evaluate.truth),
            places=await session.judge_places(),
        )

    async def keep_discriminator(trained: StageJudge) -> None:
        if isinstance(trained, DiscriminatorPool):  # one that is served is kept elsewhere
            await trained.export(session.stage_folder("align") / "discriminator")

    return await run_phase(
        session,
        Phase(
            "align",
            session.checkpoint("sft"),
            session.corpora["align"],
            settings.align,
            settings.align.updates,
            judge,
            needs_reference=True,
            on_end=keep_discriminator,
            follow=session.follow_scorers if itself and settings.discriminator.scorers else None,
        ),
    )


async def _rlvr(session: Session, name: str, start: str, updates: int) -> Outcome:
    settings = session.settings

    by_reference = settings.rlvr.judge == "serve"
    corpus, start_folder = session.corpora["rlvr"], session.checkpoint(start)

    async def judge() -> StageJudge:
        verify = settings.verify
        if by_reference:
            return await served_judge(settings)
        return EpisodePool(verify, start_folder) if verify.max_turns > 1 else VerifierPool(verify)

    return await run_phase(
        session, Phase(name, start_folder, corpus, settings.rlvr, updates, judge, needs_reference=by_reference)
    )


def _refuse_testbed_judges(settings: RunSettings) -> None:
    """The testbed's verifier and truth know only its own scenes; on other data every answer would count as wrong."""
    for corpus, field, value, other in (
        ("rlvr", "verify.environment", settings.verify.environment, "prism_ray.verify.answer:prism/Answer-v0"),
        ("evaluate", "evaluate.truth", settings.evaluate.truth, "prism_ray.verify.answer:truth_of"),
    ):
        unused = corpus == "rlvr" and settings.rlvr.judge == "serve"
        if not unused and getattr(settings.data, corpus) and value.startswith("prism_ray.testbed"):
            raise ValueError(f"{field} is the testbed's, but data.{corpus} is your own; set it to {other} or to yours")


def check_inputs(settings: RunSettings) -> None:
    """Look at the files the configuration names, before anything starts; raises InputError with a sentence."""
    try:
        if settings.policy is not None:
            check_policy(settings.policy)
            judge_start(settings.policy, settings.discriminator.policy)
        load_truth(settings.evaluate.truth)
        make_environment(settings.verify.environment, settings.verify.options).close()
        for name, paths in settings.data:
            if paths:
                columns = (*COLUMNS_OF[name], *columns_for(name, settings))
                find_fragments(paths, columns, settings.corpora)
        _refuse_testbed_judges(settings)
        check_served(settings)
    except (CorpusError, ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error


def start_cluster(settings: RunSettings) -> None:
    """Join or start Ray, and refuse a configuration that it cannot hold (ClusterError)."""
    cluster.start(settings.cluster)
    placement.check(layouts(settings), settings.cluster)
