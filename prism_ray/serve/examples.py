"""Requests as the OpenAPI page shows them; they work as they stand."""

from __future__ import annotations

from typing import Any

_RED_SQUARE = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42u3NMQEAAAQAMATRP4pYSvBtBZbTHZ8qngkEAoFAIBAI"
    "BIIrC+AFAUQz669uAAAAAElFTkSuQmCC"
)
_SEEN = "<caption>A red square.</caption><think>The square is red.</think><answer>red</answer>"
_UNSEEN = "<caption>A blue circle.</caption><think>The circle is blue.</think><answer>blue</answer>"

_QUESTION: dict[str, Any] = {"prompt": "<image>What colour is the square?", "images": [_RED_SQUARE]}

SCORE_EXAMPLE: dict[str, Any] = _QUESTION | {"responses": [_SEEN, _UNSEEN, "It is red."]}
COMPARE_EXAMPLE: dict[str, Any] = _QUESTION | {"responses": [_SEEN, _UNSEEN]}
