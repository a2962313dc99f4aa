"""Everything from a base model to an aligned, RL-trained and evaluated one.

    python jobs/align.py                                            the testbed on this machine (configs/tiny.yaml)
    python jobs/align.py --config configs/tiny.yaml align.updates=10
    python jobs/align.py --config configs/tiny.yaml --config configs/recipes/dapo.yaml          another RLVR algorithm
    ray job submit --working-dir . -- python jobs/align.py --config FILE

Stages whose outputs are missing or out of date run first; the same command again continues a run that was stopped.
Exit code 0: every stage completed; 1: failed (the last line says why); 2: bad configuration or input; 130: interrupted
with the state saved.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from prism_ray.config.run import RunSettings
from prism_ray.report.progress import setup_logging
from prism_ray.report.summary import read_summary
from prism_ray.report.table import print_evaluation
from prism_ray.runtime.front_door import finish, refusing, settings_for

# Bars of libraries that write model files would tear the live panel; a run has its own progress.
os.environ.setdefault("TQDM_DISABLE", "1")
DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    settings = settings_for(argv, RunSettings, __doc__ or "", "runs", DEFAULT)
    folder = settings.runs / settings.name
    return finish(lambda: _run(settings, folder), f"interrupted; the same command continues it: {folder}")


def _run(settings: RunSettings, folder: Path) -> None:
    # Imported after the command line is understood: --help and a typing error should not take torch's seconds.
    from prism_ray.corpora.reader import CorpusError
    from prism_ray.report.wandb_run import WandbError
    from prism_ray.runtime.cluster import ClusterError
    from prism_ray.runtime.sharing import require_shared
    from prism_ray.stages.run import InputError, check_inputs, run, start_cluster
    from prism_ray.stages.session import Interrupted

    with refusing(InputError, CorpusError, ClusterError, WandbError):
        setup_logging(folder)
        logging.getLogger("prism_ray").info("%s holds this run", folder.absolute())
        check_inputs(settings)
        start_cluster(settings)
        require_shared(folder, settings.named_paths(), settings.cluster.pending_timeout_s)
        try:
            asyncio.run(run(settings))
        except Interrupted:
            raise KeyboardInterrupt from None
    print_evaluation(read_summary(folder)["evaluation"])
    print(f"done: {folder / 'summary.json'} and {folder / 'report.html'}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
