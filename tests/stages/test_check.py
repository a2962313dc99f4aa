"""jobs/check.py over corpora that are fine, and over every kind of bad input that a run may be given."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.config.load import load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.run import RunSettings
from prism_ray.corpora.references import row_of, writing
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt
from prism_ray.response import render
from prism_ray.runtime import cluster as runtime_cluster
from prism_ray.stages.check import check_corpora, report_lines
from prism_ray.testbed.words import vocabulary

ROOT = Path(__file__).resolve().parents[2]
SIZES = TinyModelSettings(hidden_size=64, layers=2, heads=2, key_value_heads=1, mlp_size=96, vision_mlp_size=64)
CORPORA = ("sft", "align", "rlvr", "evaluate")


def picture(seed=0, kind="PNG", size=(64, 64), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(side=30_000):
    """A few bytes that claim to be so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def prompt(index, **changes):
    """A row as `jobs/collect.py` writes it."""
    made = {
        "id": f"p{index}",
        "messages": ({"role": "user", "content": f"<image> what is in picture {index}?"},),
        "images": (picture(index),),
        "reference": render(" red", " max", f" {index}"),
        "ground_truth": str(index),
        "data_source": "mine",
    }
    return Prompt(**(made | changes))


def write(path, prompts):
    with writing(path) as file:
        for one in prompts:
            file.write(row_of(one))
    return path


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    build_tiny(folder, vocabulary(), SIZES, seed=0)
    return folder


def settings(folder, policy, corpora, *overrides):
    data = {name: [str(path)] for name, path in corpora.items()}
    (folder / "run.yaml").write_text(json.dumps({"data": data, "policy": str(policy), "runs": str(folder)}))
    return load_config(RunSettings, folder / "run.yaml", ["rollout.max_model_len=1024", *overrides])


def four(folder, **others):
    """Corpora of four rows each, some replaced."""
    made = {name: folder / f"{name}.parquet" for name in CORPORA if name not in others}
    for number, path in enumerate(made.values()):
        write(path, [prompt(10 * number + i) for i in range(4)])
    return made | others


def kept(folder):
    return pq.read_table(folder / "tiny" / "check" / "quarantine.parquet").to_pylist()


def test_corpora_that_are_fine_are_described(cluster, policy, tmp_path):
    shared = write(tmp_path / "shared.parquet", [prompt(10), prompt(50), prompt(50, id="again"), prompt(51)])
    demonstrations = write(tmp_path / "sft.parquet", [prompt(i, id=f"p{i // 2}") for i in range(4)])
    corpora = four(tmp_path, sft=demonstrations, evaluate=shared)
    result = check_corpora(settings(tmp_path, policy, corpora))
    assert result == json.loads((tmp_path / "tiny" / "check" / "check.json").read_text())
    assert set(result["corpora"]) == set(CORPORA) and result["stops"] == {}
    told = result["corpora"]["evaluate"]
    assert (told["rows"], told["usable"], told["data_sources"]) == (4, 4, {"mine": 4})
    assert told["duplicates"]["exact"]["count"] == 1 and told["duplicate_ids"]["count"] == 0
    assert result["corpora"]["sft"]["usable"] == 4, "each row is a demonstration, whatever it is called"
    assert result["corpora"]["sft"]["duplicate_ids"]["count"] == 2
    assert told["image width"]["median"] == 64 and 0 < told["prompt tokens"]["median"] < 928
    overlaps = {(o["training"], o["held_out"]): o["exact"] for o in result["overlaps"]}
    assert overlaps == {("sft", "evaluate"): 0, ("align", "evaluate"): 0, ("rlvr", "evaluate"): 1}
    lines = "\n".join(report_lines(result))
    assert "evaluate: 4 of 4 rows can be used" in lines and "rlvr has too: 1 exactly" in lines
    assert not (tmp_path / "tiny" / "check" / "quarantine.parquet").exists()


HOSTILE = {
    "images: too many pixels": {"images": (huge_png(),)},
    "images: does not decode (a GIF)": {"images": (picture(0, "GIF"),)},
    "images: does not decode (an SVG)": {"images": (b"<svg onload='alert(1)'><script>alert(2)</script></svg>",)},
    "images: does not decode (OSError)": {"images": (picture(0)[:5000],)},
    "images: too narrow": {"images": (picture(0, size=(2, 500)),)},
    "images: an animation": {"images": (picture(0, save_all=True, append_images=[Image.new("RGB", (64, 64))]),)},
    "prompt: empty": {"messages": ({"role": "user", "content": " "},), "images": ()},
    "prompt: <image> markers and images differ in number": {"images": ()},
    "prompt: too long": {"messages": ({"role": "user", "content": "<image>" + " max" * 2_500_000},)},
    "images: more than rollout.max_images": {
        "messages": ({"role": "user", "content": "<image><image>?"},),
        "images": (picture(0),) * 2,
    },
    "teacher_response: missing": {"reference": ""},
    "teacher_response: not in the format": {"reference": "I think it is red."},
    "teacher_response: cannot be judged": {"reference": render(" ", " max", " 1")},
    "data_source: not one of corpora.data_sources": {"data_source": "theirs"},
}


