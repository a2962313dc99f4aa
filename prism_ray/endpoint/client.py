"""Asking a served discriminator, from asynchronous and from ordinary code. Needs neither Ray nor torch.

A busy endpoint (503) and a lost connection are asked again, after the time that the endpoint names, until
`patience_s` is over.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from prism_ray.endpoint.wire import (
    COMPARE,
    MODEL,
    MSGPACK,
    SCORE,
    Answer,
    CompareAnswer,
    EndpointError,
    ModelAnswer,
    ScoreAnswer,
    pack,
    read_answer,
    score_body,
)

TOKEN_VARIABLE = "PRISM_SERVE_TOKEN"
"""Environment variable that a client takes its token from where none is given."""

_FIRST_WAIT_S, _MOST_WAIT_S = 0.5, 30.0

A = TypeVar("A", bound=Answer)
T = TypeVar("T")


class AsyncClient:
    """Asks the endpoint at `url`. Use it as a context manager, or close it.

    `token` defaults to the environment's PRISM_SERVE_TOKEN; `timeout_s` bounds each attempt and is sent along, so that
    an answer nobody waits for is not computed; `patience_s` bounds all attempts of one call together.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 60.0,
        patience_s: float = 300.0,
        connections: int = 64,
    ) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        headers = {"Accept": MSGPACK} | ({"Authorization": f"Bearer {token.strip()}"} if token.strip() else {})
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers=headers,
            timeout=timeout_s + 5,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def score(
        self,
        prompt: str | list[dict[str, Any]],
        responses: str | list[str],
        images: Sequence[Any] = (),
        reference: str | None = None,
    ) -> ScoreAnswer:
        """Scores of one or several responses to a prompt: text with an `<image>` for each image, or chat turns.

        Images are encoded bytes, uint8 arrays [height, width, 3], or strings (base64, data: URLs). With a `reference`
        the answer has gaps and rewards. Raises EndpointError where the endpoint refuses.
        """
        body = score_body(prompt, responses, tuple(images), reference, self._timeout_s)
        return await self.ask(ScoreAnswer, SCORE, body)

    async def compare(
        self,
        prompt: str | list[dict[str, Any]],
        first: str,
        second: str,
        images: Sequence[Any] = (),
        reference: str | None = None,
    ) -> CompareAnswer:
        """How likely the first response is the better one."""
        body = score_body(prompt, [first, second], tuple(images), reference, self._timeout_s)
        return await self.ask(CompareAnswer, COMPARE, body)

    async def model(self) -> ModelAnswer:
        """What is served."""
        return await self.ask(ModelAnswer, MODEL, None)

    async def ask(self, cls: type[A], path: str, body: dict[str, Any] | None) -> A:
        """The answer to a body (None: GET) at a path, asked again while the endpoint is busy or away."""
        content = None if body is None else pack(body)
        deadline, wait = time.monotonic() + self._patience_s, _FIRST_WAIT_S
        while True:
            try:
                return await self._once(cls, path, content)
            except EndpointError as error:
                pause = max(wait, error.retry_after or 0.0)
                if error.status != 503 or time.monotonic() + pause > deadline:
                    raise
            except httpx.TransportError as error:
                pause = wait
                if time.monotonic() + pause > deadline:
                    what = f"{self._client.base_url} gave no answer for {self._patience_s:g} s ({type(error).__name__})"
                    raise EndpointError(503, "unreachable", what) from None
            await asyncio.sleep(pause * random.uniform(1.0, 1.5))  # those who were refused together return one by one
            wait = min(2 * wait, _MOST_WAIT_S)

    async def _once(self, cls: type[A], path: str, content: bytes | None) -> A:
        if content is None:
            response = await self._client.get(path)
        else:
            response = await self._client.post(path, content=content, headers={"Content-Type": MSGPACK})
        after = response.headers.get("retry-after", "")
        seconds = float(after) if after.isdigit() else None
        return read_answer(
            cls, response.status_code, response.headers.get("content-type", ""), response.content, seconds
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()


class Client:
    """The same for code that is not asynchronous; the arguments and methods are those of `AsyncClient`.

    It has an event loop in a thread of its own, so that threads may share it, also where an event loop runs already.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 60.0, patience_s: float = 300.0) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint client", daemon=True)
        self._thread.start()
        self._client = AsyncClient(url, token, timeout_s, patience_s)

    def score(
        self,
        prompt: str | list[dict[str, Any]],
        responses: str | list[str],
        images: Sequence[Any] = (),
        reference: str | None = None,
    ) -> ScoreAnswer:
        """See `AsyncClient.score`."""
        return self._wait(self._client.score(prompt, responses, images, reference))

    def score_many(self, questions: Sequence[dict[str, Any]]) -> list[ScoreAnswer]:
        """Answers to several calls of `score` (the keyword arguments of each), asked at the same time: the endpoint
        scores them together."""

        async def every() -> list[ScoreAnswer]:
            return await asyncio.gather(*(self._client.score(**question) for question in questions))

        return self._wait(every())

    def compare(
        self,
        prompt: str | list[dict[str, Any]],
        first: str,
        second: str,
        images: Sequence[Any] = (),
        reference: str | None = None,
    ) -> CompareAnswer:
        """See `AsyncClient.compare`."""
        return self._wait(self._client.compare(prompt, first, second, images, reference))

    def model(self) -> ModelAnswer:
        """See `AsyncClient.model`."""
        return self._wait(self._client.model())

    def close(self) -> None:
        """Close the connections."""
        if not self._loop.is_closed():
            self._wait(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        answer = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return answer.result()
        except BaseException:  # Ctrl-C too: nobody waits any more
            answer.cancel()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
