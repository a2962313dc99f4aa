"""Episodes of several turns: the policy responds, the environment answers, perhaps with images, the policy goes on.

Pure, for any environment that keeps the contract of `verify/environment.py`. Beyond it, a step that does not end the
episode gives `info["message"]`, `{"role": "user" or "tool", "content": str}`, where each `<image>` stands for the next
of `info["images"]` (encoded bytes; none by default); what `info` promises otherwise, only the last step owes. The
rewards of the steps are added up.

Every response is a `Rollout` of its own, whose prompt is the whole conversation before it, and `stitch` makes one of
them: the tokens that the environment wrote stand between the policy's, and a mask says which are whose. For that the
engine must be prompted with the tokens of the turns before, never with their text anew: a text can be cut into other
tokens than those that were sampled. `continuation` is the text whose tokens go in between.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np

from prism_ray.records import Prompt, Rollout, Verdict
from prism_ray.verify.judging import BrokenEnvironment, refused, verdict_of

IMAGE = "<image>"
_HERE = "\u2060response\u2060"

Respond = Callable[[Prompt], Awaitable[Rollout]]
"""What a policy does: a response to a conversation, with the conversation's tokens as its prompt."""


@dataclass(frozen=True, eq=False)
class Episode:
    """An episode so far. `prompt` is the conversation up to the policy's next turn, with every image in it, the
    policy's responses as turns of the assistant; `verdict` is there once the episode is over."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...] = ()
    reward: float = 0.0
    verdict: Verdict | None = None


def begin(prompt: Prompt, env: gymnasium.Env[Any, Any]) -> Episode:
    """A new episode; one whose environment raises is over at once, worth 0."""
    try:
        env.reset(options={"prompt": prompt})
    except Exception as error:  # a user's environment must not take the loop down
        return Episode(prompt, verdict=_failed(error))
    return Episode(prompt)


def advance(episode: Episode, rollout: Rollout, env: gymnasium.Env[Any, Any], max_turns: int) -> Episode:
    """The episode after the policy's response and what the environment makes of it.

    It is over when the environment ends it or raises, when the response was cut before its end, or after `max_turns`
    responses: then it is worth what the steps gave so far, and is not valid. BrokenEnvironment where a step does not
    give what the contract promises.
    """
    if episode.verdict is not None:
        raise ValueError("the episode is over")
    episode = replace(episode, rollouts=(*episode.rollouts, rollout))
    try:
        _, reward, terminated, truncated, info = env.step(rollout.text)
    except Exception as error:  # as above
        return replace(episode, verdict=_failed(error))
    if terminated or truncated:
        verdict = verdict_of(episode.reward + float(reward), info, env)
        return replace(episode, reward=verdict.reward, verdict=verdict)
    message, images = _answer(info, env)
    episode = replace(episode, reward=episode.reward + float(reward))
    if not math.isfinite(episode.reward):
        return replace(episode, reward=0.0, verdict=refused(f"verifier gave reward {episode.reward}"))
    if rollout.finish_reason != "stop" or len(episode.rollouts) >= max_turns:
        cut = rollout.finish_reason != "stop"
        reason = f"response {len(episode.rollouts)} was cut" if cut else f"not over after {max_turns} turns"
        parts = {"accuracy": 0.0, "format": 0.0, "unfinished": 1.0}
        return replace(episode, verdict=Verdict(episode.reward, False, reason, parts=parts))
    said = {"role": "assistant", "content": rollout.text.replace(IMAGE, "")}
    before = episode.prompt
    prompt = replace(before, messages=(*before.messages, said, message), images=(*before.images, *images))
    return replace(episode, prompt=prompt)


async def play(prompt: Prompt, env: gymnasium.Env[Any, Any], respond: Respond, max_turns: int) -> Episode:
    """A whole episode; `max_turns` at least 1."""
    episode = begin(prompt, env)
    while episode.verdict is None:
        episode = advance(episode, await respond(episode.prompt), env, max_turns)
    return episode


def stitch(rollouts: Sequence[Rollout]) -> tuple[Rollout, np.ndarray]:
    """One rollout of the responses of an episode, and which of its tokens the policy wrote (bool [R]).

    The prompt is the first turn's. Between two responses stand the tokens that the later one's prompt has beyond the
    earlier prompt and response: of log-prob 0, and of the version of the token before them, so that no staleness comes
    from them. Text and finish reason are the last response's. ValueError where a prompt does not go on from the tokens
    before it.
    """
    first = rollouts[0]
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]] = []
    so_far = first.prompt_token_ids
    for turn, rollout in enumerate(rollouts):
        prompt = rollout.prompt_token_ids
        if len(prompt) < len(so_far) or not np.array_equal(prompt[: len(so_far)], so_far):
            raise ValueError(f"{first.prompt_id}: the prompt of turn {turn} does not go on from the tokens before it")
        written = prompt[len(so_far) :]
        version = pieces[-1][2][-1:] if pieces else rollout.versions[:1]
        versions = np.repeat(version, len(written)) if len(version) else np.zeros(len(written), np.int32)
        pieces.append((written, np.zeros(len(written), np.float32), versions, False))
        pieces.append((rollout.token_ids, rollout.logp, rollout.versions, True))
        so_far = np.concatenate([prompt, rollout.token_ids])
    tokens, logp, versions = (np.concatenate([piece[i] for piece in pieces]) for i in range(3))
    last = rollouts[-1]
    whole = replace(
        first,
        token_ids=tokens.astype(np.int32),
        logp=logp.astype(np.float32),
        versions=versions.astype(np.int32),
        text=last.text,
        finish_reason=last.finish_reason,
    )
    return whole, np.concatenate([np.full(len(piece[0]), piece[3]) for piece in pieces])


def continuation(
    render: Callable[[Sequence[Mapping[str, str]]], str], message: Mapping[str, str], end: str, ended: bool
) -> str:
    """What stands between a response and the next one: the end of the turn, the environment's message, the next head.

    `render` writes a conversation as the chat template does, up to where the policy begins to write; `end` is the text
    of the end token, left out where the policy `ended` its response with that token itself.
    """
    opening = {"role": "user", "content": ""}
    text = render([opening, {"role": "assistant", "content": _HERE}, message])
    _, found, after = text.rpartition(_HERE)
    if not found or not after.startswith(end):
        raise ValueError(f"the chat template does not end a response with {end!r}; turns cannot follow each other")
    return after.removeprefix(end) if ended else after


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
