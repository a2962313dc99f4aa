"""The evaluation of one checkpoint on a user's own prompts: sampled and greedy, by truth or by verifier.

The folder holds `samples.jsonl`, one line for each prompt with all that was said and found, from which the job goes on
and from which alone `evaluation.json` is made; `assessment.json` says what the samples were made with.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prism_ray.config.evaluation import EvaluationSettings
from prism_ray.corpora.curation import RIGHT, pass_at_k
from prism_ray.corpora.files import Fragment, Source, path_of
from prism_ray.corpora.reader import RowOrder, find_fragments
from prism_ray.corpora.stream import PromptStream
from prism_ray.models.ahead import TokenCounter
from prism_ray.models.load import check_policy
from prism_ray.planning import layout
from prism_ray.records import Group, Prompt, Ticket, Verdict
from prism_ray.report.evaluation import metrics_of
from prism_ray.report.metrics import open_to_append
from prism_ray.report.progress import Progress
from prism_ray.rollout.episodes import EpisodePool
from prism_ray.rollout.pool import RolloutPool
from prism_ray.rollout.sampling import Sampling
from prism_ray.runtime import cluster, placement
from prism_ray.runtime.placement import EnginePlaces
from prism_ray.runtime.supervision import fetch
from prism_ray.stages.batches import made_alike, needs_of, next_batch, refusal_of, until_signal, verdicts_of
from prism_ray.stages.evaluate import load_truth
from prism_ray.verify.pool import VerifierPool, make_environment

SAMPLES, RESULT, _STAMP = "samples.jsonl", "evaluation.json", "assessment.json"
NO_SOURCE = "unknown"


class AssessError(ValueError):
    """An evaluation that cannot begin or go on, in one sentence that names the cure."""


def check_inputs(settings: EvaluationSettings) -> None:
    """Look at what the configuration names, and note in the output folder what its samples are made with.

    Raises AssessError, CorpusError, ValueError or FileNotFoundError with a sentence.
    """
    check_policy(settings.checkpoint)
    if settings.by == "truth":
        load_truth(settings.evaluate.truth)
    make_environment(settings.verify.environment, settings.verify.options).close()
    if not corpus_of(settings):
        raise AssessError("prompts is empty, and so is data.evaluate; name the corpora to evaluate on")
    _fragments(settings)
    if changed := made_alike(settings.output / _STAMP, _what_shapes(settings)):
        raise AssessError(
            f"{settings.output} holds samples made with another {changed}; choose another output, or delete the folder"
        )


def corpus_of(settings: EvaluationSettings) -> list[Source]:
    """The corpora that hold the prompts."""
    return [*(settings.prompts or settings.data.evaluate)]


def _fragments(settings: EvaluationSettings) -> list[Fragment]:
    return find_fragments(corpus_of(settings), ("prompt", "reward_model"), settings.corpora)


def start_cluster(settings: EvaluationSettings) -> None:
    """Join or start Ray, and refuse a configuration that it cannot hold (ClusterError)."""
    cluster.start(settings.cluster)
    placement.check([layout.Layout("evaluate", tuple(layout.engines(settings.rollout)))], settings.cluster)


async def assess(settings: EvaluationSettings) -> dict[str, Any] | None:
    """Sample and judge what is missing and write the result; returns it, or None if it was interrupted."""
    order = RowOrder(_fragments(settings), settings.seed)
    wanted = min(order.rows, settings.limit or order.rows)
    _, done = read_samples(settings.output)
    if done < wanted and not await until_signal(_sample_all(settings, done, wanted)):
        return None
    rows = [row for row in read_samples(settings.output)[0] if row["position"] < wanted]
    prompts = [str(path_of(source)) for source in corpus_of(settings)]
    result = {"checkpoint": str(settings.checkpoint), "prompts": prompts}
    result |= {"by": settings.by, "rows": wanted} | result_of(rows)
    partial = settings.output / f"{RESULT}.partial"
    partial.write_text(json.dumps(_finite(result), indent=2) + "\n")
    partial.replace(settings.output / RESULT)
    return result


def result_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the lines of `samples.jsonl` come to: `evaluation` as in a run's summary, `pass@k` for powers of two where
    there are several responses, how many verdicts `failed`, and the same figures for each of the `sources`."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_source.setdefault(row["data_source"] or NO_SOURCE, []).append(row)
    if not rows:
        raise AssessError("no prompt could be used; quarantine.parquet in the output folder says why")
    return _figures(rows) | {"sources": {name: _figures(by_source[name]) for name in sorted(by_source)}}


def read_samples(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The prompts of `samples.jsonl`, each once, and the position that is to be sampled next. A batch that a kill has
    torn is left out."""
    path = folder / SAMPLES
    rows: list[dict[str, Any]] = []
    batch: list[dict[str, Any]] = []
    reached = 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # splitlines would cut at U+2028 and others, which JSON leaves inside a line
        try:
            row = json.loads(line)
        except ValueError:
            batch = []
            continue
        if "next" not in row:
            batch.append(row)
            continue
        if row["from"] == reached and row["count"] == len(batch):
            reached = row["next"]
            rows += batch
        batch = []
    return rows, reached


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    truths = [[response["truth"] for response in row["sampled"]] for row in rows]
    greedy = [[row["greedy"]["truth"]] for row in rows]
    tokens = [[response["tokens"] for response in row["sampled"]] for row in rows]
    figures: dict[str, Any] = {"evaluation": metrics_of(truths, greedy, tokens)}
    n = min(len(of_prompt) for of_prompt in truths)
    if n > 1:
        right = [sum(truth["answer"] >= RIGHT for truth in of_prompt) for of_prompt in truths]
        sizes = [len(of_prompt) for of_prompt in truths]
        ks = [2**power for power in range(n.bit_length())]
        figures["pass@k"] = {
            str(k): float(np.mean([pass_at_k(size, c, k) for size, c in zip(sizes, right, strict=True)])) for k in ks
        }
    said = [response for row in rows for response in (*row["sampled"], row["greedy"])]
    return figures | {"failed": sum(bool(response["truth"].get("failed")) for response in said)}


