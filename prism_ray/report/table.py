"""The evaluation as a table on the terminal: what a run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from prism_ray.report.sections import COLUMNS


def evaluation_table(evaluation: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each evaluated checkpoint, in the order they were evaluated."""
    table = Table(title="held-out prompts; shares with 95 % intervals", title_justify="left")
    table.add_column("checkpoint")
    names = ("accuracy (T = 1)", "accuracy (greedy)", *(title for _, title in COLUMNS), "tokens")
    for name in names:
        table.add_column(name, justify="right")
    for label, numbers in evaluation.items():
        shares = [f"{numbers[name]:.3f}" if name in numbers else "–" for name, _ in COLUMNS]
        both = [_interval(numbers["accuracy"]), _interval(numbers["accuracy_greedy"])]
        table.add_row(label, *both, *shares, f"{numbers['mean_tokens']:.1f}")
    return table


def print_evaluation(evaluation: Mapping[str, Mapping[str, Any]]) -> None:
    """Print it, if anything was evaluated; wide enough to keep a row on a line where the output is not a terminal."""
    if evaluation:
        console = Console()
        Console(width=None if console.is_terminal else 140).print(evaluation_table(evaluation))


def _interval(accuracy: Mapping[str, float]) -> str:
    return f"{accuracy['mean']:.3f} ({accuracy['low']:.3f}–{accuracy['high']:.3f})"
