"""A look at all corpora of a run before it starts: every row is checked as the run would check it, and described.

Nothing is trained or sampled. Memory grows by about 180 bytes a row (what finds rows that say the same), whatever the
rows weigh.
"""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prism_ray.config.run import RunSettings
from prism_ray.corpora.census import facts_of
from prism_ray.corpora.checks import Requirements, check
from prism_ray.corpora.files import CorpusError, Fragment, Source, names_of
from prism_ray.corpora.identity import Ids, id_said, refuse_twice
from prism_ray.corpora.portrait import Portrait, Row, overlap
from prism_ray.corpora.quarantine import Quarantine, Quarantined
from prism_ray.corpora.reader import Piece, find_fragments, prepared, prompt_at, read_piece, reading_error, rows_of
from prism_ray.corpora.rows import BadRow
from prism_ray.models.ahead import TokenCounter
from prism_ray.models.tiny import build_tiny
from prism_ray.report.progress import Progress
from prism_ray.stages.batches import JudgedBy
from prism_ray.stages.evaluate import UNSEEN
from prism_ray.stages.inputs import COLUMNS_OF, corpora_of
from prism_ray.stages.served import columns_for
from prism_ray.stages.session import requirements
from prism_ray.stages.supervised_tasks import ResponseTask
from prism_ray.testbed.words import vocabulary

FOLDER = "check"
"""In the run's folder; holds `check.json` and `quarantine.parquet`, apart from what the run itself writes."""
HELD_OUT = ("evaluate", UNSEEN)
_TASK_BYTES = 16 * 2**20
"""Of JSON Lines, what one reading task goes through."""


@dataclass(frozen=True)
class Inspection:
    """The work of a Ray Data task: the rows of fragments -> one `Row` or `Quarantined` each."""

    fragments: Sequence[Fragment]
    needs: Requirements
    tokens: TokenCounter
    max_response_tokens: int | None

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for index in range(task["first"], task["last"]):
            fragment = self.fragments[index]
            piece = Piece(fragment, np.arange(rows_of(fragment)), 0)
            for _, place, row in read_piece(piece):
                item = pickle.dumps(self._item(fragment, place, row), protocol=pickle.HIGHEST_PROTOCOL)
                yield {"fragment": index, "place": place, "id": id_said(row), "item": item}

    def _item(self, fragment: Fragment, place: int, row: dict[str, Any] | BadRow) -> Row | Quarantined:
        try:
            prompt = prompt_at(fragment.file, place, row)
            _, tokens = check(prompt, self.needs)
            length = len(self.tokens.encoder.response(prompt.reference)) if prompt.reference else 0
            if self.max_response_tokens is not None and length > self.max_response_tokens:
                raise BadRow("teacher_response: too long", f"{length} tokens, the limit is {self.max_response_tokens}")
        except BadRow as bad:
            return Quarantined(fragment.file, place, bad.reason, bad.detail, fragment.unit)
        return Row(facts_of(prompt), prompt.data_source, tokens, length)


