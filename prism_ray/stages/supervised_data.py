"""The training data of supervised phases: which rows make up each step, and the Ray Data pipeline that prepares them.

Step s of a phase is made of rows [s·B, (s+1)·B) of its corpus's order, dealt to the ranks in equal parts, so a step
number says all there is to know: a rank that starts again goes on at the very row, and reads nothing that came before.
(`ray.train.get_dataset_shard` starts again at row 0 and deals blocks to whoever asks first, hence a Ray Data shard
made by each rank for itself.) Every phase's data follows the previous one's in one pipeline, so nothing waits between.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prism_ray.config.corpora import CorporaSettings
from prism_ray.config.learner import OptimiserSettings
from prism_ray.config.trainer import TrainerSettings
from prism_ray.corpora.quarantine import Quarantined
from prism_ray.corpora.reader import CorpusError, Pace, RowOrder, prepared, read_piece
from prism_ray.stages.supervised_tasks import Entry, Task

_FARTHEST = 1024
"""Rows that are looked through for a good one; bad rows often lie together."""


@dataclass(frozen=True)
class Course:
    """One phase's data: `steps` steps of `batch` rows in `order`, prepared by `task`."""

    name: str
    task: Task
    order: RowOrder
    steps: int
    batch: int


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know."""

    checkpoint_in: str
    out_folder: str
    courses: tuple[Course, ...]
    optimisers: tuple[OptimiserSettings, ...]
    settings: TrainerSettings
    corpora: CorporaSettings


@dataclass(frozen=True, eq=False)
class Portion:
    """A rank's part of one step: the samples of its `micro` batches, the `size` of their loss in terms, and rows that
    were `bad`.

    A bad row's place is taken by the first good one of the part, or else by the next in the order, so ranks have
    equally many micro-batches. Bad rows are named in the first epoch only.
    """

    micro: list[list[Any]]
    size: int
    bad: list[Quarantined]


class Spare:
    """Finds the row that stands in where all of a rank's part of a step is bad: the next good one in the order."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._found: tuple[int, Any] = -1, None

    def after(self, stop: int, reason: str) -> Any:
        """The first good sample from position `stop` on, the same whatever was asked before. CorpusError where there is
        none far and wide."""
        place, sample = self._found
        if place >= stop:  # what was passed over to find it was bad
            return sample
        for position in range(stop, stop + _FARTHEST):
            (sample,) = self._course.task.prepare(entries(self._course, position, position + 1))
            if not isinstance(sample, Quarantined):
                self._found = position, sample
                return sample
        raise CorpusError(
            f"{self._course.name}: {_FARTHEST:,} rows in a row cannot be used ({reason}); repair the corpus"
        )


@dataclass(frozen=True)
class Shard:
    """The steps of all phases as one rank sees them."""

    courses: tuple[Course, ...]
    rank: int
    ranks: int
    micro_batch: int
    settings: CorporaSettings

    def portions(self, first_step: int) -> Iterator[tuple[int, int, Portion]]:
        """(phase, step in the phase, portion) from the overall step on, prepared ahead of need."""
        pace = Pace(self.settings)
        for row in prepared(self._tasks(first_step, pace), self._prepare, self.settings):
            pace.note(self.courses[row["phase"]].batch // self.ranks, len(row["portion"]))
            yield row["phase"], row["step"], pickle.loads(row["portion"])

    def _tasks(self, first_step: int, pace: Pace) -> Iterator[dict[str, int]]:
        for phase, course in enumerate(self.courses):
            step = max(0, first_step)
            while step < course.steps:
                last = min(step + max(1, pace.rows * self.ranks // course.batch), course.steps)
                course.order.count_to(last * course.batch)
                yield {"phase": phase, "first": step, "last": last}
                step = last
            first_step -= course.steps

    def _prepare(self, task: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Runs in Ray Data's workers."""
        torch.set_num_threads(1)
        course = self.courses[task["phase"]]
        spare = Spare(course)
        for step in range(task["first"], task["last"]):
            start = step * course.batch + self.rank * course.batch // self.ranks
            stop = step * course.batch + (self.rank + 1) * course.batch // self.ranks
            items = course.task.prepare(entries(course, start, stop))
            good = [item for item in items if not isinstance(item, Quarantined)]
            bad = [item for item in items if isinstance(item, Quarantined)]
            again = good[0] if good else spare.after(stop, bad[0].reason)
            named = bad if course.order.first(start + 1) > start else []
            portion = self._portion(course.task, good + [again] * len(bad), named)
            yield {"phase": task["phase"], "step": step, "portion": _pickled(portion)}

    def _portion(self, task: Task, samples: list[Any], bad: list[Quarantined]) -> Portion:
        samples.sort(key=task.size)
        cuts = range(0, len(samples), self.micro_batch)
        micro = [samples[i : i + self.micro_batch] for i in cuts]
        return Portion(micro, sum(map(task.size, samples)), bad)


def entries(course: Course, start: int, stop: int) -> list[Entry]:
    """The rows at positions start … stop-1."""
    pieces = course.order.pieces(start, stop)
    return [(p.fragment.file, place, row) for p in pieces for _, place, row in read_piece(p, course.task.columns)]


def overall(courses: Sequence[Course], phase: int, step: int) -> int:
    """The overall number of a phase's step."""
    return sum(course.steps for course in courses[:phase]) + step


class _Pickler(pickle.Pickler):
    """Tensors as numpy arrays: several times faster than torch's own pickling, which writes an archive for each."""

    def reducer_override(self, obj: Any) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def _pickled(portion: Portion) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(portion)
    return buffer.getvalue()
