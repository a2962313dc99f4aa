"""The only types that cross rooms: Prompt, Rollout, Verdict, Trajectory, the Group that holds them, and its Ticket.

Arrays are numpy, so that Ray's object store hands them out without a copy and the codec writes them raw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked, with what is known of the answer.

    `messages` are chat turns `{"role": …, "content": str}`; each `<image>` in a content stands for the next of
    `images` (encoded bytes: PNG, JPEG, …). `reference` is the teacher's whole response ("" if there is none),
    `ground_truth` the verifiable answer ("" if there is none). `extra` is free, small and msgpack-able: a verifier
    or an evaluation finds there what it needs (the testbed keeps the scene). `token_ids` are the messages in the
    policy's tokens, one placeholder for each image, where somebody has tokenised them (() where nobody has);
    `tokens_of` says what they were made of, so that nobody takes another's for his own (`models.encode`).
    """

    id: str
    messages: tuple[dict[str, str], ...]
    images: tuple[bytes, ...] = ()
    reference: str = ""
    ground_truth: str = ""
    data_source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    tokens_of: str = ""


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response, or those of an episode of several turns with what the environment wrote between them.

    `token_ids` int32 [R] (end token included when the model ended itself); `logp` float32 [R], natural log-probs of
    those tokens under what sampled them (behaviour policy, after temperature); `versions` int32 [R], the policy
    version that produced each token; `prompt_token_ids` int32 [P] with image placeholders expanded;
    `finish_reason` is `stop`, `length` or `abort`.

    Of an episode, `token_ids` go on to the end of the last response: `mask` bool [R] says which tokens the policy
    sampled (None: all). The environment's have log-prob 0 and the version of the token before them; no loss comes from
    them. `turns` are the messages between the prompt and the last response, and each `<image>` of the environment's
    stands for the next of `images`, whose expanded placeholders are among the tokens. `text` and `finish_reason` are
    the last response's.
    """

    prompt_id: str
    index: int
    prompt_token_ids: np.ndarray
    token_ids: np.ndarray
    logp: np.ndarray
    versions: np.ndarray
    text: str
    finish_reason: str
    mask: np.ndarray | None = None
    turns: tuple[dict[str, str], ...] = ()
    images: tuple[bytes, ...] = ()

    @property
    def sampled(self) -> int:
        """How many of the tokens the policy sampled."""
        return len(self.token_ids) if self.mask is None else int(self.mask.sum())

    @property
    def last_response(self) -> np.ndarray:
        """The tokens of the last response, int32."""
        written = np.flatnonzero(~self.mask) if self.mask is not None else np.zeros(0, np.int64)
        return self.token_ids[int(written[-1]) + 1 :] if len(written) else self.token_ids

    @property
    def oldest_version(self) -> int:
        """Version of the oldest token; a rollout without tokens counts as version 0 (as stale as can be)."""
        return int(self.versions.min()) if len(self.versions) else 0


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one rollout.

    `reward` is the scalar a group-normalised estimator may use; `scores` holds the judge's score per view and
    `reference_scores` those of the prompt's reference (both empty for a verifier); `parts` are the reward's
    components (accuracy, format, …). `valid` is whether the response has the required format, `reason` why not.
    `judge_version` is the discriminator's version (0 for a verifier).
    """

    reward: float
    valid: bool
    reason: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    reference_scores: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    judge_version: int = 0


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A judged rollout."""

    rollout: Rollout
    verdict: Verdict


@dataclass(frozen=True, eq=False)
class Group:
    """The n rollouts of one prompt; `verdicts` is empty until a judge has spoken, then one for each rollout.

    `id` is unique in a run (the submission number), unlike the prompt's id, which returns in every epoch.
    """

    id: int
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...] = ()

    def judged(self, verdicts: list[Verdict] | tuple[Verdict, ...]) -> Group:
        """This group with its verdicts; their number must equal that of the rollouts."""
        if len(verdicts) != len(self.rollouts):
            raise ValueError(f"group {self.id}: {len(self.rollouts)} rollouts but {len(verdicts)} verdicts")
        return replace(self, verdicts=tuple(verdicts))

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        return tuple(Trajectory(r, v) for r, v in zip(self.rollouts, self.verdicts, strict=True))

    @property
    def oldest_version(self) -> int:
        return min(r.oldest_version for r in self.rollouts)

    @property
    def newest_version(self) -> int:
        return max((int(r.versions.max()) for r in self.rollouts if len(r.versions)), default=0)


UNDONE = -1
"""In place of a judge's version: those weights were undone by a recovery, and their number will name others."""


@dataclass(frozen=True)
class Ticket:
    """A group on its way: first a prompt (`ref` holds a `Prompt`), then its rollouts, then judged (a `Group`).

    `id` is the submission number, unique in a run; `position` is the prompt's place in the stream (epoch and row, as
    the stream counts them); `oldest_version` the policy version of the group's oldest token, `judge_version` the
    oldest discriminator version among its verdicts, or UNDONE; `tokens` the number of response tokens, `total_tokens`
    those and the prompt's (what a learner computes); `stats` small numbers for the metrics.
    """

    id: int
    prompt_id: str
    position: int
    ref: Any
    oldest_version: int = 0
    judge_version: int = 0
    tokens: int = 0
    total_tokens: int = 0
    stats: dict[str, float] = field(default_factory=dict)


Ratios = Mapping[int, Sequence[float]]
"""Per group id and rollout: how much likelier the rollout is under the learner's policy than under what sampled it,
the geometric mean over its tokens."""
