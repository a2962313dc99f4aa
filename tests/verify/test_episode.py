"""Episodes without Ray and without an engine: what the environment, the tokens and the limits make of them."""

from dataclasses import replace

import numpy as np
import pytest

from prism_ray.config.models import TinyModelSettings
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout
from prism_ray.testbed.scene import encode_png
from prism_ray.verify.environment import ResponseEnvironment
from prism_ray.verify.episode import Limits, Table, advance, begin
from prism_ray.verify.judging import BrokenEnvironment

PROMPT = Prompt("p", ({"role": "user", "content": "<image>which number?"},), (b"first",), ground_truth="5")
MORE = {"message": {"role": "user", "content": "go on"}}


class GuessEnvironment(ResponseEnvironment):
    """Says whether a guess is too low or too high, shows a picture after the second, and pays for a hit."""

    picture = b""
    made = 0

    def __init__(self):
        super().__init__()
        type(self).made += 1

    def reset(self, *, seed=None, options=None):
        self.prompt, self.guesses, self.seed = options["prompt"], 0, seed
        return {}, {}

    def step(self, action):
        self.guesses += 1
        if action == "raise":
            raise RuntimeError("no idea")
        guess, wanted = int(action), int(self.prompt.ground_truth)
        if guess == wanted:
            return (
                {},
                0.5,
                True,
                False,
                {"accuracy": 1.0, "format": 1.0, "valid": True, "reason": "", "seed": self.seed},
            )
        said = "too low" if guess < wanted else "too high"
        info = {"message": {"role": "user", "content": said}}
        if self.guesses == 2:
            info = {"message": {"role": "user", "content": f"<image>{said}"}, "images": (self.picture,)}
        return {}, 0.125, False, False, info


class Policy:
    """Writes what it is told, in a tokenizer's tokens, as an engine hands it over."""

    def __init__(self, folder):
        self.encoder = Encoder(folder, 200)

    def says(self, rollout, text, version=0, finish_reason="stop"):
        ids = self.encoder.response(text) if finish_reason == "stop" else self.encoder.response(text)[:-1]
        new = np.asarray(ids, np.int32)
        mask = rollout.mask
        return replace(
            rollout,
            token_ids=np.concatenate([rollout.token_ids, new]),
            logp=np.concatenate([rollout.logp, np.full(len(new), -1, np.float32)]),
            versions=np.concatenate([rollout.versions, np.full(len(new), version, np.int32)]),
            mask=None if mask is None else np.concatenate([mask, np.ones(len(new), np.bool_)]),
            text=text,
            finish_reason=finish_reason,
        )


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    build_tiny(folder, ["too", "low", "high"], TinyModelSettings(), seed=0)
    return Policy(folder)


@pytest.fixture(autouse=True)
def guesses(ask_picture, monkeypatch):
    monkeypatch.setattr(GuessEnvironment, "picture", ask_picture)
    monkeypatch.setattr(GuessEnvironment, "made", 0)


@pytest.fixture(scope="module")
def ask_picture():
    return encode_png(np.zeros((64, 96, 3), np.uint8))


def table(policy, **limits):
    usual = {"max_turns": 9, "max_prompt_tokens": 200, "max_response_tokens": 200, "max_images": 2}
    return Table(GuessEnvironment, policy.encoder, Limits(**usual | limits))


def group_of(count):
    none = np.zeros(0, np.int32)
    nothing = (Rollout("p", i, none, none, np.zeros(0, np.float32), none, "", "abort") for i in range(count))
    return Group(7, PROMPT, tuple(nothing))


def play(policy, at, *scripts, group=None, verdicts=(), cut=None):
    """Turns of a group whose rollout i says what script i has, one text a turn; `cut` names one that ends too early.
    Returns the groups after each turn and the last verdicts."""
    group, groups = group or group_of(len(scripts)), []
    for turn in range(max(map(len, scripts))):
        said = tuple(
            policy.says(r, scripts[i][turn], turn, "length" if scripts[i][turn] == cut else "stop")
            if not verdicts or verdicts[i] is None
            else r
            for i, r in enumerate(group.rollouts)
        )
        group, verdicts, told = at.turn(replace(group, rollouts=said), verdicts)
        groups.append(group)
    return groups, verdicts, told


