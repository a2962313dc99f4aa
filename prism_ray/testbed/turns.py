"""The testbed in two turns, `prism/TestbedTurns-v0`: the question, then the same question about a second picture."""

from __future__ import annotations

import json
import zlib
from typing import Any

import gymnasium
import numpy as np

from prism_ray.testbed.environment import TestbedEnv
from prism_ray.testbed.questions import question_from
from prism_ray.testbed.scene import draw, encode_png, random_cells

ID = "prism/TestbedTurns-v0"


class TestbedTurnsEnv(TestbedEnv):
    """Episodes of two responses, each worth half; the second picture follows from the first scene alone.

    The first step's `info` has the `message` and the `images` that the policy goes on from (the contract of
    `verify/episode.py`); the last step's has the means of both responses' parts, and is valid if both are.
    """

    __test__ = False
    _first: tuple[float, dict[str, Any]] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self._first = None
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Judge the response; after the first one, show the second picture."""
        observation, reward, _, _, info = super().step(action)
        if self._first is None:
            self._first = reward, info
            content, picture = self._show_second()
            more = {"message": {"role": "user", "content": content}, "images": (picture,)}
            return self._observation(content.removeprefix("<image>")), reward / 2, False, False, info | more
        _, before = self._first
        parts = {name: (before[name] + info[name]) / 2 for name in ("accuracy", "format")}
        both = {"valid": before["valid"] and info["valid"], "reason": before["reason"] or info["reason"]}
        turns = {"accuracy_first": before["accuracy"], "accuracy_second": info["accuracy"]}
        return observation, reward / 2, True, False, info | parts | both | turns

    def _show_second(self) -> tuple[str, bytes]:
        """Put another scene in the place of the first: the message that asks about it, and its picture."""
        s, question = self.settings, question_from(self._extra)
        rng = np.random.default_rng(zlib.crc32(json.dumps(self._extra, sort_keys=True, default=list).encode()))
        cells = random_cells(rng, s.rows * s.columns)
        self._image = draw(cells, s.rows, s.columns, s.hardness, rng)
        self._extra = {**question.as_dict(), "cells": [list(cell) for cell in cells]}
        return f"<image>{question.text}", encode_png(self._image)


gymnasium.register(id=ID, entry_point=f"{__name__}:TestbedTurnsEnv", order_enforce=True)
