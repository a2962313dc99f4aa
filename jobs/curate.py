"""Which prompts a policy can learn from, which it cannot solve, and pairs to warm a discriminator up with.

    python jobs/curate.py --config configs/data/curate.yaml prompts='[prompts.parquet]' policy=runs/tiny/sft/checkpoint

Samples every prompt several times, judges the rollouts, and writes to the output folder: `rl.parquet` (pass rate
between `low` and `high`, for `data.rlvr` of `jobs/align.py`), `teacher.parquet` (never solved, for `jobs/collect.py`),
`warmup.jsonl` with `images/` (pairs of references and rollouts), `statistics.parquet` and `summary.json`. The same
command again goes on where it was stopped; other values of `low`, `high`, `hardest` and `pairs_per_prompt` only write
the results anew. Exit code 0: done; 1: failed (the last line says why); 2: bad configuration or input; 130: interrupted
with the state saved.
"""

from __future__ import annotations

import asyncio
import json
import sys

from prism_ray.config.corpora import paths_of
from prism_ray.config.curate import CurateSettings
from prism_ray.runtime.front_door import finish, refusing, settings_for


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    settings = settings_for(argv, CurateSettings, __doc__ or "", "output")
    return finish(lambda: _curate(settings), f"interrupted; the same command goes on: {settings.output}")


def _curate(settings: CurateSettings) -> None:
    # Imported after the command line is understood: --help and a typing error should not take torch's seconds.
    from prism_ray.corpora.curation import drawn
    from prism_ray.corpora.reader import CorpusError
    from prism_ray.report.progress import setup_logging
    from prism_ray.runtime.cluster import ClusterError
    from prism_ray.runtime.sharing import require_shared
    from prism_ray.stages.curate import check_inputs, curate, start_cluster

    with refusing(ValueError, FileNotFoundError, ClusterError):
        check_inputs(settings)
        setup_logging(settings.output)
        start_cluster(settings)
        named = {"policy": [settings.policy], "prompts": paths_of(settings.prompts)}
        require_shared(settings.output, named, settings.cluster.pending_timeout_s)
    with refusing(CorpusError):
        summary = asyncio.run(curate(settings))
    if summary is None:
        raise KeyboardInterrupt
    print(json.dumps({name: value for name, value in summary.items() if name != "pass_rates"}, indent=2))
    print(f"pass rates of {summary['prompts']} prompts:\n{drawn(summary['pass_rates'])}")
    print(f"done: {settings.output / 'rl.parquet'}, teacher.parquet and warmup.jsonl beside it")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
