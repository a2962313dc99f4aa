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

import logging
import sys
from pathlib import Path

from prism_ray.config.cli import parse_job
from prism_ray.config.run import RunSettings

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    settings = parse_job(argv, RunSettings, __doc__ or "", DEFAULT)
    # Imported after the command line is understood: --help and a typing error should not take torch's seconds.
    from prism_ray.models.load import check_policy
    from prism_ray.report.incidents import reason
    from prism_ray.report.progress import setup_logging
    from prism_ray.runtime import cluster
    from prism_ray.stages.check import FOLDER, check_corpora, report_lines

    folder = settings.runs / settings.name / FOLDER
    try:
        if settings.policy is not None:
            check_policy(settings.policy)
        setup_logging(folder)
        cluster.start(settings.cluster)
    except (ValueError, FileNotFoundError, cluster.ClusterError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        result = check_corpora(settings)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        logging.getLogger("prism_ray").error("failed", exc_info=True)
        print(reason(error), file=sys.stderr)
        return 1
    print("\n".join(report_lines(result)))
    print(f"done: {folder / 'check.json'}")
    for sentence in result["stops"].values():
        print(sentence, file=sys.stderr)
    return 2 if result["stops"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
