"""The Dockerfile, as far as it can be checked where no Docker engine is: its instructions, files and shell."""

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

import prism_ray

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"FROM", "RUN", "WORKDIR", "ENV", "COPY"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def copies() -> list[str]:
    found = [rest.split() for name, rest in instructions() if name == "COPY"]
    return [word for words in found for word in words[:-1] if not word.startswith("--")]


def test_the_base_is_pinned_to_the_locked_ray_and_this_python():
    found = instructions()
    assert {name for name, _ in found} <= KNOWN and found[0][0] == "FROM"
    locked = (ROOT / "requirements" / "gpu.txt").read_text()
    version = re.search(r"^ray==(\S+)$", locked, re.MULTILINE)
    assert version and found[0][1] == f"rayproject/ray:{version[1]}-py311-cu130"
    assert re.search(r"^torch==(\S+)$", locked, re.MULTILINE)


@pytest.mark.parametrize("source", copies())
def test_what_it_copies_is_there_and_reaches_the_build(source):
    assert (ROOT / source).exists()
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(source.split("/")[0], pattern):
            ignored = not line.startswith("!")
    assert not ignored, f".dockerignore keeps {source} from the build"


def test_the_image_has_all_of_the_repository_that_a_job_needs():
    assert {"prism_ray", "jobs", "configs"} <= set(copies())


def test_its_steps_are_shell_and_install_as_make_does(tmp_path):
    steps = [rest for name, rest in instructions() if name == "RUN"]
    for step in steps:
        subprocess.run(["bash", "-n", "-c", step], check=True, capture_output=True)
    (setup,) = [step for step in steps if "make" in step.split()]
    done = subprocess.run([*setup.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "requirements/gpu.txt" in done.stdout and "requirements/dev.txt" not in done.stdout
    assert not any(re.search(r"\bpip install\b", step) for step in steps), "another way than the Makefile's"


def test_the_venv_of_the_makefile_comes_first_on_the_path():
    workdir = [rest for name, rest in instructions() if name == "WORKDIR"][-1]
    paths = [rest for name, rest in instructions() if name == "ENV" and rest.startswith("PATH=")]
    assert paths == [f"PATH={workdir}/.venv/bin:$PATH"]


def test_its_comment_names_the_tag_that_the_cluster_files_use():
    assert f"docker build --tag prism-ray:{prism_ray.__version__} ." in (ROOT / "Dockerfile").read_text()
