"""What a real Ray node offers to Prometheus, scraped from it."""

import math
import re
import time
import urllib.request

import pytest

from prism_ray.runtime.gauges import RayMetrics, endpoints, exported
from tests.runtime.test_dashboard import OF_MACHINES_WITH_GPUS, queried

SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def scraped() -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every series that this machine's Ray offers: name -> (labels, value)."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for address in endpoints():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        for name, labels, value in SAMPLE.findall(text):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def until(condition, timeout_s=90.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "Ray did not export it in time"
        time.sleep(0.5)
    return found


def ours(metric, run):
    """The series of a run: (stage, of) -> value."""
    series = scraped().get(f"ray_{metric}", ())
    return {(labels["stage"], labels["of"]): value for labels, value in series if labels.get("run") == run}


@pytest.mark.parametrize(
    ("name", "metric", "of"),
    [
        ("policy/loss", "prism_ray_policy_loss", ""),
        ("discriminator/gap/perception", "prism_ray_discriminator_gap", "perception"),
        ("discriminator/scores/perception/rollout/q10", "prism_ray_discriminator_scores", "perception/rollout/q10"),
        ("odd-name", "prism_ray_odd_name", ""),
    ],
)
def test_a_metric_has_a_name_that_prometheus_takes(name, metric, of):
    assert exported(name) == (metric, of)


@pytest.fixture
def metrics(cluster):
    made = RayMetrics("scrape")
    yield made
    made.close(False)


@pytest.mark.long
def test_prometheus_finds_the_numbers_of_a_run_by_stage_and_view(metrics):
    metrics.write("sft", 7, {"supervised/loss": 2.5})
    metrics.write("align", 3, {"policy/loss": 0.25, "discriminator/gap/perception": 1.5, "correction/ess": math.nan})
    metrics.evaluated("prism", {"accuracy": 0.75})
    metrics.incident("WARNING", "rollout")
    metrics.incident("WARNING", "rollout")

    until(lambda: ours("prism_ray_evaluation", "scrape") and scraped().get("ray_prism_ray_incidents_total"))
    assert ours("prism_ray_step", "scrape")["align", ""] == 3.0
    assert ours("prism_ray_policy_loss", "scrape") == {("align", ""): 0.25}
    assert ours("prism_ray_discriminator_gap", "scrape") == {("align", "perception"): 1.5}
    assert ours("prism_ray_evaluation", "scrape") == {("prism", "accuracy"): 0.75}
    counted = [series for series in scraped()["ray_prism_ray_incidents_total"] if series[0]["run"] == "scrape"]
    assert [(labels["level"], labels["room"], value) for labels, value in counted] == [("WARNING", "rollout", 2.0)]

    # Longer than Ray remembers a gauge that is not set anew: the stage that runs stays, the one before it goes.
    until(lambda: ours("prism_ray_supervised_loss", "scrape") == {})
    assert ours("prism_ray_step", "scrape") == {("align", ""): 3.0}
    assert ours("prism_ray_evaluation", "scrape") == {("prism", "accuracy"): 0.75}

    metrics.write("align", 4, {"policy/loss": 0.125})
    until(lambda: ours("prism_ray_step", "scrape").get(("align", "")) == 4.0)
    assert ours("prism_ray_policy_loss", "scrape") == {("align", ""): 0.125}


@pytest.mark.long
def test_what_the_dashboard_asks_of_the_machines_is_offered_by_ray(cluster):
    wanted = queried("ray_(?!prism_ray)") - OF_MACHINES_WITH_GPUS
    assert wanted
    until(lambda: wanted <= set(scraped()))
