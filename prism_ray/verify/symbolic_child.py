"""The process that compares expressions (`symbolic.py`): reads questions from stdin, a JSON line each, and replies.

A keeper imports the mathematics once and forks a worker, which answers question after question with caches that stay
warm. The kernel ends a worker at its limits, in the middle of whatever it computes; the keeper then replies in its
place and forks the next, which costs milliseconds.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time

from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 2 << 30
"""Bytes a worker may map; without it `10**10**10` takes all there is before its time is up."""

_WHOLE = (LatexExtractionConfig(boxed_match_priority=0),)
"""A box around an expression makes math-verify read all of it, where it else picks the last number of a text."""

_WARM = (("2\\sqrt{3}", "\\sqrt{12}"), ("\\frac{x}{2}", "0.5x"), ("(x-1)(x+1)", "x^2-1"), ("x>3", "3<x"))


def same(truth: str, answer: str) -> bool:
    """Whether math-verify takes the answer for the same as the truth; each is read whole, as LaTeX."""
    wanted, given = (parse(f"\\boxed{{{t}}}", _WHOLE, "no_fallback", parsing_timeout=0) for t in (truth, answer))
    return bool(wanted and given) and verify(wanted, given, timeout_seconds=0)


def _serve() -> None:
    """Answer until stdin ends. Never two questions at once, so that a worker's end loses no more than one."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while line := sys.stdin.buffer.readline():
        truth, answer, limit_s = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # processor time; the signals' default is the process's end
        signal.setitimer(signal.ITIMER_REAL, 5 * limit_s)
        begun = time.process_time()
        try:
            reply = {"same": same(truth, answer)}
        except MemoryError:
            reply = {"same": False, "cut": True}
        except Exception:  # the parsers raise all sorts of things on what they cannot read
            reply = {"same": False}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(reply | {"spent_s": time.process_time() - begun})


def _reply(reply: object) -> None:
    os.write(1, json.dumps(reply).encode() + b"\n")


def main() -> None:
    logging.disable(logging.CRITICAL)
    for truth, answer in _WARM:
        same(truth, answer)
    _reply("ready")
    while True:
        worker = os.fork()
        if worker == 0:
            _serve()
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return
        _reply({"same": False, "cut": True})


if __name__ == "__main__":
    main()
