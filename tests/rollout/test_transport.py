"""A learner whose weights the engine fetches over a link (gloo): real ranks, real vLLM, no array through Ray."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import ray

from prism_ray.config.learner import LearnerSettings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.learner.group import LearnerGroup
from prism_ray.learner.step import Recipe
from prism_ray.models.load import save_weights
from prism_ray.records import Verdict
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime.protocols import Ticket
from prism_ray.weights.transports import Offer, Superseded, Wire

RECIPE = Recipe(AdvantageSettings(estimator="grpo"), ObjectiveSettings(), CorrectionSettings())
LEARNER = LearnerSettings(cpus_per_rank=0.2, lr=1e-2)


@pytest.fixture(scope="module")
def linked(settings):
    """Several buckets, the largest tensors in buckets of their own; old keys and values are kept."""
    changes = {"weights": "gloo", "weights_bucket_mb": 0.25, "cpus_per_engine": 0.5, "kv_on_update": "keep"}
    return settings.model_copy(update=changes)


@pytest.fixture(scope="module")
def other(folder, reference, tmp_path_factory):
    """A policy of the same architecture in which every tensor is another."""
    path = tmp_path_factory.mktemp("other")
    save_weights(reference.changed(seed=20), path, like=folder)
    return path


@pytest.fixture(scope="module")
def rooms(cluster, run, folder, other, linked):
    """A learner with the other policy, and an engine with that of `folder`."""

    async def make():
        return await asyncio.gather(_learner(other, linked), RolloutPool.create(folder, linked))

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


def judged(run, pool, ask):
    """Tickets of two groups whose rollouts are worth different things."""
    tickets = []
    for i in range(2):
        prompt = ask(f"p{i}", seed=i)
        done = run(pool.generate(Ticket(i, prompt.id, i, ray.put(prompt))))
        group = ray.get(done.ref)
        verdicts = tuple(Verdict(float(r.index), True, parts={"format": 1.0}) for r in group.rollouts)
        tickets.append(replace(done, ref=ray.put(replace(group, verdicts=verdicts))))
    return tickets


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_was_set_aside_is_fetched_though_the_learner_has_gone_on(
    rooms, run, ask, reference, make_reference, other, tmp_path
):
    learner, pool = rooms
    tickets = judged(run, pool, ask)
    offer = run(learner.weights())
    assert isinstance(offer, Offer) and len(offer.ranks) == 1
    run(learner.update(tickets, 0))
    metrics = run(pool.publish(offer, 1))
    assert 0 < metrics["weights/paused_s"] <= metrics["weights/publish_s"]
    before = make_reference(other).weights
    prompt = ask("p", seed=1, question=" red" * 140)  # of which a whole block is cached
    check(run, pool, prompt, reference, before, 1)

    run(learner.export(tmp_path / "after"))
    after = make_reference(tmp_path / "after").weights
    assert all((after[name] != before[name]).any() for name in before)
    run(pool.publish(run(learner.weights()), 2))
    check(run, pool, prompt, reference, after, 2)  # the same words and image: what is cached of them would show
    with pytest.raises(Superseded, match="learner rank 0 has replaced the weights"):
        run(pool.publish(offer, 1))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_checkpoint_folder_takes_over_whatever_the_transport(rooms, run, ask, reference, make_reference, other):
    _, pool = rooms
    run(pool.load(other, 7))
    check(run, pool, ask("p", seed=2), reference, make_reference(other).weights, 7)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_engine_that_joins_fetches_what_the_others_hold_and_a_new_learner_is_met(
    rooms, run, ask, reference, make_reference, other, linked
):
    learner, pool = rooms
    run(pool.publish(run(learner.weights()), 8))
    run(pool.resize(2))
    versions = {name: engine["version"] for name, engine in run(pool.health()).items()}
    assert versions == {"rollout engine 0": 8, "rollout engine 1": 8}
    gone = run(learner.weights())
    learner.shutdown()
    with pytest.raises(Superseded, match="the learner died while rollout engine . was to fetch its weights"):
        run(pool.publish(gone, 9))
    assert len(pool._ready) == 2, "an engine was replaced for a fault that was not its own"
    rebuilt = run(_learner(other, linked))
    run(pool.publish(run(rebuilt.weights()), 2))
    for seed in range(4):
        check(run, pool, ask("p", seed=seed), reference, make_reference(other).weights, 2)
    rebuilt.shutdown()


async def _learner(policy, settings):
    return await LearnerGroup.create(policy, LEARNER, RECIPE, settings.max_prompt_tokens, wire=Wire.of(settings))
