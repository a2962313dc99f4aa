"""What a phase keeps for a person to read."""

import asyncio
import json

import numpy as np

from prism_ray.records import Group, Prompt, Rollout, Ticket, Verdict
from prism_ray.stages.samples import FILE, MOST, SampleLog, sample_of


def group(*rewards, number=5):
    none = np.zeros(0, np.int32)
    prompt = Prompt("p", ({"role": "user", "content": "<image>q"},), (b"image",), "the reference")
    rollouts = tuple(
        Rollout("p", i, none, none, np.zeros(0, np.float32), none, f"text {i}", "stop") for i in range(len(rewards))
    )
    scored = [Verdict(r, True, "", {"v": r}, {"v": 9.0}, judge_version=i) for i, r in enumerate(rewards)]
    return Group(number, prompt, rollouts).judged(scored)


def note_all(folder, updates, versions):
    async def run():
        log = SampleLog(folder, updates)
        for version in versions:
            ref = asyncio.get_running_loop().create_future()
            ref.set_result(group(0.5, number=version))
            await log.note([Ticket(version, "p", 0, ref)], version)

    asyncio.run(run())
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_a_group_keeps_its_reference_and_its_best_and_worst_rollout_with_their_scores():
    row = sample_of(group(0.5, 0.9, 0.1, 0.9), version=3)
    assert [(r["index"], r["response"], r["scores"]) for r in row["rollouts"]] == [
        (1, "text 1", {"v": 0.9}), (2, "text 2", {"v": 0.1}),
    ]  # fmt: skip
    assert (row["group"], row["version"], row["judge_version"], row["reference"]) == (5, 3, 3, "the reference")
    assert row["reference_scores"] == {"v": 9.0} and row["image"] == "aW1hZ2U=" and row["question"] == "<image>q"


def test_a_group_of_one_rollout_that_was_not_scored_is_kept_as_it_is():
    sampled = group(0.0)
    invalid = Group(1, Prompt("p", ()), sampled.rollouts).judged([Verdict(0.0, False, "no caption")])
    row = sample_of(invalid, version=0)
    assert [r["reason"] for r in row["rollouts"]] == ["no caption"]
    assert row["reference_scores"] == {} and row["image"] == "" and row["question"] == ""


def test_a_long_phase_keeps_no_more_than_a_short_one(tmp_path):
    rows = note_all(tmp_path, 1000, range(1000))
    assert MOST <= len(rows) <= MOST + 1 and rows[-1]["version"] > 900


def test_a_short_phase_keeps_one_of_every_update_and_goes_on_where_it_was_stopped(tmp_path):
    note_all(tmp_path, 4, range(2))
    assert [row["version"] for row in note_all(tmp_path, 4, range(1, 4))] == [0, 1, 1, 2, 3]