def check_corpora(settings: RunSettings) -> dict[str, Any]:
    """Check every row of the run's corpora; returns what `check.json` holds. Its `stops` are the corpora that would
    stop the run, each with the sentence it would stop with. Ray must be running."""
    folder = (settings.runs / settings.name).resolve() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quarantine.parquet").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        policy = _policy(settings, Path(scratch))
        sources = {name: found for name, found in corpora_of(settings).items() if name in (*COLUMNS_OF, UNSEEN)}
        found = [_portrait(name, corpus, settings, policy, folder) for name, corpus in sources.items()]
    told, trained = [c for c in found if c.name in HELD_OUT], [c for c in found if c.name not in HELD_OUT]
    result = {
        "run": settings.name,
        "corpora": {corpus.name: corpus.described() for corpus in found if len(corpus)},
        "overlaps": [overlap(training, held_out) for held_out in told for training in trained],
        "stops": {corpus.name: corpus.error for corpus in found if corpus.error},
    }
    (folder / "check.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _policy(settings: RunSettings, scratch: Path) -> Path:
    """A model that reads text and images as the run's policy does."""
    if settings.policy is not None:
        return settings.policy
    build_tiny(scratch / "tiny", vocabulary(), settings.model, settings.seed)
    return scratch / "tiny"


def _portrait(name: str, sources: Sequence[Source], settings: RunSettings, policy: Path, folder: Path) -> Portrait:
    corpus = Portrait(name, Quarantine(names_of(sources), 0, settings.corpora.max_bad_share))
    columns = (*COLUMNS_OF.get(name, ("prompt",)), *columns_for(name, settings))
    try:
        corpus.fragments = find_fragments(sources, columns, settings.corpora)
        _read(corpus, settings, policy)
    except CorpusError as error:
        corpus.error = str(error)
    corpus.bad.rows = corpus.rows
    if not corpus.error and corpus.bad.too_many:
        corpus.error = corpus.bad.verdict()
    corpus.bad.write(folder / "quarantine.parquet")
    return corpus


def _read(corpus: Portrait, settings: RunSettings, policy: Path) -> None:
    needs, longest = _needs(settings, corpus.name, policy)
    if needs.unique:
        refuse_twice(corpus.fragments)
    work = Inspection(corpus.fragments, needs, TokenCounter(policy, needs.max_prompt_tokens), longest)
    tasks, ids = _tasks(corpus.fragments, settings.corpora.rows_per_task), Ids()
    with Progress(f"check {corpus.name}", len(corpus.fragments)) as progress:
        try:
            for made in prepared(tasks, work, settings.corpora):
                item, fragment = pickle.loads(made["item"]), corpus.fragments[made["fragment"]]
                again = ids.again(made["id"], fragment.file, made["place"], fragment.unit) if needs.unique else None
                corpus.take(made["fragment"], made["place"], again if again and isinstance(item, Row) else item)
                if corpus.rows % 1000 == 0:
                    progress.update(made["fragment"], rows=corpus.rows, bad=len(corpus.bad))
        except Exception as error:
            raise reading_error(error) or error from None


def _needs(settings: RunSettings, name: str, policy: Path) -> tuple[Requirements, int | None]:
    """What the run requires of a corpus's rows, and its longest response (None: any)."""
    if name != "sft":
        judged_by: JudgedBy | None = "verifier" if name == "rlvr" else "truth" if name in HELD_OUT else None
        needs = requirements(settings, policy, reference=judged_by is None, judged_by=judged_by)
        return replace(needs, student=name == "warmup", unique=name != "warmup"), None
    trainer = settings.trainer
    limits = (trainer.max_prompt_tokens, trainer.max_response_tokens, settings.corpora.max_image_pixels)
    return ResponseTask(str(policy), *limits).needs, trainer.max_response_tokens


def _tasks(fragments: Sequence[Fragment], rows: int) -> Iterator[dict[str, int]]:
    """Consecutive fragments, of about so many rows or `_TASK_BYTES` together."""
    first, weight = 0, 0.0
    for index, fragment in enumerate(fragments):
        weight += fragment.rows / rows if fragment.rows is not None else (fragment.stop - fragment.first) / _TASK_BYTES
        if weight >= 1 or index == len(fragments) - 1:
            yield {"first": first, "last": index + 1}
            first, weight = index + 1, 0.0


def report_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result for people."""
    for name, corpus in result["corpora"].items():
        yield f"{name}: {corpus['usable']} of {corpus['rows']} rows can be used"
        yield from (f"  quarantined, {reason}: {count}" for reason, count in corpus["quarantined"].items())
        for what in ("data_sources", "images_per_prompt"):
            counts = ", ".join(f"{value or '(none)'}: {count}" for value, count in corpus[what].items())
            yield f"  {what.replace('_', ' ')}: {counts}"
        for what, numbers in corpus.items():
            if isinstance(numbers, dict) and "median" in numbers:
                yield f"  {what}: " + ", ".join(f"{key} {value:g}" for key, value in numbers.items())
        repeated = {"exact duplicates": corpus["duplicates"]["exact"], "near duplicates": corpus["duplicates"]["near"]}
        for what, found in (repeated | {"ids used again": corpus["duplicate_ids"]}).items():
            example = f" (for example {' and '.join(found['examples'][0])})" if found["count"] else ""
            yield f"  {what}: {found['count']}{example}"
    for shared in result["overlaps"]:
        example = f" (for example {' and '.join(shared['examples'][0])})" if shared["examples"] else ""
        yield (
            f"{shared['held_out']} rows that {shared['training']} has too: {shared['exact']} exactly, "
            f"{shared['near']} nearly{example}"
        )
