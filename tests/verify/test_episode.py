import asyncio
from dataclasses import replace

import jinja2
import numpy as np
import pytest

from prism_ray.records import Prompt, Rollout
from prism_ray.verify.environment import ResponseEnvironment
from prism_ray.verify.episode import advance, begin, continuation, play, stitch
from prism_ray.verify.judging import BrokenEnvironment

PROMPT = Prompt("p", ({"role": "user", "content": "<image>which number?"},), (b"first",), ground_truth="5")


class GuessEnvironment(ResponseEnvironment):
    """Says whether a guess is too low or too high, shows another picture after the second, and pays for a hit."""

    def reset(self, *, seed=None, options=None):
        self.prompt, self.guesses = options["prompt"], 0
        return {}, {}

    def step(self, action):
        self.guesses += 1
        if action == "raise":
            raise RuntimeError("no idea")
        guess, wanted = int(action), int(self.prompt.ground_truth)
        if guess == wanted:
            return {}, 0.5, True, False, {"accuracy": 1.0, "format": 1.0, "valid": True, "reason": "", "turns": 3}
        said = "too low" if guess < wanted else "too high"
        info = {"message": {"role": "user", "content": said}}
        if self.guesses == 2:
            info = {"message": {"role": "user", "content": f"<image>{said}"}, "images": (b"second",)}
        return {}, 0.125, False, False, info


def response(text, prompt_tokens=(), tokens=(), version=0, finish_reason="stop"):
    ids, prompt = np.asarray(tokens, np.int32), np.asarray(prompt_tokens, np.int32)
    logp = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Rollout("p", 2, prompt, ids, logp, np.full(len(ids), version, np.int32), text, finish_reason)


def played(*texts, max_turns=9):
    said, heard = iter(texts), []

    async def respond(prompt):
        heard.append(prompt)
        return response(next(said))

    return asyncio.run(play(PROMPT, GuessEnvironment(), respond, max_turns)), heard


def test_environment_answers_and_the_policy_goes_on():
    episode, heard = played("3", "8", "5")
    assert [len(p.messages) for p in heard] == [1, 3, 5] and [p.images for p in heard[:2]] == [(b"first",)] * 2
    assert heard[2].images == (b"first", b"second"), "an image that came later"
    assert [m["content"] for m in heard[2].messages[1:]] == ["3", "too low", "8", "<image>too high"]
    assert [m["role"] for m in heard[2].messages] == ["user", "assistant", "user", "assistant", "user"]
    assert heard[2].ground_truth == "5" and heard[2].id == "p"
    assert [r.text for r in episode.rollouts] == ["3", "8", "5"]
    assert (episode.verdict.reward, episode.verdict.valid) == (0.75, True), "the rewards of the steps are added up"
    assert episode.verdict.parts == {"accuracy": 1.0, "format": 1.0, "turns": 3.0}


def test_one_turn_is_an_episode_too():
    episode, heard = played("5")
    assert len(heard) == 1 and episode.verdict.reward == 0.5


def test_an_episode_that_does_not_end_is_ended():
    episode, heard = played("1", "2", "3", max_turns=2)
    assert len(heard) == 2
    assert (episode.verdict.reward, episode.verdict.valid) == (0.25, False)
    assert episode.verdict.reason == "not over after 2 turns" and episode.verdict.parts["unfinished"] == 1.0


def test_a_response_that_was_cut_ends_the_episode():
    env = GuessEnvironment()
    episode = advance(begin(PROMPT, env), response("1", finish_reason="length"), env, 9)
    assert (episode.verdict.valid, episode.verdict.reason) == (False, "response 1 was cut")
    with pytest.raises(ValueError, match="the episode is over"):
        advance(episode, response("5"), env, 9)


def test_an_environment_that_raises_ends_the_episode_worth_nothing():
    episode, _ = played("1", "raise")
    assert episode.verdict.reward == 0.0 and episode.verdict.reason == "verifier failed: RuntimeError: no idea"
    assert begin(None, ResponseEnvironment()).verdict.reason.startswith("verifier failed: ValueError: reset(")


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_step_whose_reward_is_no_number_ends_the_episode(reward):
    env = GuessEnvironment()
    env.step = lambda action: ({}, reward, False, False, {"message": {"role": "user", "content": "go on"}})
    assert advance(begin(PROMPT, env), response("1"), env, 9).verdict.parts["failed"] == 1.0


