"""Warm-up on a real discriminator's actor, with hand-written rollouts in place of the engines'."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.config.load import load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.run import RunSettings
from prism_ray.discriminator.model import create_discriminator
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.discriminator.probes import PROBES, Examination
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout
from prism_ray.report.metrics import MetricsLog, read_metrics
from prism_ray.report.summary import Summary
from prism_ray.response import render
from prism_ray.stages import warmup
from prism_ray.stages.session import Session
from prism_ray.stages.warmup import WORST_FILE, WeakDiscriminator, _question, _sample, _train, run_warmup
from prism_ray.verify.answer import truth_of

VIEW_NAMES = ("perception", "reasoning")

REFERENCE = render(" red one two", " max one", " one")
SMALL = [
    "warmup.prompts_per_step=4", "warmup.rollouts=2", "warmup.held_out_prompts=6", "warmup.max_steps=6",
    "warmup.min_steps=2", "discriminator.optimiser.lr=3e-3", "discriminator.micro_batch_tokens=512",
]  # fmt: skip


class HandWritten:
    """Rollouts shorter than the reference in every view, or all equal to it."""

    def __init__(self, same: bool) -> None:
        self.same = same

    async def sample(self, prompts: list[Prompt], count: int) -> list[Group]:
        texts = (
            (REFERENCE, REFERENCE) if self.same else (render(" red", " max", " two"), render(" red two", "", " two"))
        )
        none, logp = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return [
            Group(n, p, tuple(Rollout(p.id, i, none, none, logp, none, texts[i], "stop") for i in range(count)))
            for n, p in enumerate(prompts)
        ]


class Endless:
    """Prompts one after the other."""

    taken = 0

    async def take(self) -> tuple[str, int, Any]:
        pixels = np.random.default_rng(self.taken).integers(0, 255, (32, 64, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        messages = ({"role": "user", "content": "<image> count red"},)
        prompt = Prompt(f"prompt-{self.taken}", messages, (data.getvalue(),), REFERENCE, ground_truth="one")
        self.taken += 1

        async def ref() -> Prompt:
            return prompt

        return prompt.id, self.taken, ref()


@pytest.fixture(scope="module")
def folder(cluster, tmp_path_factory):
    made = tmp_path_factory.mktemp("warmup")
    sizes = TinyModelSettings(hidden_size=64, layers=2, heads=2, key_value_heads=1, mlp_size=96, vision_mlp_size=64)
    build_tiny(made / "policy", ["red", "one", "two", "max", "count"], sizes, seed=0)
    settings = load_config(RunSettings, None, SMALL).discriminator
    create_discriminator(made / "policy", made / "judge", settings, seed=0)
    return made


def warm_up(folder, runs, *overrides: str, same: bool = False, start: str = "judge"):
    """Train with these settings; the steps taken, the rows of metrics and the session's folder."""
    settings = load_config(RunSettings, None, [f"runs={runs}", *SMALL, *overrides])
    metrics = MetricsLog(runs / "tiny")
    session = Session(settings, metrics, Summary(runs / "tiny", "tiny"))
    session.stage_folder("warmup").mkdir(parents=True)
    engines: Any = HandWritten(same)
    stream: Any = Endless()

    async def scenario() -> int:
        judge = await DiscriminatorPool.start(
            folder / start, settings.discriminator, 128, options={"num_cpus": 1}, truth=truth_of
        )
        try:
            return await _train(session, "warmup", engines, judge, stream)
        finally:
            judge.shutdown()

    try:
        return asyncio.run(scenario()), session
    finally:
        metrics.close()


def test_a_warm_up_stops_at_its_target_and_says_how_good_the_judge_is(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "prism_ray"):
        steps, session = warm_up(folder, tmp_path, "warmup.target_accuracy=0.9", "warmup.max_steps=40")
    assert 2 <= steps < 40
    rows = read_metrics(session.folder / "metrics.jsonl")
    last = rows[-1]
    assert last["step"] == steps == rows[-2]["step"], "the examination is a row of its own"
    for view in VIEW_NAMES:
        assert 0 <= last[f"discriminator/calibration_error/{view}_held_out"] <= 1
        assert last[f"discriminator/pair_accuracy/{view}_held_out"] >= 0.9
        for probe in PROBES:
            assert 0 <= last[f"discriminator/probe/{probe}/{view}"] <= 1
        assert f"{view} pairs are ordered rightly" in caplog.text
    assert last["discriminator/probe/length/perception"] == 1.0
    assert "warmup: length alone orders 1.00 of the held-out perception pairs" in caplog.text
    assert rows[0]["discriminator/canary_gap"] == 0.0 and "discriminator/canary_gap" not in rows[1]


