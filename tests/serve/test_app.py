"""The endpoint in this process, over a tiny real discriminator."""

from __future__ import annotations

import base64
import io
import math
import re
import socket
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from prism_ray import codec
from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.scorer import judge
from prism_ray.endpoint.wire import MSGPACK, CompareAnswer, ScoreAnswer, pack, read_answer
from prism_ray.records import Group, Prompt, Rollout
from prism_ray.serve.examples import COMPARE_EXAMPLE, SCORE_EXAMPLE

ROOT = Path(__file__).resolve().parents[2]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def score(client):
    """Ask `/v1/score` about `<image> count red`, with other fields; the status and the plain answer."""

    def ask(images, responses, fields=None):
        body = {"prompt": "<image> count red", "images": images, "responses": responses} | (fields or {})
        answer = client.post("/v1/score", json=body)
        return answer.status_code, answer.json()

    return ask


def test_scores_are_those_of_training(client, score, png, response):
    """With a reference the verdict is `judge`'s to the bit, without one the scores are the same."""
    texts, reference = [response(), response(" blue two", " max", " two"), "no tags", response()], response(" red")
    served = client.service._served
    prompt = Prompt("p", ({"role": "user", "content": "<image> count red"},), (png(),), reference)
    empty = np.zeros(0, np.int32)
    rollouts = tuple(
        Rollout("p", i, empty, empty, np.zeros(0, np.float32), empty, text, "stop") for i, text in enumerate(texts)
    )
    [judged] = judge(served.model, served.encoder, [Group(0, prompt, rollouts)], 0)
    status, answer = score([b64(png())], texts, {"reference": reference})
    assert status == 200
    for ours, theirs in zip(answer["results"], judged.group.verdicts, strict=True):
        assert (ours["valid"], ours["reason"], ours["reward"]) == (theirs.valid, theirs.reason, theirs.reward)
        assert ours["scores"] == pytest.approx(theirs.scores, rel=1e-6)
        for view, score_of_reference in theirs.reference_scores.items():
            assert ours["gap"][view] == pytest.approx(score_of_reference - theirs.scores[view], rel=1e-5)
    assert answer["reference"]["scores"] == pytest.approx(judged.group.verdicts[0].reference_scores, rel=1e-6)
    _, alone = score([b64(png())], texts)
    for ours, theirs in zip(alone["results"], answer["results"], strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-5)
        assert ours["gap"] is ours["reward"] is None
    first = answer["results"][0]
    assert first["combined"] == pytest.approx(sum(first["scores"].values()) / 2)
    assert answer["results"][3]["scores"] == first["scores"] and answer["results"][1]["scores"] != first["scores"]


def test_spans_cut_the_views_out_of_the_text_whatever_its_alphabet(score, png):
    text = " <caption>ein rötes 🟥</caption>\n<think>日本 is</think><answer>é</answer> "
    _, answer = score([b64(png())], text)
    [result] = answer["results"]
    cut = {view: text[span["start"] : span["stop"]] for view, span in result["spans"].items()}
    assert cut == {
        "perception": "<caption>ein rötes 🟥</caption>",
        "reasoning": "<think>日本 is</think><answer>é</answer>",
    }


@pytest.mark.parametrize(
    ("text", "fault", "reason"),
    [
        ("it is red", "format", "missing <caption>"),
        ("<caption> </caption><think>a</think><answer>b</answer>", "empty_view", "nothing in the perception view"),
        ("<caption>a<|im_end|></caption><think>a</think><answer>b</answer>", "special_token", "a special token"),
        ("", "format", "missing <caption>"),
    ],
)
def test_a_response_in_the_wrong_format_is_an_answer_not_an_error(score, png, text, fault, reason):
    status, answer = score([b64(png())], [text])
    [result] = answer["results"]
    assert status == 200 and not result["valid"] and result["scores"] == {} and result["combined"] is None
    assert result["fault"] == fault and reason in result["reason"]


