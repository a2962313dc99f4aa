import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def job(*arguments):
    command = [sys.executable, str(ROOT / "jobs" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_page_of_a_run_that_left_none_can_be_made(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "align", "step": 1, "reward/mean": 0.5}\n')
    done = job(tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "report.html")
    assert "Reward in RLVR" in (tmp_path / "report.html").read_text()


def test_a_folder_that_is_not_there_is_an_error_with_a_sentence(tmp_path):
    done = job(tmp_path / "none")
    assert done.returncode == 2 and "is no folder; give that of a run" in done.stderr
