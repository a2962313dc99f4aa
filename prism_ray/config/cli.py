"""The command line every job shares: `--config FILE` as often as needed, `name=value` overrides, `--help` for all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prism_ray.config.base import Settings
from prism_ray.config.describe import describe
from prism_ray.config.load import ConfigError, load_config

S = TypeVar("S", bound=Settings)


def parse_job(
    argv: list[str],
    cls: type[S],
    description: str,
    default_config: Path | None = None,
    found: Callable[[Path], Path] = Path,
) -> S:
    """The settings that a job's arguments (without the program's name) ask for.

    `--help` prints every setting and leaves with exit code 0; a bad configuration prints one sentence per problem to
    stderr and leaves with exit code 2. `default_config` is the file used without `--config` (None: no file);
    `found` says where a file that is named lies.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"settings, with their types and defaults:\n\n{describe(cls)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # argparse reads % in a help text as its own placeholder.
    default = str(default_config).replace("%", "%%") if default_config else "the defaults below"
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        help=f"YAML file (without it: {default}); may be repeated, a later one wins setting by setting",
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="a setting, for instance learner.lr=3e-4")
    arguments = parser.parse_intermixed_args(argv)
    try:
        files = [found(file) for file in arguments.config or ([default_config] if default_config else [])]
        return load_config(cls, files, arguments.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