def test_environment_answers_and_the_policy_goes_on(policy):
    groups, verdicts, told = play(policy, table(policy), ["3", "8", "5"], ["5"])
    last = groups[-1]
    assert [len(g.verdicts) for g in groups] == [0, 0, 2] and told["open"] == 0
    assert last.verdicts == tuple(verdicts)
    assert [(v.reward, v.valid) for v in verdicts] == [(0.75, True), (0.5, True)], "the steps' rewards are added up"
    assert [v.parts["turns"] for v in verdicts] == [3.0, 1.0] and told["stats"]["verify/turns"] == 2.0
    long, short = last.rollouts
    assert [(m["role"], m["content"]) for m in long.turns] == [
        ("assistant", "3"), ("user", "too low"), ("assistant", "8"), ("user", "<image>too high"),
    ]  # fmt: skip
    assert long.images == (GuessEnvironment.picture,) and long.text == "5" and long.finish_reason == "stop"
    assert (short.mask, short.turns, short.images) == (None, (), ()), "one turn is an episode too"
    assert [r.finish_reason for r in groups[0].rollouts] == ["abort", "stop"], "only one of them goes on"


def test_what_the_environment_wrote_is_masked_and_says_nothing_of_the_policy(policy):
    groups, _, told = play(policy, table(policy), ["3", "8", "5"])
    whole, encoder = groups[-1].rollouts[0], policy.encoder
    own = [*encoder.response("3"), *encoder.response("8"), *encoder.response("5")]
    assert whole.token_ids[whole.mask].tolist() == own and whole.sampled == len(own)
    assert whole.last_response.tolist() == encoder.response("5")
    assert not whole.logp[~whole.mask].any() and (whole.logp[whole.mask] == -1).all()
    assert whole.versions[whole.mask].tolist() == [0, 0, 1, 1, 2, 2]
    steps = np.diff(whole.versions)
    assert (steps >= 0).all() and whole.mask[1:][steps > 0].all(), "versions change with the policy's tokens"
    assert told["tokens"] == len(whole.token_ids) == len(whole.logp) == len(whole.mask)
    assert {a.dtype.name for a in (whole.token_ids, whole.versions)} == {"int32"} and whole.logp.dtype == np.float32
    text = encoder.tokenizer.decode(whole.token_ids)
    assert text.count("<|image_pad|>") == 6 and text.replace("<|image_pad|>", "") == (
        "3<|im_end|>\n<|im_start|>user\ntoo low<|im_end|>\n<|im_start|>assistant\n"
        "8<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>too high<|im_end|>\n<|im_start|>assistant\n"
        "5<|im_end|>"
    )


@pytest.mark.parametrize(
    ("limits", "script", "cut", "reward", "reason"),
    [
        ({"max_turns": 2}, ["1", "2"], None, 0.25, "not over after 2 turns"),
        ({}, ["1", "2"], "2", 0.25, "response 2 was cut"),
        ({"max_response_tokens": 10}, ["1"], None, 0.125, "no room for response 2"),
    ],
)
def test_an_episode_that_does_not_end_is_ended(policy, limits, script, cut, reward, reason):
    _, (verdict,), _ = play(policy, table(policy, **limits), script, cut=cut)
    assert (verdict.reward, verdict.valid, verdict.reason) == (reward, False, reason)
    assert verdict.parts["unfinished"] == 1.0 and verdict.parts["turns"] == len(script)


