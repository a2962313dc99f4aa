"""Look into the journal of a run's stage, or train on it again without engines.

    python jobs/replay.py RUN_FOLDER --stage align --show           the groups: prompt, versions, rewards, lengths, fate
    python jobs/replay.py RUN_FOLDER --stage align --show 12        one of them: its texts and verdicts
    python jobs/replay.py RUN_FOLDER --stage align                  the stage's updates again, on the recorded groups
    python jobs/replay.py RUN_FOLDER --stage align learner.lr=1e-4  with another setting than the run had

Training needs a run with `journal.keep=true`. The same journal, start and settings give the same losses each time; they
are printed beside those of the run, and go with all other metrics to RUN_FOLDER/replay/<stage>/metrics.jsonl.
Exit code 0: done; 1: failed (the last line says why); 2: bad input; 130: interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from pathlib import Path

from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.run import RunSettings
from prism_ray.report.metrics import MetricsLog, read_metrics
from prism_ray.runtime.front_door import finish, refusing
from prism_ray.runtime.submitted import at_home, found, kept


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    arguments.run = kept(arguments.run)  # where the run is, what comes of this is written too
    work = _show if arguments.show is not None else _train
    return finish(lambda: work(arguments), "interrupted; the same command begins anew")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="the run's folder, such as runs/tiny")
    stages = ("align", "rlvr", "rlvr-sft", "rlvr-references")
    parser.add_argument("--stage", required=True, choices=stages, help="whose journal")
    parser.add_argument(
        "--show", nargs="?", type=int, const=-1, metavar="ID", help="print the groups, or this one, and train nothing"
    )
    parser.add_argument("--updates", type=int, help="end after so many updates (all there are)")
    parser.add_argument("--start", type=Path, help="policy to start from (the stage's own start)")
    parser.add_argument("--salvage", action="store_true", help="leave out damaged records instead of failing")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="a setting to differ from the run's")
    return parser


def _journal(arguments: argparse.Namespace) -> Path:
    folder = arguments.run / "journal" / arguments.stage
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is not there: {arguments.run} has no run whose {arguments.stage} was begun")
    return folder


def _show(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    # Imported after the command line is understood: --help should not take torch's seconds.
    from prism_ray.runtime.journal import JournalError
    from prism_ray.stages.replay import ReplayError, describe, overview

    with refusing(JournalError, ReplayError, FileNotFoundError):
        folder = _journal(arguments)
        if arguments.show >= 0:
            print(describe(folder, arguments.show, arguments.salvage))
        else:
            console = Console()
            Console(width=None if console.is_terminal else 160).print(overview(folder, arguments.salvage))


def _train(arguments: argparse.Namespace) -> None:
    from prism_ray.runtime import cluster
    from prism_ray.runtime.journal import JournalError
    from prism_ray.runtime.sharing import require_shared
    from prism_ray.stages.replay import STARTS, ReplayError, replay

    stage = arguments.stage
    with refusing(ConfigError, JournalError, ReplayError, FileNotFoundError, cluster.ClusterError):
        journal = _journal(arguments)
        settings = at_home(load_config(RunSettings, arguments.run / "config.yaml", arguments.overrides), "runs")
        given = found(arguments.start) if arguments.start else arguments.run / STARTS[stage] / "checkpoint"
        start = given.resolve()
        recorded = {r["step"]: r for r in read_metrics(arguments.run / "metrics.jsonl") if r["stage"] == stage}
        cluster.start(settings.cluster)
        require_shared(None, {"--start": [start]}, settings.cluster.pending_timeout_s)
        with MetricsLog(arguments.run / "replay" / stage) as log:

            def on_update(step: int, metrics: dict[str, float]) -> None:
                log.write(stage, step, metrics)
                then = recorded.get(step, {}).get("policy/loss", math.nan)
                loss, norm = metrics["policy/loss"], metrics["policy/grad_norm"]
                print(f"update {step}: loss {loss:.9g} (the run's: {then:.9g}), gradient norm {norm:.9g}", flush=True)

            updates, salvage, midway = arguments.updates, arguments.salvage, arguments.start is not None
            asyncio.run(replay(settings, stage, journal, start, on_update, updates, salvage, midway))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
