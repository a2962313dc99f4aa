"""What is said to a served discriminator and what it answers: the bodies of its HTTP endpoint, as JSON or msgpack.

msgpack bodies are `codec`'s: images travel as raw bytes (or uint8 arrays), scores also as one float32 array.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from prism_ray import codec
from prism_ray.records import Prompt

JSON, MSGPACK = "application/json", "application/msgpack"
SCORE, COMPARE, MODEL, READY, ALIVE = "/v1/score", "/v1/compare", "/v1/model", "/readyz", "/healthz"


class EndpointError(RuntimeError):
    """The endpoint refused or could not answer: HTTP status, a code for programs, a sentence for people, and after how
    many seconds to ask again where that makes sense."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(
            status, code, message, retry_after
        )  # all of them, so that it survives a trip between processes
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.code}, HTTP {self.status})"


def _image(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or not value.size:
            raise ValueError(f"an image array is {value.dtype} {list(value.shape)}; give uint8 [height, width, 3]")
    elif not isinstance(value, str | bytes):
        raise ValueError("an image is base64 or a data: URL in JSON, and bytes or a uint8 array in msgpack")
    return value


Image = Annotated[
    Any,
    BeforeValidator(_image),
    WithJsonSchema(
        {"type": "string", "description": "An encoded image (PNG, JPEG, WebP, BMP): base64 or a data: URL."}
    ),
]


class Body(BaseModel):
    """Base of what callers send: unknown fields are refused, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TextPart(Body):
    """Text."""

    type: Literal["text"]
    text: str


class ImagePart(Body):
    """An image: this one, or the next of `images`."""

    type: Literal["image"]
    image: Image | None = None


class ImageUrl(Body):
    """Where an image is."""

    url: str
    """A data: URL; an address to fetch only where the server's settings allow its origin."""
    detail: str | None = None
    """Accepted for OpenAI's clients; says nothing here."""


class ImageUrlPart(Body):
    """An image as OpenAI's chat protocol has it."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Body):
    """A chat turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart | ImageUrlPart, Field(discriminator="type")]]
    """Text in which each `<image>` stands for the next of `images`, or parts."""


class Question(Body):
    """What every request about responses holds."""

    prompt: str | list[Message]
    """What the policy was asked: text or chat turns. Images come first where no `<image>` says where they stand."""
    images: list[Image] = []
    """The prompt's images, in order."""
    reference: str | None = None
    """A response that is known to be good, in the response format. Answers then have `gap` and `reward`."""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """After so many seconds nobody waits for the answer any more: it is not computed then (503, code `deadline`)."""


class ScoreRequest(Question):
    """`POST /v1/score`."""

    responses: str | list[str]
    """What the policy answered: one response, or several to the same prompt."""

    @property
    def texts(self) -> list[str]:
        return [self.responses] if isinstance(self.responses, str) else self.responses


class CompareRequest(Question):
    """`POST /v1/compare`."""

    responses: list[str] = Field(min_length=2, max_length=2)
    """Two responses to the prompt."""

    @property
    def texts(self) -> list[str]:
        return self.responses


class Answer(BaseModel):
    """Base of what the endpoint says; fields that are unknown here come from a newer server and are left out."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Judge(Answer):
    """Who judged."""

    name: str
    """The name it is served under."""
    version: str
    """Changes with the discriminator's weights and nothing else."""


class Span(Answer):
    """Where a view lies in a response, in characters, tags included: `text[start:stop]`."""

    start: int
    stop: int
    cut: bool = False
    """Whether the view was longer than the judge reads, so that its end was not judged."""


class Scored(Answer):
    """What is said of one response. One that cannot be judged is `valid: false`, with a reason and without scores."""

    valid: bool
    fault: str = ""
    """`format`, `empty_view` or `special_token`."""
    reason: str = ""
    """The same in words."""
    scores: dict[str, float] = {}
    """By view. Scores compare responses to one prompt; their level means nothing across prompts."""
    combined: float | None = None
    """Their mean, weighted as the views are in training."""
    spans: dict[str, Span] = {}
    """By view."""
    gap: dict[str, float] | None = None
    """The reference's score less this one's, by view and `combined`; only with a reference."""
    reward: float | None = None
    """What the response is worth in training, 0 to 1 (0 if invalid); only with a reference."""


