"""Settings of the collection of references from a teacher behind an API."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.corpora import CorporaSettings, SourceSettings

_OURS = ("model", "messages", "stream", "n", "max_tokens", "max_completion_tokens")


class TeacherSettings(Settings):
    """Any chat endpoint that speaks OpenAI's protocol with images."""

    url: str
    """Address up to the version, for instance `https://api.openai.com/v1`; `/chat/completions` is added."""
    model: str = Field(min_length=1)
    """The teacher's name at that endpoint."""
    key_variable: str = "TEACHER_API_KEY"
    """Environment variable that holds the key, which is written nowhere. Empty: the endpoint wants none."""
    system: str = (
        "Answer the question about the image. Reply with three elements in this order, and nothing before, between or "
        "after them: <caption>what the image shows, as far as the question may need it</caption><think>the reasoning, "
        "step by step</think><answer>the final answer only</answer>"
    )
    """Told to the teacher where a prompt has no system turn of its own; it must ask for the response format."""
    max_answer_tokens: int = Field(default=8192, ge=1)
    """Longest answer. It is also what an unanswered request may have cost at most, which the spending caps count with:
    a low one leaves less of a cap unused."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit; models that think before they answer often want the latter."""
    options: dict[str, Any] = {}
    """Further fields of each request as the endpoint knows them, for instance `{temperature: 0.7}`."""

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or any(mark in url for mark in "?#@ "):
            raise ValueError(
                "it must be an http(s) address without user, query or fragment; a key belongs into the environment "
                "variable that teacher.key_variable names"
            )
        return url.rstrip("/")

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(options) & set(_OURS)):
            raise ValueError(f"{', '.join(taken)} is set from elsewhere; remove it from the options")
        return options


class AskingSettings(Settings):
    """How fast the teacher is asked, and how often again."""

    concurrency: int = Field(default=16, ge=1)
    """Requests under way at once."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """The endpoint's limit on requests. Unset: only `concurrency` limits."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """The endpoint's limit on tokens, those of questions and answers together. Unset: none."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Seconds a whole answer may take, however slowly it drips in. What then comes late may have to be paid, so this is
    well above what a long answer needs."""
    attempts: int = Field(default=6, ge=1)
    """Requests for one answer before a prompt is given up in this run (busy or failing endpoint, lost connections)."""
    backoff_s: float = Field(default=1.0, gt=0)
    """Longest wait before the second attempt; it doubles with each, and the actual one is drawn between half of it and
    all of it, so that requests that failed together do not return together. A `Retry-After` is kept in any case."""
    backoff_most_s: float = Field(default=60.0, gt=0)
    """Where the doubling ends."""
    reasks: int = Field(default=2, ge=0)
    """How often a prompt is asked again because its answer did not keep the response format, counted over all runs:
    each of those answers is paid."""
    max_failures: int = Field(default=20, ge=1)
    """Prompts given up one after the other at which the run stops: the endpoint is down, or refuses what is asked."""
    stop_grace_s: float = Field(default=5.0, ge=0)
    """Seconds that requests under way have to come back after Ctrl-C or SIGTERM; they are paid already."""


class SpendingSettings(Settings):
    """What the teacher costs and may cost. Both caps count everything ever spent in the output folder; a request is
    only sent if the longest answer it may get still fits. Raise a cap to go on."""

    input_price: float = Field(default=0.0, ge=0)
    """Money for a million tokens of questions, in whatever currency the cap is in."""
    output_price: float = Field(default=0.0, ge=0)
    """Money for a million tokens of answers, hidden reasoning included."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in all, questions and answers. Unset: no cap."""
    max_money: float | None = Field(default=None, gt=0)
    """Most money in all. Unset: no cap."""
    tokens_per_image: int = Field(default=1600, ge=0)
    """What an image counts before the endpoint has said what it was: for the dry run and for requests under way."""
    answer_tokens: int = Field(default=1000, ge=1)
    """Length of an answer that the dry run reckons with while none has come yet."""

    @model_validator(mode="after")
    def _prices_are_known(self) -> Self:
        if self.max_money is not None and not (self.input_price or self.output_price):
            raise ValueError("spending.max_money needs spending.input_price and spending.output_price; give the prices")
        return self


class CollectSettings(Settings):
    """A run of `jobs/collect.py`."""

    prompts: list[Path | SourceSettings] = Field(min_length=1)
    """Corpora with the prompts, as for training; references that they have already are replaced."""
    output: Path = Path("runs/references")
    """Folder for the answers; the same folder again goes on where the collection ended."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many prompts, to try a teacher out. Unset: all."""
    only_agreeing: bool = False
    """Leave references whose answer is not the known one out of `references.parquet` (they stay in `answers.jsonl`).
    Off: all are there, and the column `agrees` tells."""
    policy: Path | None = None
    """Hugging Face folder of the policy that will learn from the references; only its processor is read. The teacher is
    then shown images at the size at which that policy sees them: it cannot describe what the policy has no way to see,
    and fewer image tokens are paid. Unset: images are shown as they are."""
    teacher: TeacherSettings
    """Who is asked."""
    asking: AskingSettings = AskingSettings()
    """How."""
    spending: SpendingSettings = SpendingSettings()
    """At what price."""
    corpora: CorporaSettings = CorporaSettings()
    """How the prompts are read and checked."""
