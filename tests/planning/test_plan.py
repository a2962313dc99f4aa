"""What a plan says of a configuration, and what it refuses with which setting to change."""

import json
import re
import sys
from pathlib import Path

import pytest

from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.planning.architecture import PlanError
from prism_ray.planning.hardware import Hardware, parse_cluster
from prism_ray.planning.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FOUR = CONFIGS / "nodes" / "4.yaml"
SIZES = ("4b", "8b")


def planned(files: list[Path], *overrides: str, cluster: str = "1x8", **more):
    settings = load_config(RunSettings, files, overrides)
    return make_plan(settings, Hardware(parse_cluster(cluster, 192, 0), **more))


def of(size: str) -> Path:
    return CONFIGS / f"qwen3_vl_{size}.yaml"


@pytest.mark.parametrize("size", SIZES)
def test_the_published_configurations_are_possible_on_one_node_and_on_four(size):
    assert planned([of(size)]).problems == []
    assert planned([of(size), FOUR], cluster="4x8").problems == []


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_so_are_they_with_every_recipe(recipe):
    assert planned([of("8b"), FOUR, recipe], cluster="4x8").problems == []


@pytest.mark.parametrize("size", SIZES)
def test_the_papers_own_numbers_are_possible_as_their_files_name_them(size):
    published = ("align.loop.groups_per_step=4", "align.updates=500", "learner.ranks=4")
    assert all(override in FOUR.read_text() for override in published)
    found = planned([of(size), FOUR], *published, "discriminator.ranks=4", cluster="4x8")
    assert found.problems == []
    every = ("trainer.ranks=32", "sft.batch=64", "sft.steps=21400")
    assert all(override in FOUR.read_text() for override in every)
    assert planned([of(size), FOUR], *every, cluster="4x8").problems == []
    synchronous = ("align.loop.max_staleness=0", "rlvr.loop.max_staleness=0")
    assert planned([of(size)], *synchronous).problems == []


def test_the_testbed_is_possible_on_a_laptop():
    found = make_plan(load_config(RunSettings, CONFIGS / "tiny.yaml"), Hardware(parse_cluster("1x0", 2, 0), node_gib=8))
    assert found.problems == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.gradient_checkpointing=false", "a trainer rank needs .* set trainer.gradient_checkpointing to true"),
        ("learner.gradient_checkpointing=false", "a learner rank needs .*learner.gradient_checkpointing to true"),
        ("discriminator.gradient_checkpointing=false", "a judge rank needs .*discriminator.gradient_checkpointing"),
        ("discriminator.optimiser.offload=none", "a judge rank needs .* but its 0.75 of a GPU has 59.7 GiB"),
        ("discriminator.gpus_per_scorer=0.1", "a scorer needs .* raise discriminator.gpus_per_scorer"),
        ("learner.zero_stage=1", None),
        ("rollout.engines=4", r"asks for 9 GPUs in stage align \(rollout.engines = 4: 4"),
        ("rollout.gpus_per_engine=16", r"rollout.gpus_per_engine = 16"),
        ("learner.ranks=5", "align.loop.groups_per_step is 4 but a group stays on one of learner.ranks = 5"),
        ("align.loop.groups_per_step=1", "align.loop.groups_per_step is 1 but a group stays on one of learner.ranks"),
        ("sft.batch=12", "sft.batch is 12 but trainer.ranks is 8; make sft.batch a multiple"),
        ("rollout.kv_cache_gb=1", "cache holds .* tokens but one rollout may have rollout.max_model_len = 10240"),
        ("rollout.kv_cache_gb=70", "an engine needs .* lower rollout.kv_cache_gb"),
        ("cluster.object_store_mb=1000", "cluster.object_store_mb is 1000; raise it to 33858 or more"),
        ("discriminator.ranks=5", "align.loop.groups_per_step is 4 but every one of discriminator.ranks = 5"),
    ],
)
def test_what_cannot_be_is_refused_with_the_setting_to_change(override, says):
    problems = planned([of("4b")], override).problems
    if says is None:
        assert problems == []
    else:
        assert any(re.search(says, problem) for problem in problems), problems


def test_a_smaller_gpu_and_a_smaller_node_are_refused():
    assert any("an engine" in p for p in planned([of("8b")], gpu_gib=24).problems)
    assert any("in its own memory in stage" in p for p in planned([of("8b")], node_gib=64).problems)
    assert any("set runs to a larger disk" in p for p in planned([of("8b")], disk_gib=100).problems)


def test_a_policy_of_unknown_size_is_refused(tmp_path):
    with pytest.raises(PlanError, match="policy: .*mine is not there"):
        planned([of("4b")], f"policy={tmp_path / 'mine'}")


def test_the_colocated_layout_counts_what_the_learner_keeps_while_engines_sample():
    shared = (
        "cluster.layout=colocated", "rollout.sleep_level=2", "rollout.engines=4",
        "align.loop.max_staleness=0", "rlvr.loop.max_staleness=0",
        "discriminator.gpus_per_rank=1", "discriminator.gpus_per_scorer=1",
    )  # fmt: skip
    assert planned([of("4b")], *shared, "rollout.kv_cache_gb=30").problems == []
    (problem,) = planned([of("4b")], *shared, "rollout.kv_cache_gb=50").problems
    assert "an engine needs" in problem and "beside what a learner rank keeps there" in problem