def test_what_is_reached_is_what_the_last_weights_reach(folder, tmp_path, monkeypatch):
    """Not what earlier ones did, where warm-up ends at an odd step."""
    measured = []

    async def measure(self, groups):
        measured.append(self.version)
        return {f"discriminator/pair_accuracy/{view}": float(self.version < 3) for view in VIEW_NAMES}

    async def examine(self, groups, worst):
        return Examination(await measure(self, groups), [], [])

    monkeypatch.setattr(DiscriminatorPool, "measure", measure)
    monkeypatch.setattr(DiscriminatorPool, "examine", examine)
    monkeypatch.setattr(warmup, "_report", lambda *_: None)
    with pytest.raises(WeakDiscriminator, match="after 4 warm-up steps"):
        warm_up(folder, tmp_path, "warmup.target_accuracy=0.9", "warmup.min_steps=3", "warmup.max_steps=4")
    assert measured == [2, 3, 4, 4]


def test_the_pairs_it_is_most_wrong_about_are_written_with_their_ids_even_if_it_is_too_weak(folder, tmp_path):
    with pytest.raises(WeakDiscriminator, match="after 2 warm-up steps the held-out pair accuracy is"):
        warm_up(
            folder, tmp_path, "warmup.target_accuracy=1", "warmup.max_steps=2",
            "discriminator.optimiser.lr=1e-9", "warmup.held_out_prompts=12",
        )  # fmt: skip
    lines = (tmp_path / "tiny" / "warmup" / WORST_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    counts = {view: sum(row["view"] == view for row in rows) for view in VIEW_NAMES}
    assert set(counts.values()) == {10}
    held_out = {f"prompt-{i}" for i in range(12)}
    assert all(row["prompt_id"] in held_out and row["rollout"] in (0, 1) for row in rows)
    for view in VIEW_NAMES:
        gaps = [row["gap"] for row in rows if row["view"] == view]
        assert gaps == sorted(gaps)
    assert all(row["response"] != row["reference"] and row["image"] for row in rows)


def test_a_view_without_a_differing_pair_counts_as_untaught(folder, tmp_path):
    with pytest.raises(WeakDiscriminator, match="is 0.00 .perception., 0.00 .reasoning."):
        warm_up(folder, tmp_path, "warmup.max_steps=1", same=True)
    assert (tmp_path / "tiny" / "warmup" / WORST_FILE).read_text() == ""


def test_whole_responses_are_warmed_up_on_as_one_view_and_a_watched_view_is_not_waited_for(folder, tmp_path):
    watched = "{name: seen, tags: [caption], weight: 0}, {name: rest, tags: [think, answer]}"
    for name, views in (("whole", "{name: whole, tags: [caption, think, answer]}"), ("watched", watched)):
        override = f"discriminator.views=[{views}]"
        settings = load_config(RunSettings, None, [*SMALL, override]).discriminator
        create_discriminator(folder / "policy", folder / name, settings, seed=0)
        with pytest.raises(WeakDiscriminator) as error:
            warm_up(folder, tmp_path / name, override, "warmup.max_steps=1", "warmup.target_accuracy=1", start=name,
                    same=True)  # fmt: skip
        assert f"0.00 ({'whole' if name == 'whole' else 'rest'})" in str(error.value) and "seen" not in str(error.value)


def test_pairs_that_were_written_before_need_no_engines_and_no_question_is_on_both_sides(folder, tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(60):
        pixels = np.random.default_rng(number // 3).integers(0, 255, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number // 3}.png")
        row = {"id": f"{number}", "image": f"images/{number // 3}.png", "question": " count red"}
        row |= {"teacher_caption": "<caption> red one two</caption>"}
        row |= {"teacher_cot": "<think> max one</think><answer> one</answer>"}
        row |= {"student_caption": "<caption> red</caption>", "student_cot": "<think> max</think><answer> two</answer>"}
        lines.append(json.dumps(row | ({"student_cot": None} if number == 30 else {})))
    (tmp_path / "warmup.jsonl").write_text("\n".join(lines))
    settings = load_config(
        RunSettings,
        None,
        [f"runs={tmp_path}", *SMALL, f"data.warmup=[{tmp_path / 'warmup.jsonl'}]", "warmup.target_accuracy=0.9",
         "warmup.max_steps=30"],
    )  # fmt: skip
    metrics = MetricsLog(tmp_path / "tiny")
    session = Session(settings, metrics, Summary(tmp_path / "tiny", "tiny"))
    session.stage_folder("warmup").mkdir(parents=True)
    try:
        outcome = asyncio.run(
            run_warmup(session, "warmup", folder / "policy", settings.data.warmup, written=True)  # engines would fail
        )
    finally:
        metrics.close()
    assert session._pool is None and (outcome.checkpoint / "config.json").exists()
    last = read_metrics(session.folder / "metrics.jsonl")[-1]
    assert all(last[f"discriminator/pair_accuracy/{view}_held_out"] >= 0.9 for view in VIEW_NAMES)
    (bad,) = pq.read_table(session.quarantine).to_pylist()
    assert bad["reason"] == "student_caption, student_cot: missing" and bad["unit"] == "byte"


def test_a_reserved_question_is_passed_over():
    stream: Any = Endless()
    first = asyncio.run(_sample(HandWritten(False), stream, 3, 1, set()))
    again: Any = Endless()
    later = asyncio.run(_sample(HandWritten(False), again, 2, 1, {_question(g.prompt) for g in first}))
    assert [g.prompt.id for g in later] == ["prompt-3", "prompt-4"]
