"""What a run would need, before it costs a GPU-hour: placement, memory, tokens under way, staleness, disk.

    python jobs/plan.py --config configs/qwen3_vl_4b.yaml                         on one node of 8 x H100
    python jobs/plan.py --config configs/qwen3_vl_8b.yaml --config configs/nodes/4.yaml --cluster 4x8     on four
    python jobs/plan.py --config configs/tiny.yaml --cluster live                 on the Ray cluster that there is
    python jobs/plan.py --config configs/tiny.yaml --cluster 1x0 --measured runs/tiny   with the rates of an earlier run

Nothing is started but, for `live`, what connects to Ray (where there is no cluster: a private one of this machine, for
a moment). The policy's `config.json` says how large it is; a folder that is not there yet is known by its name if that
begins like a published model's (Qwen3-VL-2B, 4B, 8B, 32B).
Exit code 0: the run is possible; 1: failed (the last line says why); 2: it is not, or the configuration is bad (the
reasons, with the settings to change, are the last lines); 130: interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from prism_ray.config.run import RunSettings
from prism_ray.planning.architecture import PlanError
from prism_ray.planning.flow import Rates, measured, phases
from prism_ray.planning.hardware import GIB, Hardware, parse_cluster
from prism_ray.planning.plan import make_plan
from prism_ray.planning.table import print_plan
from prism_ray.report.metrics import read_metrics
from prism_ray.runtime.front_door import DONE, REFUSED, finish, refusing, settings_for
from prism_ray.runtime.submitted import found

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    own = _parser()
    if "-h" in argv or "--help" in argv:
        own.print_help()
    arguments, rest = own.parse_known_args(argv)
    settings = settings_for(rest, RunSettings, __doc__ or "", "runs", DEFAULT)
    return finish(lambda: _plan(arguments, settings), "interrupted")


def _plan(arguments: argparse.Namespace, settings: RunSettings) -> int:
    with refusing(PlanError, FileNotFoundError):
        rates = _rates(found(arguments.measured) if arguments.measured else None, settings)
        plan = make_plan(settings, _hardware(arguments, settings), rates)
    print_plan(plan, settings)
    for problem in plan.problems:
        print(f"impossible: {problem}", file=sys.stderr)
    return REFUSED if plan.problems else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("the cluster")
    group.add_argument("--cluster", default="1x8", help="NODESxGPUS of a node (1x8), or live: the Ray cluster there is")
    group.add_argument("--node-cpus", type=float, default=192, help="CPUs of a node (192, a p5.48xlarge's)")
    group.add_argument("--node-gib", type=float, default=2048, help="memory of a node (2048)")
    group.add_argument("--head-cpus", type=float, default=0, help="CPUs of a head beside the nodes (0: there is none)")
    group.add_argument("--gpu-gib", type=float, default=79.6, help="memory of a GPU (79.6, an H100's)")
    group.add_argument("--gpu-tflops", type=float, default=989, help="dense bfloat16 peak of a GPU (989, an H100's)")
    group.add_argument("--gpu-tb-per-s", type=float, default=3.35, help="memory bandwidth of a GPU (3.35, an H100's)")
    group.add_argument("--measured", type=Path, metavar="RUN_FOLDER", help="take rates from this run's metrics")
    return parser


def _hardware(arguments: argparse.Namespace, settings: RunSettings) -> Hardware:
    if arguments.cluster == "live":
        from prism_ray.runtime import cluster, placement

        with refusing(cluster.ClusterError):
            cluster.start(settings.cluster)
        nodes = placement.nodes()
    else:
        nodes = parse_cluster(arguments.cluster, arguments.node_cpus, arguments.head_cpus)
    there = next(p for p in (settings.runs.resolve(), *settings.runs.resolve().parents) if p.exists())
    # Only a live cluster's disk is the one that the run will write to.
    disk = shutil.disk_usage(there).free / GIB if arguments.cluster == "live" else None
    return Hardware(nodes, arguments.gpu_gib, arguments.node_gib, disk, arguments.gpu_tflops, arguments.gpu_tb_per_s)


def _rates(run: Path | None, settings: RunSettings) -> dict[str, Rates]:
    if run is None:
        return {}
    if not (run / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"--measured: {run} has no metrics.jsonl; give the folder of a run")
    rows = read_metrics(run / "metrics.jsonl")
    return {stage: measured(rows, stage, settings, str(run)) for stage in phases(settings)}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
