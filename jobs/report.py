"""The page of a run, made anew from what lies in its folder: of one that still goes on, was killed, or came from afar.

    python jobs/report.py runs/tiny

Exit code 0: `report.html` is written; 2: there is no such folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prism_ray.report.html import write_report


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, runs/NAME")
    folder = parser.parse_args(argv).run
    if not folder.is_dir():
        print(f"{folder} is no folder; give that of a run, runs/NAME", file=sys.stderr)
        return 2
    print(write_report(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
