"""The environments whose truth is an answer: each compares the response's answer with the prompt's ground truth.

* `prism/Answer-v0`: every rule, in the published order; which of them applies, the truth decides.
* `prism/Math-v0`: every rule but multiple choice, so that a truth such as `A` is the name of something.
* `prism/MultipleChoice-v0`: the truth is an option, `A` to `J`, with or without its text.
* `prism/Number-v0`: the truth is a number, with or without a unit; no symbolic mathematics, so no process beside it.

A truth that an environment cannot use is an error of the data, which `reset` raises and names. Where the prompt's
`extra` has `equivalent_answers`, any of them is as right as the ground truth. What produced the prompt (its
`data_source`) plays no part.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import gymnasium

from prism_ray.records import Prompt
from prism_ray.response import parse
from prism_ray.verify.choice import LETTERS, option_of
from prism_ray.verify.environment import ResponseEnvironment
from prism_ray.verify.normalise import clean
from prism_ray.verify.rewards import Reward, judge_response
from prism_ray.verify.rules import MAX_ANSWER, Judged, judge, quantity_of
from prism_ray.verify.symbolic import Budget, SymbolicChecker

ID = "prism/Answer-v0"
TRUTH = f"{__name__}:truth_of"
MATH, CHOICE, NUMBER = "prism/Math-v0", "prism/MultipleChoice-v0", "prism/Number-v0"

MORE_LETTERS = "ABCDEFGHIJ"
"""Options of benchmarks with ten of them; in `prism/Answer-v0` an `I` would be no option but a word."""

NO_EQUIVALENTS = "__EMPTY__"
"""What the published data writes where there are no equivalent answers."""


class AnswerEnvironment(ResponseEnvironment):
    """Right or wrong by every rule; an answer of several values is right if all of them are, in order.

    `limit_s`: seconds of processor time that the symbolic comparisons of an answer may take together, with all values
    and all equivalents; then it counts as wrong. After a step, `info` also has `rule` (what decided) and `cut` (1.0
    where the limit was met).
    """

    letters = LETTERS

    def __init__(self, limit_s: float = 2.0) -> None:
        super().__init__()
        self._checker = SymbolicChecker(limit_s)
        self._rule, self._budget = "", Budget(self._checker)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode on `options["prompt"]`; ValueError without one, or where its truth cannot be used."""
        prompt = (options or {}).get("prompt")
        if isinstance(prompt, Prompt) and (why := self.refusal(prompt)):
            raise ValueError(why)
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._rule, self._budget = "", Budget(self._checker)
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, info | {"rule": self._rule, "cut": float(self._budget.cut)}

    def verify(self, text: str, prompt: Prompt) -> Reward:
        return judge_response(text, prompt.ground_truth, lambda answer, _: self._accuracy(answer, truths_of(prompt)))

    @classmethod
    def refusal(cls, prompt: Prompt) -> str:
        """Why this environment cannot judge answers to a prompt's ground truth; "" if it can."""
        try:
            for truth in truths_of(prompt):
                cls.check_truth(truth, prompt.id)
        except ValueError as error:
            return str(error)
        return ""

    @classmethod
    def check_truth(cls, truth: str, prompt_id: str) -> None:
        """ValueError with a sentence where this environment cannot judge answers to that truth."""

    def close(self) -> None:
        self._checker.close()
        super().close()

    def _accuracy(self, answer: str, truths: list[str]) -> float:
        judged = Judged(False, "none")
        for truth in truths:
            judged = self._judge(answer, truth)
            if judged.right:
                break
        self._rule = judged.rule
        return float(judged.right)

    def _judge(self, answer: str, truth: str) -> Judged:
        return judge(answer, truth, self._budget.same, self.letters)


class MathEnvironment(AnswerEnvironment):
    """Right or wrong by every rule but multiple choice."""

    letters = ""


class MultipleChoiceEnvironment(AnswerEnvironment):
    """Right if the answer picks the truth's option, by its letter or by its text."""

    letters = MORE_LETTERS

    @classmethod
    def check_truth(cls, truth: str, prompt_id: str) -> None:
        if option_of(clean(truth), cls.letters) is None:
            raise ValueError(
                f"prompt {prompt_id}: the ground truth {truth[:40]!r} names no option A to {cls.letters[-1]};"
                f" set verify.environment to {ID} for answers of other kinds"
            )


class NumberEnvironment(AnswerEnvironment):
    """Right if the answer is the same number, with the same unit where both have one."""

    letters = ""

    @classmethod
    def check_truth(cls, truth: str, prompt_id: str) -> None:
        if quantity_of(truth) is None:
            raise ValueError(
                f"prompt {prompt_id}: the ground truth {truth[:40]!r} is no number;"
                f" set verify.environment to {ID} for answers of other kinds"
            )

    def _judge(self, answer: str, truth: str) -> Judged:
        return judge(answer, truth, None, "")


def truths_of(prompt: Prompt) -> list[str]:
    """The right answers of a prompt: the ground truth, then its equivalents.

    ValueError with a sentence where one is no text, is empty, or is too long to be compared.
    """
    equivalents = prompt.extra.get("equivalent_answers") or []
    if not isinstance(equivalents, list | tuple):
        raise ValueError(f"prompt {prompt.id}: extra.equivalent_answers is no list of texts")
    truths = [prompt.ground_truth, *([] if NO_EQUIVALENTS in equivalents else equivalents)]
    for truth in truths:
        if not isinstance(truth, str):
            raise ValueError(f"prompt {prompt.id}: the ground truth must be text, it is {type(truth).__name__}")
        if not 0 < len(truth.strip()) <= len(truth) < MAX_ANSWER:
            what = "empty" if not truth.strip() else f"longer than {MAX_ANSWER - 1} characters"
            raise ValueError(f"prompt {prompt.id}: the ground truth is {what}; a verifier cannot judge answers to it")
    return truths


def truth_of(text: str, prompt: Prompt) -> dict[str, float]:
    """What of a response is right where only the answer is known: `answer` and `format`, each 0 or 1.

    The rules of `prism/Answer-v0`; ValueError where the prompt's ground truth cannot be used.
    """
    parsed, budget = parse(text), Budget(_checker())
    right = parsed.valid and any(
        judge(parsed.parts["answer"].strip(), truth, budget.same).right for truth in truths_of(prompt)
    )
    return {"answer": float(right), "format": float(parsed.valid)}


@lru_cache(maxsize=1)
def _checker() -> SymbolicChecker:
    return SymbolicChecker()


for _id, _class in (
    (ID, AnswerEnvironment),
    (MATH, MathEnvironment),
    (CHOICE, MultipleChoiceEnvironment),
    (NUMBER, NumberEnvironment),
):
    gymnasium.register(id=_id, entry_point=f"{__name__}:{_class.__name__}")
