"""Who is let in while others wait: what would only wait in vain is turned away before it costs anything.

A request that is refused here was not read: no byte of its body was waited for, nothing was decoded, and no other
process was told of it. The ingress does so for all its requests (`Admission`); with `in_proxy` as Serve's
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH Serve's HTTP proxy does it already, a message to the ingress earlier, by the
bound that the ingress announces. Processor time that refusals take is time that nobody is answered in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prism_ray.endpoint.wire import ALIVE, COMPARE, JSON, MODEL, MSGPACK, READY, SCORE, EndpointError
from prism_ray.serve.answers import failure, media_type_of

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:in_proxy"}
"""Environment of Serve's controller, and so of its proxies, with which they turn requests away themselves."""

_COUNTED = (SCORE, COMPARE)
_OURS = (*_COUNTED, MODEL, READY, ALIVE)
_BOUND = "x-prism-bound"
"""Header by which the ingress tells the proxy its bound; the proxy takes it off."""
_WINDOW_S = 1.0
"""Seconds of work over which the rate of answers is measured."""
_MEMORY = 0.5
"""Weight of what was known of the rate before a window."""
_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 60.0


@dataclass(frozen=True)
class Bound:
    """How much may be under way at once."""

    requests: int
    wait_s: float
    """Seconds after which an answer is of no use."""

    def __str__(self) -> str:
        return f"{self.requests} {self.wait_s:g}"

    @staticmethod
    def read(text: str) -> Bound:
        """The bound that `str` wrote."""
        requests, wait_s = text.split()
        return Bound(int(requests), float(wait_s))


class Load:
    """The requests that are under way, and how long one more would wait behind them."""

    def __init__(self, bound: Bound | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Without a bound (it is not known yet) nothing is refused."""
        self.bound, self.clock = bound, clock
        self.open = 0
        self.per_s: float | None = None
        self._scored, self._worked_s, self._counted = 0, 0.0, -math.inf

    def enter(self) -> None:
        """A request more."""
        self.open += 1

    def leave(self, began: float | None) -> None:
        """A request less. `began` is when the body of one that was scored was there; None says that it was not scored.

        Work is the time in which there was one that is scored in the end, and not the time of slow bodies.
        """
        self.open -= 1
        if began is None:
            return
        now = self.clock()
        self._worked_s, self._counted = self._worked_s + now - max(began, self._counted), now
        self._scored += 1
        if self._worked_s >= _WINDOW_S:
            rate = self._scored / self._worked_s
            self.per_s = rate if self.per_s is None else _MEMORY * self.per_s + (1 - _MEMORY) * rate
            self._scored, self._worked_s = 0, 0.0

    def refusal(self) -> EndpointError | None:
        """Why one more may not enter: there are too many, or it would be late by the rate of the last ones."""
        if self.bound is None:
            return None
        if self.open >= self.bound.requests:
            what = f"{self.open} requests are being worked on, and no more may be"
        elif self.per_s and self.open / self.per_s > self.bound.wait_s:
            wait, most = self.open / self.per_s, self.bound.wait_s
            what = f"{self.open} requests wait, for some {wait:.0f} s, and an answer may take {most:g} s"
        else:
            return None
        return EndpointError(503, "overloaded", f"{what}; ask again later", self._retry_after())

    def _retry_after(self) -> float:
        """Seconds in which half of what is under way is answered: those who return then find room."""
        half = self.open / 2 / self.per_s if self.per_s else 0.0
        return float(min(_MOST_RETRY_S, max(_LEAST_RETRY_S, math.ceil(half))))


class Admission:
    """ASGI middleware of the ingress: as many requests for scores at once as `bound` allows."""

    def __init__(self, app: ASGIApp, bound: Bound | None) -> None:
        self._app, self.load = app, Load(bound)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_one_of(scope, _OURS):
            return await self._app(scope, receive, send)
        send = self._outgoing(scope, receive, send)
        if scope["method"] != "POST" or not _is_one_of(scope, _COUNTED):
            return await self._app(scope, receive, send)
        if refusal := self.load.refusal():
            return await failure(refusal, _header(scope, "accept"))(scope, receive, send)
        status, began = 0, None

        async def noting() -> Message:
            nonlocal began
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                began = self.load.clock()
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.load.enter()
        try:
            await self._app(scope, noting, noted)
        finally:
            self.load.leave(began if status == 200 else None)

    def _outgoing(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """`send` with what is said of the bound."""

        async def announcing(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_BOUND] = str(self.load.bound)
            await send(message)

        return announcing


class ProxyAdmission(Admission):
    """ASGI middleware of Serve's proxy. It learns the bound from answers, and says in our words what Serve says in its
    own where an ingress is lost or too busy: plain text, with a traceback where it has one."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, None)

    def _outgoing(self, scope: Scope, receive: Receive, send: Send) -> Send:
        instead: EndpointError | None = None

        async def learning(message: Message) -> None:
            nonlocal instead
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if _BOUND in headers:
                    self.load.bound = Bound.read(headers[_BOUND])
                    del headers[_BOUND]
                instead = _serves_own(message["status"], headers)
            if instead is None:
                await send(message)
            elif not message.get("more_body", False) and message["type"] == "http.response.body":
                await failure(instead, _header(scope, "accept"))(scope, receive, send)

        return learning


def in_proxy() -> list[Any]:
    """What Serve's proxies put before their work."""
    return [Middleware(ProxyAdmission)]


def _serves_own(status: int, headers: Headers) -> EndpointError | None:
    """What to say instead of an error that is none of ours; None for all else."""
    if status < 400 or media_type_of(headers.get("content-type", "")) in (JSON, MSGPACK):
        return None
    if status < 500:
        return EndpointError(status, "http", f"Ray Serve answered {status} before the request was read")
    after = headers.get("retry-after", "")
    what = "the endpoint is too busy or is being restarted; ask again later"
    return EndpointError(503, "unavailable", what, float(after) if after.isdigit() else 5.0)


def _is_one_of(scope: Scope, paths: tuple[str, ...]) -> bool:
    return scope["type"] == "http" and scope["path"].endswith(paths)


def _header(scope: Scope, name: str) -> str:
    return Headers(scope=scope).get(name, "")
