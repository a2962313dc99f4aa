"""The example configurations of the data jobs can be loaded."""

from pathlib import Path

from prism_ray.config.collect import CollectSettings
from prism_ray.config.curate import CurateSettings
from prism_ray.config.load import load_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "data"


def test_the_examples_load_and_one_feeds_the_other():
    collect = load_config(CollectSettings, FOLDER / "collect.yaml")
    curate = load_config(CurateSettings, FOLDER / "curate.yaml")
    assert collect.prompts == [curate.output / "teacher.parquet"]
    assert collect.spending.max_money == 50 and curate.rollout.group_size == 16
