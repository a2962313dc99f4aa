"""What is put together of unfinished rollouts, and what is refused as garbage."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_ray.records import Rollout
from prism_ray.rollout.partial import UNFINISHED, Piece, assembled
from prism_ray.rollout.sampling import Garbage, Sampling, check_rollouts


def whole(index, length, reason="stop"):
    ids = np.arange(length, dtype=np.int32) + 100 * index
    arrays = (ids, -ids.astype(np.float32), ids // 10)
    return Rollout("p", index, np.zeros(0, np.int32), *arrays, "", reason)


def told(rollout, edges):
    """The rollout in pieces that end at `edges`."""
    edges = [0, *edges]
    return [_piece(rollout, begin, end) for begin, end in zip(edges, edges[1:], strict=False)]


def _piece(rollout, begin, end):
    reason = rollout.finish_reason if end == len(rollout.token_ids) else UNFINISHED
    parts = (getattr(rollout, name)[begin:end] for name in ("token_ids", "logp", "versions"))
    return Piece(rollout.index, begin, *parts, reason)


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4), st.integers(0, 30), st.integers(0, 30))
def test_pieces_make_the_rollouts_they_were_cut_from(cuts, known, lost):
    rollouts = [whole(i, sum(pieces)) for i, pieces in enumerate(cuts)]
    pieces = []
    for rollout, steps in zip(rollouts, cuts, strict=True):
        pieces += told(rollout, np.cumsum(steps).tolist())
    so_far = assembled("p", [], pieces[:known])
    together = assembled("p", so_far, pieces[known:])
    assert [r.token_ids.tolist() for r in together] == [r.token_ids.tolist() for r in rollouts]
    assert [r.versions.tolist() for r in together] == [r.versions.tolist() for r in rollouts]
    assert {r.finish_reason for r in together} == {"stop"}

    # One piece is lost: the others still tell only what is true, and of its rollout what came before.
    gap = pieces.pop(lost % len(pieces))
    for rollout in assembled("p", [], pieces):
        end = gap.start if rollout.index == gap.index else len(rollouts[rollout.index].token_ids)
        assert rollout.token_ids.tolist() == rollouts[rollout.index].token_ids[:end].tolist()
        assert (rollout.finish_reason == UNFINISHED) == (rollout.index == gap.index)


def test_what_was_told_twice_counts_once():
    rollout = whole(0, 8)
    pieces = told(rollout, [5, 8])
    assert assembled("p", [], [pieces[0], pieces[0], pieces[1], pieces[1]])[0].token_ids.tolist() == list(range(8))


GOOD = replace(whole(0, 3), token_ids=np.arange(3, dtype=np.int32), versions=np.full(3, 4, np.int32))


def changed(name, position, value):
    array = getattr(GOOD, name).copy()
    array[position] = value
    return replace(GOOD, **{name: array})


@pytest.mark.parametrize(
    ("rollouts", "sentence"),
    [
        ([], r"rollouts \[\] where 1 were"),
        ([GOOD, replace(GOOD, index=1)], r"rollouts \[0, 1\] where 1"),
        ([replace(GOOD, logp=GOOD.logp[:2])], "rollout 0 of prompt p with 3 tokens, 2 log-probs and 3 versions"),
        ([replace(GOOD, **{n: np.tile(getattr(GOOD, n), 2) for n in ("token_ids", "logp", "versions")})], "at most 5"),
        ([replace(whole(0, 0), finish_reason="stop")], "no token"),
        ([changed("token_ids", 1, 10)], "token 10 in a vocabulary of 10"),
        ([changed("token_ids", 1, -1)], "token -1 in"),
        ([changed("logp", 2, np.nan)], "not finite"),
        ([changed("logp", 2, -np.inf)], "not finite"),
        ([changed("logp", 2, 0.5)], "a log-prob of 0.5"),
        ([changed("versions", 0, 5)], "versions 4 to 5 while it held 4"),
        ([changed("versions", 0, -1)], "versions -1 to 4"),
    ],
)
def test_garbage_is_refused_with_what_is_wrong(rollouts, sentence):
    with pytest.raises(Garbage, match=sentence):
        check_rollouts(rollouts, Sampling(1, 1.0, 5), 10, 4)


def test_what_a_policy_can_have_sampled_is_accepted():
    for rollout in (GOOD, changed("logp", 0, 1e-6), changed("token_ids", 0, 9)):
        check_rollouts([rollout], Sampling(1, 1.0, 5), 10, 4)


def test_only_what_was_abandoned_may_be_unfinished_or_later_than_the_engine():
    later = replace(changed("versions", 0, 5), finish_reason=UNFINISHED)
    for rollout in (whole(0, 0, UNFINISHED), later):
        check_rollouts([rollout], Sampling(1, 1.0, 5), 10, None)
        with pytest.raises(Garbage, match="an end after . tokens that nobody asked for"):
            check_rollouts([rollout], Sampling(1, 1.0, 5), 10, 9)


def test_a_later_turn_of_an_episode_goes_on_behind_what_the_environment_wrote():
    rollout = whole(0, 6)
    begun = replace(
        rollout,
        token_ids=rollout.token_ids[:4],
        logp=rollout.logp[:4],
        versions=rollout.versions[:4],
        mask=np.array([True, True, False, False]),
        turns=({"role": "assistant", "content": "a"}, {"role": "user", "content": "<image>"}),
        images=(b"later",),
        finish_reason=UNFINISHED,
    )
    (known,) = assembled("p", [begun], [_piece(rollout, 4, 5), _piece(rollout, 5, 6)])
    assert known.token_ids.tolist() == rollout.token_ids.tolist() and known.finish_reason == "stop"
    assert known.mask.tolist() == [True, True, False, False, True, True] and known.sampled == 4
    assert (known.turns, known.images) == (begun.turns, begun.images)
    assert known.last_response.tolist() == rollout.token_ids[4:].tolist()
