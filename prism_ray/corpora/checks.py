"""Whether a prompt can be used: images decode, the reference parses, the answer is there, the prompt fits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from prism_ray.corpora.rows import BadRow
from prism_ray.records import Prompt
from prism_ray.response import parse


@dataclass(frozen=True)
class Requirements:
    """What a stage needs of its prompts.

    `reference`: the teacher's response must be there and keep the format, and `refusal` of it, which says why it could
    not be judged, be ""; `ground_truth`: the answer must be there;
    `decode`: every image is decoded once to see that it can be (False where it is decoded anyway right after; size
    and kind are then read from its header only); `count_tokens`: tokens of a prompt as the model will see it (or an
    error that says why it cannot be encoded), held against `max_prompt_tokens`.
    """

    reference: bool = False
    ground_truth: bool = False
    decode: bool = True
    max_image_pixels: int = 64_000_000
    max_images: int = 1_000
    count_tokens: Callable[[Prompt], int] | None = None
    max_prompt_tokens: int = 0
    refusal: Callable[[str], str] | None = None


def check(prompt: Prompt, needs: Requirements) -> None:
    """Raise `BadRow` if the prompt cannot be used."""
    if len(prompt.images) > needs.max_images:
        raise BadRow("images: more than rollout.max_images", f"{len(prompt.images)} images")
    for index, image in enumerate(prompt.images):
        _check_image(index, image, needs)
    if needs.reference:
        _check_reference(prompt.reference, needs.refusal)
    if needs.ground_truth and not prompt.ground_truth.strip():
        raise BadRow("reward_model: no ground truth")
    if needs.count_tokens is not None:
        _check_length(prompt, needs.count_tokens, needs.max_prompt_tokens)


def _check_image(index: int, data: bytes, needs: Requirements) -> None:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = image.size
            if width * height > needs.max_image_pixels:
                raise BadRow("images: too many pixels", f"image {index}: {width} x {height}")
            if needs.decode:
                image.load()
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow("images: too many pixels", f"image {index}") from error
    except Exception as error:  # PIL raises many types on damaged files, SyntaxError and struct.error among them
        raise BadRow("images: does not decode", f"image {index}: {type(error).__name__}") from error


def _check_reference(reference: str, refusal: Callable[[str], str] | None) -> None:
    if not reference.strip():
        raise BadRow("teacher_response: missing")
    parsed = parse(reference)
    if not parsed.valid:
        raise BadRow("teacher_response: not in the format", parsed.reason)
    if refusal is not None and (why := refusal(reference)):
        raise BadRow("teacher_response: cannot be judged", why)


def _check_length(prompt: Prompt, count_tokens: Callable[[Prompt], int], limit: int) -> None:
    try:
        tokens = count_tokens(prompt)
    except ValueError as error:
        raise BadRow("prompt: cannot be encoded", str(error)) from error
    if tokens > limit:
        raise BadRow("prompt: too long", f"{tokens} tokens, the limit is {limit}")
