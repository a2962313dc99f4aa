"""From a request's body to what is scored: the prompt as records have it, checked before anything is computed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import itertools
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from prism_ray.config.serve import LimitSettings, ServeSettings
from prism_ray.corpora.checks import Requirements, check
from prism_ray.corpora.rows import MARKER, BadRow
from prism_ray.endpoint.wire import CompareRequest, EndpointError, ImagePart, ScoreRequest, TextPart
from prism_ray.records import Prompt

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")
"""How the kinds of image begin that are decoded (and WebP, which says so at byte 8). PIL knows dozens more, some of
which run other programs."""


@dataclass(frozen=True)
class Query:
    """What is to be scored: responses to a prompt, whose reference ("" if there is none) they are compared with."""

    prompt: Prompt
    texts: tuple[str, ...]


class Intake:
    """Reads requests within the settings' limits."""

    def __init__(self, settings: ServeSettings) -> None:
        self._limits = settings.limits
        self._origins = frozenset(origin.lower() for origin in settings.image_origins)
        self._fetch_timeout_s = settings.fetch_timeout_s
        self._numbers = itertools.count()

    async def query(self, request: ScoreRequest | CompareRequest) -> Query:
        """What a request asks for; EndpointError, with a sentence, if it may not be asked."""
        limits = self._limits
        _check_texts(request.texts, request.reference, limits)
        messages, given = _laid_out(request)
        if len(given) > limits.images:
            raise EndpointError(422, "too_many_images", f"{len(given)} images; the limit is {limits.images}")
        images = [await self._image(index, item) for index, item in enumerate(given)]
        prompt = Prompt(f"request-{next(self._numbers)}", messages, tuple(images), request.reference or "")
        try:
            check(prompt, Requirements(decode=False, max_image_pixels=limits.image_pixels))
        except BadRow as error:
            code = "image_too_large" if "pixels" in error.reason else "bad_image"
            limit = f"; the limit is {limits.image_pixels} pixels" if code == "image_too_large" else ""
            raise EndpointError(422, code, f"{error}{limit}") from None
        return Query(prompt, tuple(request.texts))

    async def _image(self, index: int, item: Any) -> bytes:
        if isinstance(item, np.ndarray):
            return await asyncio.to_thread(_png, index, item, self._limits)
        data = item if isinstance(item, bytes) else await self._text_image(index, item)
        if not (data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
            raise EndpointError(422, "bad_image", f"image {index} is no PNG, JPEG, WebP or BMP; convert it")
        return data

    async def _text_image(self, index: int, text: str) -> bytes:
        if text[:5].lower() == "data:":
            head, comma, text = text.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise EndpointError(422, "bad_image", f"image {index}: a data: URL must hold base64")
        elif "://" in text[:64]:
            return await self._fetched(index, text)
        try:
            return base64.b64decode("".join(text.split()), validate=True)  # tools wrap lines
        except (binascii.Error, ValueError):
            raise EndpointError(422, "bad_image", f"image {index} is neither base64 nor a data: URL") from None

    async def _fetched(self, index: int, url: str) -> bytes:
        """The image at an address of an allowed origin. Redirects are not followed: they lead anywhere."""
        try:
            parts = urllib.parse.urlsplit(url)
            allowed = f"{parts.scheme}://{parts.netloc}".lower() in self._origins
        except ValueError:
            allowed = False
        if not allowed:
            what = f"image {index}: nothing is fetched from that address; send the image itself"
            raise EndpointError(422, "url_not_allowed", what)
        most, found = int(self._limits.body_mb * 2**20), bytearray()
        try:
            async with (
                asyncio.timeout(self._fetch_timeout_s),
                httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=False) as client,
                client.stream("GET", url) as response,
            ):
                if response.status_code != 200:
                    raise EndpointError(422, "bad_image", f"image {index}: its address answers {response.status_code}")
                async for chunk in response.aiter_bytes():
                    found += chunk
                    if len(found) > most:
                        raise EndpointError(422, "image_too_large", f"image {index} has more than {most} bytes")
        except TimeoutError:
            what = f"image {index}: not fetched within {self._fetch_timeout_s:g} s"
            raise EndpointError(422, "bad_image", what) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointError(422, "bad_image", f"image {index}: not fetched ({type(error).__name__})") from None
        return bytes(found)


def _check_texts(texts: Sequence[str], reference: str | None, limits: LimitSettings) -> None:
    if not texts:
        raise EndpointError(422, "invalid_request", "responses: none; give at least one")
    if len(texts) > limits.responses:
        what = f"{len(texts)} responses; the limit is {limits.responses}: ask several times"
        raise EndpointError(422, "too_many_responses", what)
    named = [(f"response {index}", text) for index, text in enumerate(texts)]
    for name, text in [*named, ("the reference", reference or "")]:
        if (size := len(text.encode(errors="replace"))) > limits.response_bytes:
            what = f"{name} has {size} bytes; the limit is {limits.response_bytes}"
            raise EndpointError(422, "response_too_long", what)


def _laid_out(request: ScoreRequest | CompareRequest) -> tuple[tuple[dict[str, str], ...], list[Any]]:
    """Chat turns with a marker for each image, and the images in the order of the markers."""
    coming, used = iter(request.images), []
    if isinstance(request.prompt, str):
        turns = [{"role": "user", "content": _content(request.prompt, coming, used)}]
    else:
        turns = [{"role": turn.role, "content": _content(turn.content, coming, used)} for turn in request.prompt]
    rest = list(coming)
    if rest and used:
        what = f"{len(request.images)} images but {len(request.images) - len(rest)} {MARKER} markers; give one for each"
        raise EndpointError(422, "bad_image", what)
    if not any(turn["content"].strip() for turn in turns) and not rest:
        raise EndpointError(422, "invalid_request", "prompt: it is empty")
    if rest:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise EndpointError(422, "invalid_request", "prompt: no user turn for the images to stand in")
        first["content"] = MARKER * len(rest) + first["content"]
    return tuple(turns), used + rest


def _content(content: Any, coming: Iterator[Any], used: list[Any]) -> str:
    """A turn's text; the images it names are taken from `coming` and put into `used`."""
    if isinstance(content, str):
        for _ in range(content.count(MARKER)):
            used.append(_next(coming))
        return content
    text = ""
    for part in content:
        if isinstance(part, TextPart):
            text += _content(part.text, coming, used)
            continue
        own = part.image if isinstance(part, ImagePart) else part.image_url.url
        used.append(_next(coming) if own is None else own)
        text += MARKER
    return text


def _next(coming: Iterator[Any]) -> Any:
    try:
        return next(coming)
    except StopIteration:
        what = f"more {MARKER} markers than images; give an image for each"
        raise EndpointError(422, "bad_image", what) from None


def _png(index: int, array: np.ndarray, limits: LimitSettings) -> bytes:
    if array.shape[0] * array.shape[1] > limits.image_pixels:
        what = f"image {index}: {array.shape[1]} x {array.shape[0]}; the limit is {limits.image_pixels} pixels"
        raise EndpointError(422, "image_too_large", what)
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG", compress_level=1)
    return data.getvalue()
