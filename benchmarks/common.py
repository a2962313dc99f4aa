"""What benchmark scripts share: their command line, the conditions they ran under, and the JSON line they end with."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch


def parse(description: str | None, *own: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line: `--quick` asks for a run of seconds whose figures only show that the script works.

    `own` are parsers (without help) of the arguments that only one benchmark has.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style, parents=own)
    parser.add_argument("--quick", action="store_true", help="a small run that only shows that the script works")
    return parser.parse_args()


def conditions() -> dict[str, Any]:
    """What a figure depends on besides the code. The machine's name is left out on purpose."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
    }


def finish(
    benchmark: str, ratios: Mapping[str, float], figures: Mapping[str, Any], conditions: Mapping[str, Any]
) -> None:
    """Print the result as one line of JSON, the last line of a benchmark's output."""
    result = {"benchmark": benchmark, "ratios": ratios, "figures": figures, "conditions": conditions}
    print(json.dumps(result), flush=True)
