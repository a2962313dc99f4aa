"""Look at every row of a run's corpora before anything is trained on them.

    python jobs/check.py --config FILE              the same file as for jobs/align.py
    python jobs/check.py --config FILE corpora.max_bad_share=0.05

Checks what the run would check (columns, images, references, ground truths, lengths), prints what the corpora are like
(lengths, image sizes, sources), which rows say the same exactly or nearly, which ids are used twice, and what training
and held-out corpora have in common. `runs/<name>/check/` gets `check.json` with all of it, and `quarantine.parquet`
with the rows that cannot be used, each with its reason and place. Exit code 0: the run would accept its corpora;
1: failed (the last line says why); 2: bad configuration, or a corpus would stop the run; 130: interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prism_ray.config.run import RunSettings
from prism_ray.runtime.front_door import DONE, REFUSED, finish, refusing, settings_for

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    settings = settings_for(argv, RunSettings, __doc__ or "", "runs", DEFAULT)
    return finish(lambda: _check(settings), "interrupted; nothing was written")


def _check(settings: RunSettings) -> int:
    # Imported after the command line is understood: --help and a typing error should not take torch's seconds.
    from prism_ray.models.load import check_policy
    from prism_ray.report.progress import setup_logging
    from prism_ray.runtime import cluster
    from prism_ray.runtime.sharing import require_shared
    from prism_ray.stages.check import FOLDER, check_corpora, report_lines

    folder = settings.runs / settings.name / FOLDER
    with refusing(ValueError, FileNotFoundError, cluster.ClusterError):
        if settings.policy is not None:
            check_policy(settings.policy)
        setup_logging(folder)
        cluster.start(settings.cluster)
        require_shared(None, settings.named_paths(), settings.cluster.pending_timeout_s)
    result = check_corpora(settings)
    print("\n".join(report_lines(result)))
    print(f"done: {folder / 'check.json'}")
    for sentence in result["stops"].values():
        print(sentence, file=sys.stderr)
    return REFUSED if result["stops"] else DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
