"""The journal's actor: what was judged comes back after a crash, until a checkpoint holds it."""

import asyncio
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import ray

from prism_ray.config.runtime import JournalSettings
from prism_ray.records import UNDONE, Group, Prompt, Rollout, Ticket, Verdict
from prism_ray.runtime import journal
from prism_ray.runtime.keeper import JournalKeeper

SMALL = JournalSettings(segment_mb=0.0001)


def ticket(number: int) -> Ticket:
    ids = np.arange(3, dtype=np.int32)
    rollout = Rollout(f"p{number}", 0, ids, ids, np.zeros(3, np.float32), ids, "text", "stop")
    group = Group(number, Prompt(f"p{number}", ()), (rollout,)).judged([Verdict(0.5, True)])
    return Ticket(
        number,
        f"p{number}",
        10 + number,
        ray.put(group),
        2,
        judge_version=4,
        tokens=3,
        total_tokens=9,
        stats={"a": 1.0},
    )


def test_judged_groups_survive_the_process_until_they_are_consumed(cluster, tmp_path):
    async def first():
        keeper = JournalKeeper(tmp_path, SMALL)
        for number in range(4):
            await keeper.append(ticket(number))
        await keeper.close()

    async def second():
        keeper = JournalKeeper(tmp_path, SMALL)
        assert await keeper.restore({0, 1}, 1, 4) == [], "version 2 was undone by the crash"
        assert keeper.last_id == 3, "ids of groups that are not used must not come again either"
        restored = await keeper.restore({0, 1}, 2, 4)
        groups = [await t.ref for t in restored]
        await keeper.resume(2, 4, [2, 3])
        await keeper.append(ticket(4))
        await keeper.forget([2])
        again = await found(tmp_path, {0, 1, 2}, 2)
        await keeper.forget([3])
        last = await found(tmp_path, set(), 2)
        await keeper.forget([4])
        await keeper.append(ticket(5))
        await keeper.close()
        return restored, groups, again, last

    asyncio.run(first())
    restored, groups, again, last = asyncio.run(second())
    assert [(t.id, t.position, t.oldest_version, t.judge_version, t.stats) for t in restored] == [
        (2, 12, 2, 4, {"a": 1.0}),
        (3, 13, 2, 4, {"a": 1.0}),
    ]
    assert [g.rollouts[0].text for g in groups] == ["text", "text"]
    assert [t.id for t in again] == [3, 4], "a restored group that no checkpoint holds must not be deleted"
    assert [t.id for t in last] == [4], "segments that only hold consumed groups go"
    assert [e["ticket"]["id"] for e in journal.read(tmp_path) if "group" in e] == [4, 5]


async def found(folder, consumed, version, judge_version=4):
    keeper = JournalKeeper(folder, SMALL)
    try:
        return await keeper.restore(consumed, version, judge_version)
    finally:
        await keeper.close()


def test_groups_that_a_resume_did_not_use_never_come_back(cluster, tmp_path):
    """Their prompts were sampled again: with other weights, which later bear the same version."""

    async def drive():
        keeper = JournalKeeper(tmp_path, SMALL)
        for number in range(3):
            await keeper.append(ticket(number))
        assert await keeper.restore(set(), 1, 4) == []
        await keeper.resume(1, 4, [])
        await keeper.append(ticket(3))
        await keeper.close()
        return await found(tmp_path, set(), 2)

    assert [t.id for t in asyncio.run(drive())] == [3]


def test_verdicts_of_an_undone_judge_stay_undone_even_when_another_reaches_its_number(cluster, tmp_path):
    """Twice taken up: the judge was at 4, went back to 3, came to 4 anew. Verdicts of the first 4 must not pass."""

    async def drive():
        keeper = JournalKeeper(tmp_path, SMALL.model_copy(update={"keep": True}))
        for number in range(3):
            await keeper.append(ticket(number))  # judged by version 4
        first = await keeper.restore(set(), 2, 3)
        await keeper.resume(2, 3, [0, 1, 2])
        await keeper.append(ticket(3))  # by the version 4 that counts
        await keeper.trained(2, [replace(first[2], judge_version=4)])  # judged again, by that one too
        await keeper.close()
        return first, await found(tmp_path, {2}, 3, 4)

    first, second = asyncio.run(drive())
    assert [t.judge_version for t in first] == [UNDONE] * 3
    assert {t.id: t.judge_version for t in second} == {0: UNDONE, 1: UNDONE, 3: 4}
    written = [e["ticket"] for e in journal.read(tmp_path) if "group" in e]
    assert [t["judge_version"] for t in written if t["id"] == 2] == [4, 4], "the verdicts that trained are not noted"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_actor_is_replaced_and_everything_counts_once(cluster, tmp_path, caplog, number):
    async def drive():
        keeper = JournalKeeper(tmp_path, SMALL.model_copy(update={"heartbeat_s": 2.0}))
        await keeper.append(ticket(0))
        pid = await keeper._watched.actor.__ray_call__.remote(lambda _: os.getpid())
        os.kill(pid, number)
        await asyncio.gather(*(keeper.append(ticket(i)) for i in range(4)))  # 0: written before, but not acknowledged
        restored = await keeper.restore(set(), 2, 4)
        groups = [await t.ref for t in restored]
        await keeper.close()
        return restored, groups

    restored, groups = asyncio.run(drive())
    assert sorted(t.id for t in restored) == [0, 1, 2, 3]
    assert sorted(g.id for g in groups) == [0, 1, 2, 3]
    assert sum(e["ticket"]["id"] == 0 for e in journal.read(tmp_path)) == 2, "nothing was there twice to count once"
    assert caplog.text.count("another one takes over") == 1


def test_what_trained_is_noted_with_newer_verdicts_where_the_journal_is_kept(cluster, tmp_path):
    async def drive(folder, settings):
        keeper = JournalKeeper(folder, settings)
        tickets = [ticket(i) for i in range(3)]
        for one in tickets:
            await keeper.append(one)
        await keeper.trained(2, [tickets[0], replace(tickets[2], judge_version=9)])
        await keeper.forget([0, 1, 2])
        await keeper.close()

    asyncio.run(drive(tmp_path / "kept", SMALL.model_copy(update={"keep": True})))
    entries = [*journal.read(tmp_path / "kept" / journal.KEPT), *journal.read(tmp_path / "kept")]
    assert [e["ticket"]["judge_version"] for e in entries if "group" in e] == [4, 4, 4, 9]
    assert [(e["update"], e["groups"]) for e in entries if "update" in e] == [(2, [0, 2])]
    asyncio.run(drive(tmp_path / "not", SMALL))
    assert not any("update" in e for e in journal.read(tmp_path / "not"))


def test_an_actor_that_is_only_slow_is_named_when_the_time_is_up(cluster, tmp_path):
    async def drive():
        keeper = JournalKeeper(tmp_path, SMALL.model_copy(update={"timeout_s": 1.0}))
        actor = keeper._watched.actor
        await actor.__ray_call__.remote(lambda self: setattr(self, "gate", threading.Event()))
        actor.__ray_call__.remote(lambda self: self.gate.wait(60))
        try:
            with pytest.raises(TimeoutError, match="waited 1 s for the journal in .* to write group 0"):
                await keeper.append(ticket(0))
        finally:
            await keeper.close()

    asyncio.run(drive())
