"""Everything asked of a teacher and everything it answered, in `answers.jsonl`, and what that cost.

One JSON object a line. A request is noted before it is sent and its answer before it counts, so whoever kills the
process loses at most what was under way, and that is counted as possibly paid:

* `{"ask": n, "key", "id", "input", "most", "raw", "time"}`: request n, about `input` tokens, at most `most` tokens of
  answer; `raw` is `input` before what was learned of estimates.
* `{"answer": n, "body", "fault", "input_tokens", "output_tokens"}`: its raw answer; `fault` is empty if it can be used.
* `{"lost": n, "reason", "body"}`: no whole answer came, and it may have to be paid; `body` is what there was of it.
* `{"free": n, "reason", "body"}`: the endpoint did not do it, so it costs nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prism_ray.config.collect import SpendingSettings
from prism_ray.corpora.collect_request import Reply, count_text, read_reply

FILE = "answers.jsonl"


class CollectError(ValueError):
    """A collection that cannot begin or go on, in one sentence that names the cure."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of questions and of answers."""

    input: int = 0
    output: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.input + other.input, self.output + other.output)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.input - other.input, self.output - other.output)

    @property
    def total(self) -> int:
        return self.input + self.output

    def money(self, prices: SpendingSettings) -> float:
        """What they cost."""
        return (self.input * prices.input_price + self.output * prices.output_price) / 1e6

    def within(self, caps: SpendingSettings) -> bool:
        """Whether the caps allow them."""
        if caps.max_tokens is not None and self.total > caps.max_tokens:
            return False
        return caps.max_money is None or self.money(caps) <= caps.max_money


class UnderWay(NamedTuple):
    """A request without a line of what became of it: what it costs at most, and about how many tokens the question was
    thought to have before anything was learned of estimates."""

    key: str
    most: Tokens
    raw: int


class State:
    """What the lines of a journal come to; made by applying them in order."""

    def __init__(self) -> None:
        self.answers: dict[str, int] = {}
        """Key of every prompt that has an answer that can be used, and the byte where that line begins."""
        self.malformed: Counter[str] = Counter()
        """Key -> answers that could not be used."""
        self.faults: dict[str, str] = {}
        """Key -> what was wrong with the last of them."""
        self.paid = Tokens()
        """As the endpoint counted, or estimated where it did not say."""
        self.uncertain = Tokens()
        """Most that the requests without a whole answer may have cost."""
        self.under_way: dict[int, UnderWay] = {}
        self.excess = 1.0
        """How many times as long as estimated a question was at most, by what the endpoint counted; at least 1."""
        self.requests = 0
        self.paid_answers = 0

    @property
    def at_most(self) -> Tokens:
        """All that was spent, if every uncertain request and all those under way cost what they can."""
        return sum((request.most for request in self.under_way.values()), self.paid + self.uncertain)

    def apply(self, line: dict[str, Any], place: int) -> None:
        """Take in the line that begins at byte `place`; KeyError, TypeError or ValueError if it is not one."""
        if "ask" in line:
            self.requests = max(self.requests, int(line["ask"]))
            most = Tokens(int(line["input"]), int(line["most"]))
            raw = int(line.get("raw", most.input))  # journals of earlier versions have none
            self.under_way[int(line["ask"])] = UnderWay(str(line["key"]), most, raw)
        elif "answer" in line:
            self._answered(line, place)
        elif "lost" in line:
            self.uncertain += self.under_way.pop(int(line["lost"])).most
        else:
            self.under_way.pop(int(line["free"]))

    def _answered(self, line: dict[str, Any], place: int) -> None:
        key, _, raw = self.under_way.pop(int(line["answer"]))
        paid = Tokens(int(line["input_tokens"]), int(line["output_tokens"]))
        self.paid += paid
        self.excess = max(self.excess, paid.input / max(1, raw))
        self.paid_answers += 1
        if line["fault"]:
            self.malformed[key] += 1
            self.faults[key] = str(line["fault"])
        else:
            self.answers[key] = place

    def abandon(self) -> None:
        """Whoever asked is gone: what was under way may have been paid."""
        self.uncertain = self.at_most - self.paid
        self.under_way.clear()


def replay(path: Path) -> tuple[State, int]:
    """The state that a journal tells, and its length up to the last whole line (a crash may have torn one)."""
    state, place = State(), 0
    if not path.exists():
        return state, place
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                state.apply(json.loads(line), place)
            except (ValueError, KeyError, TypeError) as error:
                raise CollectError(
                    f"{path}: line {number} is damaged ({type(error).__name__}); restore the file, or move it away to "
                    "ask (and pay) for everything again"
                ) from error
            place += len(line)
    state.abandon()
    return state, place


class Journal:
    """The journal of one collection, opened to go on with it; only one process may have it open."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._file: BinaryIO = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CollectError(f"{folder}: a collection into it is running already; wait for it or stop it") from error
        self.state, self._end = replay(self.path)
        self._file.truncate(self._end)

    def ask(self, key: str, prompt_id: str, cost: Tokens, raw: int) -> int:
        """Note a request before it is sent, with the estimate that `cost` was made from; returns its number."""
        number = self.state.requests + 1
        line = {"ask": number, "key": key, "id": prompt_id, "input": cost.input, "most": cost.output, "raw": raw}
        self._append(line | {"time": round(time.time(), 3)})
        return number

    def answered(self, number: int, body: str, reply: Reply, fault: str) -> Tokens:
        """Note an answer, on the disk before it counts; returns what it cost."""
        most = self.state.under_way[number].most
        cost = Tokens(
            most.input if reply.input_tokens is None else reply.input_tokens,
            count_text(reply.text or body) if reply.output_tokens is None else reply.output_tokens,
        )
        line = {"answer": number, "fault": fault, "input_tokens": cost.input, "output_tokens": cost.output}
        self._append(line | {"body": body})
        os.fsync(self._file.fileno())
        return cost

    def lost(self, number: int, reason: str, body: str = "") -> None:
        """Note that no whole answer came, though there may have been one."""
        self._append({"lost": number, "reason": reason, "body": body})

    def free(self, number: int, reason: str, body: str = "") -> None:
        """Note that a request was not done and costs nothing."""
        self._append({"free": number, "reason": reason, "body": body})

    def text(self, key: str) -> str:
        """The usable answer to a prompt that has one."""
        with self.path.open("rb") as file:
            file.seek(self.state.answers[key])
            return read_reply(json.loads(file.readline())["body"]).text or ""

    def close(self) -> None:
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            rest = memoryview(data)
            while rest:  # a disk that has just become full takes a part before it refuses
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._end)
            raise CollectError(
                f"cannot write {self.path}: {error.strerror}; free disk space there and run the same command again"
            ) from error
        self.state.apply(line, self._end)
        self._end += len(data)
