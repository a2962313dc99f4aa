"""What a run leaves behind when a stage warns, or fails: incidents, a summary and a page, whatever happens."""

import asyncio
import json
import logging

import pytest

from prism_ray.config.run import RunSettings
from prism_ray.report.incidents import read_incidents
from prism_ray.stages import run as module
from prism_ray.stages.pipeline import Outcome, Stage

log = logging.getLogger("prism_ray.rollout.pool")


@pytest.fixture
def settings(tmp_path, monkeypatch, cluster):
    """A run of two stages that start nothing: `sft` warns and ends well, `warmup` fails."""

    async def sft():
        log.warning("engine-0 died; a new one has taken its place")
        return Outcome(3, None)

    async def warmup():
        raise ValueError("the accuracy is too low\nraise warmup.max_steps")

    stages = {"sft": Stage("sft", (), {}, sft), "warmup": Stage("warmup", ("sft",), {}, warmup)}
    monkeypatch.setattr(module, "stages_of", lambda _: stages)
    monkeypatch.setattr(module, "corpora_of", lambda _: {})
    return RunSettings(runs=tmp_path, name="r", stages=["sft", "warmup"])


def test_a_run_keeps_what_failed_and_was_recovered_with_the_stage_it_was_at(settings, tmp_path):
    with pytest.raises(ValueError, match="accuracy is too low"):
        asyncio.run(module.run(settings))
    found = [(i["stage"], i["level"], i["room"], i["what"]) for i in read_incidents(tmp_path / "r")]
    assert found == [
        ("sft", "WARNING", "rollout", "engine-0 died; a new one has taken its place"),
        ("warmup", "ERROR", "stages", "warmup failed: ValueError: raise warmup.max_steps"),
    ]
    page = (tmp_path / "r" / "report.html").read_text()
    assert "engine-0 died" in page and "warmup failed: ValueError" in page and "warmup (failed)" in page


def test_a_page_that_cannot_be_written_costs_the_run_nothing(settings, tmp_path, monkeypatch):
    def broken(_):
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_report", broken)
    asyncio.run(module.run(settings.model_copy(update={"stages": ["sft"]})))
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "completed"
    assert "report.html could not be written: OSError: no space left" in read_incidents(tmp_path / "r")[-1]["what"]
