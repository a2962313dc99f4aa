"""A Ray node is lost with the learner on it; another joins, and the stage goes on there."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.long


@pytest.fixture
def ray_folder():
    """For Ray's files, among which is the address that everybody on this machine would take for theirs; its sockets
    need a short path."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(400)
def test_a_lost_node(tmp_path, ray_folder):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'verify'}", "RAY_TMPDIR": ray_folder}
    command = [sys.executable, "-m", "tests.chaos.lost_node", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-4000:]
