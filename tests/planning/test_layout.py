"""Which actors a stage reserves what for, and on which nodes they would lie."""

import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.run import RunSettings
from prism_ray.planning.layout import Bundle, Group, Layout, Misfit, Node, assign, layout, layouts, whole_run

GPUS = (
    "rollout.engines=3", "rollout.gpus_per_engine=1", "rollout.cpus_per_engine=4", "learner.ranks=4",
    "learner.gpus_per_rank=1", "learner.cpus_per_rank=4", "trainer.ranks=8", "trainer.gpus_per_rank=1",
    "discriminator.gpus_per_rank=0.75", "discriminator.scorers=1", "discriminator.gpus_per_scorer=0.25",
)  # fmt: skip
ALIGN = ("stages=[sft, warmup, align, rlvr, evaluate]", "policy=somewhere/Qwen3-VL-4B")


def settings(*overrides: str) -> RunSettings:
    return load_config(RunSettings, None, list(overrides))


def totals(of: Layout, resource: str = "GPU") -> dict[str, float]:
    found: dict[str, float] = {}
    for group in of.groups:
        kind = group.name.rstrip(" 0123456789")
        found[kind] = found.get(kind, 0) + group.total(resource)
    return {kind: amount for kind, amount in found.items() if amount}


def test_every_stage_reserves_what_it_uses_and_no_more():
    gpus = {of.stage: totals(of) for of in layouts(settings(*GPUS, *ALIGN))}
    engines, judge = {"engine": 3}, {"judge ranks": 0.75, "scorer": 0.25}
    assert gpus == {
        "sft": {"trainer": 8},  # before engines are started it may have all GPUs
        "warmup": engines | judge,
        "align": engines | {"learner": 4} | judge,
        "rlvr": engines | {"learner": 4},
        "evaluate": engines,
    }


def test_a_supervised_stage_after_engines_were_started_must_leave_them_their_gpus():
    first = layouts(settings(*GPUS, "policy=x", "stages=[sft, references]"))
    later = layouts(settings(*GPUS, "policy=x", "stages=[sft, align, references]"))
    assert totals(first[-1]) == {"trainer": 8}
    assert totals(later[-1]) == {"engine": 3, "trainer": 8}
    with pytest.raises(Misfit, match="asks for 11 GPUs in stage references .rollout.engines = 3: 3, trainer.ranks = 8"):
        assign(later[-1], [Node("a", 100, 8)])


def test_learner_and_engine_share_their_gpus_in_the_colocated_layout():
    s = settings(
        *GPUS, *ALIGN, "cluster.layout=colocated", "rollout.sleep_level=1", "rollout.engines=4",
        "rollout.kv_cache_gb=20", "align.loop.max_staleness=0", "rlvr.loop.max_staleness=0",
    )  # fmt: skip
    of = layout("align", s)
    assert totals(of) == {"engine": 4, "judge ranks": 0.75, "scorer": 0.25}
    assert of.groups[0].bundles == (Bundle(8, 1),), "the CPUs of both"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("align.loop.max_staleness=1", "align.loop.max_staleness = 1 cannot be had; set it to 0"),
        ("rlvr.loop.max_staleness=2", "rlvr.loop.max_staleness = 2 cannot be had; set it to 0"),
        ("rollout.engines=3", "learner.ranks is 4 and rollout.engines 3; make them equal"),
        ("rollout.gpus_per_engine=2", "rollout.gpus_per_engine and learner.gpus_per_rank must both be 1"),
        ("learner.gpus_per_rank=0", "rollout.gpus_per_engine and learner.gpus_per_rank must both be 1"),
        ("rollout.kv_cache_gb=null", "rollout.kv_cache_gb must be a number"),
        ("rollout.sleep_level=0", "set rollout.sleep_level to 1 or 2"),
    ],
)
def test_what_engines_that_sleep_cannot_do_is_refused(override, says):
    good = [
        *GPUS, "cluster.layout=colocated", "rollout.sleep_level=1", "rollout.engines=4", "align.loop.max_staleness=0",
        "rlvr.loop.max_staleness=0",
    ]  # fmt: skip
    settings(*good)
    with pytest.raises(ConfigError, match=re.escape(says)):
        settings(*good, override)


def group(name: str, *gpus: float, strategy: str = "anywhere", cpus: float = 1) -> Group:
    return Group(name, tuple(Bundle(cpus, g) for g in gpus), strategy, f"x.{name} = {len(gpus)}")  # type: ignore[arg-type]


def where(*groups: Group, nodes: list[Node]) -> dict:
    return assign(Layout("align", groups), nodes)


FOUR = [Node("head", 16, head=True), *(Node(f"n{i}", 96, 8) for i in range(4))]


