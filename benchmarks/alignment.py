"""Does alignment help, and what in it? The arms of the study, each a whole run of `jobs/align.py`, over seeds.

    python benchmarks/alignment.py [--quick] [--arms default sync ...] [--seeds 0 1 2] [--runs FOLDER] [--list]

An arm is `configs/tiny.yaml` with other settings (`--list` prints them); its runs are `<runs>/<arm>-s<seed>`. Stages
that an arm shares with `default` are taken from that arm's run of the same seed, if it is there, so the arms of a seed
start from the same checkpoints. What is finished is not run again, so arms and seeds can be added later.

Prints a Markdown table per arm and seed: accuracy at T = 1 and greedy on held-out prompts, captions exactly right,
reasoning right given the response's own caption, and the total-variation distances to the references of caption length,
number of steps and response length. Ratios are means over the seeds that finished, accuracy at T = 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import conditions, finish, parse

ROOT = Path(__file__).resolve().parents[1]
ALL = "[sft,warmup,align,rlvr,rlvr-sft,references,rlvr-references,evaluate]"
OURS = "[align,rlvr,evaluate]"
"""Arms that change nothing but alignment evaluate nothing but what alignment leads to."""

SHARED = ("corpora", "base", "sft", "warmup", "references", "rlvr-sft", "rlvr-references")
"""What an arm takes over from `default`; a stage that its settings change is made anew by the run itself."""

DRIFTS = ("caption_length", "steps", "response_length")


@dataclass(frozen=True)
class Arm:
    """Settings of an arm, and the question that it asks."""

    why: str
    settings: tuple[str, ...] = ()
    stages: str = OURS


def _context(context: str) -> str:
    """The default views with another context for the reasoning."""
    return (
        "discriminator.views=[{name: perception, tags: [caption], weight: 0.5, context: none}, "
        f"{{name: reasoning, tags: [think, answer], weight: 0.5, context: {context}}}]"
    )


WHOLE = "{name: whole, tags: [caption, think, answer]}"
SCALAR = (
    "discriminator.likelihood_weight=0", "warmup.max_steps=60", "warmup.min_steps=60", "warmup.target_accuracy=0.5",
)  # fmt: skip
MILD = (
    "testbed.noise.wrong_cells=0.5", "testbed.noise.truncated_caption=0.35", "testbed.noise.wrong_reasoning=0.3",
    "testbed.noise.terse_think=0.4",
)  # fmt: skip
GATE = "discriminator.gate.window=64"

ARMS: dict[str, Arm] = {
    "default": Arm("alignment, GRPO alone, and the control (SFT on the references)", stages=ALL),
    "sync": Arm("what asynchrony costs", ("align.loop.max_staleness=0", "rlvr.loop.max_staleness=0")),
    "gate-replay": Arm("gate and replay", (GATE, "discriminator.replay.share=0.25")),
    "context-none": Arm("the reasoning judge does not see the caption (published)", (_context("none"),)),
    "context-reference": Arm("it sees the reference's caption", (_context("reference"),)),
    "gad": Arm("one view of the whole response", (f"discriminator.views=[{WHOLE}]",)),
    "scalar": Arm("the published scalar head alone", SCALAR),
    "scalar-gate": Arm("the same behind a gate", (*SCALAR, GATE)),
    "prism-code": Arm("raw scores, as the published code has them", ("align.advantage.estimator=prism_code",)),
    "no-std": Arm("rewards of views centred, not divided by their deviation", ("align.advantage.by_std=false",)),
    "long-no-std": Arm(
        "long and no-std at once", ("align.updates=35", "rlvr.updates=25", "align.advantage.by_std=false")
    ),
    "dense": Arm("a judge without experts", ("discriminator.backbone=dense",)),
    "short": Arm("15 updates of alignment, 45 of GRPO", ("align.updates=15", "rlvr.updates=45")),
    "long": Arm("35 updates of alignment, 25 of GRPO", ("align.updates=35", "rlvr.updates=25")),
    "few": Arm("96 references", ("testbed.align=96", "warmup.held_out_prompts=32"), ALL),
    "styles": Arm("a teacher of three styles", ("testbed.teacher_styles=3",), ALL),
    "few-styles": Arm(
        "96 references of a teacher of three styles",
        ("testbed.align=96", "warmup.held_out_prompts=32", "testbed.teacher_styles=3"),
        ALL,
    ),
    "less-sparse": Arm("SFT that spoils less: 150 steps in place of 350", ("sft.steps=150",), ALL),
    "mild-noise": Arm("a public corpus with about half the faults, so a start that is less sparse", MILD, ALL),
}

SMALL = (
    "testbed.pretrain=64", "testbed.base=64", "testbed.sft=64", "testbed.align=96", "testbed.rlvr=64",
    "testbed.evaluate=32", "testbed.evaluate_unseen=8", "base.pretrain.steps=2", "base.clean.steps=4", "sft.steps=2",
    "references.steps=2", "references.batch=8", "warmup.max_steps=2", "warmup.min_steps=0", "warmup.rollouts=1",
    "warmup.target_accuracy=0", "warmup.held_out_prompts=16", "warmup.prompts_per_step=8", "align.updates=2",
    "rlvr.updates=2", "evaluate.prompts=16", "align.loop.groups_per_step=4", "rlvr.loop.groups_per_step=4",
)  # fmt: skip
"""Everything small enough to show in minutes that the script works; the numbers then mean nothing."""


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--arms", nargs="+", default=["default"], choices=list(ARMS), metavar="ARM")
    own.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    own.add_argument("--runs", type=Path, default=Path("runs/alignment"), help="folder of the runs")
    own.add_argument("--list", action="store_true", help="print the arms with their settings and end")
    arguments = parse(__doc__, own)
    if arguments.list:
        for name, arm in ARMS.items():
            print(f"{name}: {arm.why}; {' '.join(arm.settings) or 'configs/tiny.yaml as it is'}")
        return
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    began = time.monotonic()
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in seeds:
        for name in sorted(arguments.arms, key=list(ARMS).index):
            result = run(name, seed, arguments.runs, SMALL if arguments.quick else ())
            found.setdefault(name, {})[seed] = result
            print(table(name, seed, result), flush=True)
    figures = {"arms": found, "settings": {name: list(ARMS[name].settings) for name in found}}
    finish("alignment", ratios(found), figures, conditions() | {"hours": (time.monotonic() - began) / 3600})


def run(name: str, seed: int, runs: Path, more: tuple[str, ...]) -> dict[str, Any]:
    """The evaluation of an arm's run by label, or {"failed": the reason}."""
    arm, folder = ARMS[name], runs / f"{name}-s{seed}"
    if not folder.exists():
        folder.mkdir(parents=True)
        for stage in SHARED:
            if (made := runs / f"default-s{seed}" / stage).exists():
                shutil.copytree(made, folder / stage)
    command = [
        sys.executable, str(ROOT / "jobs" / "align.py"), "--config", str(ROOT / "configs" / "tiny.yaml"),
        f"name={folder.name}", f"runs={runs}", f"seed={seed}", f"stages={arm.stages}", *more, *arm.settings,
    ]  # fmt: skip
    with (folder / "output.txt").open("a") as output:
        done = subprocess.run(command, stdout=output, stderr=output)
    if done.returncode:
        reason = (folder / "output.txt").read_text().strip().splitlines()[-1]
        return {"failed": f"exit code {done.returncode}: {reason}"}
    return json.loads((folder / "summary.json").read_text())["evaluation"]


