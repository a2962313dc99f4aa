"""The placement plan on a real Ray cluster of several nodes, whose GPUs are only pretended."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("placement_program.py"))],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_cluster_is_seen_as_it_is_head_first(found):
    assert found["nodes"] == [[2, 0, True], [6, 4, False], [6, 4, False]]


def test_an_engines_gpus_are_on_one_node_and_the_learners_ranks_together(found):
    split = found["split"]
    ((engine, gpus),) = split["engine"]
    assert len(gpus) == 2
    assert len({node for node, _ in split["learner"]}) == 1, "packed"
    assert len({tuple(gpus) for _, gpus in split["learner"]}) == 4, "a GPU each"
    assert split["learner"][0][0] != engine, "there was no room beside it"


def test_judge_and_scorer_take_parts_of_gpus_that_nobody_else_has(found):
    taken = {(node, gpu) for kind in ("engine", "learner") for node, gpus in found["split"][kind] for gpu in gpus}
    parts = {(node, gpu) for node, gpus in found["split"]["judge"] for gpu in gpus}
    assert not parts & taken and len(parts) <= 2
    assert found["split"]["nothing to reserve"] == {}


def test_who_waits_for_resources_is_told_within_the_limit(found):
    split = found["split"]
    assert split["pending_s"] < 30
    assert split["pending"].startswith(
        "rollout.engines = 2 (1 x 2 GPUs and 1 CPU) cannot be placed: the cluster has 8 GPUs and 14 CPUs on 3 nodes, "
    )
    assert "lower rollout.engines or what each of them books" in split["pending"]
    assert "waited 1 s; raise cluster.pending_timeout_s" in split["pending"]


def test_a_successor_takes_the_place_of_the_engine_that_died(found):
    assert found["split"]["successor"][0][0] == found["split"]["engine"][0][0]


def test_what_is_given_back_is_free(found):
    assert found["split"]["free after"] == found["colocated"]["free after"] == 8, "also what was refused"


def test_a_learner_rank_shares_the_gpu_of_its_engine(found):
    pairs = found["colocated"]["pairs"]
    assert all(engine == rank for engine, rank in pairs)
    assert pairs[0][0] != pairs[1][0]
    assert pairs[0][0][0] == pairs[1][0][0], "on one node, so that the other stays whole; Ray would have spread them"


def test_groups_go_elsewhere_where_somebody_else_has_the_plans_node(found):
    ((other, _),) = found["occupied"]["other"]
    assert {node for node, _ in found["occupied"]["learner"]}.isdisjoint({other})
    assert found["occupied"]["free after"] == 8


def test_a_plan_that_does_not_fit_is_refused_and_a_cluster_that_grows_is_waited_for(found):
    sentence = "the configuration asks for 12 GPUs in stage align (learner.ranks = 12: 12) but the cluster has 8; "
    assert found["refused"].startswith(sentence) and "waited 1 s" in found["refused"]
    assert found["refused at once"].startswith(sentence) and "waited" not in found["refused at once"]
    assert found["grown"] == ""


def test_the_plan_of_a_live_cluster_is_of_its_nodes_with_the_coordinator_on_the_head(found):
    code, out, err = found["live"]
    assert (code, err) == (0, "")
    (row,) = [line for line in out.splitlines() if "coordinator" in line]
    assert found["head"] in row
