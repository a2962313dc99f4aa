"""A changed setting re-runs its stage and those after it, and nothing else."""

import asyncio
from pathlib import Path

from prism_ray.stages.pipeline import Outcome, Stage, finish, finished, key_of, plan, prepare


async def nothing() -> Outcome:
    return Outcome(1, None)


def build(base=1, sft=1, align=1, rlvr=1) -> dict[str, Stage]:
    needs = {"base": (), "sft": ("base",), "align": ("sft",), "rlvr": ("align",), "other": ("base",)}
    settings = {"base": base, "sft": sft, "align": align, "rlvr": rlvr, "other": 0}
    return {n: Stage(n, needs[n], {"value": settings[n]}, nothing) for n in needs}


def run_all(folder: Path, stages: dict[str, Stage], wanted=("rlvr", "other")) -> list[str]:
    ran, keys = [], {}
    for stage in plan(stages, wanted):
        keys[stage.name] = key_of(stage, keys)
        if prepare(folder / stage.name, keys[stage.name]):
            continue
        (folder / stage.name / "checkpoint").mkdir()
        finish(folder / stage.name, keys[stage.name], asyncio.run(stage.run()), 0.1)
        ran.append(stage.name)
    return ran


def test_each_stage_runs_once_then_only_what_changed(tmp_path):
    assert run_all(tmp_path, build()) == ["base", "sft", "align", "rlvr", "other"]
    assert run_all(tmp_path, build()) == []
    assert run_all(tmp_path, build(align=2)) == ["align", "rlvr"]
    assert run_all(tmp_path, build(align=2, sft=3)) == ["sft", "align", "rlvr"]
    assert run_all(tmp_path, build(align=2, sft=3, base=0)) == ["base", "sft", "align", "rlvr", "other"]


def test_only_what_is_wanted_and_its_needs_is_planned():
    assert [s.name for s in plan(build(), ["align"])] == ["base", "sft", "align"]


def test_unfinished_outputs_of_the_same_settings_stay_and_of_others_go(tmp_path):
    assert not prepare(tmp_path / "align", "a")
    (tmp_path / "align" / "state").mkdir()
    assert not prepare(tmp_path / "align", "a")
    assert (tmp_path / "align" / "state").exists(), "a killed stage resumes"
    assert not prepare(tmp_path / "align", "b")
    assert not (tmp_path / "align" / "state").exists(), "a checkpoint of other settings must not be resumed"


def test_what_finish_wrote_is_found(tmp_path):
    prepare(tmp_path, "a")
    finish(tmp_path, "a", Outcome(7, tmp_path / "checkpoint"), 2.5)
    done = finished(tmp_path)
    assert done == {"key": "a", "updates": 7, "seconds": 2.5, "checkpoint": str(tmp_path / "checkpoint")}
    assert finished(tmp_path / "nowhere") is None
