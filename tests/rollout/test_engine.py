"""What the engine samples, through the pool and its actor: the numbers must be the learner's."""

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest
import ray

from prism_ray.models.encode import Encoder
from prism_ray.models.load import copy_policy, save_weights
from prism_ray.models.template import set_system_turn
from prism_ray.rollout.partial import UNFINISHED, assembled
from prism_ray.rollout.sampling import Request, Sampling
from prism_ray.runtime.protocols import Ticket
from prism_ray.weights.files import shared_folder

PARITY = 1e-4


def ticket(number, prompt):
    return Ticket(number, prompt.id, number, ray.put(prompt))


def group_of(run, pool, prompt, number=0):
    done = run(pool.generate(ticket(number, prompt)))
    return done, ray.get(done.ref)


def leftovers(run, pool):
    (engine,) = run(pool.health()).values()
    return list(shared_folder().glob(f"prism_ray_{engine['pid']}_*"))


def test_a_group_has_n_complete_rollouts(run, pool, ask, reference, settings):
    prompt = ask("p7", seed=1)
    done, group = group_of(run, pool, prompt, 7)
    assert (done.id, done.prompt_id, done.position, group.id) == (7, "p7", 7, 7)
    assert group.prompt == prompt and not group.verdicts
    assert [r.index for r in group.rollouts] == list(range(settings.group_size))
    assert done.tokens == sum(len(r.token_ids) for r in group.rollouts)
    encoded = reference.encoder.prompt(prompt).token_ids.tolist()
    assert done.total_tokens == done.tokens + len(encoded)
    for r in group.rollouts:
        assert r.prompt_id == "p7" and r.prompt_token_ids.tolist() == encoded
        assert len(r.token_ids) == len(r.logp) == len(r.versions) <= settings.max_response_tokens
        assert (r.token_ids.dtype, r.logp.dtype, r.versions.dtype) == (np.int32, np.float32, np.int32)
        assert set(r.versions.tolist()) == {0}
        assert r.text == reference.encoder.tokenizer.decode(r.token_ids, skip_special_tokens=True)
        ended = r.token_ids[-1] == reference.encoder.end_id
        assert r.finish_reason == ("stop" if ended else "length")
        assert ended or len(r.token_ids) == settings.max_response_tokens
    assert len({tuple(r.token_ids.tolist()) for r in group.rollouts}) == settings.group_size
    assert 0 <= done.stats["rollout/truncated_share"] <= 1 and done.stats["rollout/mixed_share"] == 0


def test_log_probs_are_the_learners_before_and_after_every_tensor_changed(run, pool, ask, reference):
    prompts = [ask(f"p{i}", seed=i) for i in range(3)]
    prompts.append(ask("long", seed=3, question=" red" * 140))  # a whole block of it is cached, and must be forgotten
    both = ({"role": "user", "content": "<image> max of<image> red"},)
    prompts.append(replace(prompts[0], id="two", messages=both, images=prompts[0].images + prompts[1].images))
    new = reference.changed(seed=0)
    assert all((new[n] != w).mean() > 0.99 for n, w in reference.weights.items())
    for weights, version in ((reference.weights, 0), (new, 1), (reference.changed(seed=1), 2), (reference.weights, 3)):
        if version:
            metrics = run(pool.publish(weights, version))
            assert metrics["weights/paused_s"] > 0
        done = run(asyncio.wait_for(_all(pool, prompts), 120))
        for prompt, t in zip(prompts, done, strict=True):
            assert t.oldest_version == version
            other, moved = (new if weights is not new else reference.weights), 0.0
            for r in ray.get(t.ref).rollouts:
                assert set(r.versions.tolist()) == {version}
                np.testing.assert_allclose(r.logp, reference.logp(r, prompt, weights), atol=PARITY, rtol=0)
                moved = max(moved, np.abs(r.logp - reference.logp(r, prompt, other)).max())
            assert moved > 0.1, "other weights give other log-probs (a response of one token may be alike by chance)"
    assert not leftovers(run, pool)


