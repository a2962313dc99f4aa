"""Conversations that go on in tokens: what stands between two responses, and images that came after the first.

An engine must be prompted with the tokens of the turns before, never with their text anew: a text can be cut into
other tokens than those that were sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_HERE = "\u2060response\u2060"


@dataclass(frozen=True, eq=False)
class LaterImages:
    """The images within a response, as a model reads them.

    `pixel_values` and `grid_thw` as in `EncodedPrompt`; `visual_spots` int64 [V] where their placeholders lie in the
    response's tokens; `position_ids` int64 [3, R] of those tokens, which such images move.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    visual_spots: Tensor
    position_ids: Tensor


def continuation(
    render: Callable[[Sequence[Mapping[str, str]]], str], message: Mapping[str, str], end: str, ended: bool
) -> str:
    """What stands between a response and the next one: the end of the turn, the environment's message, the next head.

    `render` writes a conversation as the chat template does, up to where the policy begins to write; `end` is the text
    of the end token, left out where the policy `ended` its response with that token itself.
    """
    opening = {"role": "user", "content": ""}
    text = render([opening, {"role": "assistant", "content": _HERE}, message])
    _, found, after = text.rpartition(_HERE)
    if not found or not after.startswith(end):
        raise ValueError(f"the chat template does not end a response with {end!r}; turns cannot follow each other")
    return after.removeprefix(end) if ended else after


def collapsed(token_ids: np.ndarray, image_id: int) -> np.ndarray:
    """The tokens with one placeholder for each image, as vLLM wants to be prompted; images never touch each other."""
    repeated = np.zeros(len(token_ids), np.bool_)
    repeated[1:] = (token_ids[1:] == image_id) & (token_ids[:-1] == image_id)
    return token_ids[~repeated]
