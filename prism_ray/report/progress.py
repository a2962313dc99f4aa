"""What a person sees while a run goes on: a live panel on a terminal, plain lines everywhere else."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_ROOT = "prism_ray"
_SHOWN = (
    ("reward/mean", "reward"),
    ("verify/accuracy", "accuracy"),
    ("discriminator/gap/perception", "gap (perception)"),
    ("discriminator/gap/reasoning", "gap (reasoning)"),
    ("discriminator/pair_accuracy/perception", "pairs told apart (perception)"),
    ("discriminator/pair_accuracy/reasoning", "pairs told apart (reasoning)"),
    ("policy/loss", "policy loss"),
    ("supervised/loss", "loss"),
    ("correction/ess", "effective samples"),
    ("staleness/mean", "staleness"),
    ("staleness/max", "staleness, most"),
    ("rollout/response_tokens", "response tokens"),
    ("rollout/tokens_per_second", "tokens/s"),
)
"""The numbers worth a person's glance, in order, with what they are called there."""


def setup_logging(run_folder: Path, console: Console | None = None) -> None:
    """Send what `prism_ray` logs to `run_folder/log.txt` (appended) and to the console; calling again starts anew.

    Messages of level INFO and above. On a terminal they scroll above the live panel.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    console = console or _console()
    logger = logging.getLogger(_ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    file = logging.FileHandler(run_folder / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    if console.is_terminal:
        shown: logging.Handler = RichHandler(console=console, show_path=False, markup=False)
    else:
        shown = logging.StreamHandler(console.file)
        shown.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(file)
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Progress:
    """The progress of one stage, as a context manager: a live panel on a terminal, otherwise lines in the log."""

    def __init__(self, title: str, total: int, log_every_s: float = 10.0, console: Console | None = None):
        """`total` is the number of steps; `log_every_s` the least time between two lines in the log."""
        self.title, self.total, self._log_every_s = title, total, log_every_s
        self._console = console or _console()
        self._log = logging.getLogger(f"{_ROOT}.progress")
        self._live: Live | None = None
        self._step, self._numbers = 0, {}

    def __enter__(self) -> Progress:
        self._began = self._last_line = time.monotonic()
        self._first_step: int | None = None
        self._step_seconds = math.nan
        if self._console.is_terminal:
            self._live = Live(self._panel(), console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._log.info("%s: %d steps", self.title, self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        took = duration(time.monotonic() - self._began)
        ended = "done" if kind is None else "stopped"
        self._log.info("%s: %s at step %d of %d after %s", self.title, ended, self._step, self.total, took)

    def update(self, step: int, **numbers: float) -> None:
        """`step` steps are done; `numbers` are the metrics by name (of those, the telling ones are shown)."""
        now = time.monotonic()
        if self._first_step is None:
            # A resumed stage begins at its checkpoint's step: the time of the steps before it is not in `_began`.
            self._first_step = step - 1
        self._step_seconds = (now - self._began) / max(1, step - self._first_step)
        self._step, self._numbers = step, dict(numbers)
        if self._live is not None:
            self._live.update(self._panel())
        elif step >= self.total or now - self._last_line >= self._log_every_s:
            self._last_line = now
            self._log.info("%s", self.line())

    def line(self) -> str:
        """Where the stage stands, on one line."""
        shown = [f"{label} {_short(value)}" for label, value in telling(self._numbers)]
        timing = [] if math.isnan(self._step_seconds) else [f"{self._step_seconds:.1f} s/step", f"left {self._left()}"]
        return "  ".join([f"{self.title} {self._step}/{self.total}", *shown, *timing])

    def _left(self) -> str:
        return duration(self._step_seconds * max(0, self.total - self._step))

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        for label, value in telling(self._numbers):
            table.add_row(Text(label, style="dim"), _short(value))
        timing = "" if math.isnan(self._step_seconds) else f"{self._step_seconds:.1f} s/step, {self._left()} left"
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, self.total), completed=self._step, width=40)
        head.add_row(bar, f"{self._step}/{self.total}", timing)
        return Panel(Group(head, table), title=self.title, title_align="left", expand=False)


def telling(numbers: Mapping[str, float]) -> list[tuple[str, float]]:
    """The numbers worth a glance with their labels; where none of them is known, the first few there are."""
    known = [(label, numbers[name]) for name, label in _SHOWN if name in numbers]
    return known or list(numbers.items())[:6]


def duration(seconds: float) -> str:
    """Seconds as `0:42`, `12:05` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _console() -> Console:
    import rich  # its global console, so that the panel and the log messages take turns

    return rich.get_console()
