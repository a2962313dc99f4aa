"""Episodes of several turns: the policy responds, the environment answers, perhaps with images, the policy goes on.

Pure, for any environment that keeps the contract of `verify/environment.py`. Beyond it, a step that does not end the
episode gives `info["message"]`, `{"role": "user" or "tool", "content": str}`, where each `<image>` stands for the next
of `info["images"]` (encoded bytes; none by default); what `info` promises otherwise, only the last step owes. The
rewards of the steps are added up.

The answer becomes tokens here, once: they are put behind those that the policy sampled, and masked. What an engine goes
on from, what a learner computes with and what a journal keeps is that one rollout (`records.Rollout`).

An environment lives from turn to turn in one process. Where that process is lost, the episode is played again up to its
present turn, with the same seed and the same responses; an environment that then answers otherwise costs its rollout.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import gymnasium
import numpy as np

from prism_ray.records import Group, Prompt, Rollout, Verdict
from prism_ray.verify.judging import BrokenEnvironment, refused, stats_of, verdict_of

IMAGE = "<image>"
TURNS = "turns"
"""The part of a verdict that counts the responses of an episode."""
GOES_ON = "abort"
"""Finish reason of a rollout under way (`rollout/partial.py`)."""
_MOST_GROUPS = 1024
"""Groups whose environments are kept between their turns; one more, and the oldest will be played again."""

Step = tuple[Rollout, Verdict | None]
"""A rollout after a turn: over, with its verdict, or with the environment's answer at its end."""


@dataclass(frozen=True)
class Limits:
    """What an episode may come to: `max_response_tokens` is the most after the prompt, the environment's included."""

    max_turns: int
    max_prompt_tokens: int
    max_response_tokens: int
    max_images: int


class Speaker(Protocol):
    """What an episode needs of `models.encode.Encoder`."""

    end_id: int

    def answer(
        self, prompt_id: str, message: Mapping[str, str], images: Sequence[bytes], ended: bool
    ) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Episode:
    """An episode so far. `turns` are the messages after the prompt, and `images` those of the last one; `verdict` is
    there once the episode is over."""

    turns: tuple[dict[str, str], ...] = ()
    images: tuple[bytes, ...] = ()
    reward: float = 0.0
    verdict: Verdict | None = None

    def ended(self, verdict: Verdict) -> Episode:
        """The episode with its verdict, after one more response."""
        count = len(self.turns) // 2 + 1
        return replace(self, verdict=replace(verdict, parts=verdict.parts | {TURNS: float(count)}))


def begin(prompt: Prompt, env: gymnasium.Env[Any, Any], seed: int) -> Episode:
    """A new episode; one whose environment raises is over at once, worth 0."""
    try:
        env.reset(seed=seed, options={"prompt": prompt})
    except Exception as error:  # a user's environment must not take the loop down
        return Episode().ended(_failed(error))
    return Episode()


def advance(episode: Episode, text: str, cut: bool, env: gymnasium.Env[Any, Any], max_turns: int) -> Episode:
    """The episode after the policy's response and what the environment makes of it.

    It is over when the environment ends it or raises, when the response was `cut` before its end, or after `max_turns`
    responses: then it is worth what the steps gave so far, and is not valid. BrokenEnvironment where a step does not
    give what the contract promises.
    """
    if episode.verdict is not None:
        raise ValueError("the episode is over")
    try:
        _, reward, terminated, truncated, info = env.step(text)
    except Exception as error:  # as above
        return episode.ended(_failed(error))
    if not isinstance(reward, bool | int | float | np.number):
        raise BrokenEnvironment(f"verify.environment: {type(env.unwrapped).__name__}.step gives no number for reward")
    total = episode.reward + float(reward)
    if terminated or truncated:
        return episode.ended(verdict_of(total, info, env))
    message, images = _answer(info, env)
    if not math.isfinite(total):
        return episode.ended(refused(f"verifier gave reward {total}"))
    said = {"role": "assistant", "content": text}
    after = Episode((*episode.turns, said, message), images, total)
    count = len(after.turns) // 2
    if cut or count >= max_turns:
        reason = f"response {count} was cut" if cut else f"not over after {max_turns} turns"
        return episode.ended(unfinished(total, reason))
    return after


def unfinished(reward: float, reason: str) -> Verdict:
    """The verdict on an episode that ended before its environment ended it."""
    return Verdict(reward, False, reason, parts={"accuracy": 0.0, "format": 0.0, "unfinished": 1.0})


def answered(rollout: Rollout, episode: Episode, tokens: np.ndarray) -> Rollout:
    """The rollout with the environment's answer at its end, `tokens` int32: masked, of log-prob 0, and of the version
    of the token before them, so that no staleness comes from them."""
    count = len(tokens)
    before = np.ones(len(rollout.token_ids), np.bool_) if rollout.mask is None else rollout.mask
    return replace(
        rollout,
        token_ids=np.concatenate([rollout.token_ids, tokens]),
        logp=np.concatenate([rollout.logp, np.zeros(count, np.float32)]),
        versions=np.concatenate([rollout.versions, np.repeat(rollout.versions[-1:], count)]),
        mask=np.concatenate([before, np.zeros(count, np.bool_)]),
        turns=episode.turns,
        images=(*rollout.images, *episode.images),
        text="",
        finish_reason=GOES_ON,
    )


@dataclass(eq=False)
class _Seat:
    """An environment in the middle of an episode."""

    env: gymnasium.Env[Any, Any]
    episode: Episode


