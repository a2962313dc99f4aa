"""What a journal tells: which groups trained which update, which were undone, and what was in them."""

import asyncio
import io

import numpy as np
import pytest
from rich.console import Console

from prism_ray.config.run import RunSettings
from prism_ray.records import Group, Prompt, Rollout, Verdict
from prism_ray.runtime.journal import Journal
from prism_ray.stages.replay import ReplayError, batches, describe, overview, read_record, replay


def group(number: int, reward: float = 0.5, text: str = "a red cell") -> dict:
    ids = np.arange(3, dtype=np.int32)
    rollout = Rollout(f"p{number}", 0, ids, ids, np.zeros(3, np.float32), np.array([1, 1, 2], np.int32), text, "stop")
    prompt = Prompt(f"p{number}", ({"role": "user", "content": "what?"},), reference="a blue cell", ground_truth="blue")
    verdict = Verdict(reward, False, "no caption", parts={"accuracy": 0.25})
    ticket = {"id": number, "prompt_id": prompt.id, "position": number, "judge_version": 7}
    return {"ticket": ticket, "group": Group(number, prompt, (rollout,), (verdict,))}


@pytest.fixture
def folder(tmp_path):
    """Two updates; a third that was undone by going back to version 2, with one group used again; a group that waits.
    Segments of the first update were put away."""
    journal = Journal(tmp_path, 1e-6, fsync=False, keep=True)
    for entry in (group(0), group(1), {"update": 0, "groups": [1, 0]}):
        journal.append(entry)
    journal.remove_before(journal.append(group(2)))
    for entry in (
        group(2, reward=0.75),  # judged again
        {"update": 1, "groups": [2]}, group(3), group(4), {"update": 2, "groups": [3]},
        {"resumed": 2, "groups": [4]}, group(5), {"update": 2, "groups": [4]}, group(6),
    ):  # fmt: skip
        journal.append(entry)
    return tmp_path


def test_updates_that_were_undone_do_not_count(folder):
    record = read_record(folder)
    assert record.updates == {0: (1, 0), 1: (2,), 2: (4,)}
    fates = {number: record.fate(number) for number in record.tickets}
    assert fates == {
        0: "update 1", 1: "update 1", 2: "update 2", 3: "void", 4: "update 3", 5: "waiting", 6: "waiting",
    }  # fmt: skip


def test_batches_are_what_trained_with_the_newest_verdicts(folder):
    found = list(batches(folder, read_record(folder)))
    assert [(version, [g.id for g in groups]) for version, groups in found] == [(0, [1, 0]), (1, [2]), (2, [4])]
    assert found[1][1][0].verdicts[0].reward == 0.75


def test_the_overview_has_a_row_for_each_group_and_a_group_can_be_read(folder):
    printed = io.StringIO()
    Console(file=printed, width=160).print(overview(folder))
    lines = printed.getvalue().splitlines()
    assert sum("update 3" in line for line in lines) == 1 and sum("void" in line for line in lines) == 1
    assert any("p2" in line and "0.750" in line and "1–2" in line for line in lines)
    told = describe(folder, 2)
    for words in ("what?", "a red cell", "a blue cell", "version 1, 2", "0.7500", "no caption", "accuracy 0.2500"):
        assert words in told
    with pytest.raises(ReplayError, match="has no group 99"):
        describe(folder, 99)


def test_a_journal_that_was_not_kept_cannot_be_replayed(tmp_path):
    def run(updates):
        journal = Journal(tmp_path, 1.0, fsync=False)
        for entry in updates:
            journal.append(entry)
        asyncio.run(replay(RunSettings(), "align", tmp_path, tmp_path, lambda step, metrics: None))

    with pytest.raises(ReplayError, match="journal.keep=true"):
        run([group(0)])
    with pytest.raises(ReplayError, match="begins with update 6; name the policy of then with --start"):
        run([{"update": 5, "groups": [0]}])
