"""Every benchmark works: its `--quick` run ends with the line of JSON that others read."""

import asyncio
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulation import Engine, Speeds, in_virtual_time, now

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
SHARED = {"common", "simulation"}
"""What benchmarks import; they are none themselves."""
ALONE = {
    "coordinator": {"most_engines_over_fewest", "last_tenth_over_first"},
    "learner_step": set(),
    "logprob_memory": set(),
    "long_tail": {"async_1_over_colocated_8", "async_4_over_one_step_off_8", "sync_over_colocated_8"},
    "memory_model": {"plain/state", "plain/gradients", "plain/peak", "checkpointing/peak"},
    "packing": set(),
    "scoring": set(),
}
"""Benchmarks that start neither engines nor Ray, with ratios that must be there."""
SLOW = {
    "alignment": set(),
    "corpus_stream": {"parquet, memory_mb 10x over 1x", "jsonl, rows_per_s 10x over 1x"},
    "async_vs_sync": {"1_engines_staleness_1_over_sync", "1_engines_staleness_1_over_trl"},
    "serve_load": {"requests_per_s, direct batched over served", "answered_per_s, at overload over peak"},
    "weight_sync": {"total_over_copy_1M", "paused_over_copy_1M", "write_over_copy_10M"},
}


@functools.cache
def quick(name: str, limit_s: float) -> dict:
    """The result of a quick run."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--quick"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(name: str, result: dict, ratios: set[str]) -> None:
    assert set(result) == {"benchmark", "ratios", "figures", "conditions"}
    assert result["benchmark"] == name
    assert ratios <= set(result["ratios"])
    assert all(isinstance(value, float) and value > 0 for value in result["ratios"].values())
    assert result["figures"]
    assert {"python", "torch", "cpus", "threads", "device"} <= set(result["conditions"])
    assert os.uname().nodename not in json.dumps(result), "figures name no machine"


def test_every_script_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == SHARED | set(ALONE) | set(SLOW)


@pytest.mark.parametrize("name", ALONE)
def test_a_quick_run_ends_with_its_result(name):
    check(name, quick(name, 300), ALONE[name])


def test_the_plans_memory_is_what_an_update_holds():
    ratios = quick("memory_model", 300)["ratios"]
    for case in ("plain", "checkpointing"):
        assert ratios[f"{case}/state"] == pytest.approx(1, abs=0.002), "weights and optimiser: exactly, but for padding"
        assert 0.95 < ratios[f"{case}/gradients"] <= 1.002, "with what else lives when the step begins"
        assert 0.8 < ratios[f"{case}/peak"] < 1.4, "activations are estimated"


def test_the_simulation_counts_staleness_and_idleness():
    figures = quick("long_tail", 300)["figures"]
    for way, bound in (("sync", 0), ("colocated", 0), ("one_step_off", 1), ("async_1", 1), ("async_4", 4)):
        row = figures[f"8/{way}"]
        assert max(map(int, row["staleness"])) == bound and sum(row["staleness"].values()) == pytest.approx(1)
        assert 0 <= row["learner_idle_share"] < 1 and 0 <= row["engine_idle_share"] < 1
    speeds = [figures[f"8/{way}"]["tokens_per_s"] for way in ("sync", "async_1", "async_2", "async_4")]
    assert speeds == sorted(speeds), "the more may be under way, the less does a straggler cost"


def test_a_simulated_engine_decodes_as_continuous_batching_does():
    """Steps of 1 s and 0.5 s a sequence: two sequences share 2 steps, then a third that waited takes the free slot; new
    weights stop the clock for 10 s; the longest ends alone."""
    speeds = Speeds(step_s=1.0, sequence_s=0.5, slots=2, learner_tokens_per_s=1.0, publish_s=10.0)

    async def run():
        engine = Engine(speeds)

        async def sample(*lengths: int):
            return await engine.sample(lengths), now()

        first, second = asyncio.create_task(sample(2, 4)), asyncio.create_task(sample(1))
        await asyncio.sleep(4.5)
        engine.pause(speeds.publish_s, version=1)
        return await first, await second, engine.busy_s

    first, second, busy = in_virtual_time(run())
    assert second == (0, pytest.approx(3 * 2.0 + 10.0)), "it got its slot before the new weights came"
    assert first == (0, pytest.approx(3 * 2.0 + 10.0 + 1.5))
    assert busy == pytest.approx(3 * 2.0 + 1.5)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_one_does_so_too(name):
    result = quick(name, 850)
    check(name, result, SLOW[name])
    if name == "async_vs_sync":
        sync, asynchronous = (result["figures"][f"1_engines_staleness_{bound}"] for bound in (0, 1))
        assert sync["staleness_of_tokens"] == {"0": 1.0}
        assert sum(asynchronous["staleness_of_tokens"].values()) == pytest.approx(1)
        assert 0 <= asynchronous["learner_idle_share"] <= 1 and {"coordinator"} < set(sync["processor_s_per_update"])
        assert sync["accuracy"]["low"] <= sync["accuracy"]["mean"] <= sync["accuracy"]["high"]