def test_ranks_are_packed_by_node_and_engines_fill_what_is_left():
    engines = [group(f"engine {i}", 2) for i in range(3)]
    found = where(*engines, group("learner", *[1] * 8, strategy="pack"), nodes=FOUR)
    assert len(set(found["learner"])) == 1, "all ranks on one node"
    assert {found[f"engine {i}"][0] for i in range(3)} == {"n0"}, "engines beside each other, so that nodes stay free"
    assert found["learner"][0] != "n0"


def test_ranks_fill_a_node_that_is_in_use_before_they_open_another():
    found = where(group("engine 0", 4), group("learner", *[1] * 4, strategy="pack"), nodes=FOUR)
    assert set(found["learner"]) == {found["engine 0"][0]}


def test_ranks_that_fit_on_no_single_node_lie_on_as_few_as_can_be():
    found = where(group("engine 0", 4), group("learner", *[1] * 16, strategy="pack"), nodes=FOUR)["learner"]
    assert len(set(found)) == 2 and all(found.count(node) == 8 for node in set(found))


def test_actors_without_gpus_stay_off_the_nodes_that_have_some():
    large = [Node("head", 500, head=True), *FOUR[1:]]
    assert where(group("readers", 0, 0), nodes=large)["readers"] == ("head", "head")


def test_parts_of_a_gpu_share_one_and_do_not_add_up_over_two():
    one = [Node("a", 9, 1)]
    assert where(group("judge ranks", 0.75), group("scorer 0", 0.25), nodes=one)
    with pytest.raises(Misfit, match="x.scorer 0 = 1 asks for 0.5 GPUs and 1 CPU on one node in stage align but"):
        where(group("judge ranks", 0.75, 0.75), group("scorer 0", 0.5), nodes=[Node("a", 9, 2)])


def test_an_engine_larger_than_a_node_is_refused_by_name():
    with pytest.raises(Misfit, match="asks for 16 GPUs and 1 CPU on one node but the largest node has 8 GPUs"):
        where(group("engine 0", 16), nodes=FOUR)


def test_a_cluster_that_is_too_small_is_told_who_asks_for_what():
    with pytest.raises(Misfit) as told:
        assign(layout("align", settings(*GPUS, *ALIGN)), [Node("a", 100, 4)])
    assert str(told.value) == (
        "the configuration asks for 8 GPUs in stage align (rollout.engines = 3: 3, learner.ranks = 4: 4, "
        "discriminator.ranks = 1: 0.75, discriminator.scorers = 1: 0.25) but the cluster has 4; lower one of these or "
        "what each books, or use a larger cluster"
    )


def test_what_lies_somewhere_already_stays_there_and_counts():
    plan = Layout("run", (group("engine 0", 4), group("engine 1", 4), group("learner", *[1] * 8, strategy="pack")))
    found = assign(plan, FOUR, {"engine 0": ("n2",), "learner": ("n0",) * 8})
    assert found == {"engine 0": ("n2",), "learner": ("n0",) * 8, "engine 1": ("n2",)}


def test_the_plan_of_a_whole_run_holds_what_may_run_at_once():
    def names(*overrides: str) -> list[str]:
        return [g.name for g in whole_run(settings(*GPUS, *overrides))]

    engines = ["engine 0", "engine 1", "engine 2"]
    assert names("stages=[align]") == [*engines, "learner", "judge ranks", "scorer 0"]
    assert names("stages=[rlvr]") == [*engines, "learner"]
    assert names("stages=[evaluate]") == engines
    served = ("align.judge=serve", "served.url=http://judge:8000")
    assert names("stages=[align]", *served) == [*engines, "learner"]
    assert names("stages=[warmup, align]", *served) == [*engines, "learner", "judge ranks", "scorer 0"]


BUNDLES = st.lists(st.sampled_from([0, 0.25, 0.5, 1, 2, 4]), min_size=1, max_size=4)


@hypothesis_settings(deadline=None)
@given(st.lists(st.tuples(BUNDLES, st.sampled_from(["pack", "anywhere"])), max_size=5), st.integers(1, 3))
def test_no_node_ever_holds_more_than_it_has(wanted, count):
    nodes = [Node(f"n{i}", 8, 4) for i in range(count)]
    groups = [group(f"g{i}", *gpus, strategy=how) for i, (gpus, how) in enumerate(wanted)]
    try:
        placed = where(*groups, nodes=nodes)
    except Misfit:
        return
    for node in nodes:
        lie = [b for g in groups for b, n in zip(g.bundles, placed[g.name], strict=True) if n == node.name]
        assert sum(b.cpus for b in lie) <= 8 and sum(b.gpus for b in lie) <= 4
    assert {name: len(found) for name, found in placed.items()} == {g.name: len(g.bundles) for g in groups}