def test_every_way_to_send_an_image_is_the_same(client, score, png, response):
    encoded, pixels = png(), np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    url = f"data:image/png;base64,{b64(encoded)}"
    lines = "\n".join(b64(encoded)[i : i + 76] for i in range(0, len(b64(encoded)), 76))
    text = {"type": "text", "text": " count red"}
    parts = (
        [{"type": "image"}, text],
        [{"type": "image", "image": b64(encoded)}, text],
        [{"type": "image_url", "image_url": {"url": url, "detail": "high"}}, text],
    )
    asked = [
        score([b64(encoded)], response()),
        score([url], response()),
        score([lines], response()),
        score([b64(encoded)], response(), {"prompt": " count red"}),
        score([b64(encoded)], response(), {"prompt": [{"role": "user", "content": parts[0]}]}),
        score([], response(), {"prompt": [{"role": "user", "content": parts[1]}]}),
        score([], response(), {"prompt": [{"role": "user", "content": parts[2]}]}),
    ]
    found = [answer["results"][0]["scores"] for status, answer in asked if status == 200]
    for image in (encoded, pixels):
        body = pack({"prompt": "<image> count red", "images": [image], "responses": response()})
        answer = client.post("/v1/score", content=body, headers={"Content-Type": MSGPACK})
        found.append(answer.json()["results"][0]["scores"])
    assert len(found) == len(asked) + 2 and all(scores == pytest.approx(found[0], rel=1e-6) for scores in found)
    _, other = score([b64(png(seed=1))], response())
    assert other["results"][0]["scores"] != found[0], "the image matters"


def test_msgpack_answers_hold_the_scores_as_an_array(client, png, response):
    body = pack({"prompt": "count red", "responses": [response(), "broken"], "images": [png()]})
    headers = {"Content-Type": MSGPACK, "Accept": "application/json;q=0.1, application/msgpack"}
    raw = client.post("/v1/score", content=body, headers=headers)
    assert raw.headers["content-type"] == MSGPACK
    answer = read_answer(ScoreAnswer, raw.status_code, raw.headers["content-type"], raw.content)
    array = codec.decode(raw.content)["array"]
    assert array.dtype == np.float32 and array.shape == (2, 2) and np.isnan(array[1]).all()
    assert array[0].tolist() == pytest.approx(list(answer.results[0].scores.values()))
    assert np.array_equal(array, answer.array, equal_nan=True)


def test_compare_is_bradley_terry(client, png, response):
    texts = [response(), response(" blue two", " max", " two")]
    body = {"prompt": "count red", "images": [b64(png())], "responses": texts}
    answer = CompareAnswer.model_validate(client.post("/v1/compare", json=body).json())
    first, second = answer.results
    for view, probability in answer.preference.views.items():
        assert probability == pytest.approx(1 / (1 + math.exp(second.scores[view] - first.scores[view])))
    assert first.combined is not None and second.combined is not None
    assert answer.preference.combined == pytest.approx(1 / (1 + math.exp(second.combined - first.combined)))
    swapped = client.post("/v1/compare", json=body | {"responses": texts[::-1]}).json()
    assert swapped["preference"]["combined"] == pytest.approx(1 - (answer.preference.combined or 0))
    for texts, combined in ((["broken", response()], 0.0), ([response(), "broken"], 1.0), (["broken", ""], None)):
        answer = client.post("/v1/compare", json=body | {"responses": texts}).json()
        assert answer["preference"] == {"views": {}, "combined": combined}
    assert client.post("/v1/compare", json=body | {"responses": ["a"]}).status_code == 422


