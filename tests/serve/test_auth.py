"""Tokens: where digests come from, what is refused, and that all of them are compared."""

from __future__ import annotations

import hmac

import pytest

from prism_ray.config.serve import TokenSettings
from prism_ray.endpoint.wire import EndpointError
from prism_ray.serve.auth import Guard, TokenError, digest_of, load_digests, new_token


def test_digests_come_from_file_and_environment(tmp_path):
    tokens = [new_token()[0] for _ in range(4)]
    file = tmp_path / "tokens"
    file.write_text(f"# who may ask\nalice {digest_of(tokens[0])}\n\n{digest_of(tokens[1]).upper()}  # bob\n")
    environment = {"PRISM_SERVE_TOKENS": f"{digest_of(tokens[2])},\n {digest_of(tokens[3])}"}
    guard = Guard(load_digests(TokenSettings(file=file), environment))
    for token in tokens:
        guard.check(f"Bearer {token}")
        guard.check(f"bearer  {token} ")
    for header in (f"Bearer {digest_of(tokens[0])}", f"Bearer {tokens[0]}x", tokens[0], "Bearer é"):
        with pytest.raises(EndpointError) as caught:
            guard.check(header)
        assert caught.value.status == 401 and tokens[0] not in str(caught.value)


def test_a_token_is_random_and_only_its_digest_is_configured():
    (token, digest), (other, _) = new_token(), new_token()
    assert token != other and len(token) >= 40 and digest == digest_of(token) and token not in digest


def test_without_a_digest_everybody_is_let_in_only_where_that_is_meant():
    with pytest.raises(TokenError, match="nobody may ask.*PRISM_SERVE_TOKENS"):
        load_digests(TokenSettings(), {})
    digests = load_digests(TokenSettings(anonymous=True), {})
    Guard(digests).check(None)
    token, digest = new_token()
    guard = Guard(load_digests(TokenSettings(anonymous=True), {"PRISM_SERVE_TOKENS": digest}))
    guard.check(f"Bearer {token}")
    with pytest.raises(EndpointError, match="no_token"):
        guard.check(None)


def test_what_is_no_digest_is_named_by_its_place_and_never_shown(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("\nalice my-secret-token\n")
    with pytest.raises(TokenError, match="tokens, line 2 holds something that is no SHA-256 digest") as caught:
        load_digests(TokenSettings(file=file), {})
    assert "secret" not in str(caught.value)
    with pytest.raises(TokenError, match="cannot be read"):
        load_digests(TokenSettings(file=tmp_path / "missing"), {})
    with pytest.raises(TokenError, match="OTHER"):
        load_digests(TokenSettings(variable="OTHER"), {"OTHER": "plain"})


def test_every_digest_is_compared_wherever_the_match_is(monkeypatch):
    """Else the time of an answer would tell who of them it was."""
    compared = []

    def compare(one, other):
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    tokens = [new_token() for _ in range(3)]
    Guard([digest for _, digest in tokens]).check(f"Bearer {tokens[0][0]}")
    assert compared == [digest for _, digest in tokens]
