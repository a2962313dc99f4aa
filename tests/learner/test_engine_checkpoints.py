"""A checkpoint read by new processes: to the bit on as many ranks, dropout included; on others up to rounding."""

import shutil

import pytest
import torch

from prism_ray.config.learner import LoraSettings
from prism_ray.models.batch import Sample

COMMON = {"lr": 1e-3, "grad_clip": 0.5, "warmup_steps": 2, "schedule": "linear", "weight_decay": 0.1}
LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
RANDOM = {
    "whole0": {"settings": {"zero_stage": 0}, "attention_dropout": 0.1},
    "whole2": {"settings": {"zero_stage": 2}, "attention_dropout": 0.1},
    "lora1": {"settings": {"zero_stage": 1, "lora": LORA.model_dump(), "precision": "bfloat16"}},
    "lora3": {"settings": {"zero_stage": 3, "lora": LORA.model_dump()}},
}
STILL = LORA.model_copy(update={"dropout": 0.0}).model_dump()
MOVED = {
    "moved0": {"settings": {"zero_stage": 0}},
    "moved1": {"settings": {"zero_stage": 1}},
    "moved2": {"settings": {"zero_stage": 2, "freeze": [r"^model\.visual\."]}},
    "moved3": {"settings": {"zero_stage": 3, "lora": STILL}},
}
RESTAGED = {"settings": {"zero_stage": 2}, "load": "moved1"}
REFUSED = {
    "other stage": {"settings": {"zero_stage": 3}, "load": "moved1"},
    "no zero": {"settings": {"zero_stage": 0}, "load": "moved1"},
    "damaged": {"settings": {"zero_stage": 1}, "load": "damaged"},
}


@pytest.fixture(scope="module")
def inputs(policy_folder, encoder, make_group, tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    prompts = encoder.prompts([make_group(i, image=i % 2 == 0).prompt for i in range(2)])
    samples = [
        Sample(p, torch.randint(260, 280, (n,), generator=generator)) for p, n in zip(prompts, (4, 9), strict=True)
    ]
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    return {"policy": policy_folder, "samples": samples, "tokens": 13, "common": COMMON, "checkpoints": checkpoints}


@pytest.fixture(scope="module")
def unbroken(inputs, run_ranks):
    return run_ranks("train", 2, inputs | {"kinds": RANDOM | MOVED})


@pytest.fixture(scope="module")
def on_one_rank(inputs, unbroken, run_ranks):
    kinds = {name: kind | {"load": name, "save_as": f"{name}_by_one"} for name, kind in MOVED.items()}
    return run_ranks("resume", 1, inputs | {"kinds": kinds | {"restaged": RESTAGED}})[0]


@pytest.fixture(scope="module")
def on_two_ranks(inputs, on_one_rank, run_ranks):
    """Resumed as they were saved, those that one rank saved, and what must be refused."""
    folder = inputs["checkpoints"]
    shutil.copytree(folder / "moved1_by_one", folder / "damaged")
    next((folder / "damaged").glob("*optim_states.pt")).unlink()
    kinds = {name: kind | {"load": name} for name, kind in RANDOM.items()}
    kinds |= {name: kind | {"load": f"{name}_by_one"} for name, kind in MOVED.items()}
    return run_ranks("resume", 2, inputs | {"kinds": kinds | REFUSED})


def assert_close(ours, theirs, start):
    """Equal up to 1e-4 of the change since `start`, which Adam's division makes of rounding."""
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert [r.lr for r in ours["reports"]] == [r.lr for r in theirs["reports"]]
    assert [r.grad_norm for r in ours["reports"]] == pytest.approx([r.grad_norm for r in theirs["reports"]], rel=1e-4)
    names = start.keys()
    assert ours["weights"].keys() == theirs["weights"].keys() == names
    error = sum(float((ours["weights"][n] - theirs["weights"][n]).double().square().sum()) for n in names)
    change = sum(float((theirs["weights"][n] - start[n]).double().square().sum()) for n in names)
    assert error**0.5 < 1e-4 * change**0.5


@pytest.mark.parametrize("name", RANDOM)
def test_the_next_three_steps_are_those_of_an_unbroken_run_to_the_bit(unbroken, on_two_ranks, name):
    for before, after in zip(unbroken, on_two_ranks, strict=True):
        ours, theirs = after[name], before[name]["after"]
        assert ours["losses"] == theirs["losses"]
        assert ours["reports"] == theirs["reports"]
        assert ours["draws"] == theirs["draws"]
        assert all(torch.equal(ours["weights"][n], weight) for n, weight in theirs["weights"].items())


@pytest.mark.parametrize("name", MOVED)
def test_one_rank_goes_on_where_two_were(unbroken, on_one_rank, name):
    assert_close(on_one_rank[name], unbroken[0][name]["after"], unbroken[0][name]["start"])


@pytest.mark.parametrize("name", MOVED)
def test_two_ranks_go_on_where_one_was(unbroken, on_two_ranks, name):
    for before, after in zip(unbroken, on_two_ranks, strict=True):
        assert_close(after[name], before[name]["after"], before[name]["start"])


def test_zero_2_goes_on_where_zero_1_was(unbroken, on_one_rank):
    assert_close(on_one_rank["restaged"], unbroken[0]["moved1"]["after"], unbroken[0]["moved1"]["start"])


def test_nothing_but_checkpoints_is_left_of_a_conversion(inputs, on_two_ranks):
    names = {path.name for path in inputs["checkpoints"].iterdir() if path.is_dir()}
    saved = {*RANDOM, *MOVED, *(f"{name}_by_one" for name in MOVED), "damaged"}
    assert names == saved
    assert not (inputs["checkpoints"] / "latest_universal").exists()


def test_a_checkpoint_of_a_zero_stage_that_cannot_be_read_says_which_to_set(on_two_ranks):
    for rank in on_two_ranks:
        for name, stage in (("other stage", 3), ("no zero", 0)):
            assert f"cannot be read with zero_stage {stage}; set zero_stage to 1" in rank[name]


def test_a_conversion_that_fails_on_rank_0_is_told_to_all(on_two_ranks):
    assert "damaged cannot be converted for another number of ranks: " in on_two_ranks[0]["damaged"]
    assert on_two_ranks[1]["damaged"].endswith("see rank 0")
