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
import sys

from prism_ray.config.collect import CollectSettings
from prism_ray.runtime.front_door import DONE, FAILED, finish, refusing, settings_for

DRY_RUN = "--dry-run"


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    settings = settings_for([word for word in argv if word != DRY_RUN], CollectSettings, __doc__ or "", "output")
    interrupted = f"interrupted; the same command goes on: {settings.output}"
    return finish(lambda: _collect(settings, dry_run=DRY_RUN in argv), interrupted)


def _collect(settings: CollectSettings, dry_run: bool) -> int:
    # Imported after the command line is understood: --help and a typing error should not take seconds.
    from prism_ray.corpora.collect_journal import CollectError
    from prism_ray.corpora.reader import CorpusError
    from prism_ray.report.progress import setup_logging
    from prism_ray.stages.collect import collect, describe_estimate, estimate

    with refusing(CollectError, CorpusError):
        if dry_run:
            print(describe_estimate(estimate(settings), settings))
            return DONE
        setup_logging(settings.output)
        summary = collect(settings)
    print(json.dumps(summary, indent=2))
    if summary["status"] == "interrupted":
        raise KeyboardInterrupt
    if summary["status"] == "stopped":
        print(summary["reason"], file=sys.stderr)
        return FAILED
    print(f"done: {settings.output / 'references.parquet'}")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
