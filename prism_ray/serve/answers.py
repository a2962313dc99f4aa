"""Answers as HTTP has them: JSON, or msgpack for who accepts it. Errors have a code for programs and a sentence."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from prism_ray.endpoint.wire import JSON, MSGPACK, EndpointError, ErrorAnswer, pack


def media_type_of(header: str) -> str:
    """The media type of a `Content-Type` or `Accept` header, without parameters."""
    return header.partition(";")[0].strip().lower()


def accepts_msgpack(accept: str) -> bool:
    """Whether an `Accept` header names msgpack."""
    return MSGPACK in map(media_type_of, accept.split(","))


def failure(error: EndpointError, accept: str) -> Response:
    """An error for a caller with this `Accept` header."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    plain = ErrorAnswer.model_validate({"error": {"code": error.code, "message": error.message}}).model_dump()
    return response(plain, accept, error.status, headers)


def response(plain: dict[str, Any], accept: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Plain data for a caller with this `Accept` header."""
    if accepts_msgpack(accept):
        return Response(pack(plain), status, headers, MSGPACK)
    return Response(json.dumps(plain), status, headers, JSON)
