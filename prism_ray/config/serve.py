"""Settings of the Serve application: the trained discriminator behind an HTTP endpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.runtime import ClusterSettings


class TokenSettings(Settings):
    """Who may ask. Only SHA-256 digests of tokens are configured, so that neither file nor environment gives one away;
    `python jobs/serve.py --new-token` makes a token and its digest."""

    file: Path | None = None
    """File with a digest a line, `[name] digest`; `#` begins a comment. Unset: none."""
    variable: str = "PRISM_SERVE_TOKENS"
    """Environment variable with digests, separated by spaces or commas; they count beside those of the file."""
    anonymous: bool = False
    """Let everybody ask, where neither file nor variable has a digest. Off: the endpoint refuses to start without one
    (`jobs/serve.py` asks for none on the loopback address, which only this machine reaches)."""


class LimitSettings(Settings):
    """What one request may be at most; what is more is refused before it costs anything."""

    body_mb: float = Field(default=32.0, gt=0)
    """Size of a body. Base64 makes images a third larger; a body is in memory as a whole."""
    responses: int = Field(default=64, ge=1)
    """Responses of one request: several times a customary group of rollouts. Who has more asks more often, so that
    nobody's thousand stand before everybody's one."""
    response_bytes: int = Field(default=131_072, ge=1)
    """UTF-8 bytes of a response or reference: some four times what `max_segment_tokens` of both views hold."""
    images: int = Field(default=8, ge=0)
    """Images of a prompt."""
    image_pixels: int = Field(default=16_000_000, ge=1)
    """Width times height of an image as its header says, before it is decoded: a small file can hold gigabytes."""
    prompt_tokens: int = Field(default=8192, ge=1)
    """Tokens of a prompt with its images; keep it at the run's `rollout.max_prompt_tokens` or above."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest time to an answer; a request may ask for less, not for more. What nobody waits for is not computed."""


class QueueSettings(Settings):
    """How requests are put together, and how many may wait."""

    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens that are scored in one forward pass, of as many requests as fit; one larger request goes in several.
    What waits while a batch is computed makes the next: no time is lost waiting for company."""
    waiting_tokens: int = Field(default=131_072, ge=1)
    """Tokens that may wait in a replica; beyond them requests are turned away with 503 and the time after which it is
    worth asking again. It bounds how long an accepted request waits: 16 batches by default."""
    requests: int = Field(default=256, ge=1)
    """Requests that a replica works on at once, and that may wait before all of them. Their images are in memory.
    `replicas.most` times as many are let in at once; another is refused before it is read, as is one that would be late
    (`limits.timeout_s`) by the rate of the last ones."""
    prompt_cache_mb: float = Field(default=256.0, ge=0)
    """Memory for prompts that were encoded lately: reward hooks send a prompt once for each of its responses, and equal
    prompts are then encoded once, and share their computation within a batch."""


class ReplicaSettings(Settings):
    """The processes that score. Serve adds and removes them by how many requests each has."""

    least: int = Field(default=1, ge=1)
    """Replicas that are always there; each holds a copy of the weights (two for a moment while it takes new ones)."""
    most: int = Field(default=1, ge=1)
    """Replicas under load."""
    target_requests: float = Field(default=16.0, gt=0)
    """Requests that a replica should have at a time, waiting ones counted; more brings up another. Batching makes a
    single one per replica wasteful."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """Seconds of too many requests after which a replica is added: a burst should not load a model."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """Seconds of too few after which one is taken away."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs that a replica books and (rounded up) its compute threads."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs that a replica books; a part of one is enough for a small judge."""
    ingresses: int = Field(default=1, ge=1)
    """Processes that read and check requests. One keeps up with several scorers; large images want more."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.most < self.least:
            raise ValueError(f"replicas.most is {self.most}, fewer than replicas.least = {self.least}; raise it")
        return self

    @property
    def threads(self) -> int:
        """Compute threads of a replica."""
        return max(1, math.ceil(self.cpus))


class ServeSettings(Settings):
    """The Serve application; what `args` in a Serve config file may hold."""

    checkpoint: Path | None = None
    """Folder of a trained discriminator, `runs/<name>/align/discriminator` or `runs/<name>/warmup/checkpoint`. In a
    Serve config file give it as the Scorer's `user_config` instead: changing it there loads the new weights beside the
    old ones and drops no request."""
    name: str = Field(default="discriminator", min_length=1)
    """What the discriminator is called in answers."""
    watch_s: float | None = Field(default=None, gt=0)
    """Look at the checkpoint (a link, say) every so many seconds, and take up what is new there. Unset: weights change
    only when the configuration says so, as whoever trains on the scores will expect."""
    image_origins: tuple[str, ...] = ()
    """Origins such as `https://images.example.org` that images may be fetched from, and no redirect is followed. Empty:
    nothing is ever fetched, so that no caller can make this server ask addresses that only it can reach."""
    fetch_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that one image may take to be fetched."""
    tokens: TokenSettings = TokenSettings()
    """Who may ask."""
    limits: LimitSettings = LimitSettings()
    """What a request may be."""
    queue: QueueSettings = QueueSettings()
    """How requests are batched, and how many may wait."""
    replicas: ReplicaSettings = ReplicaSettings()
    """The processes."""

    @field_validator("image_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, _, rest = origin.partition("://")
            if scheme not in ("http", "https") or not rest or any(mark in rest for mark in "/?#@ "):
                raise ValueError(f"{origin} is no origin; write scheme, host and port only, like https://images.org")
        return origins


class ServeJobSettings(ServeSettings):
    """A run of `jobs/serve.py`."""

    host: str = "127.0.0.1"
    """Address to listen on. The default reaches this machine only; `0.0.0.0` is for everybody, and wants tokens."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    app: str = Field(default="prism", min_length=1, pattern=r"^[\w.-]+$")
    """Name of the application in Ray Serve."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds until the discriminator must be loaded."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster; a private one on this machine unless it says otherwise."""