async def _all(pool, prompts):
    return await asyncio.gather(*(pool.generate(ticket(i, p)) for i, p in enumerate(prompts)))


def test_a_tied_output_layer_may_come_along(run, pool, ask, reference):
    new = reference.changed(seed=2)
    tied = new | {"lm_head.weight": new["model.language_model.embed_tokens.weight"]}
    run(pool.publish(ray.put(tied), 5))
    prompt = ask("p", seed=3)
    _, group = group_of(run, pool, prompt)
    np.testing.assert_allclose(group.rollouts[0].logp, reference.logp(group.rollouts[0], prompt, new), atol=PARITY)


def test_a_checkpoint_of_another_stage_takes_over(run, pool, ask, reference, folder, tmp_path):
    new = reference.changed(seed=3)
    save_weights(new, tmp_path, like=folder)
    run(pool.load(tmp_path, 0))
    prompt = ask("p", seed=4)
    _, group = group_of(run, pool, prompt)
    np.testing.assert_allclose(group.rollouts[0].logp, reference.logp(group.rollouts[0], prompt, new), atol=PARITY)
    assert (tmp_path / "model.safetensors").exists()


def test_every_token_is_of_the_version_it_is_attributed_to(run, pool, ask, reference, monkeypatch):
    """New weights while rollouts are under way: each span's log-probs are those of its version's weights."""
    monkeypatch.setattr(pool, "settings", pool.settings.model_copy(update={"max_response_tokens": 200}))
    prompts = [ask(f"p{i}", seed=i) for i in range(3)]
    kinds = [reference.weights, reference.changed(seed=4)]
    refs = [ray.put(w) for w in kinds]

    async def generate_while_publishing():
        tasks = [asyncio.create_task(pool.generate(ticket(i, p))) for i, p in enumerate(prompts)]
        version = 0
        while not all(t.done() for t in tasks):
            await asyncio.sleep(0.3)
            version += 1
            await pool.publish(refs[version % 2], version)
        return [t.result() for t in tasks]

    mixed = 0
    for prompt, done in zip(prompts, run(generate_while_publishing()), strict=True):
        group = ray.get(done.ref)
        assert done.oldest_version == group.oldest_version
        for r in group.rollouts:
            assert (np.diff(r.versions) >= 0).all()
            mixed += len(set((r.versions % 2).tolist())) == 2
            under = [reference.logp(r, prompt, w) for w in kinds]
            expected = np.where(r.versions % 2, under[1], under[0])
            np.testing.assert_allclose(r.logp, expected, atol=PARITY, rtol=0)
    assert mixed


def test_the_engine_samples_from_the_ids_that_came_with_the_prompt(run, pool, ask, reference):
    encoder = reference.encoder
    plain, other = ask("p", seed=5), ask("p", seed=5, question=" count of red")
    travelled = encoder.tokenised(plain)
    forged = replace(travelled, token_ids=encoder.tokenised(other).token_ids)
    stale = replace(forged, tokens_of=encoder.tokenised(other).tokens_of)
    seen = [g.rollouts[0] for g in run(pool.sample([plain, travelled, forged, stale], greedy=True, max_tokens=20))]
    wanted = [encoder.prompt(p).token_ids.tolist() for p in (plain, plain, other, plain)]
    assert [r.prompt_token_ids.tolist() for r in seen] == wanted and wanted[0] != wanted[2]
    assert seen[0].token_ids.tolist() == seen[1].token_ids.tolist() == seen[3].token_ids.tolist()
    np.testing.assert_allclose(seen[2].logp, reference.logp(seen[2], other), atol=PARITY, rtol=0)


