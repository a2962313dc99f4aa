"""What resize.yaml says, what a follower makes of it, and whether Ray has room: the last with real placement groups."""

import asyncio
import logging

import pytest
import ray

from prism_ray.config.runtime import ClusterSettings
from prism_ray.runtime import elastic
from prism_ray.runtime.elastic import Elastic, Follower, Room, WishFile

NAME = "rollout.engines"
PATIENT, HASTY = ClusterSettings(pending_timeout_s=1000), ClusterSettings(pending_timeout_s=1e-9)


class Cluster:
    """Grants room for at most `free` actors."""

    def __init__(self, free=0):
        self.free, self.asked, self.cpus = free, 0, 4.0

    def ask(self, count):
        self.asked = count

    def granted(self):
        return min(self.asked, self.free)

    def size(self):
        return {"CPU": self.cpus}


class Pool:
    def __init__(self, refuses=()):
        self.refuses, self.sizes = refuses, []

    async def resize(self, count):
        self.sizes.append(count)
        if count in self.refuses:
            raise RuntimeError("its own sentence")


def follower(cluster, pool, settings=PATIENT, count=2):
    return Follower(NAME, count, pool.resize, cluster, settings)


def steps(follower, *wanted):
    async def take():
        for number in wanted:
            await follower.step(number)

    asyncio.run(take())


def says(path, text):
    path.write_text(text)
    return path


def test_the_file_says_what_is_wanted_and_without_it_the_configuration_holds(tmp_path):
    file = WishFile(tmp_path / "resize.yaml")
    configured = {NAME: None, "discriminator.scorers": None}
    assert file.read() == configured
    says(file.path, "rollout: {engines: 3}\n")
    assert file.read() == configured | {NAME: 3}
    says(file.path, "rollout: {engines: 3}\ndiscriminator: {scorers: 2}\n")
    assert file.read() == {NAME: 3, "discriminator.scorers": 2}
    file.path.unlink()
    assert file.read() == configured


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rollout: {engines: 0}", "The setting rollout.engines is 0 but should be greater than or equal to 1"),
        ("rollout: {engine: 2}", "There is no setting rollout.engine; did you mean rollout.engines?"),
        ("learner: {ranks: 2}", "There is no setting learner"),
        ("discriminator: {scorers: many}", 'The setting discriminator.scorers is "many" but should be a valid integer'),
        ("rollout: {engines: [", "is not valid YAML"),
        ("3", "holds a int at its top"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence_once_and_the_last_good_one_holds(
    tmp_path, caplog, text, sentence
):
    file = WishFile(says(tmp_path / "resize.yaml", "rollout: {engines: 3}"))
    before = file.read()
    says(file.path, text)
    assert file.read() == file.read() == before
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and sentence in record.message and str(file.path) in record.message
    says(file.path, "rollout: {engines: 4}")
    assert file.read()[NAME] == 4


def test_a_file_that_cannot_be_read_is_no_reason_to_resize(tmp_path, caplog):
    file = WishFile(tmp_path / "resize.yaml")
    file.path.mkdir()
    assert file.read() == file.read() == {NAME: None, "discriminator.scorers": None}
    assert "cannot be read (Is a directory)" in caplog.text and len(caplog.records) == 1


def test_a_pool_shrinks_at_once_and_grows_when_there_is_room_for_all(caplog):
    cluster, pool = Cluster(free=1), Pool()
    follows = follower(cluster, pool)
    with caplog.at_level(logging.INFO):
        steps(follows, 2, 1, 3, 3)
        assert pool.sizes == [1] and cluster.asked == 2
        cluster.free = 2
        steps(follows, 3, 3)
    assert pool.sizes == [1, 3] and follows.count == 3 and cluster.asked == 0, "what was reserved is given back"
    assert "rollout.engines: 3 are wanted, 1 are there" in caplog.text and "is 3 instead of 1" in caplog.text


def test_what_the_cluster_does_not_grant_in_time_is_left_until_it_has_grown(caplog):
    cluster, pool = Cluster(free=1), Pool()
    follows = follower(cluster, pool, HASTY)
    steps(follows, 5, 5, 5)
    assert pool.sizes == [3] and cluster.asked == 0
    (record,) = warnings(caplog)
    assert "5 are wanted, but the cluster has not granted room for more than 3 within 1e-09 s" in record.message
    cluster.free = 2
    steps(follows, 5, 5)
    assert pool.sizes == [3], "an actor's successor might need what has become free"
    cluster.cpus = 8.0
    steps(follows, 5, 5)
    assert pool.sizes == [3, 5]


def test_another_number_is_asked_for_at_once():
    cluster, pool = Cluster(free=0), Pool()
    follows = follower(cluster, pool, HASTY)
    steps(follows, 5)
    cluster.free = 1
    steps(follows, 3)
    assert pool.sizes == [3]


def test_a_wish_that_is_withdrawn_gives_back_what_was_reserved():
    cluster, pool = Cluster(free=0), Pool()
    follows = follower(cluster, pool)
    steps(follows, 5)
    assert cluster.asked == 3
    steps(follows, 2)
    assert cluster.asked == 0 and not pool.sizes
    steps(follows, 4)
    follows.close()
    assert cluster.asked == 0


def test_an_actor_that_does_not_start_costs_nothing_that_was_there(caplog):
    cluster, pool = Cluster(free=9), Pool(refuses=(4,))
    follows = follower(cluster, pool)
    steps(follows, 4, 4)
    assert pool.sizes == [4, 2] and follows.count == 2
    assert "rollout.engines could not be changed from 2 to 4: its own sentence" in caplog.text
    steps(follows, 1)
    assert pool.sizes == [4, 2, 1] and follows.count == 1


def test_a_pool_that_cannot_shrink_is_not_asked_again_and_again(caplog):
    pool = Pool(refuses=(1,))
    steps(follower(Cluster(), pool), 1, 1, 1)
    assert pool.sizes == [1] and len(warnings(caplog)) == 1


def warnings(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


async def until(met):
    async with asyncio.timeout(60):
        while not met():
            await asyncio.sleep(0.02)


def test_ray_grants_what_is_free_on_one_node_and_gets_it_back(cluster):
    free = ray.available_resources()["CPU"]
    room = Room({"CPU": 1.0, "GPU": 0.0})

    async def ask():
        room.ask(int(free) + 1)
        await until(lambda: room.granted() == int(free))
        room.ask(1)
        await until(lambda: ray.available_resources().get("CPU") == free - 1)
        room.ask(0)
        await until(lambda: ray.available_resources().get("CPU") == free)

    asyncio.run(ask())
    assert room.size()["CPU"] >= free
    nothing = Room({"CPU": 0.0})
    nothing.ask(2)
    assert nothing.granted() == 2


def test_a_pool_is_followed_from_its_making_to_its_end(cluster, tmp_path, caplog):
    pool = Pool()
    file = tmp_path / elastic.FILE

    async def scene():
        following = Elastic(tmp_path, ClusterSettings(resize_poll_s=0.02)).follow(NAME, 1, {"CPU": 0.1}, pool.resize)
        says(file, "rollout: {engines: 2}")
        await until(lambda: pool.sizes == [2])
        says(file, "rollout: {engines: two}")
        await until(lambda: "is not used" in caplog.text)
        file.unlink()
        await until(lambda: pool.sizes == [2, 1])
        following.shutdown()
        says(file, "rollout: {engines: 2}")
        await asyncio.sleep(0.1)

    asyncio.run(scene())
    assert pool.sizes == [2, 1]