def _what_shapes(settings: EvaluationSettings) -> dict[str, Any]:
    """What samples of the same folder must have in common."""
    names = {"max_response_tokens", "max_model_len", "max_images", "dtype"}
    return {
        "checkpoint": [str(settings.checkpoint.resolve()), *_stats(sorted(settings.checkpoint.glob("*.safetensors")))],
        "prompts": _stats(sorted({Path(f.file) for f in _fragments(settings)})),
        "rollout": settings.rollout.model_dump(mode="json", include=names),
        "by": [settings.by, *([settings.evaluate.truth] if settings.by == "truth" else verdicts_of(settings.verify))],
        "n": settings.n,
        "evaluate.temperature": settings.evaluate.temperature,
        "seed": settings.seed,
    }


def _stats(files: Sequence[Path]) -> list[Any]:
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]


async def _sample_all(settings: EvaluationSettings, first: int, wanted: int) -> None:
    """Sample and judge from the first missing position on."""
    tokens = TokenCounter(settings.checkpoint, settings.rollout.max_prompt_tokens)
    refusal = refusal_of(settings.by, settings.evaluate.truth, settings.verify)
    needs = needs_of(tokens, settings.rollout, settings.corpora)
    needs = replace(needs, ground_truth=True, truth_refusal=refusal)
    quarantine = settings.output / "quarantine.parquet"
    stream = PromptStream(corpus_of(settings), needs, settings.corpora, settings.seed, first, quarantine)
    seeded = settings.rollout.model_copy(update={"seed": settings.rollout.seed + settings.seed + first})
    engines = examiner = None
    held = placement.Placement(settings.cluster)
    try:
        places = EnginePlaces(held, layout.engines(settings.rollout), False, settings.rollout)
        engines = await RolloutPool.create(settings.checkpoint, seeded, places=places)
        examiner = Examiner(settings, engines)
        settings.output.mkdir(parents=True, exist_ok=True)
        with Progress("evaluate", wanted) as progress:
            exhausted, reached = False, first
            while not exhausted:
                batch, exhausted = await next_batch(stream, settings.batch, wanted)
                after = wanted if exhausted else batch[-1][0] + 1
                prompts: list[Prompt] = [await fetch(ref, f"the prompt of row {position}") for position, ref in batch]
                rows = await examiner.examine(prompts)
                for row, (position, _) in zip(rows, batch, strict=True):
                    row["position"] = position
                await asyncio.to_thread(_note, settings.output / SAMPLES, rows, reached, after)
                reached = after
                numbers = [response["truth"]["answer"] for row in rows for response in row["sampled"]]
                progress.update(after, **({"accuracy": float(np.mean(numbers))} if numbers else {}))
    finally:
        stream.shutdown()
        if examiner is not None:
            examiner.shutdown()
        if engines is not None:
            await engines.shutdown()
        held.release()


