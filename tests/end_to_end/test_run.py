"""All stages in miniature through the real front door: real vLLM, DeepSpeed, Ray, images; interrupted and continued."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from prism_ray.corpora.reader import RowOrder, find_fragments, prompt_at, read_piece
from prism_ray.models.encode import Encoder
from prism_ray.report.metrics import read_metrics
from prism_ray.runtime.gauges import EVALUATION, INCIDENTS, STEP, exported
from prism_ray.stages.replay import read_record
from tests.rollout.test_runners import by_transformers
from tests.runtime.test_dashboard import queried

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "name=small", "cluster.cpus=2", "trainer.cpus_per_rank=0.5",
    "rollout.cpus_per_engine=0.5", "learner.cpus_per_rank=0.5",
    "evaluate.prompts=8", "evaluate.samples_in_report=2",
    "testbed.pretrain=64", "testbed.base=512", "testbed.sft=64", "testbed.align=48",
    "testbed.rlvr=24", "testbed.evaluate=16", "testbed.evaluate_unseen=4",
    "base.pretrain.steps=4", "base.clean.steps=150", "sft.steps=6",
    "references.steps=2", "references.batch=8",
    "warmup.prompts_per_step=4", "warmup.held_out_prompts=4", "warmup.min_steps=1", "warmup.max_steps=2",
    "warmup.target_accuracy=0",
    "rollout.group_size=4", "rollout.max_response_tokens=64",
    "align.updates=4", "journal.keep=true", "align.loop.groups_per_step=2", "align.loop.checkpoint_every=2",
    "rlvr.updates=2", "rlvr.loop.groups_per_step=2", "rlvr.loop.max_staleness=0",
]  # fmt: skip


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "align.py"), f"runs={folder}", *SMALL, *overrides]


@pytest.mark.timeout(1500)
def test_every_stage_runs_is_interrupted_goes_on_and_is_not_repeated(tmp_path):
    run = tmp_path / "small"
    port = free_port()
    arguments = command(tmp_path, f"cluster.metrics_port={port}")
    first = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    wait_for(lambda: steps(run, "base/clean") >= 1, first)
    wait_for(lambda: "ray_prism_ray_step{" in scraped(port) and 'run="small"' in scraped(port), first)
    wait_for(lambda: steps(run, "align") >= 1, first)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors
    assert "interrupted" in errors
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert (run / "align" / "state" / "latest.json").exists()
    untouched = (run / "sft" / "done.json").stat().st_mtime

    second = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=480)
    assert second.returncode == 0, second.stderr[-4000:]
    assert (run / "sft" / "done.json").stat().st_mtime == untouched, "a finished stage ran again"
    check_summary(run)
    check_metrics(run)
    check_each_prompt_trained_once(run)
    check_checkpoints(run)
    assert "<svg" in (run / "report.html").read_text()
    assert (run / "align" / "discriminator" / "config.json").exists()

    third = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=120)
    assert third.returncode == 0, third.stderr[-2000:]
    assert "is done in" not in third.stderr + third.stdout, "nothing had changed, yet a stage ran"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def scraped(port: int) -> str:
    """What the run offers to Prometheus at the port that was asked for."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def wait_for(condition, process: subprocess.Popen, timeout_s: float = 400.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.stderr.read()[-4000:]
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.2)


def steps(run: Path, stage: str) -> int:
    return sum(row["stage"] == stage for row in read_metrics(run / "metrics.jsonl"))


