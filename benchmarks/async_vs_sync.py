"""Asynchronous against synchronous training, everything real: wall time, idle learner, staleness, accuracy.

    python benchmarks/async_vs_sync.py [--quick] [--policy FOLDER] [--engines 1 2] [--staleness 0 1 2] [--updates N]

RLVR (GRPO) of the tiny policy on the testbed as `configs/tiny.yaml` runs it: the real loop, vLLM engines, DeepSpeed
learner, verifier, journal and Ray Data. Every arm starts from the same checkpoint with the same seeds and makes as many
updates; arms differ in `max_staleness` (0 is synchronous) and in the number of engines. Without `--policy` they start
from the SFT checkpoint of `runs/tiny`, which is made first if it is not there.

Figures are of the updates between the first and the last few, when the pipeline is neither filled nor drained:
seconds per update, trained samples and response tokens per second (ratios are of the latter: arms come to answer at
different lengths, and a shorter response makes no faster system), `learner_idle_share` (time in which the learner
neither updates nor hands over weights), the share of trained tokens of each staleness, and processor seconds per update
by kind of process.
Whatever else runs on the machine counts too: `load` says how much that was. Accuracy (T = 1 and greedy) is that of each
arm's last checkpoint on held-out prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from common import conditions, finish, parse

from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.corpora.stream import PromptStream
from prism_ray.learner.group import LearnerGroup
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt, Ticket
from prism_ray.report.evaluation import evaluation_metrics
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary
from prism_ray.stages import phase, run
from prism_ray.stages.evaluate import load_truth
from prism_ray.stages.session import Session
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary
from prism_ray.verify.pool import VerifierPool

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
TRL_SAMPLES_PER_S = 73
"""TRL 1.16's GRPOTrainer, Hugging Face generation, 16 prompts x 8, about 29 tokens a response (here about 56), two
otherwise idle cores of the same kind."""
UNUSED = [f"testbed.{split}=8" for split in ("pretrain", "base", "sft", "align", "evaluate_unseen")]


class Timed(LearnerGroup):
    """The learner; notes how long it was busy, and how many response tokens it was given."""

    busy_s = 0.0
    tokens = 0

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        began = time.perf_counter()
        Timed.tokens += sum(ticket.tokens for ticket in tickets)
        try:
            return await super().update(tickets, version)
        finally:
            Timed.busy_s += time.perf_counter() - began

    async def weights(self) -> Any:
        began = time.perf_counter()
        try:
            return await super().weights()
        finally:
            Timed.busy_s += time.perf_counter() - began


class Watch(MetricsLog):
    """A run's metrics; notes at each update when it was, and what learner and processors had done until then."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.marks: dict[str, list[Mark]] = {}

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        super().write(stage, step, numbers)
        self.marks.setdefault(stage, []).append(Mark(numbers))


class Mark:
    """One moment of a run."""

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self.numbers, self.time, self.learner_s = dict(numbers), time.perf_counter(), Timed.busy_s
        self.tokens = Timed.tokens
        self.processor_s = processor_seconds()


def processor_seconds() -> dict[int, tuple[str, float]]:
    """Kind and processor seconds of this process and of all that it started, by number."""
    mine, used = psutil.Process(), dict[int, tuple[str, float]]()
    for process in [mine, *mine.children(recursive=True)]:
        try:
            command, times = process.cmdline(), process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        kind = "coordinator" if process == mine else _kind(command)
        used[process.pid] = kind, times.user + times.system
    return used


def spent_between(first: Mark, last: Mark) -> dict[str, float]:
    """Processor seconds by kind, the largest first. Ray's processes change their names: the last one counts."""
    spent: defaultdict[str, float] = defaultdict(float)
    for pid, (kind, used) in last.processor_s.items():
        spent[kind] += used - first.processor_s.get(pid, ("", 0.0))[1]
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def _kind(command: list[str]) -> str:
    """`ray::LearnerRank.update` and `ray::LearnerRank` are one kind, and so are all of Ray's own processes."""
    name = command[0] if command else ""
    if name.startswith(("ray::", "VLLM::")):
        return name.split(".")[0].split(" ")[0]
    return "ray"


async def run_arm(session: Session, name: str, staleness: int, start: Path, updates: int) -> None:
    """One training run; its checkpoint and metrics are found under its name."""
    settings = session.settings
    loop = settings.rlvr.loop.model_copy(update={"max_staleness": staleness, "checkpoint_every": updates + 1})
    rlvr = settings.rlvr.model_copy(update={"loop": loop})

    async def judge() -> VerifierPool:
        return VerifierPool(settings.verify)

    corpus = session.corpora["rlvr"]
    session.stage_folder(name).mkdir(parents=True, exist_ok=True)
    await phase.run_phase(session, phase.Phase(name, start, corpus, rlvr, updates, judge, needs_reference=False))