def _note(path: Path, rows: Sequence[Mapping[str, Any]], first: int, after: int) -> None:
    """Write a batch, and that it is complete."""
    lines = [*rows, {"from": first, "next": after, "count": len(rows)}]
    with open_to_append(path) as file:
        file.write("".join(json.dumps(_finite(line), ensure_ascii=False) + "\n" for line in lines))


class Examiner:
    """Samples prompts and says what is right: with the engines, and with the truth or the verifier of the settings."""

    def __init__(self, settings: EvaluationSettings, engines: RolloutPool) -> None:
        self._settings, self._engines = settings, engines
        self._verifiers: VerifierPool | EpisodePool | None = None
        if settings.by == "verifier" and settings.verify.max_turns > 1:
            self._verifiers = EpisodePool(settings.verify, settings.checkpoint).over(engines)
        elif settings.by == "verifier":
            self._verifiers = VerifierPool(settings.verify)
        self._truth = load_truth(settings.evaluate.truth) if settings.by == "truth" else None

    async def examine(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """A line of `samples.jsonl` for each prompt, but for its position."""
        settings, longest = self._settings, self._engines.sampling.max_tokens
        sampled = await self._sample(prompts, Sampling(settings.n, settings.evaluate.temperature, longest))
        greedy = await self._sample(prompts, Sampling(1, 0.0, longest))
        return [self._row(*pair) for pair in zip(sampled, greedy, strict=True)]

    def shutdown(self) -> None:
        """End the verifiers."""
        if self._verifiers is not None:
            self._verifiers.shutdown()

    async def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[tuple[Group, list[dict[str, float]]]]:
        """Groups, with what is true of each response."""
        if isinstance(self._verifiers, EpisodePool):
            groups = await self._verifiers.sample(prompts, sampling)
        else:
            greedy, temperature = not sampling.temperature, sampling.temperature
            groups = await self._engines.sample(prompts, sampling.n, temperature, greedy, sampling.max_tokens)
        if isinstance(self._verifiers, VerifierPool):
            groups = list(await asyncio.gather(*(_judged(group, self._verifiers) for group in groups)))
        if self._truth is None:
            return [(group, [_truth_of(verdict) for verdict in group.verdicts]) for group in groups]
        return await asyncio.to_thread(lambda: [(group, self._truths(group)) for group in groups])

    def _truths(self, group: Group) -> list[dict[str, float]]:
        assert self._truth is not None
        try:
            return [dict(self._truth(rollout.text, group.prompt)) for rollout in group.rollouts]
        except (KeyError, ValueError, TypeError) as error:
            name, cause = self._settings.evaluate.truth, f"{type(error).__name__}: {error}"
            raise AssessError(
                f"prompt {group.prompt.id}: evaluate.truth {name} cannot judge it ({cause}); set evaluate.truth to "
                "prism_ray.verify.answer:truth_of or to yours"
            ) from error

    @staticmethod
    def _row(
        sampled: tuple[Group, list[dict[str, float]]], greedy: tuple[Group, list[dict[str, float]]]
    ) -> dict[str, Any]:
        prompt = sampled[0].prompt
        return {
            "id": prompt.id,
            "data_source": prompt.data_source,
            "question": prompt.messages[-1]["content"],
            "ground_truth": prompt.ground_truth,
            "sampled": _responses(*sampled),
            "greedy": _responses(*greedy)[0],
        }


def _responses(group: Group, truths: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "response": rollout.text,
            "tokens": rollout.sampled,
            "ended_by": rollout.finish_reason,
            "truth": dict(truth),
            **({"turns": list(rollout.turns)} if rollout.turns else {}),
        }
        for rollout, truth in zip(group.rollouts, truths, strict=True)
    ]


async def _judged(group: Group, verifiers: VerifierPool) -> Group:
    return await (await verifiers.judge(Ticket(group.id, group.prompt.id, 0, group))).ref


def _truth_of(verdict: Verdict) -> dict[str, float]:
    """What a verdict says, in the words of a truth: the verifier's accuracy is how right the answer is."""
    return {"answer": verdict.parts["accuracy"], "reward": verdict.reward, **verdict.parts}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
