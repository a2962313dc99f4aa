"""What a person sees while a run goes on: a live panel on a terminal, plain lines everywhere else."""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from rich.columns import Columns
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
    ("reward/dropped_share", "groups dropped"),
    ("verify/accuracy", "accuracy"),
    ("discriminator/gap/{view}", "gap"),
    ("discriminator/pair_accuracy/{view}", "pairs told apart"),
    ("discriminator/pair_accuracy/{view}_held_out", "held-out pairs told apart"),
    ("policy/loss", "policy loss"),
    ("supervised/loss", "loss"),
    ("correction/ess", "effective samples"),
    ("policy/version", "policy version"),
    ("discriminator/version", "judge version"),
    ("staleness/max", "policy staleness"),
    ("staleness/judge_max", "judge staleness"),
    ("rollout/response_tokens", "response tokens"),
    ("rollout/tokens_per_second", "tokens/s"),
    ("rollout/engine_tokens_per_second", "of each engine"),
    ("supervised/wait_share", "waits for data"),
    ("learner/wait_share", "learner waits for data"),
    ("rollout/wait_share", "engines wait for weights"),
    ("weights/wait_share", "engines paused"),
    ("judge/wait_share", "judge waits for rollouts"),
)
"""The numbers worth a person's glance, in order, with what they are called there; `{view}` stands for every view."""
_PANEL_ONLY = {
    "correction/ess", "policy/version", "discriminator/version", "rollout/response_tokens",
    "rollout/engine_tokens_per_second", "weights/wait_share",
}  # fmt: skip
"""Not on the log's lines, which would grow too long to read."""
_ENGINES = 8
"""Engines told one by one; of more than that the slowest and the fastest."""
_ALARM = re.compile(r"^discriminator/alarm/(.+)/(.+)$")
_WINDOW = 20
"""Steps whose mean time tells how long the rest will take: a run that got faster or slower is seen to."""


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
        self._ends: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)

    def __enter__(self) -> Progress:
        self._began = self._last_line = self._last_end = time.monotonic()
        self._ends.clear()
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
        if not self._ends or step <= self._ends[-1][0]:
            # A stage begins at its checkpoint's step, or goes back to it after a fault: no step before it counts.
            self._ends.clear()
            self._ends.append((step - 1, self._last_end))
        self._ends.append((step, now))
        self._last_end = now
        self._step, self._numbers = step, dict(numbers)
        if self._live is not None:
            self._live.update(self._panel())
        elif step >= self.total or now - self._last_line >= self._log_every_s:
            self._last_line = now
            self._log.info("%s", self.line())

    def line(self) -> str:
        """Where the stage stands, on one line."""
        shown = [f"{label} {value}" for label, value in telling(self._numbers, brief=True)]
        return "  ".join([f"{self.title} {self._step}/{self.total}", *shown, *self._timing()])

    @property
    def step_seconds(self) -> float:
        """Mean time of the last steps; NaN before the first."""
        if len(self._ends) < 2:
            return math.nan
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        return (ended - began) / (last - first)

    def _timing(self) -> list[str]:
        seconds = self.step_seconds
        if math.isnan(seconds):
            return []
        return [f"{seconds:.1f} s/step", f"left {duration(seconds * max(0, self.total - self._step))}"]

    def _panel(self) -> Panel:
        bar = ProgressBar(total=max(1, self.total), completed=min(self._step, self.total), width=20)
        head = Table.grid(padding=(0, 2))
        head.add_row(bar, Text(f"{self._step}/{self.total}"), Text("  ".join(self._timing())))
        told = dict(telling(self._numbers))
        alarm = told.pop("alarm", "")
        shown = [Text.assemble((f"{label} ", "dim"), value) for label, value in told.items()]
        # As many beside each other as the terminal is wide, so that a wide one gets a low panel.
        body = Columns(shown, padding=(0, 3), column_first=True) if shown else Text("waiting for the first step")
        last = [Text(f"alarm {alarm}", style="yellow")] if alarm else []
        return Panel(Group(head, body, *last), title=self.title, title_align="left", expand=False)


def telling(numbers: Mapping[str, float], brief: bool = False) -> list[tuple[str, str]]:
    """The numbers worth a glance as (label, value), those of all views together, and the alarms that ring; where none
    of them is known, the first few there are. `brief` leaves out what a line of a log has no room for."""
    if paused := numbers.get("weights/paused_s"):
        numbers = {**numbers, "weights/wait_share": paused / max(numbers.get("time/step_s", 0.0), paused)}
    known, named = [], False
    for name, label in _SHOWN:
        if brief and name in _PANEL_ONLY:
            continue
        if name == "rollout/engine_tokens_per_second":
            known += [(label, rates)] if (rates := _of_engines(name, numbers)) else []
        elif "{view}" not in name:
            if name in numbers:
                known.append((label, f"{numbers[name]:.0%}" if name.endswith("_share") else _short(numbers[name])))
        elif views := _of_views(name, numbers):
            known.append(
                (label if named else f"{label} ({' / '.join(views)})", " / ".join(map(_short, views.values())))
            )
            named = True
    ringing = [f"{m[1]} ({m[2]})" for name, value in numbers.items() if value > 0 and (m := _ALARM.match(name))]
    known += [("alarm", ", ".join(ringing))] if ringing else []
    return known or [(name, _short(value)) for name, value in list(numbers.items())[:6]]


def _of_views(name: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """A metric of every view, by view; the name of a held-out one must say so."""
    before, _, after = name.partition("{view}")
    found = {n[len(before) : len(n) - len(after)]: v for n, v in numbers.items() if n.startswith(before)}
    return {view: v for view, v in sorted(found.items()) if f"{before}{view}{after}" in numbers and "/" not in view
            and not view.endswith("_held_out")}  # fmt: skip


def _of_engines(name: str, numbers: Mapping[str, float]) -> str:
    """A metric of every engine, in their order; "" where there is only one engine."""
    found = {int(n.rpartition("/")[2]): v for n, v in numbers.items() if n.startswith(f"{name}/")}
    values = [found[index] for index in sorted(found)]
    if len(values) > _ENGINES:
        return f"{_short(min(values))} to {_short(max(values))}"
    return " / ".join(map(_short, values)) if len(values) > 1 else ""


def duration(seconds: float) -> str:
    """Seconds as `0:42`, `12:05` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _console() -> Console:
    import rich  # its global console, so that the panel and the log messages take turns

    return rich.get_console()
