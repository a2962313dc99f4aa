"""Collection of references: prompts from corpora, answers from a teacher behind an API, Parquet for the other stages.

The folder holds `answers.jsonl` (every request and raw answer, which a collection resumes from), `references.parquet`,
`unanswered.jsonl`, `summary.json`, `quarantine.parquet` and `log.txt`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prism_ray.config.collect import CollectSettings
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.collect import CapReached, Collector, Fatal, Tally
from prism_ray.corpora.collect_client import Secret, Teacher
from prism_ray.corpora.collect_journal import FILE, CollectError, Journal, State, Tokens, replay
from prism_ray.corpora.collect_request import estimate_tokens, key_of
from prism_ray.corpora.files import names_of
from prism_ray.corpora.identity import Ids
from prism_ray.corpora.quarantine import Quarantine, Quarantined
from prism_ray.corpora.reader import Piece, counted, find_fragments, rows_of
from prism_ray.corpora.references import row_of, writing
from prism_ray.corpora.stream import read_prompts
from prism_ray.records import Prompt
from prism_ray.report.progress import Progress
from prism_ray.verify.answer import AnswerEnvironment, truth_of

log = logging.getLogger(__name__)

_STAMP = "teacher.json"


class Prompts:
    """The usable prompts of the corpora, in the files' order; what cannot be used goes into quarantine."""

    def __init__(self, settings: CollectSettings) -> None:
        self._fragments = counted(find_fragments(settings.prompts, settings=settings.corpora))
        self._settings = settings
        rows = sum(map(rows_of, self._fragments))
        self.rows = min(rows, settings.limit or rows)
        """Rows that are looked at."""
        self.quarantine = Quarantine(names_of(settings.prompts), rows, settings.corpora.max_bad_share)

    def read(self, decode: bool) -> Iterator[Prompt]:
        """Every usable prompt, and of an id only the first (no run would train on the others); `decode` looks at the
        images as a whole. CorpusError where too many are unusable."""
        corpora = self._settings.corpora
        sources = tuple(corpora.data_sources)
        needs = Requirements(decode=decode, max_image_pixels=corpora.max_image_pixels, data_sources=sources)
        position, ids = 0, Ids()
        for fragment in self._fragments:
            rows = rows_of(fragment)
            piece = Piece(fragment, np.arange(min(rows, self.rows - position)), position)
            for read in read_prompts(piece, needs):
                item = read.among(ids)
                if isinstance(item, Quarantined):
                    self.quarantine.add([item])
                else:
                    yield item
            position += rows
            if position >= self.rows:
                return

    async def stream(self) -> AsyncIterator[Prompt]:
        """The same without holding up the event loop."""
        prompts = self.read(decode=True)
        while chunk := await asyncio.to_thread(lambda: list(islice(prompts, 8))):
            for prompt in chunk:
                yield prompt


@dataclass
class Estimate:
    """What a collection has before it; tokens and money are estimates."""

    prompts: int = 0
    answered: int = 0
    unusable: int = 0
    tokens: Tokens = Tokens()
    spent: Tokens = Tokens()


def estimate(settings: CollectSettings) -> Estimate:
    """Count what is left to ask and what it may cost; asks nothing and writes nothing."""
    prompts, found = Prompts(settings), Estimate()
    state, _ = replay(settings.output / FILE)
    output = state.paid.output // state.paid_answers if state.paid_answers else settings.spending.answer_tokens
    for prompt in prompts.read(decode=False):
        found.prompts += 1
        if key_of(prompt) in state.answers:
            found.answered += 1
        else:
            found.tokens += Tokens(estimate_tokens(prompt, settings), output)
    found.unusable, found.spent = len(prompts.quarantine), state.at_most
    return found


def describe_estimate(found: Estimate, settings: CollectSettings) -> str:
    """The dry run's report."""
    spending, total = settings.spending, found.spent + found.tokens
    fits = "within the caps" if total.within(spending) else "MORE than the caps allow: it would stop on the way"
    return "\n".join(
        [
            f"prompts:   {found.prompts} usable, {found.unusable} unusable, {found.answered} answered already",
            f"to ask:    {found.prompts - found.answered} of {settings.teacher.model} at {settings.teacher.url}",
            f"tokens:    about {found.tokens.input} of questions and {found.tokens.output} of answers",
            f"money:     about {found.tokens.money(spending):.2f}, after {found.spent.money(spending):.2f} so far",
            f"in all:    {total.total} tokens, {total.money(spending):.2f} money; {fits}",
        ]
    )


def collect(settings: CollectSettings) -> dict[str, Any]:
    """Collect, and write the references; returns the summary, whose `status` is `completed`, `interrupted` (the answers
    so far are kept, the Parquet is left to the next run) or `stopped` (`reason` says why: a cap, or an endpoint that
    answers nothing; the Parquet holds what there is).

    Raises CollectError or CorpusError where nothing can be asked.
    """
    secret, shown = Secret(settings.teacher.key_variable), _shown_for(settings.policy)
    prompts, journal = Prompts(settings), Journal(settings.output)
    try:
        _same_teacher(settings)
        tally, status, reason = asyncio.run(_ask_all(settings, prompts, journal, secret, shown))
        agreement = {} if status == "interrupted" else write_references(settings, journal)
        summary = _summary(settings, tally, journal.state, prompts)
        summary = {"status": status, "reason": reason, **summary, "agreement": agreement}
        _write_summary(settings.output, summary, tally, prompts)
    finally:
        journal.close()
    return summary


