"""What is sent to a teacher and what comes back: OpenAI's chat protocol with images, as plain functions."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from prism_ray.config.collect import CollectSettings, TeacherSettings
from prism_ray.corpora.rows import MARKER
from prism_ray.records import Prompt
from prism_ray.response import parse

_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
"""What endpoints take; anything else is sent as PNG."""

_BYTES_PER_TOKEN = 3
"""Bytes of UTF-8 that make a token: fewer than in English prose (about 4), so that estimates are rather too high."""
_TOKENS_PER_REQUEST = 16


@dataclass(frozen=True)
class Reply:
    """What an answer's body says. `text` is None where there is none to be read; `problem` then says why.

    `input_tokens` and `output_tokens` are what the endpoint counted, or None where it does not say.
    """

    text: str | None
    problem: str = ""
    finish_reason: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None


def key_of(prompt: Prompt) -> str:
    """Names what is asked: the prompt's id and content. A prompt that was changed is another one."""
    digest = hashlib.sha256(json.dumps([prompt.id, prompt.messages]).encode())
    for image in prompt.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


def build_request(prompt: Prompt, teacher: TeacherSettings, fault: str = "") -> dict[str, Any]:
    """The request's body; `fault` says what was wrong with the answer before, which the teacher is then told."""
    images = iter(prompt.images)
    turns = [{"role": turn["role"], "content": _content(turn["content"], images)} for turn in prompt.messages]
    if turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": teacher.system})
    if fault:
        turns.append({"role": "user", "content": _again(fault)})
    return {
        "model": teacher.model,
        "messages": turns,
        teacher.max_tokens_field: teacher.max_answer_tokens,
        **teacher.options,
    }


def _content(text: str, images: Any) -> str | list[dict[str, Any]]:
    """A turn's text with its images where their markers stand."""
    pieces = text.split(MARKER)
    if len(pieces) == 1:
        return text
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index:
            parts.append({"type": "image_url", "image_url": {"url": data_url(next(images))}})
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _again(fault: str) -> str:
    return (
        f"An earlier answer to this could not be used ({fault}). Answer it again, with exactly one <caption>, one "
        "<think> and one <answer> element in this order and nothing outside them."
    )


def data_url(image: bytes) -> str:
    """An encoded image as a `data:` URL; kinds that endpoints do not take are converted to PNG."""
    with Image.open(io.BytesIO(image)) as opened:
        mime = _MIME.get(opened.format or "")
        if mime is None:
            converted = io.BytesIO()
            opened.convert("RGB").save(converted, format="PNG")
            mime, image = _MIME["PNG"], converted.getvalue()
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def estimate_tokens(prompt: Prompt, settings: CollectSettings) -> int:
    """About how many tokens a question has; rather too many."""
    texts = [turn["content"] for turn in prompt.messages]
    if prompt.messages[0]["role"] != "system":
        texts.append(settings.teacher.system)
    text_tokens = sum(count_text(text) for text in texts)
    return _TOKENS_PER_REQUEST + text_tokens + settings.spending.tokens_per_image * len(prompt.images)


def count_text(text: str) -> int:
    """About how many tokens a text has; rather too many."""
    return -(-len(text.encode(errors="replace")) // _BYTES_PER_TOKEN)


def read_reply(body: str) -> Reply:
    """Read the body of a successful answer; whatever it holds, nothing is raised."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return Reply(None, "the body is not JSON")
    if not isinstance(data, dict):
        return Reply(None, "the body is not a JSON object")
    usage = data.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    tokens = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        return Reply(None, "the body has no choices[0].message", "", *tokens)
    text, finish = _text(choice["message"].get("content")), str(choice.get("finish_reason") or "")
    if not text:
        return Reply(None, f"the message is empty (finish_reason {finish or 'unknown'})", finish, *tokens)
    return Reply(text, "", finish, *tokens)


def _text(content: Any) -> str:
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def fault_of(reply: Reply) -> str:
    """Why an answer cannot be a reference; empty if it can."""
    if reply.text is None:
        return reply.problem
    parsed = parse(reply.text)
    if parsed.valid:
        return ""
    return "cut at its longest length" if reply.finish_reason == "length" else parsed.reason