class ScoreAnswer(Answer):
    """Answer of `POST /v1/score`."""

    model: Judge
    results: list[Scored]
    """In the order of the responses."""
    reference: Scored | None = None

    @property
    def array(self) -> np.ndarray:
        """The scores as float32 [responses, views], the views in order; NaN where a response is invalid. msgpack
        answers hold it as `array` (extension 1: dtype, shape and raw bytes)."""
        views = list(next((r.scores for r in self.results if r.valid), {}))
        rows = [[r.scores.get(view, np.nan) for view in views] for r in self.results]
        return np.array(rows, np.float32).reshape(len(rows), len(views))


class Preference(Answer):
    """Probability that the first response is the better one (Bradley-Terry): sigmoid of the difference of scores."""

    views: dict[str, float]
    """By view; empty if a response is invalid."""
    combined: float | None
    """By the combined scores. A valid response is preferred to an invalid one for certain; null if both are invalid."""


class CompareAnswer(Answer):
    """Answer of `POST /v1/compare`."""

    model: Judge
    preference: Preference
    results: list[Scored]
    """What is said of each by itself."""


class ViewAnswer(Answer):
    """One view of the discriminator."""

    name: str
    tags: list[str]
    share: float
    """Its share of `combined`."""
    context: str
    """What is seen before it: `own`, `none` or `reference` (then a request needs a reference)."""


class ModelAnswer(Answer):
    """Answer of `GET /v1/model`."""

    model: Judge
    views: list[ViewAnswer]
    needs_reference: bool
    sees_images: bool
    backbone: str
    temperature: float
    """What gaps are divided by in `reward`."""
    limits: dict[str, float]
    """What a request may be at most."""
    waiting_tokens: int
    """Tokens that wait to be scored (in one replica)."""
    tokens_per_s: float | None
    """What was scored per second lately (by one replica)."""
    reload_failure: str = ""
    """Why the newest checkpoint is not the one that is served; empty if it is."""


class Fault(Answer):
    """What went wrong."""

    code: str
    message: str


class ErrorAnswer(Answer):
    """Every answer that is not 2xx."""

    error: Fault


B = TypeVar("B", bound=Body)
A = TypeVar("A", bound=Answer)


def pack(body: Any) -> bytes:
    """Plain data as a msgpack body."""
    return codec.encode(body)


def score_body(
    prompt: str | list[dict[str, Any]],
    responses: str | list[str],
    images: list[Any] | tuple[Any, ...] = (),
    reference: str | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """The body of a `ScoreRequest` (or, with two responses, a `CompareRequest`) as plain data."""
    body: dict[str, Any] = {"prompt": prompt, "responses": responses, "images": list(images)}
    return body | {k: v for k, v in {"reference": reference, "timeout_s": timeout_s}.items() if v is not None}


def body_of(prompt: Prompt, responses: list[str], timeout_s: float | None = None) -> dict[str, Any]:
    """`score_body` of a prompt as records have it, with its reference."""
    messages = [{"role": m["role"], "content": m["content"]} for m in prompt.messages]
    return score_body(messages, responses, prompt.images, prompt.reference or None, timeout_s)


def read_body(cls: type[B], data: bytes, media_type: str) -> B:
    """The request in a body of this media type; EndpointError with a sentence for anything else."""
    try:
        if media_type == MSGPACK:
            return cls.model_validate(codec.decode(data))
        return cls.model_validate_json(data)
    except codec.CodecError as error:
        raise EndpointError(400, "bad_msgpack", f"the body is not msgpack: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise EndpointError(400, "bad_json", f"the body is not JSON: {first['msg']}") from None
        name = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise EndpointError(422, "invalid_request", f"{name or 'the body'}: {what}") from None


def read_answer(cls: type[A], status: int, content_type: str, data: bytes, retry_after: float | None = None) -> A:
    """The answer in a body; EndpointError where it is an error, or nothing this client understands."""
    try:
        plain = codec.decode(data) if content_type.startswith(MSGPACK) else json.loads(data)
    except (codec.CodecError, ValueError):
        plain = None
    if 200 <= status < 300 and isinstance(plain, dict):
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            raise EndpointError(status, "bad_answer", f"the answer is not a {cls.__name__}: {error}") from None
    fault = plain.get("error") if isinstance(plain, dict) else None
    fault = fault if isinstance(fault, dict) else {}
    text = data[:200].decode(errors="replace").strip() or "no body"
    raise EndpointError(status, str(fault.get("code", "http")), str(fault.get("message", text)), retry_after)
