"""Verifiers are Gymnasium environments; this is the contract they keep, and the base of the single-turn ones.

The contract (an environment of a user's own, or of another room, need only keep to it; it need not inherit):

* It is registered under an id, and named in the configuration in Gymnasium's own form `module:namespace/Name-v0`
  (the module is imported first, and registers it), or without a module where it is registered already.
* `reset(seed=None, options={"prompt": Prompt})` -> `(observation, info)`. The observation is a
  `Dict(image: Box uint8 [H, W, 3], prompt: Text)`: the first image (one black pixel where there is none) and the text
  of the last user turn. The prompt brings `ground_truth` and `extra`, all that verification may use.
* `step(action: str)` -> `(observation, reward, terminated, truncated, info)`. The action is the whole response as text.
  A single-turn environment ends there: terminated True, truncated False.
* `reward` is a float in [0, 1]: `0.8 * accuracy + 0.2 * format`, and 0 where the format is invalid.
* `info` carries the parts: `accuracy` float 0..1, `format` float 0 or 1, `valid` bool (the response has the required
  format), `reason` str ("" or why it is not valid). Further float entries are kept as further parts.
* `step` never raises on model output; a response that cannot be judged is worth 0 and says why.
* One instance judges many responses: `reset` makes it ready for the next, and nothing leaks between episodes.
* It is called in a thread of its process that is not the main one, where Python allows no signals: what needs a time
  limit of its own needs a process of its own (`verify/symbolic.py` is that of math-verify).
* An environment of several turns ends `step` with terminated False and writes its answer to the policy in
  `info["message"]`, with `info["images"]` if it shows any; `verify/episode.py` says how, `verify.max_turns` lets it.
  Each episode under way has an instance, whose `reset` is given a seed; where its process is lost, the episode is
  played again, and must then go as it went.
"""

from __future__ import annotations

import io
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from prism_ray.records import Prompt
from prism_ray.verify.rewards import Reward, judge_response

MAX_TEXT = 1 << 20
"""Longest text, in characters, that the spaces declare."""


class AnyText(spaces.Text):
    """A Text space of any Unicode string; Gymnasium's own wants its alphabet listed."""

    def __init__(self, max_length: int = MAX_TEXT) -> None:
        super().__init__(max_length=max_length, min_length=0)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


class ResponseEnvironment(gymnasium.Env[dict[str, Any], str]):
    """Single-turn environment: the prompt is observed, the response is judged, the episode ends.

    A subclass overrides `accuracy` (or `verify`, for all of it).
    """

    metadata = {"render_modes": []}

    def __init__(self) -> None:
        image = spaces.Box(0, 255, shape=(1, 1, 3), dtype=np.uint8)
        self.observation_space = spaces.Dict({"image": image, "prompt": AnyText()})
        self.action_space = AnyText()
        self._prompt: Prompt | None = None
        self._image = np.zeros((1, 1, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode on `options["prompt"]`; ValueError without one."""
        super().reset(seed=seed)
        prompt = (options or {}).get("prompt")
        if not isinstance(prompt, Prompt):
            raise ValueError('reset(options={"prompt": …}) needs a prism_ray.records.Prompt')
        if prompt is not self._prompt:  # the rollouts of a group come one after the other: decode their image once
            self._prompt, self._image = prompt, first_image(prompt)
            image = spaces.Box(0, 255, shape=self._image.shape, dtype=np.uint8)
            self.observation_space = spaces.Dict({"image": image, "prompt": AnyText()})
        return self._observe(prompt), {"id": prompt.id}

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Judge the response; RuntimeError before the first `reset`."""
        if self._prompt is None:
            raise RuntimeError("call reset before step")
        result = self.verify(action, self._prompt)
        info = {"accuracy": result.accuracy, "format": result.format, "valid": result.valid, "reason": result.reason}
        return self._observe(self._prompt), result.reward, True, False, info

    def verify(self, text: str, prompt: Prompt) -> Reward:
        """The reward of a response and its parts."""
        return judge_response(text, prompt.ground_truth, self.accuracy)

    def accuracy(self, answer: str, truth: str) -> float:
        """How right an answer is, 0..1."""
        raise NotImplementedError

    def _observe(self, prompt: Prompt) -> dict[str, Any]:
        return {"image": self._image.copy(), "prompt": question_of(prompt)}


def first_image(prompt: Prompt) -> np.ndarray:
    """The first image of a prompt, uint8 [H, W, 3]; one black pixel where there is none."""
    if not prompt.images:
        return np.zeros((1, 1, 3), np.uint8)
    with Image.open(io.BytesIO(prompt.images[0])) as image:
        return np.array(image.convert("RGB"))


def question_of(prompt: Prompt) -> str:
    """The text of the last user turn, without image markers."""
    turns = [m["content"] for m in prompt.messages if m["role"] == "user"]
    return turns[-1].replace("<image>", "").strip() if turns else ""
