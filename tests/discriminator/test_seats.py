"""Who gets which waiting groups: pure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prism_ray.discriminator.dispatch import UNKNOWN, Seat, share_out
from prism_ray.runtime.supervision import Watched


def seat(version: int = 5, groups: int = 0, leaving: bool = False) -> Seat:
    return Seat(Watched("scorer 0", None, 1.0), None, version, groups, leaving)


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(0, 4), st.integers(1, 8))
def test_every_group_goes_to_one_process_the_first_come_first_and_none_gets_too_many(tokens, seats, most):
    batches = share_out(tokens, seats, most)
    assert len(batches) == seats and all(len(batch) <= most for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(min(len(tokens), seats * most)))
    assert all(batch == sorted(batch) for batch in batches)


def test_the_least_loaded_process_gets_the_next_group():
    assert share_out([100, 10, 10, 10, 10], 2) == [[0], [1, 2, 3, 4]]
    assert share_out([1, 1, 1, 1], 2) == [[0, 2], [1, 3]], "no process idles while another has a batch"
    assert share_out([0, 0, 0], 3) == [[0], [1], [2]], "groups whose size is not known count as one each"


def test_a_process_works_only_when_it_is_free_and_its_weights_are_new_enough():
    assert seat(5).may_work(5, 0) and seat(4).may_work(5, 1)
    assert not seat(3).may_work(5, 1), "too far behind"
    assert not seat(6).may_work(5, 1), "of a future that a checkpoint has undone"
    assert not seat(UNKNOWN).may_work(0, 1)
    assert not seat(5, groups=1).may_work(5, 0) and not seat(5, leaving=True).may_work(5, 0)