def summarise(marks: list[Mark], samples: int, skipped: int) -> dict[str, Any]:
    """What happened between two marks of a run; `samples` are those of one update."""
    rows = marks[skipped : len(marks) - skipped]
    first, last = marks[skipped - 1], rows[-1]
    seconds, count = last.time - first.time, len(rows)
    spent = spent_between(first, last)
    shares = {name for mark in rows for name in mark.numbers if name.startswith("staleness/") and "share" in name}
    staleness = {
        name.split("/")[1]: sum(mark.numbers.get(name, 0.0) for mark in rows) / count
        for name in sorted(shares)
        if name.endswith("/share")
    }
    return {
        "seconds_per_update": seconds / count,
        "samples_per_s": samples * count / seconds,
        "tokens_per_s": (last.tokens - first.tokens) / seconds,
        "learner_idle_share": 1 - (last.learner_s - first.learner_s) / seconds,
        "staleness_of_tokens": staleness,
        "processor_s_per_update": {kind: used / count for kind, used in spent.items()},
        "processors_busy": sum(spent.values()) / seconds,
        "coordinator_ms_per_trajectory": 1e3 * spent["coordinator"] / (samples * count),
        "load": os.getloadavg()[0],
    }


async def held_out(session: Session, policy: Path) -> list[Prompt]:
    """The prompts that every arm's checkpoint is evaluated on."""
    settings = session.settings
    needs = session.requirements(policy, judged_by="verifier")
    stream = PromptStream(session.corpora["evaluate"], needs, settings.corpora, settings.seed)
    try:
        taken = [await stream.take() for _ in range(min(settings.evaluate.prompts, stream.rows))]
        return [await ref for _, _, ref in taken]
    finally:
        stream.shutdown()


async def evaluate(session: Session, name: str, prompts: list[Prompt]) -> dict[str, Any]:
    engines = await session.engines(session.checkpoint(name))
    sampled = await engines.sample(prompts, 1, temperature=1.0)
    greedy = await engines.sample(prompts, 1, greedy=True)
    metrics = evaluation_metrics(sampled, greedy, load_truth(session.settings.evaluate.truth))
    return {name: metrics[name] for name in ("n", "accuracy", "accuracy_greedy", "mean_tokens")}


async def compare(settings: RunSettings, start: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every arm, one after the other; arms with equally many engines share them."""
    found: dict[str, Any] = {}
    for engines in options.engines:
        rollout = settings.rollout.model_copy(update={"engines": engines})
        own = settings.model_copy(update={"rollout": rollout, "name": f"engines_{engines}"})
        metrics = Watch(own.runs / own.name)
        session = Session(own, metrics, Summary(own.runs / own.name, own.name))
        session.corpora = {n: [p] for n, p in write_corpora(own.runs / "corpora", own.testbed, own.seed).items()}
        try:
            prompts = await held_out(session, start)
            for staleness in options.staleness:
                name = f"{engines}_engines_staleness_{staleness}"
                await run_arm(session, name, staleness, start, options.updates)
                samples = own.rlvr.loop.groups_per_step * own.rollout.group_size
                found[name] = summarise(metrics.marks[name], samples, options.skipped)
                found[name] |= await evaluate(session, name, prompts)
                print(name, found[name], flush=True)
        finally:
            await session.close()
            metrics.close()
    return found


def starting_policy(options: argparse.Namespace, settings: RunSettings, folder: Path) -> Path:
    """The given checkpoint, or the tiny run's; a quick run makes do with an untrained policy."""
    given = Path(options.policy) if options.policy else ROOT / "runs" / "tiny" / "sft" / "checkpoint"
    if given.exists():
        return given
    if options.policy:
        raise SystemExit(f"{given} is not there; give --policy a Hugging Face folder")
    if options.quick:
        build_tiny(folder / "policy", vocabulary(), settings.model, seed=0)
        return folder / "policy"
    asyncio.run(run.run(load_config(RunSettings, TINY, [f"runs={ROOT / 'runs'}", "stages=[sft]"])))
    return given


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--policy", default="", help="checkpoint to start from (default: runs/tiny/sft/checkpoint)")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=28)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings of the run, all arms")
    options = parse(__doc__, parser)
    options.skipped, overrides = 4, ["stages=[rlvr]", "testbed.evaluate=512", *UNUSED]
    if options.quick:
        options.skipped, options.updates, options.engines, options.staleness = 1, 3, [1], [0, 1]
        overrides += ["testbed.evaluate=32", "testbed.rlvr=128", "rlvr.loop.groups_per_step=4"]
    with tempfile.TemporaryDirectory() as folder:
        settings = load_config(RunSettings, TINY, [f"runs={folder}", *overrides, *options.set])
        phase.LearnerGroup = Timed
        run.start_cluster(settings.model_copy(update={"rollout": settings.rollout.model_copy(
            update={"engines": max(options.engines)})}))  # fmt: skip
        try:
            start = starting_policy(options, settings, Path(folder))
            found = asyncio.run(compare(settings, start, options))
        finally:
            ray.shutdown()
    ratios = {}
    for engines in options.engines:
        for staleness in options.staleness:
            arm, base = f"{engines}_engines_staleness_{staleness}", f"{engines}_engines_staleness_0"
            if staleness and base in found:
                ratios[f"{arm}_over_sync"] = found[arm]["tokens_per_s"] / found[base]["tokens_per_s"]
    for name, row in found.items():
        ratios[f"{name}_over_trl"] = row["samples_per_s"] / TRL_SAMPLES_PER_S
    setting = {"updates": options.updates, "skipped_at_both_ends": options.skipped, "set": options.set}
    finish("async_vs_sync", ratios, found, {**conditions(), **setting})


if __name__ == "__main__":
    main()
