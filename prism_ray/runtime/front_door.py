"""The front door that all jobs share: what they are asked, where their paths are, and how they end.

Exit codes: 0 done, 1 failed (the reason is the last line of stderr), 2 bad configuration or input, 130 interrupted.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from prism_ray.config.base import Settings
from prism_ray.config.cli import parse_job
from prism_ray.report.incidents import reason
from prism_ray.runtime.submitted import at_home, found

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

S = TypeVar("S", bound=Settings)


class Refused(Exception):
    """A configuration or input that the job cannot work with; the message is what the user is told."""


def settings_for(
    argv: list[str], cls: type[S], description: str, output: str | None = None, default_config: Path | None = None
) -> S:
    """The settings that a job's arguments ask for, with paths as they hold where the job runs (see `at_home`).

    `output` is the field with the folder that the job writes into (None: it writes none). Leaves the process as
    `parse_job` does.
    """
    return at_home(parse_job(argv, cls, description, default_config, found), output)


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are the user's to mend: the job ends with exit code 2 and their sentence."""
    try:
        yield
    except kinds as error:
        raise Refused(str(error)) from error


def finish(work: Callable[[], int | None], interrupted: str) -> int:
    """Do a job's work; returns its exit code, which is what `work` returns unless it raises.

    Ctrl-C and SIGTERM raise KeyboardInterrupt where `work` does not see to them itself; `interrupted` is what is said
    then.
    """
    try:
        with _sigterm_interrupts():
            return work() or DONE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except Refused as error:
        print(error, file=sys.stderr)
        return REFUSED
    except Exception as error:
        logging.getLogger("prism_ray").error("failed", exc_info=True)
        print(reason(error), file=sys.stderr)
        return FAILED


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """`ray job stop` and Kubernetes ask a job to end by SIGTERM, people by Ctrl-C: both mean the same."""
    if threading.current_thread() is not threading.main_thread():  # only that one may say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
