"""README and docs say what is there: settings, defaults, commands, flags, files, functions, metrics, sentences."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from prism_ray.config import yaml12
from prism_ray.config.base import Settings
from prism_ray.config.collect import CollectSettings
from prism_ray.config.curate import CurateSettings
from prism_ray.config.describe import Field, fields
from prism_ray.config.load import ConfigError, _plain, load_config
from prism_ray.config.run import RunSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
JOBS: dict[str, type[Settings]] = {
    "jobs/align.py": RunSettings,
    "jobs/curate.py": CurateSettings,
    "jobs/collect.py": CollectSettings,
}
"""Jobs that take settings."""
FOLDERS = ("prism_ray", "jobs", "configs", "tests", "benchmarks", "docs", "tools", "requirements")
FILE = re.compile(r"\.(py|json|jsonl|html|yaml|yml|md|txt|parquet|lock)$")
STANDS_FOR = re.compile(r"[…*<{]|\bX\b|NAME|STAGE|FILE")
"""In a name that stands for others."""


def code_of(page: str) -> list[str]:
    """What a page shows as code: its inline pieces and the lines of its blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE))
    return [*inline, *(line for block in blocks for line in block.splitlines())]


@cache
def settings() -> dict[str, Field]:
    """Every setting of every job by name; those of a list's items as `list[].name`."""
    known: dict[str, Field] = {}
    for cls in JOBS.values():
        for field in fields(cls):
            known.setdefault(field.name, field)
            for inner in fields(field.item) if field.item else ():
                known.setdefault(f"{field.name}[].{inner.name}", inner)
    return known


def setting_faults(page: str) -> list[str]:
    """Settings that do not exist, or that do not take the value beside them."""
    first, last = {n.partition(".")[0] for n in settings()}, {n.rpartition(".")[2] for n in settings()}
    found = []
    for code in code_of(page):
        named = re.fullmatch(r"'?([a-z_]+(?:\.[a-z_0-9]+|\[\])*(?:\.\*)?)(?:(?:=|: )(.+?))?'?", code)
        if named is None or FILE.search(code):
            continue
        name, value = named[1], named[2]
        if "." not in name:
            if value is not None and name not in last:
                found.append(f"{code}: no setting ends in {name}")
        elif name.endswith(".*"):
            if not any(known.startswith(name[:-1]) for known in settings()):
                found.append(f"{code}: there are no such settings")
        elif name.partition(".")[0] in first:
            if name not in settings():
                found.append(f"{code}: there is no such setting")
            elif value is not None and "…" not in value and (refused := refusal([f"{name}={value}"])):
                found.append(f"{code}: {refused}")
    return found


def refusal(overrides: list[str], cls: type[Settings] = RunSettings, files: list[Path] | None = None) -> str:
    """Why settings cannot be given so, "" if they can."""
    try:
        load_config(cls, files, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def default_faults(page: str) -> list[str]:
    """Rows of tables `| setting | default | … |` that do not tell the code's default."""
    found = []
    for table in re.findall(r"^\| setting \| default \|.*\n\|[ |-]+\n((?:\|.*\n)+)", page, re.MULTILINE):
        for row in table.splitlines():
            name, told = (cell.strip() for cell in row.strip("|").split("|")[:2])
            field = settings().get(name.strip("`"))
            if field is None:
                found.append(f"{name}: there is no such setting")
            elif not re.fullmatch(r"`[^`]+`", told) or yaml12.parse(told.strip("`")) != _plain(field.default):
                found.append(f"{name}: the default is {field.default}, not {told}")
    return found


def command_faults(page: str) -> list[str]:
    """Commands that cannot be run: no such file, target or flag, or settings that are refused."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = []
    for code in code_of(page):
        for target in re.findall(r"(?:^|\s)make ([a-z]+)\b", code):
            if target not in targets:
                found.append(f"{code}: make knows no {target}")
        for command in re.findall(r"python (?:jobs|benchmarks)/.*", code):
            if not STANDS_FOR.search(command):
                found += [f"{code}: {fault}" for fault in faults_of(command)]
    return found


def faults_of(command: str) -> list[str]:
    """What is wrong with a command `python jobs/X.py …`."""
    script, *arguments = shlex.split(command, comments=True)[1:]
    if not (ROOT / script).exists():
        return [f"there is no {script}"]
    flags = [argument for argument in arguments if argument.startswith("--")]
    wrong = [f"{script} has no {flag}" for flag in flags if not re.search(rf"{flag}\b", help_of(script))]
    files = [ROOT / file for flag, file in zip(arguments, arguments[1:], strict=False) if flag == "--config"]
    wrong += [f"there is no {file}" for file in files if not file.exists()]
    if script not in JOBS or wrong:
        return wrong
    overrides = [a for a in arguments if re.match(r"[a-z_.]+=", a)]
    refused = refusal(overrides, JOBS[script], files) if overrides or files else ""
    return [refused] if refused else []


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout


def path_faults(page: str, folder: Path) -> list[str]:
    """Files and functions of the repository that are not there; links are relative to the page's folder."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page)
    found = [link for link in links if "://" not in link and not (folder / link).exists()]
    for code in code_of(page):
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./…*<>-]*", code):
            if not STANDS_FOR.search(path) and not (ROOT / path.rstrip(".")).exists():
                found.append(path)
        for name in re.findall(r"(?<![\w/.])prism_ray(?:\.\w+)+", code):
            if not defined(name):
                found.append(name)
    return found


