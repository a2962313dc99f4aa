"""The Grafana dashboard and the Prometheus configuration; that what it asks for exists is shown in `test_run.py`."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from prism_ray.config import yaml12

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "grafana"
DASHBOARD = json.loads((FOLDER / "prism_ray.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_MACHINES_WITH_GPUS = {"ray_node_gpus_utilization"}


def queries() -> list[str]:
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return variables + [target["expr"] for panel in PANELS for target in panel["targets"]]


def queried(pattern: str = "ray_prism_ray_") -> set[str]:
    """The metrics that the dashboard asks for, of those whose name begins so."""
    return {name for query in queries() for name in re.findall(rf"\b{pattern}\w+", query)}


def test_every_panel_says_what_it_shows_and_asks_for_something():
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["targets"] and all(t["expr"].count("(") == t["expr"].count(")") for t in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    titles, numbers = [p["title"] for p in PANELS], [p["id"] for p in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles) and len(set(numbers)) == len(numbers)


def test_no_two_panels_lie_on_each_other_and_none_sticks_out():
    for one, other in combinations([p["gridPos"] for p in DASHBOARD["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in DASHBOARD["panels"])


@pytest.mark.parametrize("what", ["staleness", "wait_share", "tokens_per_second", "gap", "pair_accuracy", "incidents"])
def test_it_asks_for_what_a_person_watches(what):
    assert any(what in name for name in queried())


def test_it_depends_on_no_installation():
    sources = [t["datasource"]["uid"] for panel in PANELS for t in panel["targets"]]
    assert set(sources) == {"${datasource}"}
    assert "datasource" in {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_prometheus_and_grafana_are_told_where_things_are():
    jobs = {job["job_name"]: job for job in yaml12.parse((FOLDER / "prometheus.yml").read_text())["scrape_configs"]}
    assert jobs["ray"]["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    assert len(jobs["prism_ray"]["static_configs"][0]["targets"]) == 1
    for file in FOLDER.glob("provisioning/*/*.yaml"):
        assert yaml12.parse(file.read_text())["apiVersion"] == 1