class Table:
    """The episodes of several groups, each with an environment of its own; a group comes back for every turn."""

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], encoder: Speaker, limits: Limits) -> None:
        self._make, self._encoder, self._limits = make, encoder, limits
        self._seats: OrderedDict[int, dict[int, _Seat]] = OrderedDict()
        self._free: list[gymnasium.Env[Any, Any]] = []

    def turn(
        self, group: Group, verdicts: Sequence[Verdict | None]
    ) -> tuple[Group, list[Verdict | None], dict[str, Any]]:
        """The group after a turn of all its episodes; `verdicts` of those that are over already (empty: of none).

        Also the new verdicts, and what its ticket needs to know: how many rollouts are `open`, the `tokens` of all, and
        the `stats` of the verdicts once none is open; the group has them then.
        """
        return self.collect(group, [self.step(group, verdicts, index) for index in range(len(group.rollouts))])

    def step(self, group: Group, verdicts: Sequence[Verdict | None], index: int) -> Step:
        """One rollout of the group after a turn of its episode."""
        rollout = group.rollouts[index]
        if verdicts and verdicts[index] is not None:
            return rollout, verdicts[index]
        seat = self._seat(group, index)
        if seat.episode.verdict is None:
            cut = rollout.finish_reason != "stop"
            seat.episode = advance(seat.episode, rollout.text, cut, seat.env, self._limits.max_turns)
        if seat.episode.verdict is not None:
            return rollout, seat.episode.verdict
        return self._answered(group.prompt, rollout, seat)

    def collect(self, group: Group, steps: Sequence[Step]) -> tuple[Group, list[Verdict | None], dict[str, Any]]:
        """What `turn` returns, from the steps."""
        verdicts = [verdict for _, verdict in steps]
        over = [verdict for verdict in verdicts if verdict is not None]
        group = replace(group, rollouts=tuple(rollout for rollout, _ in steps))
        tokens = sum(len(rollout.token_ids) for rollout in group.rollouts)
        told: dict[str, Any] = {"open": len(steps) - len(over), "tokens": tokens, "stats": {}}
        if len(over) == len(steps):
            self._leave(group.id)
            group = group.judged(over)
            told["stats"] = stats_of(group)
        return group, verdicts, told

    def _answered(self, prompt: Prompt, rollout: Rollout, seat: _Seat) -> Step:
        episode, limits = seat.episode, self._limits
        shown = len(prompt.images) + len(rollout.images) + len(episode.images)
        if shown > limits.max_images:
            reason = f"the environment shows image {shown}, but rollout.max_images is {limits.max_images}"
            return rollout, self._end(seat, rollout, refused(reason))
        from prism_ray.models.encode import BadImage  # where an episode goes on, that is imported already

        ended = int(rollout.token_ids[-1]) == self._encoder.end_id
        try:
            tokens = self._encoder.answer(prompt.id, episode.turns[-1], episode.images, ended)
        except BadImage as error:
            return rollout, self._end(seat, rollout, refused(f"the environment's answer cannot be used: {error}"))
        if len(rollout.token_ids) + len(tokens) >= limits.max_response_tokens:
            reason = f"no room for response {len(episode.turns) // 2 + 1}"
            return rollout, self._end(seat, rollout, unfinished(episode.reward, reason))
        return answered(rollout, episode, tokens), None

    @staticmethod
    def _end(seat: _Seat, rollout: Rollout, verdict: Verdict) -> Verdict:
        """The verdict on an episode that ends at its environment's answer, which the rollout does not hold."""
        seat.episode = Episode(rollout.turns).ended(verdict)
        assert seat.episode.verdict is not None
        return seat.episode.verdict

    def _seat(self, group: Group, index: int) -> _Seat:
        """The environment of a rollout, where its episode is."""
        seats = self._seats.setdefault(group.id, {})
        self._seats.move_to_end(group.id)
        rollout = group.rollouts[index]
        if index not in seats or seats[index].episode.turns != rollout.turns:
            env = seats[index].env if index in seats else self._free.pop() if self._free else self._make()
            seats[index] = _Seat(env, self._played(group, index, env))
        if len(self._seats) > _MOST_GROUPS:
            self._leave(next(iter(self._seats)))
        return seats[index]

    def _played(self, group: Group, index: int, env: gymnasium.Env[Any, Any]) -> Episode:
        """The episode of a rollout up to its last response, from its beginning."""
        rollout = group.rollouts[index]
        episode = begin(group.prompt, env, zlib.crc32(f"{group.id}/{index}".encode()))
        for said in rollout.turns[::2]:
            if episode.verdict is None:
                episode = advance(episode, said["content"], False, env, self._limits.max_turns)
        if episode.verdict is None and episode.turns != rollout.turns:
            return episode.ended(refused("its process was lost, and played again the environment answered otherwise"))
        return episode

    def _leave(self, group: int) -> None:
        self._free += [seat.env for seat in self._seats.pop(group, {}).values()]


def _answer(info: Mapping[str, Any], env: gymnasium.Env[Any, Any]) -> tuple[dict[str, str], tuple[bytes, ...]]:
    message, images = info.get("message"), tuple(info.get("images", ()))
    step = f"verify.environment: {type(env.unwrapped).__name__}.step"
    if not isinstance(message, dict) or message.get("role") not in ("user", "tool"):
        raise BrokenEnvironment(f'{step} goes on without info["message"] of role user or tool')
    content = message.get("content")
    if not isinstance(content, str) or content.count(IMAGE) != len(images):
        raise BrokenEnvironment(f"{step} gives {len(images)} images, but the message names another number of them")
    return {"role": message["role"], "content": content}, images


def _failed(error: Exception) -> Verdict:
    return refused(f"verifier failed: {type(error).__name__}: {error}")
