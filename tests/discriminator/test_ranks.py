"""Several ranks train the discriminator that one rank would, and say the same of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prism_ray.config.discriminator import DiscriminatorSettings, GuardSettings, ReplaySettings
from prism_ray.config.learner import OptimiserSettings
from prism_ray.discriminator.group import split_groups
from prism_ray.records import Verdict

SAME = ("plain", "divided")
"""Settings whose updates depend on the groups alone; the others draw old pairs, which every rank does for itself."""


def run_ranks(world: int, inputs: dict, folder: Path) -> list:
    torch.save(inputs, folder / "inputs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).with_name("rank_program.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(world), str(port), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)[-4000:]
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def trained(tiny_folder, judged_group, tmp_path_factory):
    """Two steps on one rank and on two, of whom in the second step one has no valid rollout; ZeRO 0 and 2, replay."""
    guard = GuardSettings(patience=1, high_accuracy=0.51, low_accuracy=0.52, gap_closing=None)
    plain = DiscriminatorSettings(
        max_segment_tokens=24, micro_batch_tokens=150, head_dropout=0.0, score_reg=0.1, guard=guard, updates_per_step=2,
        rollouts_per_update=2, optimiser=OptimiserSettings(lr=1e-4, zero_stage=0),
    )  # fmt: skip
    settings = {
        "plain": plain,
        "divided": plain.model_copy(update={"optimiser": OptimiserSettings(lr=1e-4, zero_stage=2)}),
        "replay": plain.model_copy(update={"replay": ReplaySettings(share=0.5, pairs=10)}),
    }
    steps = [
        [[judged_group(0), judged_group(1), judged_group(2)], [judged_group(3)]],
        [[judged_group(4)], [judged_group(5, broken=True), judged_group(6, broken=True)]],
    ]
    folder = tmp_path_factory.mktemp("ranks")
    inputs = {"model": tiny_folder, "settings": settings, "steps": steps, "resume": None}
    one = run_ranks(1, inputs, folder)
    two = run_ranks(2, inputs | {"resume": folder}, folder)
    return one[0], two


@pytest.fixture(scope="module")
def judged_group(group_of, response):
    """A judged group of four rollouts, of which three are valid, or of two that are not."""

    def make(seed: int, broken: bool = False):
        texts = [
            response(" blue three", " max three", " three"),
            response(" green", " two"),
            "broken",
            response(" red"),
        ]
        group = group_of(seed, response(" red one two", " max one", " one"), *(["broken", "no"] if broken else texts))
        views = ("perception", "reasoning")
        verdicts = [Verdict(0.0, not broken, scores={} if broken else dict.fromkeys(views, float(i))) for i in range(4)]
        return replace(group, prompt=replace(group.prompt, ground_truth="one")).judged(verdicts[: len(group.rollouts)])

    return make


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_make_the_update_of_one(trained, name):
    one, two = trained[0][name], [rank[name] for rank in trained[1]]
    for weights in (rank["weights"] for rank in two if rank["weights"]):
        for parameter, expected in one["weights"].items():
            torch.testing.assert_close(weights[parameter], expected, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_say_what_one_does(trained, name):
    one, two = trained[0][name], [rank[name] for rank in trained[1]]
    for step, expected in enumerate(one["metrics"]):
        found = two[0]["metrics"][step]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        other = two[1]["metrics"][step]
        assert other == {k: v for k, v in found.items() if not k.endswith("canary_gap")}, "on every rank"
    assert any("/watch/" in key for key in expected) and any("/router/" in key for key in expected)
    assert two[0]["alarms"] == two[1]["alarms"] and two[0]["notices"] == two[1]["notices"] != []


def test_every_rank_keeps_and_replays_its_own_part(trained):
    one, two = trained[0]["replay"], [rank["replay"] for rank in trained[1]]
    assert one["kept"] == 10 and [rank["kept"] for rank in two] == [5, 3]
    for metrics in (one["metrics"][1], two[0]["metrics"][1]):
        assert metrics["discriminator/replay/share"] == pytest.approx(0.5, abs=0.1)
        assert metrics["discriminator/replay/age"] == 0.0
    assert two[0]["metrics"][1]["discriminator/replay/size"] == 5 + 3


@pytest.mark.parametrize("name", ["divided", "replay"])
def test_two_ranks_go_on_from_what_one_saved(trained, name):
    one, two = trained[0][name], [rank[name] for rank in trained[1]]
    for version, weights, _ in (rank["resumed"] for rank in two):
        assert version == 4
        for parameter, expected in one["weights"].items() if weights else ():
            torch.testing.assert_close(weights[parameter], expected, rtol=1e-5, atol=1e-7, msg=parameter)
    if name == "replay":
        assert 8 <= sum(rank["resumed"][2] for rank in two) <= 10, "dealt out by groups, five pairs at most to each"


def test_groups_are_split_whole_by_tokens_and_in_the_order_of_their_ids():
    parts = split_groups([7, 3, 5, 1], [100, 10, 20, 60], 2)
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3]
    assert sorted(sum([100, 10, 20, 60][i] for i in part) for part in parts) == [90, 100]
    assert all([[7, 3, 5, 1][i] for i in part] == sorted([7, 3, 5, 1][i] for i in part) for part in parts)
    with pytest.raises(ValueError, match=r"1 groups cannot be split over 2 ranks; lower discriminator\.ranks"):
        split_groups([1], [10], 2)
