"""Bearer tokens: only their SHA-256 digests are known here, and comparing them takes the same time whatever is sent."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping, Sequence

from prism_ray.config.serve import TokenSettings
from prism_ray.endpoint.wire import EndpointError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class TokenError(ValueError):
    """The configured tokens cannot be used."""


def new_token() -> tuple[str, str]:
    """A fresh token, and the digest by which it is configured."""
    token = secrets.token_urlsafe(32)
    return token, digest_of(token)


def digest_of(token: str) -> str:
    """SHA-256 of a token. (Tokens are random, so that a slow hash would add nothing.)"""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def load_digests(settings: TokenSettings, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The configured digests; none means that everybody may ask. TokenError where that is not what was meant."""
    found = [(settings.variable, word) for word in re.split(r"[\s,]+", environment.get(settings.variable, "")) if word]
    if settings.file is not None:
        try:
            lines = settings.file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TokenError(f"tokens.file: {settings.file} cannot be read ({error}); give a readable one") from None
        words = [(number, line.partition("#")[0].split()) for number, line in enumerate(lines, 1)]
        found += [(f"{settings.file}, line {number}", parts[-1]) for number, parts in words if parts]
    for where, word in found:
        if not _DIGEST.fullmatch(word.lower()):
            raise TokenError(
                f"{where} holds something that is no SHA-256 digest in hexadecimal; "
                "`python jobs/serve.py --new-token` makes a token and its digest"
            )
    if not found and not settings.anonymous:
        where = f"{settings.variable} in the environment" + (f" and {settings.file}" if settings.file else "")
        raise TokenError(
            f"nobody may ask: no digest of a token in {where}; `python jobs/serve.py --new-token` makes a token, "
            "or let everybody ask with tokens.anonymous=true"
        )
    return tuple(word.lower() for _, word in found)


class Guard:
    """Lets requests in whose `Authorization` header holds a known token."""

    def __init__(self, digests: Sequence[str]) -> None:
        """Without digests everybody is let in."""
        self._digests = tuple(digests)

    def check(self, authorization: str | None) -> None:
        """Raise EndpointError unless the header (None: there is none) holds a known token."""
        if not self._digests:
            return
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise EndpointError(401, "no_token", "send the header `Authorization: Bearer TOKEN`")
        digest, known = digest_of(token.strip()), False
        for other in self._digests:  # all of them, so that the time says nothing of which it was
            known |= hmac.compare_digest(digest, other)
        if not known:
            raise EndpointError(401, "wrong_token", "the token is not one that this endpoint knows")
