"""A session that is asked to stop ends its work in bounded time, and a phase that loses its rooms too often ends."""

import asyncio

import pytest
from ray.exceptions import ObjectLostError, OwnerDiedError

from prism_ray.config.run import RunSettings
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary
from prism_ray.runtime.supervision import Lost
from prism_ray.stages.phase import _Recoveries
from prism_ray.stages.session import Interrupted, Session


@pytest.fixture
def session(tmp_path):
    with MetricsLog(tmp_path) as metrics:
        yield Session(RunSettings(runs=tmp_path), metrics, Summary(tmp_path, "tiny"))


def stopped_after_a_moment(session, work, grace_s=0.0):
    async def drive():
        asyncio.get_running_loop().call_later(0.01, session.stop.set)
        return await session.until_stopped(work, grace_s)

    return asyncio.run(drive())


async def endless(notes):
    try:
        await asyncio.Event().wait()
    finally:
        notes.append("cleaned up")


def test_work_without_state_ends_at_once_and_cleans_up(session):
    notes = []
    with pytest.raises(Interrupted):
        stopped_after_a_moment(session, endless(notes))
    assert notes == ["cleaned up"]


def test_work_with_state_has_time_to_save_it(session):
    async def saving():
        await session.stop.wait()
        await asyncio.sleep(0.05)
        return "saved"

    assert stopped_after_a_moment(session, saving(), grace_s=60.0) == "saved"


def test_work_that_does_not_end_is_ended_and_the_log_says_so(session, caplog):
    notes = []
    with pytest.raises(Interrupted):
        stopped_after_a_moment(session, endless(notes), grace_s=0.05)
    assert notes == ["cleaned up"]
    assert "cluster.stop_grace_s" in caplog.text


def test_what_work_comes_to_is_passed_on(session):
    async def failing():
        raise ValueError("its own sentence")

    with pytest.raises(ValueError, match="its own sentence"):
        stopped_after_a_moment(session, failing())


def test_recoveries_are_limited_from_each_checkpoint(caplog):
    recoveries = _Recoveries("align", most=2)
    for version in (0, 0, 10, 10):
        recoveries.note(Lost("learner rank 0 died."), version)
    assert "align: learner rank 0 died; the stage goes on from update 10" in caplog.text
    with pytest.raises(RuntimeError, match="learner rank 0 died; align was taken up again 2 times from update 10"):
        recoveries.note(Lost("learner rank 0 died."), 10)


def test_a_lost_object_is_told_by_its_cause_and_not_by_rays_advice(caplog):
    _Recoveries("align", most=1).note(OwnerDiedError("ff00", None, ""), 4)
    _Recoveries("align", most=1).note(ObjectLostError("ff00", None, "loop.py:1"), 6)
    gone = "align: a group is gone from the object store:"
    assert caplog.messages == [
        f"{gone} The object's owner has exited; the stage goes on from update 4",
        f"{gone} All copies of ff00 have been lost due to node failure; the stage goes on from update 6",
    ]
