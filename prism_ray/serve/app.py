"""The HTTP side: routes, media types, tokens, limits and errors. Whoever scores is behind `Backend`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

import prism_ray
from prism_ray.config.serve import ServeSettings
from prism_ray.endpoint.wire import (
    ALIVE,
    COMPARE,
    JSON,
    MODEL,
    MSGPACK,
    READY,
    SCORE,
    Answer,
    CompareAnswer,
    CompareRequest,
    EndpointError,
    ErrorAnswer,
    ModelAnswer,
    ScoreAnswer,
    ScoreRequest,
    read_body,
)
from prism_ray.serve.admission import Admission, Bound
from prism_ray.serve.answers import accepts_msgpack, failure, media_type_of, response
from prism_ray.serve.auth import Guard
from prism_ray.serve.batching import too_late
from prism_ray.serve.examples import COMPARE_EXAMPLE, SCORE_EXAMPLE
from prism_ray.serve.intake import Intake, Query
from prism_ray.serve.scoring import preference

log = logging.getLogger(__name__)

_READY_S = 5.0
"""Seconds in which whoever scores must answer to count as ready."""

R = TypeVar("R", ScoreRequest, CompareRequest)


class Backend(Protocol):
    """Who scores: `service.Service`, here or in another process."""

    async def score(self, query: Query, time_left_s: float) -> ScoreAnswer: ...
    async def describe(self) -> ModelAnswer: ...


def create_app(settings: ServeSettings, digests: Sequence[str], backend: Backend) -> FastAPI:
    """The ASGI application; `digests` are those of the tokens that are let in (none: everybody is)."""
    app = FastAPI(title="prism_ray", version=prism_ray.__version__, description=_DESCRIPTION)
    door = _Door(settings, Guard(digests))

    @app.post(SCORE, summary="Score responses to a prompt", **_documented(ScoreRequest, ScoreAnswer, SCORE_EXAMPLE))
    async def score(request: Request) -> Response:
        answer = await backend.score(*await door.enter(request, ScoreRequest))
        return answered(request, answer, answer)

    @app.post(COMPARE, summary="Which of two is better", **_documented(CompareRequest, CompareAnswer, COMPARE_EXAMPLE))
    async def compare(request: Request) -> Response:
        said = await backend.score(*await door.enter(request, CompareRequest))
        first, second = said.results
        answer = CompareAnswer(model=said.model, preference=preference(first, second), results=said.results)
        return answered(request, answer, said)

    @app.get(MODEL, summary="What is served", response_model=ModelAnswer, responses=_ERRORS, openapi_extra=_LOCKED)
    async def model(request: Request) -> Response:
        door.guard.check(request.headers.get("authorization"))
        return answered(request, await backend.describe())

    @app.get(ALIVE, summary="The process is up")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(READY, summary="The discriminator can be asked", responses={503: _ERRORS[503]})
    async def readyz() -> dict[str, str]:
        try:
            async with asyncio.timeout(_READY_S):
                await backend.describe()
        except TimeoutError:
            raise EndpointError(503, "not_ready", f"no discriminator answered within {_READY_S:g} s", 5.0) from None
        return {"status": "ready"}

    _handle_errors(app)
    bound = Bound(settings.replicas.most * settings.queue.requests, settings.limits.timeout_s)
    app.add_middleware(Admission, bound=bound)
    app.openapi = lambda: _openapi(app)
    return app


class _Door:
    """What a request passes before it is understood: token, media type, size."""

    def __init__(self, settings: ServeSettings, guard: Guard) -> None:
        self.guard, self._intake = guard, Intake(settings)
        self._most = int(settings.limits.body_mb * 2**20)
        self._timeout_s = settings.limits.timeout_s

    async def enter(self, request: Request, cls: type[R]) -> tuple[Query, float]:
        """What a request asks, and in how many seconds from now it is to be answered."""
        began = time.monotonic()
        self.guard.check(request.headers.get("authorization"))
        media_type = media_type_of(request.headers.get("content-type", JSON))
        if media_type not in (JSON, MSGPACK):
            raise EndpointError(
                415, "media_type", f"the body is {media_type or 'of no type'}; send {JSON} or {MSGPACK}"
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._body(request)
        except TimeoutError:
            raise EndpointError(408, "slow_body", f"the body took more than {self._timeout_s:g} s to arrive") from None
        asked = read_body(cls, body, media_type)
        deadline = began + min(asked.timeout_s or self._timeout_s, self._timeout_s)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                query = await self._intake.query(asked)  # which may fetch images
        except TimeoutError:
            raise too_late() from None
        return query, max(0.0, deadline - time.monotonic())

    async def _body(self, request: Request) -> bytes:
        """The body; EndpointError as soon as it is known to be too large, whatever its header says."""
        too_large = EndpointError(413, "too_large", f"the body has more than {self._most} bytes")
        said = request.headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said[:20]) > self._most:
            raise too_large
        found = bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > self._most:
                raise too_large
        return bytes(found)


def answered(request: Request, answer: Answer, scored: ScoreAnswer | None = None) -> Response:
    """The answer in the media type that the caller accepts; msgpack holds the scores once more as one array."""
    plain, accept = answer.model_dump(mode="python"), request.headers.get("accept", "")
    if scored is not None and accepts_msgpack(accept):
        plain["array"] = scored.array
    return response(plain, accept)


def _failure(request: Request, error: EndpointError) -> Response:
    return failure(error, request.headers.get("accept", ""))


def _handle_errors(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, EndpointError)
        return _failure(request, error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        what = f"{error.detail}: {request.method} {request.url.path}"
        return _failure(request, EndpointError(error.status_code, code, what))

    async def unknown(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return _failure(request, EndpointError(500, "internal", "this request met a fault of the server; see its log"))

    handlers: list[tuple[Any, Callable[[Request, Exception], Awaitable[Response]]]] = [
        (EndpointError, known),
        (HTTPException, http),
        (Exception, unknown),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


_DESCRIPTION = (
    "A discriminator that was trained to tell a teacher's responses from a policy's. It judges the views of a response "
    "(by default perception, the caption, and reasoning, think and answer). Bodies are JSON or application/msgpack; "
    "answers are what `Accept` asks for."
)
_MEANINGS = {
    400: "The body is not JSON or msgpack.",
    401: "No token, or a wrong one.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is of another media type.",
    422: "The request is not one that can be scored; the message names the field.",
    503: "Too busy, too late, or not ready. `Retry-After` says when to ask again.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": what} for status, what in _MEANINGS.items()
}
_LOCKED: dict[str, Any] = {"security": [{"token": []}]}


def _documented(request: type[Any], answer: type[Any], example: dict[str, Any]) -> dict[str, Any]:
    """What the OpenAPI page says of a route that reads its body itself."""
    schema = {"$ref": f"#/components/schemas/{request.__name__}"}
    content = {JSON: {"schema": schema, "example": example}, MSGPACK: {"schema": schema}}
    extra = {"requestBody": {"required": True, "content": content}} | _LOCKED
    return {"response_model": answer, "responses": _ERRORS, "openapi_extra": extra}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the bodies that routes read themselves."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        bodies: list[tuple[Any, Any]] = [(ScoreRequest, "validation"), (CompareRequest, "validation")]
        _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
        components = made.setdefault("components", {})
        components["schemas"] = definitions["$defs"] | components.get("schemas", {})
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema
