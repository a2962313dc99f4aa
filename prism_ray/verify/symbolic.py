"""math-verify in a process of its own, with hard limits: whatever an answer makes it compute ends when the time is up.

math-verify and the parser and algebra below it take as long as they like: `10**10**10` is computed, and its own limit
needs signals, which only a main thread gets. So a child process compares (`symbolic_child.py`), and the kernel ends it
there, in the middle of whatever it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

_START_S = 120.0
"""Longest wait for the child's imports, which the limit of a comparison does not count."""

_LEAST_S = 0.01
"""Less time than this is not worth a question; the kernel counts in about as long ticks."""

_GRACE_S = 5.0
"""How much longer than its limit a comparison may take before the child counts as stopped and is killed from here."""


class NoChild(RuntimeError):
    """The process that compares could not be started."""


@dataclass(frozen=True)
class Compared:
    """Whether two expressions are the same; `cut` where the limit ended the comparison, which then counts as no.
    `spent_s`: seconds of processor time that it took."""

    same: bool
    cut: bool = False
    spent_s: float = field(default=0.0, compare=False)


class SymbolicChecker:
    """Compares expressions in a child process, one at a time (from any thread); started when first asked.

    `limit_s`: seconds of processor time a comparison may take where it is given no other limit; five times that of wall
    time, on a machine that is busy with other things.
    """

    def __init__(self, limit_s: float = 2.0) -> None:
        if not 0 < limit_s < 3600:
            raise ValueError(f"limit_s: {limit_s!r} is no number of seconds between 0 and 3600")
        self.limit_s = limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def compare(self, truth: str, answer: str, limit_s: float | None = None) -> Compared:
        """Whether math-verify takes the answer for the same as the truth. Raises NoChild, and nothing for any text."""
        limit_s = self.limit_s if limit_s is None else limit_s
        question = json.dumps([truth, answer, limit_s]).encode() + b"\n"
        with self._lock:
            try:
                child = self._started()
                assert child.stdin is not None
                child.stdin.write(question)
                reply = _line(child, 5 * limit_s + _GRACE_S)
            except (BrokenPipeError, ConnectionResetError):
                reply = b""
            if not reply:  # the child is stopped or gone, which its own limits should have kept it from
                self._end()
                return Compared(False, cut=True, spent_s=limit_s)
        return Compared(**{"spent_s": limit_s} | json.loads(reply))  # a worker that was ended cannot say

    def close(self) -> None:
        """End the child; the next comparison starts another."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            command = [sys.executable, "-m", "prism_ray.verify.symbolic_child"]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._child = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                start_new_session=True,
            )  # fmt: skip
            if not _line(self._child, _START_S):
                self._end()
                raise NoChild(f"the process that compares expressions did not start: {' '.join(command)}")
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its own session: the process that compares goes too
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        child.wait()


class Budget:
    """What the comparisons of one answer, however many they are, may take together: the checker's limit."""

    def __init__(self, checker: SymbolicChecker) -> None:
        self._checker, self._left_s = checker, checker.limit_s
        self.cut = False
        """Whether the limit ended a comparison, or left nothing for one."""

    def same(self, truth: str, answer: str) -> bool:
        """Whether the answer is the same as the truth; no, unasked, once the time is spent."""
        if self._left_s < _LEAST_S:
            self.cut = True
            return False
        compared = self._checker.compare(truth, answer, self._left_s)
        self._left_s -= compared.spent_s
        self.cut |= compared.cut
        return compared.same


def _line(child: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """The child's next line; empty where it ends or the limit passes before it is complete."""
    assert child.stdout is not None
    pipe, line, end = child.stdout.fileno(), b"", time.monotonic() + limit_s
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        piece = os.read(pipe, 4096) if ready else b""
        if not piece:
            return b""
        line += piece
    return line
