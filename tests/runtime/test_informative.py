"""Which groups dynamic sampling keeps, what it says of the others, and when it gives up."""

import pytest

from prism_ray.config.runtime import HIGHEST, LOWEST, LoopSettings
from prism_ray.runtime.informative import Informative, TooFewInformative
from prism_ray.runtime.protocols import Ticket


def group(low: float, high: float, what: str = "accuracy") -> Ticket:
    return Ticket(0, "p", 0, None, stats={f"{LOWEST}{what}": low, f"{HIGHEST}{what}": high, "rollout/seconds": 1.0})


def filtered(limit: int = 10, step: int = 2, what: str | None = "accuracy") -> Informative:
    return Informative(LoopSettings(dynamic_sampling=what, dynamic_sampling_limit=limit, groups_per_step=step))


def test_groups_that_vary_are_kept_and_others_counted():
    seen = filtered()
    assert [seen.keeps(group(*r)) for r in ((0, 1), (1, 1), (0, 0), (0.25, 0.5), (0.0, 0.0))] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert seen.metrics() == {
        "reward/dropped_share": 0.6,
        "reward/dropped_right_share": 0.2,
        "reward/dropped_wrong_share": 0.4,
    }
    assert seen.metrics() == {}, "nothing was judged since"
    seen.keeps(group(0, 1))
    assert seen.metrics()["reward/dropped_share"] == 0


def test_without_dynamic_sampling_every_group_is_kept_and_nothing_is_asked_of_the_judge():
    seen = filtered(what=None)
    assert seen.keeps(Ticket(0, "p", 0, None))
    assert seen.metrics() == {}


def test_what_must_vary_is_chosen_by_name():
    ticket = group(0, 1)
    ticket.stats.update(group(0.2, 0.2, "reward").stats)
    assert filtered(what="accuracy").keeps(ticket)
    assert not filtered(what="reward").keeps(ticket)


def test_a_part_the_judge_does_not_note_is_refused_with_those_it_does():
    with pytest.raises(ValueError, match=r"dynamic_sampling is 'acuracy', but .* notes accuracy; name one of those"):
        filtered(what="acuracy").keeps(group(0, 1))
    with pytest.raises(ValueError, match="notes nothing that could vary"):
        filtered().keeps(Ticket(0, "p", 0, None))


@pytest.mark.parametrize(("value", "words"), [(1.0, "too easy.*harder prompts"), (0.0, "too hard.*easier prompts")])
def test_too_many_groups_alike_end_the_loop_with_what_to_change(value, words):
    seen = filtered(limit=3, step=2)
    assert seen.keeps(group(0, 1))
    for _ in range(6):
        assert not seen.keeps(group(value, value))
    with pytest.raises(TooFewInformative, match=rf"^7 groups were alike in accuracy .* while 1 of the 2 .*{words}"):
        seen.keeps(group(value, value))


def test_the_limit_is_counted_anew_for_every_batch_worth_of_groups():
    seen = filtered(limit=3, step=2)
    for _ in range(10):
        for ticket in [group(1, 1)] * 6 + [group(0, 1)] * 2:
            seen.keeps(ticket)
    assert seen.metrics()["reward/dropped_share"] == 0.75
