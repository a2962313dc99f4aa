"""The corpora: columns, contents, determinism, disjoint splits."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.config.testbed import TestbedSettings
from prism_ray.testbed.corpora import SPLITS, write_corpora
from prism_ray.testbed.scene import labels
from prism_ray.testbed.truth import truth_of

SETTINGS = TestbedSettings(pretrain=20, base=140, sft=120, align=40, rlvr=40, evaluate=40, evaluate_unseen=10)
PUBLISHED = [
    "images",
    "data_source",
    "prompt",
    "teacher_caption",
    "teacher_cot",
    "teacher_response",
    "answer",
    "reward_model",
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    paths = write_corpora(tmp_path_factory.mktemp("corpora"), SETTINGS, seed=7)
    assert set(paths) == set(SPLITS)
    return {split: pq.read_table(path).to_pylist() for split, path in paths.items()}


def text_splits(corpora: dict[str, list[dict]]) -> dict[str, list[dict]]:
    return {split: rows for split, rows in corpora.items() if split != "pretrain"}


def test_every_split_has_its_size_and_the_published_columns(corpora):
    for split, rows in corpora.items():
        assert len(rows) == getattr(SETTINGS, split)
    for rows in text_splits(corpora).values():
        assert list(rows[0])[: len(PUBLISHED)] == PUBLISHED
        assert rows[0]["reward_model"] == {"ground_truth": rows[0]["answer"], "style": "rule"}
        assert rows[0]["prompt"][0]["content"].startswith("<image> ")
        assert rows[0]["teacher_caption"] + rows[0]["teacher_cot"] == rows[0]["teacher_response"]


def test_images_decode_to_the_grid(corpora):
    for rows in corpora.values():
        assert Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])).size == (96, 64)


def test_clean_splits_are_right_in_every_part(corpora):
    for split, rows in text_splits(corpora).items():
        if split == "sft":
            continue
        for row in rows:
            truth = truth_of(row["teacher_response"], json.loads(row["extra_info"]))
            assert truth.caption_exact and truth.reasoning_given_caption and truth.answer


def test_the_sft_split_is_damaged_as_configured(corpora):
    extras = [json.loads(row["extra_info"]) for row in corpora["sft"]]
    for kind, share in (("wrong cells", 0.9), ("truncated caption", 0.55), ("terse think", 0.65)):
        assert abs(sum(kind in extra["damage"] for extra in extras) / len(extras) - share) < 0.15
    truths = [truth_of(r["teacher_response"], e) for r, e in zip(corpora["sft"], extras, strict=True)]
    assert all(truth.format for truth in truths)
    assert sum(truth.caption_exact for truth in truths) < 0.15 * len(truths)


def test_ids_are_unique_over_all_splits(corpora):
    ids = [json.loads(row["extra_info"])["id"] for rows in corpora.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_no_example_is_shared_between_splits(corpora):
    seen: dict[str, str] = {}
    for split, rows in text_splits(corpora).items():
        for row in rows:
            extra = json.loads(row["extra_info"])
            scene = json.dumps([extra["cells"], row["prompt"]])
            image = hashlib.sha256(row["images"][0]["bytes"] + row["prompt"][0]["content"].encode()).hexdigest()
            for key in (scene, image):
                assert key not in seen, f"{split} repeats an example of {seen[key]}"
                seen[key] = split


def test_only_the_unseen_split_has_the_reserved_family(corpora):
    families = {
        split: {json.loads(row["extra_info"])["family"] for row in rows} for split, rows in text_splits(corpora).items()
    }
    assert families.pop("evaluate_unseen") == {"each range"}
    assert families.pop("base") == {"one colour", "cell", "each"}
    assert all(found == {"each"} for found in families.values())


def test_pretraining_labels_are_those_of_the_cells(corpora):
    for row in corpora["pretrain"]:
        cells = json.loads(row["extra_info"])["cells"]
        assert row["labels"] == labels(tuple((c, d) for c, d in cells))


def digest(folder: Path, seed: int, settings: TestbedSettings = SETTINGS) -> dict[str, str]:
    paths = write_corpora(folder, settings, seed)
    return {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in paths.items()}


def test_corpora_are_deterministic_in_the_seed(tmp_path: Path):
    first = digest(tmp_path / "a", 7)
    assert first == digest(tmp_path / "b", 7)
    assert all(first[split] != other for split, other in digest(tmp_path / "c", 8).items())


def test_the_size_of_a_training_split_does_not_change_what_is_held_out(tmp_path: Path):
    first = digest(tmp_path / "a", 7)
    other = digest(tmp_path / "b", 7, SETTINGS.model_copy(update={"sft": 30, "base": 10}))
    assert first["evaluate"] == other["evaluate"]
    assert first["align"] == other["align"]


def test_a_grid_with_too_few_scenes_is_reported(tmp_path: Path):
    settings = SETTINGS.model_copy(update={"rows": 1, "columns": 1, "pretrain": 28})
    with pytest.raises(ValueError, match="testbed.pretrain: the grid has too few"):
        write_corpora(tmp_path, settings, 0)
