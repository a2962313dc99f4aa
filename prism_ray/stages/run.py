"""A run: the stages of `configs/*.yaml`, each with what it needs and depends on, run in order and accounted for."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path
from typing import Any

from prism_ray.config.load import to_yaml
from prism_ray.config.run import STAGES, RunSettings
from prism_ray.config.supervised import SupervisedSettings
from prism_ray.corpora.reader import CorpusError, find_fragments
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.models.load import check_policy
from prism_ray.models.tiny import build_tiny
from prism_ray.report.html import write_report
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.progress import Progress
from prism_ray.report.summary import Summary
from prism_ray.runtime import cluster
from prism_ray.stages import supervised
from prism_ray.stages.evaluate import LABELS, load_truth, run_evaluate
from prism_ray.stages.phase import Phase, StageJudge, run_phase
from prism_ray.stages.pipeline import Outcome, Stage, finish, finished, key_of, plan, prepare
from prism_ray.stages.session import Interrupted, Session
from prism_ray.stages.warmup import run_warmup
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary
from prism_ray.verify.pool import VerifierPool, make_environment

log = logging.getLogger(__name__)


class InputError(ValueError):
    """The configuration names something that is not there or not what it should be."""


def stages_of(session: Session) -> dict[str, Stage]:
    """Every stage of a run, each after those it needs."""
    s = session.settings
    task = {"testbed": s.testbed, "seed": s.seed, "data": s.data, "corpora": s.corpora}
    policy = {"model": s.model, "base": s.base, "policy": s.policy}
    sampling = {"rollout": _what_shapes(s.rollout), "learner": s.learner}
    align = {"discriminator": s.discriminator, "align": s.align, **sampling}
    rlvr = {"rlvr": s.rlvr, "verify": s.verify, **sampling}
    full = s.align.updates + s.rlvr.updates
    evaluated = tuple(name for name in LABELS if name in s.stages) or ("sft",)
    runs: dict[str, tuple[tuple[str, ...], dict[str, Any], Any]] = {
        "base": ((), task | policy, lambda: _base(session)),
        "sft": (("base",), {"sft": s.sft}, lambda: _sft(session, "sft", "base", "sft", s.sft)),
        "warmup": (
            ("sft",),
            {"warmup": s.warmup, "discriminator": s.discriminator, "rollout": _what_shapes(s.rollout)},
            lambda: run_warmup(session, "warmup", session.checkpoint("sft"), session.corpora["align"]),
        ),
        "align": (("sft", "warmup"), align, lambda: _align(session)),
        "rlvr": (("align",), rlvr, lambda: _rlvr(session, "rlvr", "align", s.rlvr.updates)),
        "rlvr-sft": (("sft",), rlvr | {"updates": full}, lambda: _rlvr(session, "rlvr-sft", "sft", full)),
        "references": (
            ("sft",),
            {"references": s.references},
            lambda: _sft(session, "references", "sft", "align", s.references),
        ),
        "rlvr-references": (
            ("references",),
            rlvr,
            lambda: _rlvr(session, "rlvr-references", "references", s.rlvr.updates),
        ),
        "evaluate": (
            evaluated,
            {"evaluate": s.evaluate, "rollout": _what_shapes(s.rollout)},
            lambda: run_evaluate(session, evaluated),
        ),
    }
    return {name: Stage(name, *runs[name]) for name in STAGES}


async def run(settings: RunSettings) -> Path:
    """Run the configured stages; returns the run's folder. Raises what failed, or Interrupted with the state saved."""
    folder = settings.runs / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    summary = Summary(folder, settings.name)
    metrics = MetricsLog(folder, settings.report, settings.model_dump(mode="json"))
    session = Session(settings, metrics, summary)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, session)
    status = "failed"
    try:
        session.corpora = await asyncio.to_thread(_corpora, session)
        await _run_stages(session)
        status = "completed"
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        await session.close()
        session.metrics.close()
        summary.finish(status)
        write_report(folder, settings)
    return folder


async def _run_stages(session: Session) -> None:
    summary, keys = session.summary, {}
    for stage in plan(stages_of(session), session.settings.stages):
        keys[stage.name] = key_of(stage, keys)
        folder = session.stage_folder(stage.name)
        if prepare(folder, keys[stage.name]):
            done = finished(folder) or {}
            log.info("%s is up to date", stage.name)
            summary.stage(stage.name, "completed", done["seconds"], done["updates"], done["checkpoint"])
            continue
        session.check_stop()
        log.info("%s begins", stage.name)
        began = time.monotonic()
        try:
            outcome = await stage.run()
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            summary.stage(stage.name, status, time.monotonic() - began, 0, None)
            raise
        seconds = time.monotonic() - began
        finish(folder, keys[stage.name], outcome, seconds)
        summary.stage(stage.name, "completed", seconds, outcome.updates, outcome.checkpoint)
        log.info("%s is done in %.0f s", stage.name, seconds)


