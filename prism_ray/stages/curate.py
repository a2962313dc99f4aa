"""Curation: a policy's rollouts over a corpus say what each prompt is good for.

The folder holds `parts/` (statistics and rollouts of finished batches, which a run resumes from), and of all parts
together `rl.parquet`, `teacher.parquet`, `warmup.jsonl` with `images/`, `statistics.parquet`, `summary.json`, and
`quarantine.parquet`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prism_ray.config.curate import CurateSettings
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.curation import STATISTICS, for_rl, pairs_of, statistics_of, summary_of, unsolved
from prism_ray.corpora.files import Fragment
from prism_ray.corpora.quarantine import Quarantined
from prism_ray.corpora.reader import RowOrder, find_fragments
from prism_ray.corpora.references import row_of, writing
from prism_ray.corpora.stream import PromptStream, read_prompts
from prism_ray.models.ahead import TokenCounter
from prism_ray.models.load import check_policy
from prism_ray.planning import layout
from prism_ray.records import Group, Prompt
from prism_ray.report.progress import Progress
from prism_ray.rollout.episodes import EpisodePool
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime import cluster, placement
from prism_ray.runtime.placement import EnginePlaces
from prism_ray.runtime.protocols import Ticket
from prism_ray.runtime.supervision import fetch
from prism_ray.stages.batches import made_alike, needs_of, next_batch, until_signal, verdicts_of
from prism_ray.verify.judging import truth_refusal
from prism_ray.verify.pool import VerifierPool, make_environment

log = logging.getLogger(__name__)

_STAMP = "curation.json"
_PART = pa.schema([*STATISTICS, ("texts", pa.list_(pa.string()))])
_AHEAD = 2
"""Batches under way: the engines work on the next one while the last responses of this one are awaited."""


class CurateError(ValueError):
    """A curation that cannot begin, in one sentence that names the cure."""


def check_inputs(settings: CurateSettings) -> None:
    """Look at the files that the configuration names, and note in the output folder what its rollouts are made with.

    Raises CurateError, CorpusError, ValueError or FileNotFoundError with a sentence.
    """
    check_policy(settings.policy)
    make_environment(settings.verify.environment, settings.verify.options).close()
    _fragments(settings, "prompt", "reward_model")
    if changed := made_alike(settings.output / _STAMP, _what_shapes(settings)):
        raise CurateError(
            f"{settings.output} holds rollouts made with another {changed}; choose another output, or delete the folder"
        )


def _what_shapes(settings: CurateSettings) -> dict[str, Any]:
    """What rollouts of the same folder must have in common."""
    names = {"group_size", "temperature", "max_response_tokens", "max_model_len", "dtype"}
    return {
        "policy": [str(settings.policy.resolve()), *_stats(sorted(settings.policy.glob("*.safetensors")))],
        "prompts": _stats(sorted({Path(f.file) for f in _fragments(settings, "prompt")})),
        "rollout": settings.rollout.model_dump(mode="json", include=names),
        "verify": verdicts_of(settings.verify),
        "seed": settings.seed,
    }


def _fragments(settings: CurateSettings, *columns: str) -> list[Fragment]:
    return find_fragments(settings.prompts, columns, settings.corpora)


def _stats(files: Sequence[Path]) -> list[Any]:
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]


def start_cluster(settings: CurateSettings) -> None:
    """Join or start Ray, and refuse a configuration that it cannot hold (ClusterError)."""
    cluster.start(settings.cluster)
    placement.check([layout.Layout("curate", tuple(layout.engines(settings.rollout)))], settings.cluster)


async def curate(settings: CurateSettings) -> dict[str, Any] | None:
    """Sample what is missing and write the results; returns the summary, or None if it was interrupted."""
    order = RowOrder(_fragments(settings, "prompt"), settings.seed)
    wanted = min(order.rows, settings.limit or order.rows)
    parts = Parts(settings.output / "parts")
    if parts.next < wanted and not await until_signal(_sample_all(settings, parts, wanted)):
        return None
    return await asyncio.to_thread(write_results, settings, order, parts, wanted)


class Parts:
    """The finished batches, a file each, named by the position that comes after them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def files(self) -> list[Path]:
        """In the order of their positions."""
        return sorted(self._folder.glob("*.parquet"))

    @property
    def next(self) -> int:
        """The position that is to be sampled next."""
        return max((int(path.stem) for path in self.files), default=0)

    def write(self, rows: list[dict[str, Any]], next_position: int) -> None:
        """Keep a batch; it is there as a whole or not at all."""
        path = self._folder / f"{next_position:012d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(rows, _PART), partial, compression="zstd")
        partial.replace(path)

    def rows(self, wanted: int, texts: bool) -> Iterator[dict[str, Any]]:
        """The rows of positions below `wanted`, in order."""
        columns = None if texts else [name for name, _ in STATISTICS]
        for path in self.files:
            yield from (row for row in pq.read_table(path, columns=columns).to_pylist() if row["position"] < wanted)


