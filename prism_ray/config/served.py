"""Settings of a judge that is served elsewhere: a discriminator behind the endpoint of `jobs/serve.py`."""

from __future__ import annotations

from pydantic import Field, field_validator

from prism_ray.config.base import Settings


class ServedSettings(Settings):
    """The endpoint that phases with `judge: serve` ask. Such a judge is frozen: it does not learn."""

    url: str = ""
    """Address of the endpoint, `http://host:8000`. Must be given where a phase has `judge: serve`."""
    token_variable: str = "PRISM_SERVE_TOKEN"
    """Environment variable that holds the bearer token, which is written nowhere. Unset there: none is sent."""
    version: str | None = None
    """Version that the endpoint must serve (`GET /v1/model`), so that a run that goes on tomorrow has the judge of
    today. Unset: whichever it serves when the phase begins; it must stay that one until the phase ends."""
    concurrency: int = Field(default=8, ge=1)
    """Groups that are asked about at once: the endpoint scores them together."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds to the answer about one group, after which it is asked again."""
    patience_s: float = Field(default=300.0, gt=0)
    """Seconds that an endpoint may be busy or away before the run fails. A restart of it should fit in."""
    images: bool = True
    """Send the prompts' images. False saves the traffic where the discriminator sees none (`sees_images: false`)."""

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        if url and (not url.startswith(("http://", "https://")) or any(mark in url for mark in "?#@ ")):
            raise ValueError("it must be an http(s) address without user, query or fragment")
        return url.rstrip("/")
