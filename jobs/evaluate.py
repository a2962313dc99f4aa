"""How good one checkpoint is on prompts of your own.

    python jobs/evaluate.py --config runs/tiny/config.yaml checkpoint=runs/tiny/sft/checkpoint 'prompts=[mine.parquet]'

Samples each prompt `n` times and once greedily, with the run's engines, and judges the responses with the run's truth
or verifier (`by=verifier`). Writes to the output folder: `evaluation.json` (the fields of a run's summary, pass@k if
`n` is above 1, and the same for each source), `samples.jsonl` (every response with what was found) and
`quarantine.parquet` if rows could not be used. The same command again goes on where it was stopped. Exit code 0: done;
1: failed (the last line says why); 2: bad configuration or input; 130: interrupted with the state saved.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from prism_ray.config.cli import parse_job
from prism_ray.config.evaluation import EvaluationSettings


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    settings = parse_job(argv, EvaluationSettings, __doc__ or "")
    # Imported after the command line is understood: --help and a typing error should not take torch's seconds.
    from prism_ray.corpora.reader import CorpusError
    from prism_ray.report.incidents import reason
    from prism_ray.report.progress import setup_logging
    from prism_ray.runtime.cluster import ClusterError
    from prism_ray.stages.assess import RESULT, AssessError, assess, check_inputs, start_cluster

    try:
        check_inputs(settings)
        setup_logging(settings.output)
        start_cluster(settings)
    except (ValueError, FileNotFoundError, ClusterError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        result = asyncio.run(assess(settings))
    except KeyboardInterrupt:
        result = None
    except (CorpusError, AssessError) as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        logging.getLogger("prism_ray").error("failed", exc_info=True)
        print(reason(error), file=sys.stderr)
        return 1
    if result is None:
        print(f"interrupted; the same command goes on: {settings.output}", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2))
    print(f"done: {settings.output / RESULT}, samples.jsonl beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
