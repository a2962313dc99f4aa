"""An engine with tensor parallelism over two (pretended) GPUs of one node: vLLM's real workers, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_engine_over_two_gpus_samples_what_the_model_says_and_takes_new_weights(tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tensor_parallel_program.py")), str(tmp_path / "policy")],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gap"] < 1e-4 and found["gap after"] < 1e-4
    assert found["versions"] == [1]