def test_the_documented_examples_work_as_they_stand(client):
    documented = client.get("/openapi.json").json()
    for path, example in (("/v1/score", SCORE_EXAMPLE), ("/v1/compare", COMPARE_EXAMPLE)):
        content = documented["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["example"] == example and MSGPACK in content
        assert client.post(path, json=example).status_code == 200
    names = _references(documented)
    assert names and names <= set(documented["components"]["schemas"])
    assert "</html>" in client.get("/docs").text


def _references(value) -> set[str]:
    """Names of all schemas that something refers to."""
    if isinstance(value, dict):
        own = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(_references, value.values()))
    return set().union(*map(_references, value)) if isinstance(value, list) else set()


def test_the_model_says_what_it_is(client):
    model = client.get("/v1/model").json()
    assert [(v["name"], v["tags"], v["share"]) for v in model["views"]] == [
        ("perception", ["caption"], 0.5),
        ("reasoning", ["think", "answer"], 0.5),
    ]
    assert len(model["model"]["version"]) == 12 and model["limits"]["responses"] == 64
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic a-token-of-the-tests"])
def test_without_the_right_token_nobody_is_let_in(client, header):
    bare = TestClient(client.app, headers={"authorization": header} if header is not None else {})
    for answer in (bare.get("/v1/model"), bare.post("/v1/score", content=b"{}"), bare.post("/v1/compare")):
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] in ("no_token", "wrong_token")


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes whose header promises side x side pixels."""
    row = zlib.compress(b"\0" * 1000)
    chunks = (b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"), (b"IDAT", row), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(d).to_bytes(4, "big") + kind + d + zlib.crc32(kind + d).to_bytes(4, "big") for kind, d in chunks
    )


@pytest.mark.parametrize(
    ("images", "code"),
    [
        ([b64(bomb(50_000))], "image_too_large"),
        ([b64(bomb(400_000))], "image_too_large"),
        ([b64(bomb(64))], "bad_image"),
        ([b64(b"%!PS-Adobe-3.0 EPSF-3.0\n")], "bad_image"),
        ([b64(b"RIFFxxxxWEBPnonsense")], "bad_image"),
        (["no base64!"], "bad_image"),
        ([""], "bad_image"),
        (["data:image/png,abc"], "bad_image"),
        (["http://127.0.0.1:22/"], "url_not_allowed"),
        (["file:///etc/hostname"], "url_not_allowed"),
        (["https://[::1"], "url_not_allowed"),
        ([], "bad_image"),
        (["QUJD"] * 9, "bad_image"),
        ([5], "invalid_request"),
        ([None], "invalid_request"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused_with_a_sentence(score, response, images, code):
    status, answer = score(images, [response()])
    assert (status, answer["error"]["code"]) == (422, code) and len(answer["error"]["message"]) > 10


def test_images_of_other_kinds_and_shapes_are_refused(score, response):
    """A kind that PIL would decode (its kinds include programs), and a size that no grid of patches fits."""
    for kind, size in (("TIFF", (32, 32)), ("PNG", (4000, 4))):
        data = io.BytesIO()
        Image.new("RGB", size).save(data, kind)
        status, answer = score([b64(data.getvalue())], [response()])
        assert (status, answer["error"]["code"]) == (422, "bad_image")


def test_the_kinds_of_images_that_are_named_are_those_that_are_decoded(client, score, response):
    def told(text: str) -> set[str]:
        return set(re.findall(r"\b(?:PNG|JPEG|WebP|GIF|BMP|TIFF)\b", text))

    decoded, refusals = set(), []
    for kind in ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF"):
        data = io.BytesIO()
        Image.new("RGB", (64, 32)).save(data, kind)
        status, answer = score([b64(data.getvalue())], [response()])
        decoded |= {kind} if status == 200 else set()
        refusals += [answer["error"]["message"]] if status != 200 else []
    question = client.get("/openapi.json").json()["components"]["schemas"]["ScoreRequest"]["properties"]
    [readme] = re.findall(r"[^.]*are read, by content\.", (ROOT / "README.md").read_text())
    for text in (question["images"]["items"]["description"], readme, *refusals):
        assert told(text) == decoded, text
    assert len(refusals) == 2 and all("convert it" in text for text in refusals)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"responses": ["a"] * 1000}, "too_many_responses"),
        ({"responses": []}, "invalid_request"),
        ({"responses": "x" * 200_000}, "response_too_long"),
        ({"reference": "x" * 200_000}, "response_too_long"),
        ({"reference": "not in the format"}, "bad_reference"),
        ({"prompt": "", "images": []}, "invalid_request"),
        ({"prompt": "word " * 9000 + "<image>"}, "prompt_too_long"),
        ({"prompt": "<image><image>"}, "bad_image"),
        ({"prompt": "<image> <|image_pad|>"}, "bad_image"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "invalid_request"),
        ({"prompt": []}, "invalid_request"),
        ({"prompt": "x", "images": ["QUJD"] * 9}, "too_many_images"),
        ({"timeout_s": -1}, "invalid_request"),
        ({"temperature": 1}, "invalid_request"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused_with_a_sentence(score, png, response, fields, code):
    status, answer = score([b64(png())], [response()], fields)
    assert (status, answer["error"]["code"]) == (422, code) and len(answer["error"]["message"]) > 10


def test_bodies_that_cannot_be_read_are_refused(client):
    def post(content, **headers):
        answer = client.post("/v1/score", content=content, headers=headers)
        return answer.status_code, answer.json()["error"]["code"]

    assert post(b"{") == (400, "bad_json")
    assert post(b"[" * 100_000) == (400, "bad_json")
    assert post(b"\xc1", **{"Content-Type": MSGPACK}) == (400, "bad_msgpack")
    assert post(b"\x91" * 100_000, **{"Content-Type": MSGPACK})[0] == 400
    assert post(b"[]") == post(pack([]), **{"Content-Type": MSGPACK}) == (422, "invalid_request")
    assert post(b"a=b", **{"Content-Type": "application/x-www-form-urlencoded"}) == (415, "media_type")
    prompt = codec.encode(Prompt("p", ({"role": "user", "content": "x"},)))
    assert post(prompt, **{"Content-Type": MSGPACK}) == (422, "invalid_request")


def test_other_paths_and_methods_answer_in_json(client):
    assert client.get("/v2/score").json()["error"]["code"] == "not_found"
    assert client.get("/v1/score").json()["error"]["code"] == "method_not_allowed"


def test_a_body_above_the_limit_is_refused_before_it_has_arrived(serving, response):
    with serving(limits={"body_mb": 0.01}) as client:
        sent = 0

        def endless():
            nonlocal sent
            while sent < 2**24:
                sent += 1024
                yield b" " * 1024

        answer = client.post("/v1/score", content=endless(), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        answer = client.post("/v1/score", json={"prompt": "x" * 20_000, "responses": [response()]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_body_that_drips_in_is_not_waited_for(listening, token):
    with listening(limits={"timeout_s": 0.2}) as endpoint:
        address = urlsplit(endpoint.url)
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 9\r\n\r\n{{"
            connection.sendall(head.encode())
            answer = connection.recv(10_000).decode()
    assert answer.startswith("HTTP/1.1 408")


def test_a_request_may_ask_for_less_time(client, png, response):
    body = {"prompt": "count red", "images": [b64(png())], "responses": [response()], "timeout_s": 1e-6}
    answer = client.post("/v1/score", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_discriminator_that_reads_the_reference_asks_for_it(serving, make_folder, tmp_path, response):
    views = DiscriminatorSettings().views
    views = (views[0], views[1].model_copy(update={"context": "reference"}))
    with serving(make_folder(tmp_path / "d", views=views)) as client:
        body = {"prompt": "count red", "responses": [response()]}
        refused = client.post("/v1/score", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "reference_required")
        assert client.post("/v1/score", json=body | {"reference": response(" red")}).status_code == 200
        assert client.get("/v1/model").json()["needs_reference"]