def defined(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something defined at the top of one (or a class's method)."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.is_dir() and length == len(parts):
            return True
        if (module := path.with_suffix(".py")).exists():
            body: list[ast.stmt] = ast.parse(module.read_text()).body
            for part in parts[length:]:
                node = next((n for n in body if getattr(n, "name", None) == part), None)
                if node is None:
                    return False
                body = getattr(node, "body", [])
            return True
    return False


@cache
def texts() -> list[str]:
    """Every string of our code, with `…` for what is put into it, and the lines of the Makefile."""
    found = (ROOT / "Makefile").read_text().splitlines()
    for path in [*ROOT.glob("prism_ray/**/*.py"), *ROOT.glob("jobs/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(?:\.\d)?[a-z]", "…", node.value))
    return found


def sentence_faults(page: str) -> list[str]:
    """Sentences of tables `| you see | it means | … |` that nothing in our code says in these words, in this order."""
    found = []
    for table in re.findall(r"^\| you see \| it means \|.*\n\|[ |-]+\n((?:\|.*\n)+)", page, re.MULTILINE):
        for sentence in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE):
            words = ".*".join(re.findall(r"[a-z_]{3,}", sentence))
            if not any(re.search(words, text, re.DOTALL) for text in texts()):
                found.append(sentence)
    return found


def metric_faults(page: str) -> list[str]:
    """Metrics `room/quantity` that nothing in the code names."""
    named = [c for c in code_of(page) if re.fullmatch(r"[a-z]+/[a-z_]+(/[a-z_]+)*", c) and not (ROOT / c).exists()]
    rooms = {p.name.removesuffix(".py") for p in (ROOT / "prism_ray").iterdir()} | {"loop", "policy", "reward"}
    return [
        name
        for name in named
        if name.split("/")[0] in rooms | {"correction", "staleness", "time", "judge"}
        and not any("/".join(name.split("/")[:2]) in text for text in texts())
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_is_true_of_the_code(path):
    page = path.read_text()
    checks = setting_faults, default_faults, command_faults, sentence_faults, metric_faults
    assert [fault for check in checks for fault in check(page)] + path_faults(page, path.parent) == []


def test_defaults_are_told_where_they_can_be_checked():
    told = sum(len(re.findall(r"^\| `[^|]*\| `[^`]+` \|", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert told >= 30


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (setting_faults, "`learner.lrr`"),
        (setting_faults, "`max_stalenes: 0`"),
        (setting_faults, "`learner.lr=fast`"),
        (setting_faults, "`discriminator.guards.*`"),
        (default_faults, "| setting | default | reason |\n| --- | --- | --- |\n| `learner.lr` | `1e-4` | x |\n"),
        (default_faults, "| setting | default | reason |\n| --- | --- | --- |\n| `learner.lrr` | `1e-4` | x |\n"),
        (command_faults, "`make bread`"),
        (command_faults, "```\npython jobs/bake.py\n```"),
        (command_faults, "`python jobs/replay.py runs/tiny --shown`"),
        (command_faults, "`python jobs/align.py --config configs/tiny.yml`"),
        (command_faults, "`python jobs/align.py learner.lrr=1`"),
        (lambda page: path_faults(page, ROOT), "`prism_ray/learner/steps.py`"),
        (lambda page: path_faults(page, ROOT), "`prism_ray.learner.objective.ppo_clop`"),
        (lambda page: path_faults(page, ROOT), "[here](docs/nowhere.md)"),
        (sentence_faults, "| you see | it means |\n| --- | --- |\n| `the moon is … km away` | x |\n"),
        (metric_faults, "`discriminator/gaps/perception`"),
    ],
)
def test_what_is_wrong_is_found(check, wrong):
    assert len(check(wrong)) == 1