def check_summary(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert {s["name"]: s["status"] for s in summary["stages"]} == dict.fromkeys(
        ["base", "sft", "warmup", "align", "rlvr", "rlvr-sft", "references", "rlvr-references", "evaluate"], "completed"
    )
    assert {s["name"]: s["updates"] for s in summary["stages"]}["rlvr-sft"] == 6, "equal updates in both arms"
    labels = {"base", "sft", "sft+grpo", "prism", "prism+grpo", "sft+references+grpo"}
    assert set(summary["evaluation"]) == labels
    shares = {"format", "caption_exact", "cell_accuracy", "reasoning_given_caption", "mean_tokens"}
    for numbers in summary["evaluation"].values():
        assert {"n", "accuracy", "accuracy_greedy"} | shares <= set(numbers)
        assert numbers["n"] == 8
        assert numbers["accuracy"]["low"] <= numbers["accuracy"]["mean"] <= numbers["accuracy"]["high"]
    for stage in ("base", "sft", "align", "rlvr", "rlvr-sft", "references", "rlvr-references"):
        assert (run / stage / "checkpoint" / "config.json").exists()
        assert (run / stage / "checkpoint" / "preprocessor_config.json").exists() or (
            run / stage / "checkpoint" / "processor_config.json"
        ).exists()


def check_metrics(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    align = [row for row in rows if row["stage"] == "align"]
    assert [row["step"] for row in align] == [1, 2, 3, 4]
    assert max(row["staleness/max"] for row in align) <= 1
    assert all(row["staleness/max"] == 0 for row in rows if row["stage"].startswith("rlvr"))
    for name in ("policy/loss", "correction/ess", "learner/wait_share", "rollout/response_tokens"):
        assert all(name in row for row in align), name
    told = [row for row in align if "rollout/tokens_per_second" in row]  # with the update after the weights' exchange
    assert all(row["rollout/engine_tokens_per_second/0"] == row["rollout/tokens_per_second"] for row in told)
    assert any(row["rollout/tokens_per_second"] > 0 for row in told)  # none, where all groups came from the journal
    shares = [row[f"{who}/wait_share"] for row in align for who in ("learner", "rollout", "judge")]
    assert all(0 <= share <= 1 for share in shares)
    known = {f"ray_{exported(name)[0]}" for row in rows for name in row}
    known |= {f"ray_{name}" for name in (STEP, EVALUATION, f"{INCIDENTS}_total")}
    assert queried() <= known, "the Grafana dashboard asks for what no run exports"


def check_checkpoints(run: Path) -> None:
    """What each stage hands over is loaded by the calls that other programs' runners make (one of them is asked through
    vLLM as well in tests/rollout/test_runners.py) and asked what rollouts are."""
    summary = json.loads((run / "summary.json").read_text())
    folders = {s["name"]: Path(s["checkpoint"]) for s in summary["stages"] if s["checkpoint"]}
    assert set(folders) == {"base", "sft", "warmup", "align", "rlvr", "rlvr-sft", "references", "rlvr-references"}
    (piece,) = RowOrder(find_fragments([run / "corpora" / "evaluate.parquet"]), 0).pieces(0, 1)
    prompts = [prompt_at("evaluate", place, row) for _, place, row in read_piece(piece)]
    for stage, folder in folders.items():
        (told,) = by_transformers(folder, prompts)
        assert told["prompt"] == Encoder(folder, 512).prompt(prompts[0]).token_ids.tolist(), stage
        assert told["ids"], stage


def check_each_prompt_trained_once(run: Path) -> None:
    """Every update of alignment took two groups; over interruption and resume no stream position came twice."""
    record = read_record(run / "journal" / "align")
    trained = [record.tickets[group]["position"] for version in range(4) for group in record.updates[version]]
    assert len(trained) == 8 and len(set(trained)) == 8


@pytest.mark.parametrize(
    ("override", "code", "sentence"),
    [
        ("learner.lrr=1", 2, "learner.lrr"),
        ("align.updates=0", 2, "align.updates"),
        ("data.align=[nowhere.parquet]", 2, "nowhere.parquet"),
        ("policy=nowhere", 2, "nowhere"),
        ("rollout.cpus_per_engine=64", 2, "64"),
        ("discriminator.cpus_per_rank=64", 2, "discriminator.ranks = 1"),
        ("trainer.gpus_per_rank=1", 2, "GPU"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(tmp_path, override, code, sentence):
    done = subprocess.run(command(tmp_path, override), capture_output=True, text=True, timeout=200)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code, done.stderr[-3000:]
    assert sentence in last, done.stderr[-3000:]
    assert not (tmp_path / "small" / "sft").exists()


def test_help_names_every_setting_with_its_reason():
    done = subprocess.run([sys.executable, str(ROOT / "jobs" / "align.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("learner.lr", "align.loop.max_staleness", "discriminator.experts", "rollout.engines"):
        assert name in done.stdout
