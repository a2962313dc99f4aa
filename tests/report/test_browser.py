"""The page in a real browser, where this machine has one: it is laid out, drawn, and fits a phone."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from prism_ray.report.html import write_report
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VIEW = "a_view_with_quite_a_long_name"
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with MetricsLog(folder) as log:
        for step in range(1, 30):
            scores = {
                f"discriminator/scores/{VIEW}/{side}/q{q:02d}": base + q / 100
                for side, base in (("reference", 2), ("rollout", 0))
                for q in (0, 10, 25, 50, 75, 90, 100)
            }
            gap = {f"discriminator/gap/{VIEW}": 5 / step}
            log.write("align", step, {"reward/mean": step / 30, "staleness/max": 1, **gap, **scores})
    summary = Summary(folder, "browser")
    share = {"mean": 0.5, "low": 0.4, "high": 0.6}
    summary.evaluation("prism+grpo", {"n": 8, "accuracy": share, "accuracy_greedy": share, "mean_tokens": 60.0})
    summary.stage("align", "completed", 3, 29, "/a/very/long/path/" * 12 + "checkpoint")
    return write_report(folder)


def browse(page, tmp_path, *options):
    """Run the browser once on a page, without a window and without a profile of anybody's."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout


def measured(report, tmp_path, width):
    """Width of the window and of what is laid out in it, and how many plots have a size."""
    script = (
        "<script>const e = document.documentElement; document.title = [innerWidth, e.scrollWidth, "
        "[...document.querySelectorAll('.plots svg')].filter(s => s.getBoundingClientRect().height > 50).length]"
        "</script>"
    )
    page = tmp_path / "measured.html"
    page.write_text(report.read_text().replace("</body>", f"{script}</body>"))
    dom = browse(page, tmp_path, f"--window-size={width},900", "--dump-dom")
    found = re.search(r"<title>(\d+),(\d+),(\d+)</title>", dom)
    assert found is not None, dom[:500]
    return [int(number) for number in found.groups()]


@pytest.mark.parametrize("width", [500, 1280])
def test_every_plot_has_a_size_and_nothing_sticks_out(report, tmp_path, width):
    window, content, plots = measured(report, tmp_path, width)
    assert content <= window and plots >= 6


def test_plots_are_drawn_in_their_colours(report, tmp_path):
    shot = tmp_path / "shot.png"
    browse(report, tmp_path, "--window-size=1280,1600", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    blue = np.array([0x2A, 0x78, 0xD6])  # c0, alignment's lines
    assert (np.abs(pixels.astype(int) - blue).max(1) < 4).sum() > 200
    assert len(np.unique(pixels, axis=0)) > 50
