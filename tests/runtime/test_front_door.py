"""What all jobs share: where they look for paths, and how they end."""

import importlib
import json
import logging
import os
import signal
from pathlib import Path

import pytest

from prism_ray.runtime.front_door import Refused, finish, refusing
from prism_ray.runtime.submitted import HOME, JOB_CONFIG

JOBS = Path(__file__).resolve().parents[2] / "jobs"
TEACHER = ("teacher.url=http://localhost:8000/v1", "teacher.model=m")
MISSING = {
    "align": ["data.align=[nowhere.parquet]"],
    "check": ["policy=nowhere.parquet"],
    "collect": ["--dry-run", "prompts=[nowhere.parquet]", *TEACHER],
    "curate": ["policy=nowhere.parquet", "prompts=[nowhere.parquet]"],
    "evaluate": ["checkpoint=nowhere.parquet", "prompts=[nowhere.parquet]"],
    "plan": ["--cluster", "1x0", "--measured", "nowhere.parquet"],
    "replay": ["nowhere.parquet", "--stage", "align", "--show"],
    "report": ["nowhere.parquet"],
    "serve": ["--checkpoint", "nowhere.parquet"],
}
"""Arguments of each job that name what is nowhere."""


@pytest.fixture
def quiet():
    """Leaves the package's logger as it was: a job sends what it logs to files of its own."""
    logger = logging.getLogger("prism_ray")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def submitted(monkeypatch, tmp_path) -> Path:
    """As in a submitted job, in a copy of what was submitted; the folder that is home."""
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {}, "metadata": {}}))
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "home"


def run(job: str, *arguments: str) -> int:
    return importlib.import_module(f"jobs.{job}").main(list(arguments))


def test_no_job_has_another_door():
    assert set(MISSING) == {path.stem for path in JOBS.glob("*.py")}


@pytest.mark.parametrize("job", MISSING)
def test_every_job_looks_for_relative_paths_at_home(submitted, capsys, quiet, job):
    """And says with exit code 2 what is not there."""
    assert run(job, *MISSING[job]) == 2
    assert str(submitted / "nowhere.parquet") in capsys.readouterr().err.splitlines()[-1]
    assert not any(Path().iterdir()), "something was written into the copy"


@pytest.mark.parametrize(
    ("job", "output"),
    [
        ("align", "runs/tiny"),
        ("collect", "runs/references"),
        ("curate", "runs/curation"),
        ("evaluate", "runs/evaluation"),
    ],
)
def test_what_a_job_writes_is_at_home_even_if_a_folder_of_that_name_came_along(submitted, monkeypatch, job, output):
    """As it says where it is interrupted."""
    Path(output).mkdir(parents=True)
    module, said = importlib.import_module(f"jobs.{job}"), []
    monkeypatch.setattr(module, "finish", lambda _, interrupted: said.append(interrupted) or 130)
    assert run(job, *MISSING[job]) == 130
    assert said[0].split()[-1] == str(submitted / output)


@pytest.mark.parametrize("job", ["align", "check", "collect", "curate", "evaluate", "plan", "serve"])
def test_every_job_looks_for_its_config_file_at_home_too(submitted, capsys, job):
    with pytest.raises(SystemExit) as left:
        run(job, "--config", "nowhere.yaml")
    assert left.value.code == 2 and str(submitted / "nowhere.yaml") in capsys.readouterr().err
    Path("nowhere.yaml").write_text("learner: {lrr: 1}\n")
    with pytest.raises(SystemExit):
        run(job, "--config", "nowhere.yaml")
    assert "There is no setting learner" in capsys.readouterr().err, "it came along"


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("align", ["runs=taken"]),
        ("check", ["runs=taken"]),
        ("collect", ["output=taken", "prompts=[nowhere.parquet]", *TEACHER]),
        ("report", ["torn"]),
    ],
)
def test_what_fails_is_told_on_the_last_line(tmp_path, monkeypatch, capsys, quiet, job, arguments):
    """A file where a folder is to be, a folder where a page is to be: nobody foresees everything."""
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    Path("torn/report.html").mkdir(parents=True)
    assert run(job, *arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.split(":")[0] in ("FileExistsError", "NotADirectoryError", "IsADirectoryError"), last


def test_how_work_ends_is_the_exit_code(capsys):
    def refused() -> None:
        with refusing(KeyError):
            raise KeyError("no such thing; take another")

    def failed() -> None:
        with refusing(KeyError):
            raise OSError("two lines\nthe cause")

    def told(work) -> tuple[int, str]:
        code = finish(work, "interrupted; go on")
        return code, capsys.readouterr().err.splitlines()[-1] if code else ""

    assert told(lambda: None) == told(lambda: 0) == (0, "")
    assert told(failed) == (1, "OSError: the cause")
    code, last = told(refused)
    assert code == 2 and "no such thing; take another" in last
    assert finish(lambda: 2, "") == 2
    with pytest.raises(Refused):
        refused()


@pytest.fixture
def signals():
    """As a process that Python starts has them; those that pytest-xdist starts ignore Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("signals")
def test_a_signal_interrupts_and_its_handler_is_as_before_afterwards(capsys, number):
    before = signal.getsignal(number)
    assert finish(lambda: os.kill(os.getpid(), number), "interrupted; go on") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; go on"
    assert signal.getsignal(number) is before