def table(name: str, seed: int, result: Mapping[str, Any]) -> str:
    """An arm's run as rows of a Markdown table."""
    if "failed" in result:
        return f"| {name} s{seed} | {result['failed']} |"
    rows = []
    for label, numbers in result.items():
        drift = numbers.get("drift", {})
        accuracy = " / ".join(f"{numbers[which]['mean']:.3f}" for which in ("accuracy", "accuracy_greedy"))
        shares = " | ".join(f"{numbers[which]:.3f}" for which in ("caption_exact", "reasoning_given_caption"))
        distances = " / ".join(f"{drift[d]:.2f}" if d in drift else "–" for d in DRIFTS)
        rows.append(f"| {name} s{seed} | `{label}` | {accuracy} | {shares} | {distances} |")
    return "\n".join(rows)


def ratios(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, float]:
    """Per arm: `prism+grpo` over `sft+grpo` and over the control, and over the default arm's `prism+grpo`."""
    result: dict[str, float] = {}
    for name, seeds in found.items():
        ours = _mean(seeds, "prism+grpo")
        for other, label in (("grpo_alone", "sft+grpo"), ("control", "sft+references+grpo")):
            if ours and (theirs := _mean(seeds, label)):
                result[f"{name}_over_{other}"] = ours / theirs
        if ours and name != "default" and (usual := _mean(found.get("default", {}), "prism+grpo")):
            result[f"{name}_over_default"] = ours / usual
    return result


def _mean(seeds: Mapping[int, Mapping[str, Any]], label: str) -> float | None:
    values = [result[label]["accuracy"]["mean"] for result in seeds.values() if label in result]
    return statistics.mean(values) if values else None


if __name__ == "__main__":
    main()