def _on_signal(session: Session) -> None:
    if session.stop.is_set():
        raise KeyboardInterrupt
    log.warning("stopping after this update, with the state saved; once more to stop at once")
    session.stop.set()


def _corpora(session: Session) -> dict[str, list[Path]]:
    """The user's corpora, and the testbed's where there are none."""
    settings = session.settings
    own = {name: paths for name, paths in settings.data if paths}
    if set(own) == set(type(settings.data).model_fields) and settings.policy is not None:
        return own
    made = write_corpora(session.folder.resolve() / "corpora", settings.testbed, settings.seed)
    return {name: [path] for name, path in made.items()} | own


def _what_shapes(rollout: Any) -> dict[str, Any]:
    """The rollout settings that change what is sampled, not how fast or where."""
    return {name: getattr(rollout, name) for name in ("group_size", "temperature", "max_response_tokens")}


async def _base(session: Session) -> Outcome:
    """The user's own policy as it is, or the testbed's base model: built, then trained in two phases of one run."""
    settings = session.settings
    if settings.policy is not None:
        return Outcome(0, session.checkpoint("base"))
    untrained = session.stage_folder("base") / "untrained"
    await asyncio.to_thread(build_tiny, untrained, vocabulary(), settings.model, settings.seed)
    made = session.corpora
    phases = (
        supervised.Phase("pretrain", tuple(made["pretrain"]), settings.base.pretrain, "cells"),
        supervised.Phase("clean", tuple(made["base"]), settings.base.clean),
    )
    return await _supervised(session, "base", untrained, phases)


async def _sft(session: Session, name: str, start: str, corpus: str, settings: SupervisedSettings) -> Outcome:
    phase = supervised.Phase(name, tuple(session.corpora[corpus]), settings)
    return await _supervised(session, name, session.checkpoint(start), (phase,))


async def _supervised(session: Session, name: str, start: Path, phases: tuple[supervised.Phase, ...]) -> Outcome:
    settings = session.settings
    before = {p.name: sum(q.settings.steps for q in phases[:i]) for i, p in enumerate(phases)}
    with Progress(name, sum(p.settings.steps for p in phases)) as progress:

        def on_metrics(phase: str, step: int, metrics: dict[str, float]) -> None:
            session.check_stop()
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
            session.quarantine(name),
        )
    for line in done.quarantined:
        log.warning("%s", line)
    return Outcome(done.steps, session.checkpoint(name))


async def _align(session: Session) -> Outcome:
    settings = session.settings

    async def judge() -> StageJudge:
        return await DiscriminatorPool.start(
            session.checkpoint("warmup"), settings.discriminator, settings.rollout.max_prompt_tokens
        )

    async def keep_discriminator(trained: StageJudge) -> None:
        assert isinstance(trained, DiscriminatorPool)
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
        ),
    )


async def _rlvr(session: Session, name: str, start: str, updates: int) -> Outcome:
    settings = session.settings

    async def judge() -> StageJudge:
        return VerifierPool(settings.verify)

    corpus, start_folder = session.corpora["rlvr"], session.checkpoint(start)
    return await run_phase(
        session, Phase(name, start_folder, corpus, settings.rlvr, updates, judge, needs_reference=False)
    )


def check_inputs(settings: RunSettings) -> None:
    """Look at the files the configuration names, before anything starts; raises InputError with a sentence."""
    try:
        if settings.policy is not None:
            check_policy(settings.policy)
        load_truth(settings.evaluate.truth)
        make_environment(settings.verify.environment).close()
        for _, paths in settings.data:
            if paths:
                find_fragments(paths)
    except (CorpusError, ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error


def start_cluster(settings: RunSettings) -> None:
    """Join or start Ray, and refuse a configuration that it cannot hold."""
    cluster.start(settings.cluster)
    rollout, learner = settings.rollout, settings.learner
    cluster.require(
        {
            f"rollout engines ({rollout.engines})": {
                "CPU": rollout.engines * rollout.cpus_per_engine, "GPU": rollout.engines * rollout.gpus_per_engine,
            },
            f"learner ranks ({learner.ranks})": {
                "CPU": learner.ranks * learner.cpus_per_rank, "GPU": learner.ranks * learner.gpus_per_rank,
            },
        },
        settings.cluster.pending_timeout_s,
    )  # fmt: skip
