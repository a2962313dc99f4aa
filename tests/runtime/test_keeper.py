"""The journal's actor: what was judged comes back after a crash, until a checkpoint holds it."""

import asyncio

import numpy as np
import ray

from prism_ray.config.runtime import JournalSettings
from prism_ray.records import Group, Prompt, Rollout, Ticket, Verdict
from prism_ray.runtime.keeper import JournalKeeper

SMALL = JournalSettings(segment_mb=0.0001)


def ticket(number: int) -> Ticket:
    ids = np.arange(3, dtype=np.int32)
    rollout = Rollout(f"p{number}", 0, ids, ids, np.zeros(3, np.float32), ids, "text", "stop")
    group = Group(number, Prompt(f"p{number}", ()), (rollout,)).judged([Verdict(0.5, True)])
    return Ticket(
        number, f"p{number}", 10 + number, ray.put(group), oldest_version=2, tokens=3, total_tokens=9, stats={"a": 1.0}
    )


def test_judged_groups_survive_the_process_until_they_are_consumed(cluster, tmp_path):
    async def first():
        keeper = JournalKeeper(tmp_path, SMALL, 60.0)
        for number in range(4):
            await keeper.append(ticket(number))
        await keeper.close()

    async def second():
        keeper = JournalKeeper(tmp_path, SMALL, 60.0)
        assert await keeper.restore({0, 1}, 1) == [], "version 2 was undone by the crash"
        assert keeper.last_id == 3, "ids of groups that are not used must not come again either"
        restored = await keeper.restore({0, 1}, 2)
        groups = [await t.ref for t in restored]
        await keeper.append(ticket(4))
        await keeper.forget([2])
        again = await JournalKeeper(tmp_path, SMALL, 60.0).restore({0, 1, 2}, 2)
        await keeper.forget([3])
        last = await JournalKeeper(tmp_path, SMALL, 60.0).restore(set(), 2)
        await keeper.close()
        return restored, groups, again, last

    asyncio.run(first())
    restored, groups, again, last = asyncio.run(second())
    assert [(t.id, t.position, t.oldest_version, t.stats) for t in restored] == [
        (2, 12, 2, {"a": 1.0}),
        (3, 13, 2, {"a": 1.0}),
    ]
    assert [g.rollouts[0].text for g in groups] == ["text", "text"]
    assert [t.id for t in again] == [3, 4], "a restored group that no checkpoint holds must not be deleted"
    assert [t.id for t in last] == [4], "segments that only hold consumed groups go"
