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
import sys

from prism_ray.config.corpora import paths_of
from prism_ray.config.evaluation import EvaluationSettings
from prism_ray.runtime.front_door import finish, refusing, settings_for


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    settings = settings_for(argv, EvaluationSettings, __doc__ or "", "output")
    return finish(lambda: _evaluate(settings), f"interrupted; the same command goes on: {settings.output}")


def _evaluate(settings: EvaluationSettings) -> None:
    # Imported after the command line is understood: --help and a typing error should not take torch's seconds.
    from prism_ray.corpora.reader import CorpusError
    from prism_ray.report.progress import setup_logging
    from prism_ray.runtime.cluster import ClusterError
    from prism_ray.runtime.sharing import require_shared
    from prism_ray.stages.assess import RESULT, AssessError, assess, check_inputs, start_cluster

    with refusing(ValueError, FileNotFoundError, ClusterError):
        check_inputs(settings)
        setup_logging(settings.output)
        start_cluster(settings)
        named = {"checkpoint": [settings.checkpoint], "prompts": paths_of(settings.prompts or settings.data.evaluate)}
        require_shared(settings.output, named, settings.cluster.pending_timeout_s)
    with refusing(CorpusError, AssessError):
        result = asyncio.run(assess(settings))
    if result is None:
        raise KeyboardInterrupt
    print(json.dumps(result, indent=2))
    print(f"done: {settings.output / RESULT}, samples.jsonl beside it")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
