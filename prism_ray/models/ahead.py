"""What Ray Data's workers do to a prompt ahead of need, so that nobody after them does it again."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from prism_ray.models.encode import Encoder, PromptTooLong
from prism_ray.models.tokens import writer_of
from prism_ray.records import Prompt


class TokenCounter:
    """Tokenises prompts, counts their tokens and resizes their images for the policy in a Hugging Face folder.

    It goes to the workers by pickle, one for each task; a worker loads the encoder once.
    """

    def __init__(self, policy: Path, limit: int):
        self._policy, self._limit = policy, limit
        self._encoder: Encoder | None = None

    def __call__(self, prompt: Prompt) -> tuple[Prompt, int]:
        """The prompt with its token ids, and how many tokens it has, placeholders expanded."""
        try:
            prompt = self.encoder.tokenised(prompt)
            return prompt, self.encoder.length(prompt)
        except PromptTooLong as error:
            return prompt, error.tokens

    def fitted(self, prompt: Prompt) -> Prompt:
        """The prompt with its images at the size that the policy sees them at."""
        return self.encoder.fitted(prompt)

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = _loaded(self._policy, self._limit, writer_of(self._policy))
        return self._encoder

    def __getstate__(self) -> dict[str, object]:
        return {"_policy": self._policy, "_limit": self._limit, "_encoder": None}


@lru_cache(maxsize=2)
def _loaded(policy: Path, limit: int, writer: str) -> Encoder:
    """The encoder of a folder; another one where its tokenizer or template (`writer`) has been replaced."""
    return Encoder(policy, limit)