def test_a_policy_cannot_show_itself_images():
    env = GuessEnvironment()
    env.step = lambda action: ({}, 0.0, False, False, {"message": {"role": "user", "content": "go on"}})
    episode = advance(begin(PROMPT, env), response("look: <image>"), env, 9)
    assert sum(m["content"].count("<image>") for m in episode.prompt.messages) == len(episode.prompt.images)


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"message": "go on"},
        {"message": {"role": "assistant", "content": "me"}},
        {"message": {"role": "user"}},
        {"message": {"role": "user", "content": "<image>"}},
        {"message": {"role": "user", "content": "no image"}, "images": (b"x",)},
    ],
)
def test_an_answer_that_is_none_is_named(info):
    env = GuessEnvironment()
    env.step = lambda action: ({}, 0.0, False, False, info)
    with pytest.raises(BrokenEnvironment, match="GuessEnvironment.step g"):
        advance(begin(PROMPT, env), response("1"), env, 9)


def test_stitched_rollout_masks_what_the_environment_wrote():
    turns = [
        response("a", [1, 2], [10, 11, 12], version=4),
        response("b", [1, 2, 10, 11, 12, 90, 91], [13], version=4),
        response("c", [1, 2, 10, 11, 12, 90, 91, 13, 92], [14, 15], version=6),
    ]
    whole, mask = stitch(turns)
    assert whole.prompt_token_ids.tolist() == [1, 2]
    assert whole.token_ids.tolist() == [10, 11, 12, 90, 91, 13, 92, 14, 15]
    assert mask.tolist() == [True, True, True, False, False, True, False, True, True]
    assert whole.logp.tolist() == [-1, -2, -3, 0, 0, -1, 0, -1, -2]
    assert whole.versions.tolist() == [4, 4, 4, 4, 4, 4, 4, 6, 6] and whole.oldest_version == 4
    assert (whole.text, whole.finish_reason, whole.index) == ("c", "stop", 2)
    assert (whole.token_ids.dtype, whole.logp.dtype, whole.versions.dtype, mask.dtype) == (
        np.int32, np.float32, np.int32, np.bool_,
    )  # fmt: skip
    assert whole.token_ids[mask].tolist() == [t for turn in turns for t in turn.token_ids.tolist()]


def test_one_response_is_stitched_to_itself():
    only = response("a", [1, 2], [10, 11], version=3)
    whole, mask = stitch([only])
    assert mask.all() and whole.token_ids.tolist() == [10, 11] and whole.versions.tolist() == [3, 3]


def test_a_prompt_that_was_tokenised_anew_is_refused():
    turns = [response("a", [1, 2], [10, 11]), response("b", [1, 2, 1011, 90], [13])]
    with pytest.raises(ValueError, match="p: the prompt of turn 1 does not go on from the tokens before it"):
        stitch(turns)


TEMPLATE = jinja2.Environment(keep_trailing_newline=True).from_string(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def chatml(messages):
    return TEMPLATE.render(messages=messages)


def test_continuation_is_what_the_template_puts_between_two_responses():
    message = {"role": "user", "content": "too low"}
    between = continuation(chatml, message, "<|im_end|>", ended=False)
    assert between == "<|im_end|>\n<|im_start|>user\ntoo low<|im_end|>\n<|im_start|>assistant\n"
    assert continuation(chatml, message, "<|im_end|>", ended=True) == between.removeprefix("<|im_end|>")
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "3"}, message]
    assert chatml(conversation) == chatml(conversation[:1]) + "3" + between
    with pytest.raises(ValueError, match="does not end a response with '</s>'"):
        continuation(chatml, message, "</s>", ended=True)


def test_an_episode_is_a_value():
    env = GuessEnvironment()
    start = begin(PROMPT, env)
    after = advance(start, response("1"), env, 9)
    assert start.rollouts == () and len(after.rollouts) == 1 and after.prompt != start.prompt
    assert replace(start, reward=0.0).prompt is PROMPT
