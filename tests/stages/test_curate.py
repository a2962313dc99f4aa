"""Curation: the results from hand-written parts, and one run with a real engine, killed and continued."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.config.curate import CurateSettings
from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.testbed import TestbedSettings
from prism_ray.corpora.curation import statistics_of
from prism_ray.corpora.reader import RowOrder, find_fragments
from prism_ray.corpora.references import FIELDS, facts_of, row_of
from prism_ray.corpora.rows import prompt_from_row
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout, Ticket, Verdict
from prism_ray.report.progress import Progress
from prism_ray.response import render
from prism_ray.stages.curate import CurateError, Parts, _batches, _prompts, _Rooms, check_inputs, write_results
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary

ROOT = Path(__file__).resolve().parents[2]


def png(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def corpus(tmp_path):
    """Twelve prompts: number i is right in i of 10 rollouts, and has a reference if it is even."""
    turns = ({"role": "user", "content": "<image>how many?"},)
    rows = [
        row_of(Prompt(f"p{i}", turns, (png(i),), render("a", "b", str(i)) if i % 2 == 0 else "", str(i), "s"))
        for i in range(12)
    ]
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(FIELDS)), path, row_group_size=5)
    return path


def settings(corpus, *overrides: str) -> CurateSettings:
    plain = [f"prompts=[{corpus}]", f"output={corpus.parent / 'out'}", "policy=nowhere"]
    return load_config(CurateSettings, None, [*plain, *overrides])


def filled(chosen: CurateSettings) -> tuple[RowOrder, Parts]:
    """The parts as sampling would have left them, five prompts each."""
    order, parts = RowOrder(find_fragments(chosen.prompts), chosen.seed), Parts(chosen.output / "parts")
    held = []
    for position, prompt in _prompts(chosen, order, 12):
        right = min(10, int(prompt.ground_truth))
        verdicts = [Verdict(0, True, parts={"accuracy": float(i < right), "format": 1.0}) for i in range(10)]
        row = statistics_of(Group(0, prompt, ()), position)
        judged = sum(v.parts["accuracy"] for v in verdicts)
        row |= {"rollouts": 10, "right": int(judged), "pass_rate": judged / 10, "accuracy": judged / 10}
        held.append(row | {"texts": [render("a", "b", str(prompt.ground_truth)), render("other", "b", "c"), "broken"]})
        if position % 5 == 4:
            parts.write(held, position + 1)
            held = []
    parts.write(held, 12)
    return order, parts


def test_prompts_go_where_their_pass_rates_send_them(corpus):
    chosen = settings(corpus)
    order, parts = filled(chosen)
    summary = write_results(chosen, order, parts, 12)
    rl = pq.read_table(chosen.output / "rl.parquet").to_pylist()
    assert {row["id"]: row["pass_rate"] for row in rl} == {f"p{i}": i / 10 for i in range(2, 9)}
    teacher = pq.read_table(chosen.output / "teacher.parquet").to_pylist()
    assert [(row["id"], row["rank"]) for row in teacher] == [("p0", 0)]
    again = prompt_from_row(next(row for row in rl if row["id"] == "p4"))
    assert again.images == (png(4),) and again.ground_truth == "4" and again.reference == render("a", "b", "4")
    assert facts_of(chosen.output / "rl.parquet") == summary == json.loads((chosen.output / "summary.json").read_text())
    assert (summary["for_rl"], summary["never_right"], summary["always_right"]) == (7, 1, 2)
    assert summary["pass_rates"]["0"] == 1 and summary["pass_rates"]["1"] == 2
    statistics = pq.read_table(chosen.output / "statistics.parquet")
    assert sorted(statistics["position"].to_pylist()) == list(range(12))
    assert json.loads(statistics.schema.metadata[b"prism_ray"]) == summary


def test_pairs_name_images_that_are_there(corpus):
    chosen = settings(corpus)
    order, parts = filled(chosen)
    summary = write_results(chosen, order, parts, 12)
    lines = [json.loads(line) for line in (chosen.output / "warmup.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {f"p{i}#0" for i in range(0, 12, 2)}
    assert summary["pairs"] == summary["prompts_with_pairs"] == 6
    for line in lines:
        assert list(line) == ["id", "image", "question", "teacher_caption", "teacher_cot", "student_caption",
                              "student_cot"]  # fmt: skip
        number = int(line["id"].removeprefix("p").removesuffix("#0"))
        assert (chosen.output / line["image"]).read_bytes() == png(number)
        assert line["student_caption"] == "<caption>other</caption>"


def test_other_bounds_need_no_new_rollouts(corpus):
    order, parts = filled(settings(corpus))
    chosen = settings(corpus, "low=0.5", "high=0.6", "pairs_per_prompt=0")
    summary = write_results(chosen, order, parts, 12)
    assert pq.read_table(chosen.output / "rl.parquet")["right"].to_pylist() in ([5, 6], [6, 5])
    assert summary["pairs"] == 0
    fewer = write_results(settings(corpus), order, parts, 7)
    assert fewer["prompts"] == 7


def test_bad_settings_and_another_policy_in_the_same_folder(corpus, tmp_path):
    with pytest.raises(ConfigError, match="low must not exceed high"):
        settings(corpus, "low=0.9")
    build_tiny(tmp_path / "policy", vocabulary(), TinyModelSettings(layers=1), seed=0)
    check_inputs(settings(corpus, f"policy={tmp_path / 'policy'}"))
    check_inputs(settings(corpus, f"policy={tmp_path / 'policy'}", "low=0.3", "hardest=3", "limit=3"))
    with pytest.raises(CurateError, match="made with another rollout; choose another output"):
        check_inputs(settings(corpus, f"policy={tmp_path / 'policy'}", "rollout.group_size=3"))
    with pytest.raises(FileNotFoundError):
        check_inputs(settings(corpus))


class HandWritten:
    """Prompts, rollouts and verdicts without a cluster: 12 rows, of which some cannot be used."""

    def __init__(self, start: int, unusable: tuple[int, ...]) -> None:
        self.position, self.unusable = start, unusable
        self.sampled: list[str] = []

    async def take(self) -> tuple[str, int, Any]:
        while self.position in self.unusable:
            self.position += 1
        position = self.position
        self.position += 1
        ref: asyncio.Future[Prompt] = asyncio.get_running_loop().create_future()
        ref.set_result(Prompt(f"p{position}", ({"role": "user", "content": "q"},), ground_truth="1"))
        return f"p{position}", position, ref

    async def sample(self, prompts, count, temperature) -> list[Group]:
        self.sampled += [prompt.id for prompt in prompts]
        await asyncio.sleep(0.01)
        none, logp = np.zeros(2, np.int32), np.zeros(2, np.float32)
        rollouts = [Rollout("p", i, none, none, logp, none, f"text {i}", "stop") for i in range(count)]
        return [Group(i, prompt, tuple(rollouts)) for i, prompt in enumerate(prompts)]

    async def judge(self, ticket: Ticket) -> Ticket:
        parts = {"accuracy": 1.0, "format": 1.0}

        async def ref() -> Group:
            return ticket.ref.judged([Verdict(1, True, parts=parts)] * len(ticket.ref.rollouts))

        return replace(ticket, ref=ref())


def sampled(
    chosen: CurateSettings, parts: Parts, unusable: tuple[int, ...], stop_after: int | None = None
) -> list[str]:
    """Ids of the prompts that are sampled on; `stop_after` so many files the work is cancelled."""
    rooms: Any = HandWritten(parts.next, unusable)

    async def work() -> None:
        with Progress("curate", 12) as progress:
            task = asyncio.create_task(_batches(chosen, _Rooms(rooms, rooms, rooms), parts, 12, progress))
            while stop_after is not None and len(parts.files) < stop_after:
                await asyncio.sleep(0.001)
            if stop_after is not None:
                task.cancel()
            await asyncio.wait({task})
            if stop_after is None:
                task.result()

    asyncio.run(work())
    return rooms.sampled


@pytest.mark.parametrize("unusable", [(), (4,), (10, 11), (0, 5, 6, 7, 8, 11)])
def test_a_stopped_run_goes_on_after_its_last_whole_batch(corpus, unusable):
    chosen = settings(corpus, "batch=3", "rollout.group_size=2")
    parts = Parts(chosen.output / "parts")
    sampled(chosen, parts, unusable, stop_after=1)
    finished, usable = parts.next, [i for i in range(12) if i not in unusable]
    assert 0 < finished < 12 and len(list(parts.rows(12, texts=False))) % 3 == 0
    again = sampled(chosen, parts, unusable)  # in any order: batches overlap
    assert sorted(again, key=lambda name: int(name[1:])) == [f"p{i}" for i in usable if i >= finished]
    assert [row["position"] for row in parts.rows(12, texts=False)] == usable
    assert parts.next == 12, "what cannot be used at the end is not looked for again"
    assert next(parts.rows(12, texts=True))["texts"] == ["text 0", "text 1"]


def launch(policy: Path, corpus: Path, output: Path) -> subprocess.Popen:
    command = [
        sys.executable, str(ROOT / "jobs" / "curate.py"), f"prompts=[{corpus}]", f"policy={policy}", f"output={output}",
        "verify.environment=tests.stages.coin_environment:tests/Coin-v0", "batch=4", "cluster.cpus=2",
        "rollout.cpus_per_engine=0.5", "rollout.group_size=4", "rollout.max_response_tokens=48",
        "rollout.kv_cache_gb=0.1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_run_that_is_killed_goes_on_without_repeating_what_was_done(tmp_path):
    sizes = TestbedSettings(pretrain=1, base=1, sft=1, align=1, rlvr=40, evaluate=1, evaluate_unseen=1)
    corpus = write_corpora(tmp_path / "corpora", sizes, 0)["rlvr"]
    build_tiny(tmp_path / "policy", vocabulary(), TinyModelSettings(embedding_std=0.1), seed=0)
    output = tmp_path / "out"
    first = launch(tmp_path / "policy", corpus, output)
    deadline = time.monotonic() + 400
    while not (parts := list((output / "parts").glob("*.parquet"))):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0][-4000:]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = {path: path.stat().st_mtime_ns for path in (output / "parts").glob("*.parquet")}
    assert len(parts) <= len(done) < 10, "killed in the middle"

    second = launch(tmp_path / "policy", corpus, output)
    said, _ = second.communicate(timeout=400)
    assert second.returncode == 0, said[-4000:]
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was done was done again"
    statistics = pq.read_table(output / "statistics.parquet").to_pylist()
    assert [row["position"] for row in statistics] == list(range(40))
    assert len({row["id"] for row in statistics}) == 40
    assert all(row["rollouts"] == 4 and row["tokens"] > 0 for row in statistics)
    rl = pq.read_table(output / "rl.parquet").to_pylist()
    assert {row["id"] for row in rl} == {row["id"] for row in statistics if 0.2 <= row["pass_rate"] <= 0.8}
    assert 0 < len(rl) < 40
    assert "pass rates of 40 prompts" in said and "done: " in said