async def _sample_all(settings: CurateSettings, parts: Parts, wanted: int) -> None:
    """Sample and judge from the first missing position on."""
    first = parts.next
    tokens = TokenCounter(settings.policy, settings.rollout.max_prompt_tokens)
    refusal = truth_refusal(settings.verify.environment, settings.verify.options)
    needs = needs_of(tokens, settings.rollout, settings.corpora)
    needs = replace(needs, ground_truth=True, truth_refusal=refusal)
    quarantine = settings.output / "quarantine.parquet"
    stream = PromptStream(settings.prompts, needs, settings.corpora, settings.seed, first, quarantine)
    seeded = settings.rollout.model_copy(update={"seed": settings.rollout.seed + settings.seed + first})
    engines = verifiers = None
    held = placement.Placement(settings.cluster)
    try:
        places = EnginePlaces(held, layout.engines(settings.rollout), False, settings.rollout)
        engines = await RolloutPool.create(settings.policy, seeded, places=places)
        if settings.verify.max_turns > 1:
            verifiers = EpisodePool(settings.verify, settings.policy).over(engines)
        else:
            verifiers = VerifierPool(settings.verify)
        with Progress("curate", wanted) as progress:
            await _batches(settings, _Rooms(stream, engines, verifiers), parts, wanted, progress)
    finally:
        stream.shutdown()
        if verifiers is not None:
            verifiers.shutdown()
        if engines is not None:
            await engines.shutdown()
        held.release()


@dataclass(frozen=True)
class _Rooms:
    """What a batch passes through."""

    stream: PromptStream
    engines: RolloutPool
    verifiers: VerifierPool | EpisodePool


async def _batches(settings: CurateSettings, rooms: _Rooms, parts: Parts, wanted: int, progress: Progress) -> None:
    under_way: deque[tuple[asyncio.Task[list[dict[str, Any]]], int]] = deque()
    exhausted = False
    try:
        while not exhausted or under_way:
            if not exhausted and len(under_way) < _AHEAD:
                batch, exhausted = await next_batch(rooms.stream, settings.batch, wanted)
                after = wanted if exhausted else batch[-1][0] + 1
                under_way.append((asyncio.create_task(_measured(batch, settings, rooms)), after))
                continue
            task, after = under_way[0]
            rows = await task
            under_way.popleft()
            if after > parts.next:  # else the corpus ended with the batch before, and this one is empty
                await asyncio.to_thread(parts.write, rows, after)
            progress.update(after, **_numbers(rows))
    finally:
        for task, _ in under_way:
            task.cancel()


async def _measured(batch: list[tuple[int, Any]], settings: CurateSettings, rooms: _Rooms) -> list[dict[str, Any]]:
    """Sample a batch and judge it; the rows of its part. What was said in several turns makes no pair with a reference:
    its text is not kept."""
    prompts: list[Prompt] = [await fetch(ref, f"the prompt of row {position}") for position, ref in batch]
    rollout, verifiers = settings.rollout, rooms.verifiers
    if isinstance(verifiers, EpisodePool):
        judged = await verifiers.sample(prompts, rooms.engines.sampling)
    else:
        groups = await rooms.engines.sample(prompts, rollout.group_size, rollout.temperature)
        judged = await asyncio.gather(*(_judged(group, verifiers) for group in groups))
    return [
        statistics_of(group, position) | {"texts": [rollout.text for rollout in group.rollouts if not rollout.turns]}
        for (position, _), group in zip(batch, judged, strict=True)
    ]