def test_a_checkpoint_brings_its_chat_template_along(run, pool, ask, reference, folder, tmp_path):
    """Also to an engine that takes the place of a lost one."""
    copy_policy(folder, tmp_path / "told")
    set_system_turn(tmp_path / "told", "max of red")
    told = Encoder(tmp_path / "told", 200)
    prompt = reference.encoder.tokenised(ask("p", seed=5))
    run(pool.load(tmp_path / "told", 0))
    (group,) = run(pool.sample([prompt], greedy=True, max_tokens=1))
    assert group.rollouts[0].prompt_token_ids.tolist() == told.prompt(prompt).token_ids.tolist()
    assert len(group.rollouts[0].prompt_token_ids) > len(reference.encoder.prompt(prompt).token_ids)
    assert pool._folder == tmp_path / "told", "a successor would begin with the template of the stage before"
    run(pool.load(folder, 0))
    (group,) = run(pool.sample([prompt], greedy=True, max_tokens=1))
    assert group.rollouts[0].prompt_token_ids.tolist() == reference.encoder.prompt(prompt).token_ids.tolist()


def test_the_image_matters(run, pool, ask):
    first, other = (run(pool.sample([ask("p", seed=s)], greedy=True, max_tokens=1))[0] for s in (5, 6))
    assert first.rollouts[0].prompt_token_ids.tolist() == other.rollouts[0].prompt_token_ids.tolist()
    assert abs(first.rollouts[0].logp[0] - other.rollouts[0].logp[0]) > 1e-3


def test_greedy_is_greedy(run, pool, ask):
    prompts = [ask(f"p{i}", seed=i) for i in range(5)]
    once, again = (run(pool.sample(prompts, n=1, greedy=True, max_tokens=20)) for _ in range(2))
    assert [g.prompt.id for g in once] == [p.id for p in prompts]
    for a, b in zip(once, again, strict=True):
        assert a.rollouts[0].token_ids.tolist() == b.rollouts[0].token_ids.tolist()


def test_evaluation_samples_as_many_as_asked(run, pool, ask):
    groups = run(pool.sample([ask("p", seed=1)] * 3, n=2, temperature=0.5, max_tokens=5))
    assert [len(g.rollouts) for g in groups] == [2, 2, 2]
    assert all(len(r.token_ids) <= 5 for g in groups for r in g.rollouts)


def test_temperature_is_that_of_the_learner(run, pool, ask, reference):
    """At temperature T the engine's log-probs are of softmax(logits / T), which scaling the output layer imitates."""
    prompt = ask("p", seed=8)
    rollout = run(pool.sample([prompt], n=1, temperature=0.5, max_tokens=30))[0].rollouts[0]
    norm = "model.language_model.norm.weight"
    sharper = reference.weights | {norm: reference.weights[norm] * 2}
    np.testing.assert_allclose(rollout.logp, reference.logp(rollout, prompt, sharper), atol=PARITY)


def test_banned_tokens_never_appear_even_when_the_model_loves_them(run, pool, ask, reference):
    banned = reference.encoder.banned_ids
    embedding = "model.language_model.embed_tokens.weight"
    loving = {n: w.copy() for n, w in reference.weights.items()}
    loving[embedding][banned] *= 30
    run(pool.publish(loving, 1))
    prompts = [ask(f"p{i}", seed=i) for i in range(4)]
    forgone = []
    for group in run(pool.sample(prompts, n=4)) + run(pool.sample(prompts, greedy=True)):
        for r in group.rollouts:
            assert not set(r.token_ids.tolist()) & set(banned)
            np.testing.assert_allclose(r.logp, reference.logp(r, group.prompt, loving), atol=PARITY)
            forgone.append((r.logp - reference.logp(r, group.prompt, loving, banned=False)).mean())
    # -log(1 - probability of a banned token): what the two differ by when the learner does not ban the same ids
    assert np.mean(forgone) > 1


