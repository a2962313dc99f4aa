"""The house, enforced: imports only go down, heavy libraries stay in their rooms, modules stay small.

The lowest floor is two: the codec stands on the records it encodes.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    {"jobs"},
    {"stages", "serve"},
    {"discriminator"},
    {"learner", "rollout"},
    {"verify"},
    {"weights", "runtime"},
    {"corpora", "models", "testbed", "report", "planning", "endpoint"},
    {"response", "codec"},
    {"records", "config"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
RAY_ROOMS = {"corpora", "runtime", "stages", "serve", "jobs"}
RAY_FILES = {"worker.py", "pool.py", "group.py"}
OPEN_ROOMS = {"serve", "endpoint", "codec", "records", "response", "discriminator", "models"}
"""What touches a caller's bytes, or a checkpoint that somebody else made."""
RUNS_WHAT_IT_READS = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
MODULES = sorted([*ROOT.glob("prism_ray/**/*.py"), *ROOT.glob("jobs/*.py")])


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "jobs" if parts[0] == "jobs" else parts[1].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "prism_ray")


def faults(path: Path, names: Iterator[str]) -> list[str]:
    """What a file imports that its place in the house forbids."""
    room, found = room_of(path), []
    for name in names:
        top, *rest = name.split(".")
        if top == "prism_ray" and rest and rest[0] in LEVEL and rest[0] != room and LEVEL[rest[0]] <= LEVEL[room]:
            found.append(f"{room} imports {name}, which is not below it")
        if top == "ray" and room not in RAY_ROOMS and path.name not in RAY_FILES:
            found.append("ray outside the Ray shell")
        if top == "vllm" and room != "weights" and (room, path.name) != ("rollout", "engine.py"):
            found.append("vllm outside rollout/engine.py and weights/")
        if top == "deepspeed" and (room, path.name) != ("learner", "engine.py"):
            found.append("deepspeed outside learner/engine.py")
        if top in RUNS_WHAT_IT_READS and room in OPEN_ROOMS:
            found.append(f"{top} where bytes of strangers are read")
    return found


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in MODULES if path.name != "__init__.py" or path.parent.name != "prism_ray"}
    assert rooms <= set(LEVEL), f"no floor for {rooms - set(LEVEL)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    if path != ROOT / "prism_ray" / "__init__.py":
        assert not faults(path, imports(path))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("prism_ray/learner/step.py", "prism_ray.discriminator.model"),
        ("prism_ray/learner/step.py", "prism_ray.rollout.pool"),
        ("prism_ray/models/forward.py", "ray"),
        ("prism_ray/rollout/worker.py", "vllm"),
        ("prism_ray/discriminator/trainer.py", "deepspeed.ops"),
        ("prism_ray/serve/app.py", "pickle"),
    ],
)
def test_the_rule_catches_what_it_must(path, name):
    assert faults(ROOT / path, iter([name]))


def calls(text: str) -> list[str]:
    """Calls that run code which a checkpoint brings along: `trust_remote_code`, `torch.load` of more than tensors."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    keywords = [(ast.unparse(node.func), k.arg, ast.unparse(k.value)) for node in nodes for k in node.keywords]
    return [
        f"{name}({key}={value})"
        for name, key, value in keywords
        if (key == "trust_remote_code" and value != "False") or (key == "weights_only" and value != "True")
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_of_a_checkpoint_is_run(path):
    own_state = path == ROOT / "prism_ray" / "learner" / "checkpoints.py"  # written by the run that reads it
    assert own_state or not calls(path.read_text())


def test_the_rule_on_code_of_checkpoints_catches_what_it_must():
    assert calls("load(folder, trust_remote_code=True)") and calls("torch.load(f, weights_only=False)")
    assert not calls("torch.load(f, weights_only=True)")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 420