async def _ask_all(
    settings: CollectSettings, prompts: Prompts, journal: Journal, secret: Secret, shown: Callable[[Prompt], Prompt]
) -> tuple[Tally, str, str]:
    """Ask for everything that is missing; what became of the prompts, the run's status and what stopped it."""
    teacher = Teacher(settings, secret)
    progress = Progress("collect", prompts.rows)
    collector = Collector(settings, journal, teacher, lambda: progress.update(done(), **numbers()), shown)
    began, before, interrupted = time.monotonic(), journal.state.paid_answers, False

    def done() -> int:
        return collector.tally.done + len(prompts.quarantine)

    def numbers() -> dict[str, float]:
        state, minutes = journal.state, (time.monotonic() - began) / 60
        spending = settings.spending
        left = {} if spending.max_money is None else {"left": spending.max_money - state.at_most.money(spending)}
        return left | {
            "answers/min": (state.paid_answers - before) / max(minutes, 1e-9),
            "tokens": state.at_most.total,
            "money": state.at_most.money(spending),
            "malformed": sum(state.malformed.values()),
            "unanswered": len(collector.tally.unanswered),
        }

    def on_signal() -> None:
        nonlocal interrupted
        interrupted = True
        log.warning("asking nothing more; what is under way has %g s to arrive", settings.asking.stop_grace_s)
        collector.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        with progress:
            await collector.run(prompts.stream())
    except (CapReached, Fatal) as error:
        return collector.tally, "stopped", str(error)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        await teacher.close()
    return collector.tally, "interrupted" if interrupted else "completed", ""


def _shown_for(policy: Path | None) -> Callable[[Prompt], Prompt]:
    """What makes of a prompt what the teacher sees of it. Raises CollectError where the policy has no processor."""
    if policy is None:
        return lambda prompt: prompt
    from prism_ray.models.encode import Encoder  # takes seconds to import, and most collections can do without

    try:
        return Encoder(policy, sys.maxsize).fitted
    except (OSError, ValueError) as error:
        raise CollectError(f"policy: {error}") from error


def write_references(settings: CollectSettings, journal: Journal) -> dict[str, int]:
    """Write `references.parquet` from the corpora and the journal; returns how many answers are known and agree."""
    counts = {"references": 0, "known": 0, "agreeing": 0}
    answers, seen = journal.state.answers, set()
    columns = (("agrees", pa.bool_()), ("teacher", pa.string()))
    with writing(settings.output / "references.parquet", *columns) as file:
        for prompt in Prompts(settings).read(decode=False):
            key = key_of(prompt)
            if key not in answers or key in seen:
                continue
            seen.add(key)
            text = journal.text(key)
            agrees = _agrees(text, prompt)
            counts["known"] += agrees is not None
            counts["agreeing"] += agrees is True
            if agrees is not False or not settings.only_agreeing:
                file.write(row_of(prompt, text) | {"agrees": agrees, "teacher": settings.teacher.model})
        counts["references"] = file.rows
        file.note(counts | {"model": settings.teacher.model})
    return counts


def _agrees(text: str, prompt: Prompt) -> bool | None:
    """Whether the answer is the known one; None where none is known that answers can be compared with."""
    if AnswerEnvironment.refusal(prompt):
        return None
    return truth_of(text, prompt)["answer"] > 0.5


def _same_teacher(settings: CollectSettings) -> None:
    """Answers of two teachers in one folder would be taken for one's."""
    path = settings.output / _STAMP
    if not path.exists():
        path.write_text(json.dumps({"model": settings.teacher.model}))
    elif (model := json.loads(path.read_text())["model"]) != settings.teacher.model:
        raise CollectError(
            f"{settings.output} holds answers of {model}, and teacher.model is {settings.teacher.model}; "
            "choose another output"
        )


def _summary(settings: CollectSettings, tally: Tally, state: State, prompts: Prompts) -> dict[str, Any]:
    spending, paid, uncertain = settings.spending, state.paid, state.at_most - state.paid
    return {
        "prompts": prompts.rows,
        "answered": {"before": tally.known, "now": tally.answered},
        "unanswered": dict(tally.reasons),
        "unusable": dict(prompts.quarantine.counts),
        "malformed_answers": sum(state.malformed.values()),
        "spent": asdict(paid) | {"money": paid.money(spending)},
        "perhaps_spent": asdict(uncertain) | {"money": uncertain.money(spending)},
        "requests": state.requests,
    }


def _write_summary(folder: Path, summary: dict[str, Any], tally: Tally, prompts: Prompts) -> None:
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + os.linesep)
    lines = (json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in tally.unanswered.items())
    (folder / "unanswered.jsonl").write_text("".join(lines))
    prompts.quarantine.write(folder / "quarantine.parquet")