def test_incomplete_weights_are_refused_by_name_and_the_engine_goes_on(run, pool, ask, reference):
    lacking = dict(reference.weights)
    del lacking["model.visual.pos_embed.weight"]
    with pytest.raises(ValueError, match="version 4: tensor model.visual.pos_embed.weight is missing"):
        run(pool.publish(lacking, 4))
    wrong = reference.weights | {"model.visual.pos_embed.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"pos_embed.weight has shape \(2, 2\)"):
        run(pool.publish(wrong, 4))
    done, _ = group_of(run, pool, ask("p", seed=1))
    assert done.oldest_version == 0 and not leftovers(run, pool)


def test_a_prompt_that_is_too_long_is_refused_by_name(run, pool, ask):
    with pytest.raises(ValueError, match="prompt long: .* tokens exceed"):
        run(pool.generate(ticket(0, ask("long", question=" red" * 400))))


def test_a_request_that_vllm_refuses_costs_no_engine(run, pool, ask):
    with pytest.raises(ValueError, match="prompt p: n must be 1 when using greedy"):
        run(pool.sample([ask("p", seed=1)], n=2, greedy=True))
    assert run(pool.sample([ask("p", seed=1)], greedy=True, max_tokens=2))


def test_health_and_updates_are_answered_while_rollouts_run(run, pool, ask, reference, monkeypatch):
    monkeypatch.setattr(pool, "settings", pool.settings.model_copy(update={"max_response_tokens": 200}))

    async def ask_while_running():
        tasks = [asyncio.create_task(pool.generate(ticket(i, ask(f"p{i}", seed=i)))) for i in range(8)]
        for _ in range(1000):
            health = (await pool.health())["rollout engine 0"]
            if health["running"]:
                break
        running = not any(t.done() for t in tasks)
        await asyncio.gather(*tasks)
        return health, running

    health, running = run(ask_while_running())
    assert running and health["version"] == 0 and health["running"] > 0


KEYS = itertools.count(1 << 40)


def directly(pool, prompt, sampling, so_far=()):
    """A group asked of the engine without the pool's bookkeeping."""
    request = Request(next(KEYS), 0, pool._era, sampling)
    return pool._ready[0].watched.actor.generate.options(num_returns=2).remote(prompt, request, so_far)


def cut(rollout, tokens):
    """What another engine knows of a rollout that was cut off."""
    parts = {name: getattr(rollout, name)[:tokens] for name in ("token_ids", "logp", "versions")}
    return replace(rollout, prompt_token_ids=np.zeros(0, np.int32), text="", finish_reason=UNFINISHED, **parts)


@pytest.mark.parametrize("tokens", [1, 15, 39, 40])
def test_a_rollout_that_goes_on_elsewhere_is_the_one_that_was_not_cut_off(run, pool, ask, reference, tokens):
    prompt, sampling = ask("p", seed=11), Sampling(1, 0.0, 40)
    (original,) = ray.get(directly(pool, prompt, sampling)[0]).rollouts
    known = original if tokens == 40 else cut(original, tokens)
    group, meta = ray.get(directly(pool, prompt, sampling, [known]))
    (whole,) = group.rollouts
    assert meta["finished"] and whole.token_ids.tolist() == original.token_ids.tolist()
    assert (len(whole.text), whole.finish_reason, whole.index) == (len(original.text), "length", 0)
    assert (whole.text, whole.prompt_id) == (original.text, "p")
    assert whole.prompt_token_ids.tolist() == original.prompt_token_ids.tolist()
    np.testing.assert_allclose(whole.logp, original.logp, atol=PARITY, rtol=0)
    np.testing.assert_allclose(whole.logp, reference.logp(whole, prompt), atol=PARITY, rtol=0)


def test_finished_begun_and_unknown_rollouts_of_a_group_go_on_together(run, pool, ask, reference):
    prompt, sampling = ask("p", seed=14), Sampling(4, 1.0, 40)
    before = ray.get(directly(pool, prompt, sampling)[0]).rollouts
    known = [before[0], cut(before[2], 10), cut(before[3], 0)]
    after = ray.get(directly(pool, prompt, sampling, known)[0]).rollouts
    assert [r.index for r in after] == [0, 1, 2, 3]
    assert after[0].token_ids.tolist() == before[0].token_ids.tolist() and after[0].text == before[0].text
    assert after[2].token_ids[:10].tolist() == before[2].token_ids[:10].tolist()
    assert len({tuple(r.token_ids.tolist()) for r in after}) == 4
    for rollout in after:
        np.testing.assert_allclose(rollout.logp, reference.logp(rollout, prompt), atol=PARITY, rtol=0)


def test_a_beginning_keeps_its_versions_and_log_probs_under_other_weights(run, pool, ask, reference):
    prompt, sampling = ask("p", seed=12), Sampling(2, 1.0, 40)
    begun = [cut(r, 15) for r in ray.get(directly(pool, prompt, sampling)[0]).rollouts]
    new = reference.changed(seed=6)
    run(pool.publish(new, 1))
    for rollout, beginning in zip(ray.get(directly(pool, prompt, sampling, begun)[0]).rollouts, begun, strict=True):
        kept = len(beginning.token_ids)  # 15, or fewer where the response ended earlier
        assert rollout.versions.tolist() == [0] * kept + [1] * (len(rollout.token_ids) - kept)
        np.testing.assert_array_equal(rollout.logp[:kept], beginning.logp)
        expected = np.where(rollout.versions, reference.logp(rollout, prompt, new), reference.logp(rollout, prompt))
        np.testing.assert_allclose(rollout.logp, expected, atol=PARITY, rtol=0)


def test_what_an_engine_tells_of_unfinished_rollouts_is_how_they_begin(run, pool, ask, reference):
    """Pieces told while new weights arrive, put together, are prefixes of what comes in the end, versions included."""
    prompt, sampling, actor = ask("p", seed=13), Sampling(4, 1.0, 200), pool._ready[0].watched.actor

    async def tell():
        group, meta = directly(pool, prompt, sampling)
        told, version = [], 0
        while True:
            remaining, news = await asyncio.gather(*actor.progress.options(num_returns=2).remote())
            if told and not any(remaining):
                break
            told += [(remaining[key], pieces) for key, pieces in news.items()]
            if len(told) in (5, 10):
                version += 1
                await pool.publish(reference.changed(seed=version), version)
        return told, await group

    told, group = run(asyncio.wait_for(tell(), 120))
    pieces = [piece for _, new in told for piece in new]
    assert len(pieces) > 8
    for known in assembled("p", [], pieces):
        final = group.rollouts[known.index]
        tokens = len(known.token_ids)
        for name in ("token_ids", "logp", "versions"):
            np.testing.assert_array_equal(getattr(known, name), getattr(final, name)[:tokens])
        assert tokens == len(final.token_ids) or known.finish_reason == UNFINISHED
    remaining = [tokens for tokens, _ in told]
    assert remaining == sorted(remaining, reverse=True) and 0 < remaining[-1] < 800
    halves = [assembled("p", assembled("p", [], pieces[:3]), pieces[3:]), assembled("p", [], pieces)]
    assert [r.token_ids.tolist() for r in halves[0]] == [r.token_ids.tolist() for r in halves[1]]
    assert not assembled("p", [], pieces[-1:]), "a piece was lost"


def test_going_back_samples_everything_anew_under_the_older_version(run, pool, ask, reference, monkeypatch):
    monkeypatch.setattr(pool, "settings", pool.settings.model_copy(update={"max_response_tokens": 200}))
    newer, older, newest = (reference.changed(seed=s) for s in (7, 8, 9))
    prompts = [ask(f"p{i}", seed=i) for i in range(4)]

    async def go_back():
        await pool.publish(newer, 6)
        tasks = [asyncio.create_task(pool.generate(ticket(i, p))) for i, p in enumerate(prompts)]
        while not any((await pool._ready[0].watched.actor.progress.options(num_returns=2).remote()[1]).values()):
            await asyncio.sleep(0.01)  # until there are tokens
        await pool.publish(older, 5)
        await pool.publish(newest, 6)  # the number of the abandoned weights, given to others
        return await asyncio.gather(*tasks)

    done = run(asyncio.wait_for(go_back(), 120))
    assert sum(t.stats["rollout/lost_tokens"] for t in done) > 0
    for prompt, done_ticket in zip(prompts, done, strict=True):
        for r in ray.get(done_ticket.ref).rollouts:
            assert set(r.versions.tolist()) <= {5, 6}
            under = {v: reference.logp(r, prompt, w) for v, w in ((5, older), (6, newest))}
            expected = np.where(r.versions == 5, under[5], under[6])
            np.testing.assert_allclose(r.logp, expected, atol=PARITY, rtol=0)