async def _judged(group: Group, verifiers: VerifierPool) -> Group:
    ticket = await verifiers.judge(Ticket(group.id, group.prompt.id, 0, group))
    return await fetch(ticket.ref, f"judged group {group.id}")


def _numbers(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What a batch came to, for the progress line."""
    if not rows:
        return {}
    told = summary_of(rows)
    return {"pass rate": told["mean_pass_rate"], "unsolved": told["never_right"], "response tokens": told["tokens"]}


def write_results(settings: CurateSettings, order: RowOrder, parts: Parts, wanted: int) -> dict[str, Any]:
    """Write what the parts say of the corpus; returns the summary."""
    rows = list(parts.rows(wanted, texts=False))
    statistics = {row["position"]: row for row in rows}
    chosen, ranks = for_rl(rows, settings.low, settings.high), unsolved(rows, settings.hardest)
    summary = summary_of(rows) | {
        "policy": str(settings.policy),
        "rollouts": settings.rollout.group_size,
        "low": settings.low,
        "high": settings.high,
        "for_rl": len(chosen),
        "for_teacher": len(ranks),
    }
    folder, figures = settings.output, [(name, kind) for name, kind in STATISTICS if name not in _ALREADY]
    texts = parts.rows(wanted, texts=True)
    with (
        writing(folder / "rl.parquet", *figures) as rl,
        writing(folder / "teacher.parquet", *figures, ("rank", pa.int64())) as teacher,
        Pairs(folder, settings.pairs_per_prompt) as pairs,
    ):
        for position, prompt in _prompts(settings, order, wanted):
            if position not in statistics:
                continue
            row = next(row for row in texts if row["position"] == position)
            pairs.add(prompt, row["texts"])
            if position in chosen:
                rl.write(row_of(prompt) | _figures(row))
            if position in ranks:
                teacher.write(row_of(prompt) | _figures(row) | {"rank": ranks[position]})
        summary |= {"pairs": pairs.pairs, "prompts_with_pairs": pairs.prompts}
        rl.note(summary)
        teacher.note(summary)
    _write_statistics(folder / "statistics.parquet", rows, summary)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


_ALREADY = {"id", "data_source"}


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name, _ in STATISTICS if name not in _ALREADY}


def _prompts(settings: CurateSettings, order: RowOrder, wanted: int) -> Iterator[tuple[int, Prompt]]:
    """Prompts with their positions, in order; what was put into quarantine while sampling is passed over."""
    needs = Requirements(ground_truth=True, decode=False, max_image_pixels=settings.corpora.max_image_pixels)
    for piece in order.pieces(0, wanted):
        for read in read_prompts(piece, needs):
            if not isinstance(read.item, Quarantined):
                yield read.position, read.item


def _write_statistics(path: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    schema = pa.schema(STATISTICS, metadata={"prism_ray": json.dumps(summary)})
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema), partial)
    partial.replace(path)


class Pairs:
    """Writes `warmup.jsonl` and the images it names; a context manager, whose file is there once it ends well."""

    def __init__(self, folder: Path, most: int) -> None:
        self.pairs = self.prompts = 0
        self._path, self._images, self._most = folder / "warmup.jsonl", folder / "images", most

    def __enter__(self) -> Pairs:
        self._images.mkdir(parents=True, exist_ok=True)
        self._file = self._path.with_suffix(".partial").open("w", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._path.with_suffix(".partial").replace(self._path)

    def add(self, prompt: Prompt, texts: Sequence[str]) -> None:
        """Write the pairs of a prompt."""
        image, before = "", self.pairs
        for pair in pairs_of(prompt, texts, self._most):
            if prompt.images and not image:
                image = self._kept(prompt.images[0])
            ordered = {"id": pair.pop("id"), "image": image, **pair}
            self._file.write(json.dumps(ordered, ensure_ascii=False) + "\n")
            self.pairs += 1
        self.prompts += self.pairs > before

    def _kept(self, data: bytes) -> str:
        """The image's path as the JSONL names it, relative to it."""
        with Image.open(io.BytesIO(data)) as image:
            suffix = (image.format or "img").lower()
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"
        path = self._images / name
        if not path.exists():
            path.write_bytes(data)
        return f"{self._images.name}/{name}"
