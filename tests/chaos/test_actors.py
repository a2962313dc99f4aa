"""Whatever is killed, stopped or lost in a stage: it goes on, every prompt trains once, and the log says why."""

import asyncio
import signal
from dataclasses import replace

import numpy as np
import psutil
import pytest

from prism_ray.runtime.journal import JournalError, segments
from tests.chaos.world import HEARTBEAT_S, World, actors, check_no_orphans, logged, strike

SILENT = f"has not answered for {HEARTBEAT_S} s"

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def run():
    """Runs coroutines, all on one event loop: the engines' tasks live on it between tests."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def world(cluster, run, tmp_path_factory):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    world = World(tmp_path_factory.mktemp("chaos"))
    yield world
    run(world.close())
    check_no_orphans(before)


def test_killed_actors_of_rlvr(world, run):
    """A learner rank twice: before any checkpoint, and after one (its peer may be the first to notice)."""
    faults = {
        1: strike("LearnerRank"),
        2: strike("EngineWorker", "_Verifier", within_s=2),
        3: strike("LearnerRank", which=1),
        4: strike("_Keeper", within_s=1),
    }
    found = run(world.rlvr("killed", faults))
    found.check_exactly_once()
    found.check_cause("learner rank", "died", "goes on from update 0")
    found.check_cause("learner rank", "died", "goes on from update 2")
    found.check_cause("rollout engine", "died")
    found.check_cause("verifier", "died", "it is replaced")
    found.check_cause("the journal in", "died", "another one takes over")


def test_stopped_actors_and_lost_objects(world, run):
    """Three actors that only hang, then a group that only a reference remains of, then a rank that hangs."""
    faults = {
        1: strike("EngineWorker", "_Keeper", "_Verifier", number=signal.SIGSTOP, within_s=1),
        2: world.lose_next_group,
        4: strike("LearnerRank", number=signal.SIGSTOP),
    }
    found = run(world.rlvr("stopped", faults))
    found.check_exactly_once()
    found.check_cause("gone from the object store", "owner has exited", "the stage goes on from update")
    found.check_cause("learner rank", SILENT, "the stage goes on from update")
    found.check_cause("rollout engine", SILENT)
    found.check_cause("verifier", SILENT, "it is replaced")
    found.check_cause("the journal in", SILENT, "another one takes over")


def test_killed_actors_of_alignment(world, run):
    faults = {1: strike("Scorer", within_s=2), 3: strike("Rank"), 4: strike("Scorer", number=signal.SIGSTOP)}
    found = run(world.align("judged", faults))
    found.check_exactly_once()
    found.check_cause("discriminator rank 0", "died", "goes on from update 2")
    found.check_cause("scorer", "died")
    found.check_cause("scorer", SILENT)


def _garbage(worker):
    """The engine says, of everything that it has sampled, that it was impossible."""
    engine = worker._engine
    proper = engine._rollout
    engine._rollout = lambda *a: (r := proper(*a)) and replace(r, logp=np.full_like(r.logp, np.nan))


def _slow(worker):
    """The engine does nothing for a while before each group."""
    engine = worker._engine
    proper = engine._sample

    async def late(*args):
        await asyncio.sleep(2.0)
        return await proper(*args)

    engine._sample = late


def _spoil(world, number, how):
    """A fault: this engine behaves otherwise from now on."""

    async def tell():
        await world.session._pool._ready[number].watched.actor.__ray_call__.remote(how)

    return tell


def _both(*faults):
    """A fault: all of these."""

    async def strike_all():
        await asyncio.gather(*(fault() for fault in faults))

    return strike_all


# Nothing rolls back in these two, so that the stage must ask the lost reader's successor for the last prompts: a stage
# that goes on from its checkpoint has another reader anyway.


def test_a_slow_engine_and_a_hung_reader(world, run):
    faults = {1: _both(_spoil(world, 0, _slow), strike("PromptReader", number=signal.SIGSTOP))}
    found = run(world.rlvr("slow", faults))
    found.check_exactly_once()
    found.check_cause("the reader of", "hangs; another one goes on")


def test_an_engine_that_returns_garbage_and_a_killed_reader(world, run):
    found = run(world.rlvr("spoiled", {1: strike("PromptReader"), 2: _spoil(world, 1, _garbage)}))
    found.check_exactly_once()
    found.check_cause("rollout engine 1", "garbage")
    found.check_cause("the reader of", "died; another one went on")


def test_a_full_disk_and_a_damaged_journal(world, run):
    """The stage ends with a sentence and its state; with room again, and half a record at the end, it goes on."""

    def fill():
        (keeper,) = actors("_Keeper")
        keeper.rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))

    with logged(), pytest.raises(JournalError, match="cannot write the journal in .*; free disk space there"):
        run(world.rlvr("full", {3: fill}))
    state = world.session.stage_folder("full") / "state"
    assert (state / "latest.json").exists()
    last = segments(world.session.journal("full"))[-1]
    last.write_bytes(last.read_bytes() + last.read_bytes()[:100])
    found = run(world.rlvr("full", {}))
    found.check_exactly_once()