def test_weights_that_are_set_aside_for_engines_are_counted_where_they_lie():
    def held(way: str, *overrides: str, actor: str = "learner rank"):
        usages = planned([of("4b")], f"rollout.weights={way}", *overrides).usages
        return next(usage.memory for usage in usages if usage.actor == actor)

    plain, engine = held("shared_memory"), held("shared_memory", actor="engine")
    assert held("nccl").weights - plain.weights == held("gloo").host - plain.host == engine.weights > 0
    assert held("sparse_nccl").weights - plain.weights == 2 * engine.weights and held("gloo").weights == plain.weights
    shared = ("cluster.layout=colocated", "rollout.sleep_level=2", "rollout.engines=4", "rollout.kv_cache_gb=30")
    turns = ("align.loop.max_staleness=0", "rlvr.loop.max_staleness=0")
    assert held("ipc", *shared, *turns).weights == held("nccl").weights


def test_a_judges_activations_are_those_of_a_whole_group():
    def held(*overrides: str) -> int:
        (rank,) = [u for u in planned([of("4b")], *overrides).usages if u.actor == "judge rank"]
        return rank.memory.activations

    few = held("discriminator.rollouts_per_update=4")
    assert 2.5 * few < held() < 3.5 * few, "the prompt, and 17 responses in place of 5"


def test_a_judge_that_is_served_elsewhere_is_not_counted():
    small = ("discriminator.gpus_per_rank=0.5", "discriminator.ranks=5")  # too small, and too many for four groups
    served = ("align.judge=serve", "served.url=http://judge:8000")
    assert len(planned([of("4b")], "stages=[align, rlvr]", *small).problems) > 1
    found = planned([of("4b")], "stages=[align, rlvr]", *small, *served)
    assert found.problems == [] and [usage.actor for usage in found.usages] == ["engine", "learner rank"]
    own = planned([of("4b")], "stages=[align, rlvr]")
    state, own_state = ({i.name: i.bytes for i in p.disk}["align/state, two checkpoints"] for p in (found, own))
    assert "align/discriminator" not in {item.name for item in found.disk} and state < own_state
    assert found.flows[0].judge_s == 0 < own.flows[0].judge_s
    warmed = planned([of("4b")], "stages=[warmup, align]", small[0], *served)
    assert any("a judge rank needs" in problem for problem in warmed.problems), "a warm-up is always of its own judge"


def test_flow_tells_the_bottleneck_and_asynchrony_shortens_an_update():
    asynchronous, in_turn = (
        {flow.stage: flow for flow in planned([of("4b")], f"rlvr.loop.max_staleness={k}").flows}["rlvr"] for k in (1, 0)
    )
    assert asynchronous.sequences == 2 * in_turn.sequences == 1024
    assert asynchronous.update_s == max(asynchronous.generate_s, asynchronous.train_s)
    assert in_turn.update_s > asynchronous.update_s
    assert (in_turn.staleness, asynchronous.bottleneck) == (0, "generation")
    assert 0 < asynchronous.staleness <= 1


def run(capsys, *argv: str) -> tuple[int, str, str]:
    sys.path.insert(0, str(ROOT))
    from jobs.plan import main

    code = main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_job_prints_tables_and_ends_with_0(capsys):
    code, out, err = run(capsys, "--config", str(of("4b")))
    assert (code, err) == (0, "")
    for word in ("policy 4.44 billion", "4 x learner", "gradients", "waits for", "align/state, two checkpoints"):
        assert word in out


def test_the_job_ends_with_2_and_the_reasons(capsys):
    code, _, err = run(capsys, "--config", str(of("4b")), "rollout.engines=9", "--cluster", "1x8")
    assert code == 2 and err.startswith("impossible: the configuration asks for ")
    code, _, err = run(capsys, "--config", str(of("4b")), "--cluster", "eight")
    assert code == 2 and "--cluster is 'eight' but should be NODESxGPUS" in err
    code, _, err = run(capsys, "--config", str(of("4b")), "--measured", str(ROOT / "no"))
    assert code == 2 and "has no metrics.jsonl" in err


def test_measured_rates_take_the_place_of_assumed_ones(capsys, tmp_path):
    row = {
        "stage": "align", "time/step_s": 40.0, "learner/wait_share": 0.5, "rollout/tokens_per_second": 3000.0,
        "rollout/engines": 3.0, "rollout/response_tokens": 1500.0,
    }  # fmt: skip
    cold = row | {"time/step_s": 4000.0, "rollout/tokens_per_second": 1.0}
    lines = "".join(json.dumps(r | {"step": i, "time": 0}) + "\n" for i, r in enumerate([cold] * 4 + [row] * 4))
    (tmp_path / "metrics.jsonl").write_text(lines)
    code, out, _ = run(capsys, "--config", str(of("4b")), "--measured", str(tmp_path))
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("│ align") and "measured" in line]
    assert " 32 " in line, "64 rollouts of 1,500 tokens at 3,000 a second"


def test_a_learner_that_never_waited_is_the_bottleneck_whatever_its_engines_sampled(capsys, tmp_path):
    row = {
        "stage": "align", "time/step_s": 40.0, "learner/wait_share": 0.01, "rollout/tokens_per_second": 2400.0,
        "rollout/engines": 3.0, "rollout/response_tokens": 1500.0, "step": 1, "time": 0,
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    code, out, _ = run(capsys, "--config", str(of("4b")), "--measured", str(tmp_path))
    (line,) = [line for line in out.splitlines() if line.startswith("│ align") and "measured" in line]
    assert code == 0 and "the learner" in line
