"""A learner whose weights the engine fetches over a link (gloo): real ranks, real vLLM, no array through Ray."""

import asyncio

import numpy as np
import pytest
import ray

from prism_ray.config.learner import LearnerSettings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.learner.group import LearnerGroup
from prism_ray.learner.step import Recipe
from prism_ray.models.load import save_weights
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime.protocols import Ticket
from prism_ray.weights.transports import Offer, Superseded, Wire

RECIPE = Recipe(AdvantageSettings(estimator="grpo"), ObjectiveSettings(), CorrectionSettings())
LEARNER = LearnerSettings(ranks=2, zero_stage=3, cpus_per_rank=0.2)


@pytest.fixture(scope="module")
def linked(settings):
    """Several buckets, the largest tensors in buckets of their own; old keys and values are kept."""
    changes = {"weights": "gloo", "weights_bucket_mb": 0.25, "cpus_per_engine": 0.5, "kv_on_update": "keep"}
    return settings.model_copy(update=changes)


@pytest.fixture(scope="module")
def folders(folder, reference, tmp_path_factory):
    """Two policies of the same architecture in which every tensor is another."""
    made = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for seed, path in enumerate(made):
        save_weights(reference.changed(seed=20 + seed), path, like=folder)
    return made


@pytest.fixture(scope="module")
def rooms(cluster, run, folder, folders, linked):
    """An engine with the policy of `folder`, and a learner with that of `folders[0]`, which it has saved."""

    async def make():
        learner, pool = await asyncio.gather(
            LearnerGroup.create(folders[0], LEARNER, RECIPE, linked.max_prompt_tokens, wire=Wire.of(linked)),
            RolloutPool.create(folder, linked),
        )
        return learner, pool

    learner, pool = run(make())
    yield learner, pool
    learner.shutdown()
    run(pool.shutdown())


def check(run, pool, prompt, reference, weights, version):
    """The engine's log-probs are the learner's under `weights`, images included."""
    done = run(pool.generate(Ticket(0, prompt.id, 0, ray.put(prompt))))
    for r in ray.get(done.ref).rollouts:
        assert set(r.versions.tolist()) == {version}
        np.testing.assert_allclose(r.logp, reference.logp(r, prompt, weights), atol=1e-4, rtol=0)
        assert np.abs(r.logp - reference.logp(r, prompt)).max() > 1e-2, "the policy it started with would have passed"


@pytest.mark.timeout(300)
def test_what_was_set_aside_is_fetched_though_the_learner_has_gone_on(
    rooms, run, ask, reference, make_reference, folders, tmp_path
):
    learner, pool = rooms
    first, second = (make_reference(folder).weights for folder in folders)
    offer = run(learner.weights())
    assert isinstance(offer, Offer) and len(offer.ranks) == 1, "rank 0 has all of them"

    async def go_on():  # another learner's training, in one step
        other = await LearnerGroup.create(folders[1], LEARNER, RECIPE, 100)
        await other.save(tmp_path / "state")
        other.shutdown()
        await learner.load(tmp_path / "state")

    run(go_on())
    metrics = run(pool.publish(offer, 1))
    assert 0 < metrics["weights/paused_s"] <= metrics["weights/publish_s"]
    check(run, pool, ask("p", seed=1), reference, first, 1)

    run(pool.publish(run(learner.weights()), 2))
    check(run, pool, ask("p", seed=1), reference, second, 2)  # the same image: its old encoding would show
    with pytest.raises(Superseded, match="learner rank 0 has replaced the weights"):
        run(pool.publish(offer, 1))


@pytest.mark.timeout(300)
def test_a_checkpoint_folder_takes_over_whatever_the_transport(rooms, run, ask, reference, make_reference, folders):
    _, pool = rooms
    run(pool.load(folders[0], 7))
    check(run, pool, ask("p", seed=2), reference, make_reference(folders[0]).weights, 7)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_engine_that_joins_fetches_what_the_others_hold_and_a_new_learner_is_met(
    rooms, run, ask, reference, make_reference, folders, linked
):
    learner, pool = rooms
    offer = run(learner.weights())
    run(pool.publish(offer, 3))
    run(pool.resize(2))
    versions = {name: engine["version"] for name, engine in run(pool.health()).items()}
    assert versions == {"rollout engine 0": 3, "rollout engine 1": 3}
    learner.shutdown()

    async def rebuilt():
        return await LearnerGroup.create(folders[0], LEARNER, RECIPE, 100, wire=Wire.of(linked))

    other = run(rebuilt())
    run(pool.publish(run(other.weights()), 2))
    weights = make_reference(folders[0]).weights
    for seed in range(4):
        check(run, pool, ask("p", seed=seed), reference, weights, 2)
    other.shutdown()
