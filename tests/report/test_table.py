"""The table a run ends with."""

import io

from rich.console import Console

from prism_ray.report.table import evaluation_table


def test_each_checkpoint_has_a_row_with_its_intervals():
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    numbers = {"accuracy": interval, "accuracy_greedy": interval, "format": 0.987, "mean_tokens": 55.5}
    console = Console(width=140, file=io.StringIO())
    console.print(evaluation_table({"sft": numbers, "prism+grpo": numbers | {"caption_exact": 0.123}}))
    text = console.file.getvalue()
    assert text.count("0.500 (0.400–0.600)") == 4
    assert "prism+grpo" in text and "0.123" in text and "0.987" in text and "–" in text
