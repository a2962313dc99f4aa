"""References from a teacher behind any OpenAI-compatible chat endpoint with images.

    export TEACHER_API_KEY=…
    python jobs/collect.py --config configs/data/collect.yaml --dry-run      how many questions, what they would cost
    python jobs/collect.py --config configs/data/collect.yaml spending.max_money=50
    python jobs/collect.py prompts='[prompts.parquet]' teacher.url=http://localhost:8000/v1 teacher.model=m

The same command again goes on where the collection ended, and pays for no answer twice. `references.parquet` in the
output folder is what `data.align` and `data.sft` of `jobs/align.py` read. Exit code 0: every prompt was asked for; 1:
stopped (the last line says why: a spending cap, an endpoint that answers nothing); 2: bad configuration or input; 130:
interrupted with the state saved.
"""

from __future__ import annotations

import json
import logging
import sys

from prism_ray.config.cli import parse_job
from prism_ray.config.collect import CollectSettings
from prism_ray.runtime.submitted import at_home

DRY_RUN = "--dry-run"


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    dry_run = DRY_RUN in argv
    settings = parse_job([word for word in argv if word != DRY_RUN], CollectSettings, __doc__ or "")
    settings = at_home(settings, output="output")
    # Imported after the command line is understood: --help and a typing error should not take seconds.
    from prism_ray.corpora.collect_journal import CollectError
    from prism_ray.corpora.reader import CorpusError
    from prism_ray.report.incidents import reason
    from prism_ray.report.progress import setup_logging
    from prism_ray.stages.collect import collect, describe_estimate, estimate

    try:
        if dry_run:
            print(describe_estimate(estimate(settings), settings))
            return 0
        setup_logging(settings.output)
        summary = collect(settings)
    except (CollectError, CorpusError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted(settings)
    except Exception as error:
        logging.getLogger("prism_ray").error("failed", exc_info=True)
        print(reason(error), file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    if summary["status"] == "interrupted":
        return _interrupted(settings)
    if summary["status"] == "stopped":
        print(summary["reason"], file=sys.stderr)
        return 1
    print(f"done: {settings.output / 'references.parquet'}")
    return 0


def _interrupted(settings: CollectSettings) -> int:
    print(f"interrupted; the same command goes on: {settings.output}", file=sys.stderr)
    return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
