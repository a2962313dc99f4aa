"""The testbed as a Gymnasium environment, `prism/Testbed-v0`: one question about one image, one response, done."""

from __future__ import annotations

import io
import string
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from prism_ray.config.testbed import TestbedSettings
from prism_ray.records import Prompt
from prism_ray.response import parse
from prism_ray.testbed.questions import EACH, question_from, random_question
from prism_ray.testbed.scene import CELL, draw, random_cells
from prism_ray.testbed.teacher import teach
from prism_ray.testbed.truth import truth_of

ID = "prism/Testbed-v0"
ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.8, 0.2
"""The published verifier reward: 0.8 accuracy + 0.2 format, 0 if the format is invalid (PRISM, arXiv 2604.28123)."""


class TestbedEnv(gymnasium.Env[dict[str, Any], str]):
    """One-step episodes. Observation: `image` (uint8 [H, W, 3]) and `prompt`; action: the response's text.

    The reward is that of the published verifier; `info` holds the scene and, after the step, the reward's parts
    (`accuracy`, `format`, `valid`, `reason`: the contract of `verify/environment.py`) and what was right in detail
    (`Truth` as a dict). `family` is the question family of scenes the environment makes itself.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(
        self, settings: TestbedSettings | None = None, family: str = EACH, render_mode: str | None = None
    ) -> None:
        self.settings = settings or TestbedSettings()
        self.family = family
        self.render_mode = render_mode
        shape = (self.settings.rows * CELL, self.settings.columns * CELL, 3)
        printable = string.digits + string.ascii_letters + string.punctuation + " \n"
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, shape, np.uint8),
                "prompt": spaces.Text(128, charset=printable),
            }
        )
        self.action_space = spaces.Text(4096, min_length=0, charset=printable)
        self._extra: dict[str, Any] = {}
        self._image = np.zeros(shape, np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A given prompt of the testbed (`options={"prompt": Prompt}`), or a new scene and question of its own;
        `options={"family": …}` then overrides the family for this episode."""
        super().reset(seed=seed)
        options = options or {}
        if "prompt" in options:
            return self._given(options["prompt"])
        s, rng = self.settings, self.np_random
        cells = random_cells(rng, s.rows * s.columns)
        question = random_question(rng, options.get("family", self.family), len(cells))
        self._image = draw(cells, s.rows, s.columns, s.hardness, rng)
        self._extra = {**question.as_dict(), "cells": [list(cell) for cell in cells]}
        info = {"extra": deepcopy(self._extra), "reference": teach(cells, question).text}
        return self._observation(question.text), info

    def _given(self, prompt: Prompt) -> tuple[dict[str, Any], dict[str, Any]]:
        self._extra = prompt.extra
        self._image = np.asarray(Image.open(io.BytesIO(prompt.images[0])).convert("RGB"))
        return self._observation(question_from(self._extra).text), {"extra": deepcopy(self._extra)}

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Judge the response; the episode ends."""
        truth = truth_of(action, self._extra)
        reward = ACCURACY_WEIGHT * truth.answer + FORMAT_WEIGHT * truth.format
        info = {"accuracy": float(truth.answer), "format": float(truth.format), "valid": truth.format}
        info |= {"reason": parse(action).reason, "extra": deepcopy(self._extra), "truth": asdict(truth)}
        return self._observation(" "), reward, True, False, info

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The image the question is about."""
        return self._image.copy()

    def _observation(self, question: str) -> dict[str, Any]:
        return {"image": self._image.copy(), "prompt": question}


gymnasium.register(id=ID, entry_point="prism_ray.testbed.environment:TestbedEnv", order_enforce=True)
