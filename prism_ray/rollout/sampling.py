"""What is asked of an engine, and how its failure looks; free of Ray and vLLM, so that every side can import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How to sample a group: `n` responses of at most `max_tokens` tokens; temperature 0 is greedy."""

    n: int
    temperature: float
    max_tokens: int


class EngineFailed(RuntimeError):
    """An engine that cannot go on; the message names it."""


def versions_of(spans: Sequence[Any], tokens: int) -> np.ndarray:
    """The version of each token, int32 [tokens], from the engine's spans; they must cover the tokens without a gap."""
    edges = [0, *(span.end for span in spans)]
    if edges[-1] != tokens or [span.start for span in spans] != edges[:-1]:
        raise RuntimeError(f"the engine attributed {[(s.version, s.start, s.end) for s in spans]} to {tokens} tokens")
    return np.repeat([int(span.version) for span in spans], np.diff(edges)).astype(np.int32)
