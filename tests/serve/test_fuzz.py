"""Thousands of malformed requests: each is refused with a sentence or answered, none breaks the server."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from prism_ray import codec
from prism_ray.endpoint.wire import JSON, MSGPACK

PATHS = ("/v1/score", "/v1/compare", "/v1/model", "/healthz", "/readyz", "/openapi.json", "/v1/", "/../v1/score")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(
        ["<image>", "data:image/png;base64,", "http://127.0.0.1/x.png", "<caption>", "<|image_pad|>", "a"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PACKABLE = st.recursive(
    SCALARS.filter(lambda v: not isinstance(v, int) or -(2**63) <= v < 2**63) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def good(png, response) -> dict[str, Any]:
    """A request that is answered."""
    parts = [{"type": "image"}, {"type": "text", "text": " count"}]
    prompt = [{"role": "system", "content": "red"}, {"role": "user", "content": parts}]
    texts = [response(), response(" blue two")]
    return {"prompt": prompt, "images": [png()], "responses": texts, "reference": response(), "timeout_s": 5}


def check(answer) -> None:
    """What every answer must be."""
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    if answer.status_code >= 400:
        packed = answer.headers["content-type"] == MSGPACK
        error = (codec.decode(answer.content) if packed else answer.json())["error"]
        assert error["code"] and len(error["message"]) > 5


def places(value: Any, prefix: tuple = ()) -> list[tuple]:
    """The paths of everything in nested data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, item in items for path in places(item, (*prefix, key)))]


def changed(value: Any, path: tuple, new: Any) -> Any:
    """A copy with something else at a path."""
    if not path:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole


def plain(good: dict[str, Any]) -> dict[str, Any]:
    return good | {"images": [base64.b64encode(image).decode() for image in good["images"]]}


def fuzz(client, good: dict[str, Any], examples: int) -> None:
    """So many requests of each kind."""

    def post(content: bytes, media_type: str, path: str = "/v1/score", **headers: str) -> None:
        check(client.post(path, content=content, headers={"Content-Type": media_type} | headers))

    @hypothesis.given(st.binary(max_size=200), st.sampled_from([JSON, MSGPACK, "text/plain", "", "\x7f;;"]))
    def bytes_of_any_kind(content, media_type):
        post(content, media_type)

    @hypothesis.given(st.data())
    def a_good_request_with_one_thing_wrong(data):
        body, values, media_type = good, PACKABLE, MSGPACK
        if data.draw(st.booleans()):
            body, values, media_type = plain(good), VALUES, JSON
        wrong = changed(body, data.draw(st.sampled_from(places(body))), data.draw(values))
        content = codec.encode(wrong) if media_type == MSGPACK else json.dumps(wrong).encode()
        post(content, media_type, data.draw(st.sampled_from(PATHS[:2])))

    @hypothesis.given(st.data())
    def a_good_body_with_bytes_changed(data):
        media_type = data.draw(st.sampled_from([JSON, MSGPACK]))
        content = bytearray(codec.encode(good) if media_type == MSGPACK else json.dumps(plain(good)).encode())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        post(bytes(content[: data.draw(st.integers(0, len(content)))]), media_type)

    @hypothesis.given(st.data())
    def an_image_with_bytes_changed(data):
        image = bytearray(good["images"][0])
        for _ in range(data.draw(st.integers(1, 4))):
            image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
        post(codec.encode(good | {"images": [bytes(image)]}), MSGPACK)

    @hypothesis.given(st.lists(st.sampled_from(["caption", "/caption", "think", "/think", "answer", "/answer", "x"])))
    def responses_of_tags(tags):
        text = "".join(f"<{tag}>" if tag != "x" else " red" for tag in tags)
        post(codec.encode(good | {"responses": [text, "\0", "\U0010ffff" * 10]}), MSGPACK)

    header = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)

    @hypothesis.given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "X"]), st.sampled_from(PATHS), header)
    def methods_paths_and_headers(method, path, value):
        for name in ("Authorization", "Accept", "Content-Type", "Content-Length"):
            answer = client.request(method, path, content=b"{}", headers={name: value})
            if method in ("GET", "POST"):
                check(answer)
            assert answer.status_code < 500 or answer.status_code == 503

    for kind in (
        bytes_of_any_kind, a_good_request_with_one_thing_wrong, a_good_body_with_bytes_changed,
        an_image_with_bytes_changed, responses_of_tags, methods_paths_and_headers,
    ):  # fmt: skip
        every = list(hypothesis.HealthCheck)
        hypothesis.settings(max_examples=examples, deadline=None, database=None, suppress_health_check=every)(kind)()
    assert client.post("/v1/score", json=plain(good)).status_code == 200


def test_malformed_requests_are_refused_and_harm_nobody(client, good):
    fuzz(client, good, 100)


@pytest.mark.long
def test_thousands_of_malformed_requests_are_refused_and_harm_nobody(client, good):
    fuzz(client, good, 2000)
