"""The page of a run, made anew from what lies in its folder: of one that still goes on, was killed, or came from afar.

    python jobs/report.py runs/tiny

Exit code 0: `report.html` is written; 1: failed (the last line says why); 2: there is no such folder; 130: interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prism_ray.report.html import write_report
from prism_ray.runtime.front_door import Refused, finish
from prism_ray.runtime.submitted import kept


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, runs/NAME")
    folder = kept(parser.parse_args(argv).run)
    return finish(lambda: _report(folder), "interrupted; the page is as it was")


def _report(folder: Path) -> None:
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder; give that of a run, runs/NAME")
    print(write_report(folder))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