@pytest.mark.parametrize(
    ("limits", "script", "reason"),
    [
        ({}, ["1", "raise"], "verifier failed: RuntimeError: no idea"),
        ({}, ["1", "x"], "verifier failed: ValueError: invalid literal"),
        ({"max_images": 1}, ["1", "2"], "the environment shows image 2, but rollout.max_images is 1"),
    ],
)
def test_a_turn_that_fails_costs_its_rollout_alone(policy, limits, script, reason):
    groups, verdicts, told = play(policy, table(policy, **limits), script, ["1", "5"])
    assert verdicts[0].reward == 0.0 and verdicts[0].reason.startswith(reason)
    assert verdicts[0].parts["failed"] == 1.0 and verdicts[1].reward == 0.625
    assert told["stats"]["verify/failed"] == 0.5 and len(groups[-1].verdicts) == 2


def test_a_picture_that_does_not_decode_costs_its_rollout(policy, monkeypatch):
    monkeypatch.setattr(GuessEnvironment, "picture", b"no picture")
    _, (verdict,), _ = play(policy, table(policy), ["1", "2"])
    assert verdict.reward == 0.0 and "image 0 does not decode" in verdict.reason and verdict.parts["failed"] == 1.0


def test_an_environment_that_cannot_begin_costs_its_rollout(policy):
    group = replace(group_of(1), prompt=replace(PROMPT, ground_truth="x"))
    _, (verdict,), _ = play(policy, table(policy), ["1"], group=group)
    assert verdict.reason.startswith("verifier failed: ValueError")
    assert begin(PROMPT, None, 0).verdict.reason.startswith("verifier failed: AttributeError")


def test_an_environment_that_was_lost_is_brought_back_to_where_it_was(policy):
    first, later = table(policy), table(policy)
    groups, verdicts, _ = play(policy, first, ["1", "8"], ["9", "2"])
    _, (one, two), _ = play(policy, later, ["5"], ["5"], group=groups[-1], verdicts=verdicts)
    assert (one.reward, two.reward) == (0.75, 0.75) and (one.parts["turns"], two.parts["turns"]) == (3.0, 3.0)
    _, (same, _), _ = play(policy, first, ["5"], ["5"], group=groups[-1], verdicts=verdicts)
    assert same.parts["seed"] == one.parts["seed"] != two.parts["seed"], "played again with the same seed"


def test_one_that_answers_otherwise_when_played_again_costs_its_rollout(policy):
    groups, verdicts, _ = play(policy, table(policy), ["1"], ["1"])
    changed = replace(
        groups[-1].rollouts[0], turns=({"role": "assistant", "content": "9"}, groups[-1].rollouts[0].turns[1])
    )
    group = replace(groups[-1], rollouts=(changed, groups[-1].rollouts[1]))
    _, (one, two), _ = play(policy, table(policy), ["5"], ["5"], group=group, verdicts=verdicts)
    assert one.reward == 0.0 and one.reason.endswith("played again the environment answered otherwise")
    assert two.reward == 0.625


def test_environments_are_used_again(policy):
    at = table(policy)
    for number in range(3):
        play(policy, at, ["1", "5"], ["5"], group=replace(group_of(2), id=number))
    assert GuessEnvironment.made == 2


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_step_whose_reward_is_no_number_ends_the_episode(reward):
    env = GuessEnvironment()
    env.step = lambda action: ({}, reward, False, False, MORE)
    assert advance(begin(PROMPT, env, 0), "1", False, env, 9).verdict.parts["failed"] == 1.0
    env.step = lambda action: ({}, "much", False, False, MORE)
    with pytest.raises(BrokenEnvironment, match="GuessEnvironment.step gives no number for reward"):
        advance(begin(PROMPT, env, 0), "1", False, env, 9)


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
        advance(begin(PROMPT, env, 0), "1", False, env, 9)


def test_an_episode_is_a_value():
    env = GuessEnvironment()
    start = begin(PROMPT, env, 0)
    after = advance(start, "1", False, env, 9)
    assert (start.turns, start.reward) == ((), 0.0) and len(after.turns) == 2 and after.reward == 0.125
    with pytest.raises(ValueError, match="the episode is over"):
        advance(advance(after, "5", False, env, 9), "5", False, env, 9)
