"""`prism/Answer-v0`: the answer is compared with the prompt's ground truth, as text and as numbers."""

from __future__ import annotations

import gymnasium

from prism_ray.records import Prompt
from prism_ray.response import parse
from prism_ray.verify.environment import ResponseEnvironment
from prism_ray.verify.rewards import answers_agree

ID = "prism/Answer-v0"


class AnswerEnvironment(ResponseEnvironment):
    """Right or wrong; an answer of several values is right if all of them are, in order."""

    def accuracy(self, answer: str, truth: str) -> float:
        return float(answers_agree(answer, truth))


def truth_of(text: str, prompt: Prompt) -> dict[str, float]:
    """What of a response is right where only the answer is known: `answer` and `format`, each 0 or 1."""
    parsed = parse(text)
    right = parsed.valid and answers_agree(parsed.parts["answer"], prompt.ground_truth)
    return {"answer": float(right), "format": float(parsed.valid)}


gymnasium.register(id=ID, entry_point=f"{__name__}:AnswerEnvironment")
