"""A private cluster beside another on the same machine, whose address lies where Ray's workers look for theirs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_workers_of_a_private_cluster_do_not_take_another_for_theirs():
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # sockets need a short path
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("private_program.py"))],
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
            | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["known"] == found["other"] != found["own"], "nothing there that could be mistaken"
    assert found["asked"] == found["own"] or (found["own"] in found["asked"] and "multiple active" in found["asked"])
    assert found["left"] == folder, "the folder is for the cluster alone, not for what else this process starts"