def test_every_bad_row_is_named_and_too_many_of_them_stop_the_run(cluster, policy, tmp_path):
    bad = [prompt(100 + i, **changes) for i, changes in enumerate(HOSTILE.values())]
    rows = [prompt(i) for i in range(20)] + bad
    corpora = four(tmp_path, align=write(tmp_path / "mixed.parquet", rows))
    corpora["rlvr"] = write(tmp_path / "blind.parquet", [prompt(i, ground_truth="") for i in range(2)])
    result = check_corpora(settings(tmp_path, policy, corpora, "corpora.data_sources=[mine]"))
    found = {row["row"]: row for row in kept(tmp_path) if row["file"].endswith("mixed.parquet")}
    for place, name in enumerate(HOSTILE, start=20):
        reason, _, detail = name.partition(" (")
        assert found[place]["reason"] == reason and detail.rstrip(")") in found[place]["detail"]
    assert len(found) == len(HOSTILE)
    assert result["corpora"]["align"]["usable"] == 20
    assert set(result["stops"]) == {"align", "rlvr"}
    assert "more than 2.0% of its 34 rows cannot be used" in result["stops"]["align"]
    assert "reward_model: no ground truth: 2" in result["stops"]["rlvr"]


def test_truths_that_the_configured_verifier_or_truth_cannot_use_are_quarantined(cluster, policy, tmp_path):
    rows = [prompt(i) for i in range(3)] + [prompt(3, ground_truth="7" * 2000)]
    corpora = four(tmp_path, rlvr=write(tmp_path / "long.parquet", rows), evaluate=tmp_path / "long.parquet")
    judges = ["verify.environment=prism/Answer-v0", "evaluate.truth=prism_ray.verify.answer:truth_of"]
    result = check_corpora(settings(tmp_path, policy, corpora, *judges))
    for name in ("rlvr", "evaluate"):
        assert result["corpora"][name]["quarantined"] == {"reward_model: cannot be judged": 1}
    assert "the ground truth is longer than 1023 characters" in kept(tmp_path)[0]["detail"]
    assert result["stops"].keys() == {"rlvr", "evaluate"}
    others = check_corpora(settings(tmp_path, policy, corpora))
    assert others["stops"] == {}, "another verifier may know what to do with it"


def test_repeated_ids_are_quarantined_where_each_is_trained_on_once(cluster, policy, tmp_path):
    again = write(tmp_path / "again.parquet", [prompt(i, id=f"p{i % 3}") for i in range(4)])
    corpora = four(tmp_path, align=again)
    result = check_corpora(settings(tmp_path, policy, corpora))
    (row,) = kept(tmp_path)
    assert (row["row"], row["reason"], row["detail"]) == (3, "id: used before", f"p0, first seen at row 0 of {again}")
    assert result["corpora"]["align"]["usable"] == 3 and set(result["stops"]) == {"align"}
    assert "id: used before: 1" in result["stops"]["align"]


def test_files_that_cannot_be_read_are_named_and_the_others_checked(cluster, policy, tmp_path):
    corpora = four(tmp_path)
    whole = corpora["align"].read_bytes()
    corpora["align"].write_bytes(whole[: len(whole) // 2])
    wrong = pa.table({"prompt": pa.array([1, 2]), "teacher_response": ["x", "y"]})
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    (tmp_path / "lines.jsonl").write_bytes(
        b'\xef\xbb\xbf{"question": "a", "answer": "1"}\r\n{"question": \xff}\r\n{"a\n'
    )
    corpora |= {"sft": tmp_path / "wrong.parquet", "rlvr": tmp_path / "lines.jsonl"}
    result = check_corpora(settings(tmp_path, policy, corpora))
    assert "not a readable Parquet file" in result["stops"]["align"]
    assert "prompt: not a list of chat turns: 2" in result["stops"]["sft"]
    reasons = {row["row"]: (row["unit"], row["reason"]) for row in kept(tmp_path) if "lines" in row["file"]}
    assert reasons == {37: ("byte", "line: not UTF-8"), 54: ("byte", "line: not JSON")}
    assert set(result["corpora"]) == {"evaluate", "rlvr"}


def test_the_job_ends_with_what_is_wrong_and_2(cluster, policy, tmp_path, monkeypatch, capsys):
    import sys

    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        import check
    finally:
        sys.path.remove(str(ROOT / "jobs"))
    monkeypatch.setattr(runtime_cluster, "start", lambda settings: None)  # the session's Ray is used
    chosen = settings(tmp_path, policy, four(tmp_path))
    arguments = ["--config", str(tmp_path / "run.yaml"), "rollout.max_model_len=1024"]
    assert check.main(arguments) == 0
    assert "sft: 4 of 4 rows can be used" in capsys.readouterr().out
    Path(chosen.data.align[0]).unlink()
    assert check.main(arguments) == 2
    assert "align.parquet: no Parquet file there" in capsys.readouterr().err.splitlines()[-1]
    assert check.main([*arguments, "policy=nowhere"]) == 2
