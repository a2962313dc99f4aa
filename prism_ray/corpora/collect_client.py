"""The connection to a teacher: one question over HTTP, and what can become of it. The key never leaves this file."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from prism_ray.config.collect import CollectSettings
from prism_ray.corpora.collect_journal import CollectError
from prism_ray.corpora.collect_pace import read_retry_after

MAX_BODY = 32 * 2**20
"""Bytes of an answer above which it is cut off."""
CONNECT_S = 30.0


class Secret:
    """An API key from the environment. It shows in no message; `redact` takes it out of what others say."""

    def __init__(self, variable: str, environment: Mapping[str, str] = os.environ) -> None:
        self._value = environment.get(variable, "").strip() if variable else ""
        if variable and not self._value:
            raise CollectError(f"the environment variable {variable} (teacher.key_variable) is not set; put the key in")
        if not (self._value.isascii() and self._value.isprintable()):
            raise CollectError(f"the key in {variable} has characters that no HTTP header may have; correct it there")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def redact(self, text: str) -> str:
        return text.replace(self._value, "[key]") if self._value else text

    def __repr__(self) -> str:
        return "Secret()"


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer, the key taken out of its body."""

    status: int
    body: str
    retry_after: float | None


class Unsent(Exception):
    """The endpoint never had the question."""


class Lost(Exception):
    """The endpoint had the question, and no whole answer came; `body` is what there was of it."""

    def __init__(self, reason: str, body: str = "") -> None:
        super().__init__(reason)
        self.body = body


class Teacher:
    """Asks questions at the configured endpoint; close it at the end."""

    def __init__(self, settings: CollectSettings, secret: Secret) -> None:
        self._url = f"{settings.teacher.url}/chat/completions"
        self._limit, self._secret = settings.asking.timeout_s, secret
        self._client = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **secret.headers},
            timeout=httpx.Timeout(None, connect=CONNECT_S),  # the whole has a limit of its own
            limits=httpx.Limits(max_connections=settings.asking.concurrency),
        )

    async def ask(self, request: dict[str, Any]) -> Answer:
        """Send a request's body. Raises Unsent or Lost."""
        arrived = bytearray()
        try:
            async with asyncio.timeout(self._limit):
                return await self._exchange(json.dumps(request).encode(), arrived)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unsent(self._sentence(error)) from None
        except TimeoutError:
            raise Lost(f"no whole answer within {self._limit:g} s", self._text(arrived)) from None
        except httpx.HTTPError as error:
            raise Lost(self._sentence(error), self._text(arrived)) from None

    async def _exchange(self, content: bytes, arrived: bytearray) -> Answer:
        async with self._client.stream("POST", self._url, content=content) as response:
            async for chunk in response.aiter_bytes():
                arrived += chunk
                if len(arrived) > MAX_BODY:
                    raise Lost(f"an answer of more than {MAX_BODY >> 20} MiB", self._text(arrived[: 1 << 16]))
            wait = read_retry_after(response.headers.get("Retry-After"))
            return Answer(response.status_code, self._text(arrived), wait)

    async def close(self) -> None:
        await self._client.aclose()

    def _text(self, data: bytes | bytearray) -> str:
        return self._secret.redact(bytes(data).decode(errors="replace"))

    def _sentence(self, error: Exception) -> str:
        return self._secret.redact(f"{type(error).__name__}: {error}".rstrip(": "))
