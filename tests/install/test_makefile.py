"""The Makefile in a copy of its own, with a pretended Python that writes down what it was asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRETENDED = """#!/bin/sh
echo "$@" >> calls.txt
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp fake-python .venv/bin/python;;
  *version_info*) test -z "$OLD";;
  *torch==*) test -z "$NO_TORCH";;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements", "tools"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
    (tmp_path / "fake-python").write_text(PRETENDED)
    (tmp_path / "fake-python").chmod(0o755)
    return tmp_path


def make(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A make that runs this test hands its own options down through the environment.
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "STACK", "ARGS")}
    command = ["make", "PYTHON=./fake-python", "STACK=cpu", *arguments]
    return subprocess.run(command, cwd=clone, env=inherited | environment, capture_output=True, text=True, timeout=60)


def calls(clone: Path) -> list[str]:
    path = clone / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_setup_installs_torch_then_the_locks_then_the_package_then_the_hook(clone):
    assert make(clone, "setup").returncode == 0
    wanted = [
        "version_info",
        "-m venv .venv",
        "torch==",
        "-r requirements/cpu.txt -r requirements/dev.txt",
        "--editable .",
    ]
    wanted += ["tools/torchvision_hook.py"]
    made = calls(clone)
    assert len(made) == len(wanted) and all(w in m for w, m in zip(wanted, made, strict=True)), made
    assert all("--no-deps" in m for m in made if " install " in m)


def test_a_second_setup_does_nothing_until_a_lock_changes(clone):
    make(clone, "setup")
    calls(clone)
    assert make(clone, "-q", "setup").returncode == 0
    make(clone, "setup")
    assert calls(clone) == []
    stamp = clone / ".venv" / "installed-cpu"
    later = stamp.stat().st_mtime + 10
    os.utime(clone / "requirements" / "dev.txt", (later, later))
    assert make(clone, "-q", "setup").returncode == 1


def test_a_failed_install_leaves_no_stamp_and_says_the_cure(clone):
    failed = make(clone, "setup", NO_TORCH="1")
    assert failed.returncode != 0
    assert "set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index" in failed.stderr
    assert not (clone / ".venv" / "installed-cpu").exists()


def test_an_old_python_is_refused_before_anything_is_created(clone):
    refused = make(clone, "setup", OLD="1")
    assert refused.returncode != 0 and "needs Python 3.11 or newer" in refused.stderr
    assert not (clone / ".venv").exists()


def test_the_gpu_stack_gets_no_hook_and_replaces_a_cpu_environment(clone):
    make(clone, "setup")
    calls(clone)
    assert make(clone, "setup", "STACK=gpu").returncode == 0
    made = calls(clone)
    assert any("-m venv" in m for m in made) and any("-r requirements/gpu.txt" in m for m in made)
    assert not any("hook" in m for m in made)
    assert [p.name for p in (clone / ".venv").glob("installed-*")] == ["installed-gpu"]


def test_align_and_test_set_up_first_and_hand_on_their_arguments(clone):
    assert make(clone, "align", "ARGS=learner.lr=1").returncode == 0
    assert calls(clone)[-1] == "jobs/align.py --config configs/tiny.yaml learner.lr=1"
    assert make(clone, "test", "ARGS=-x").returncode == 0
    assert calls(clone) == ["-m pytest -n 2 --dist loadscope --no-loadscope-reorder -x"]


def test_continuous_integration_lints_and_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make lint test" in script.read_text()
