"""Whether a prompt can be used: images decode, the reference parses, the answer is there, the prompt fits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from prism_ray.corpora.rows import STUDENT, BadRow
from prism_ray.records import Prompt
from prism_ray.response import parse

KINDS = ("PNG", "JPEG", "WEBP", "BMP")
"""Kinds of images that are read, whatever their files are called. Pillow knows many more, some of which run other
programs."""
MOST_ASPECT = 200
"""Longest side over shortest; Qwen's image processor refuses what is narrower."""
_MAY_MOVE = ("PNG", "WEBP")
_FOREIGN = {b"GIF8": "a GIF", b"<svg": "an SVG", b"%PDF": "a PDF", b"<html": "a web page", b"<!DOCTYPE": "a web page"}
"""What is often found in place of an image, by what it begins with."""


@dataclass(frozen=True)
class Requirements:
    """What a stage needs of its prompts.

    `reference`: the teacher's response must be there and keep the format, and `refusal` of it, which says why it could
    not be judged, be ""; `ground_truth`: the answer must be there, and `truth_refusal` of the prompt, which says why
    nothing could be judged by it, be ""; `student`: the row must be a warm-up pair; `decode`:
    every image is decoded once to see that it can be (False where it is decoded anyway right after; size and kind are
    then read from its header only); `tokenise`: gives a prompt its token ids and says how many tokens it is as the
    model will see it (or an error that says why it cannot be encoded), held against `max_prompt_tokens`;
    `data_sources`: the accepted ones (empty: any); `unique`: of the rows of one id only the first is used; `fit`: makes
    of a good prompt what is handed on, for instance with smaller images.
    """

    reference: bool = False
    ground_truth: bool = False
    decode: bool = True
    max_image_pixels: int = 64_000_000
    max_images: int = 1_000
    tokenise: Callable[[Prompt], tuple[Prompt, int]] | None = None
    max_prompt_tokens: int = 0
    refusal: Callable[[str], str] | None = None
    truth_refusal: Callable[[Prompt], str] | None = None
    data_sources: tuple[str, ...] = ()
    student: bool = False
    unique: bool = True
    fit: Callable[[Prompt], Prompt] | None = None


def check(prompt: Prompt, needs: Requirements) -> tuple[Prompt, int]:
    """Raise `BadRow` if the prompt cannot be used; returns it, with its token ids, and how many tokens it is (where
    nobody tokenises it: as it came, and 0)."""
    if needs.data_sources and prompt.data_source not in needs.data_sources:
        raise BadRow("data_source: not one of corpora.data_sources", prompt.data_source[:80])
    if len(prompt.images) > needs.max_images:
        raise BadRow("images: more than rollout.max_images", f"{len(prompt.images)} images")
    for index, image in enumerate(prompt.images):
        _check_image(index, image, needs)
    if needs.reference:
        _check_reference(prompt.reference, needs.refusal)
    if needs.student and not prompt.extra.get(STUDENT):
        raise BadRow("student_caption, student_cot: missing")
    if needs.ground_truth:
        _check_truth(prompt, needs.truth_refusal)
    return (prompt, 0) if needs.tokenise is None else _tokenised(prompt, needs.tokenise, needs.max_prompt_tokens)


def _check_image(index: int, data: bytes, needs: Requirements) -> None:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=KINDS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = image.size
            if width * height > needs.max_image_pixels:
                raise BadRow("images: too many pixels", f"image {index}: {width} x {height}")
            if max(width, height) > MOST_ASPECT * min(width, height):
                raise BadRow("images: too narrow", f"image {index}: {width} x {height}")
            if image.format in _MAY_MOVE and getattr(image, "n_frames", 1) > 1:
                raise BadRow("images: an animation", f"image {index}: {image.format}")
            if needs.decode:
                image.load()
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow("images: too many pixels", f"image {index}") from error
    except Exception as error:  # PIL raises many types on damaged files, SyntaxError and struct.error among them
        kind = next((kind for mark, kind in _FOREIGN.items() if mark in data[:256]), type(error).__name__)
        raise BadRow("images: does not decode", f"image {index}: {kind}; {', '.join(KINDS)} are read") from error


def _check_reference(reference: str, refusal: Callable[[str], str] | None) -> None:
    if not reference.strip():
        raise BadRow("teacher_response: missing")
    parsed = parse(reference)
    if not parsed.valid:
        raise BadRow("teacher_response: not in the format", parsed.reason)
    if refusal is not None and (why := refusal(reference)):
        raise BadRow("teacher_response: cannot be judged", why)


def _check_truth(prompt: Prompt, refusal: Callable[[Prompt], str] | None) -> None:
    if not prompt.ground_truth.strip():
        raise BadRow("reward_model: no ground truth")
    if refusal is not None and (why := refusal(prompt)):
        raise BadRow("reward_model: cannot be judged", why)


def _tokenised(prompt: Prompt, tokenise: Callable[[Prompt], tuple[Prompt, int]], limit: int) -> tuple[Prompt, int]:
    try:
        prompt, tokens = tokenise(prompt)
    except ValueError as error:
        raise BadRow("prompt: cannot be encoded", str(error)) from error
    if tokens > limit:
        raise BadRow("prompt: too long", f"{tokens} tokens, the limit is {limit}")
    return prompt, tokens
