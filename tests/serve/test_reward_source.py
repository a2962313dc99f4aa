"""A served discriminator as the judge of a run: the same verdicts and metrics as the run's own, frozen."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.run import RunSettings
from prism_ray.config.served import ServedSettings
from prism_ray.config.views import ViewSettings
from prism_ray.discriminator.model import create_discriminator, load_discriminator
from prism_ray.discriminator.scorer import judge, judged_metrics
from prism_ray.discriminator.served.judging import OtherJudge, check_model, judged_group
from prism_ray.discriminator.served.pool import ServedPool
from prism_ray.endpoint.client import Client
from prism_ray.endpoint.wire import EndpointError, Judge
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout, Verdict
from prism_ray.report.metrics import read_metrics
from prism_ray.runtime.protocols import Ticket
from prism_ray.stages.served import check_served, columns_for
from prism_ray.testbed.words import vocabulary

ROOT = Path(__file__).resolve().parents[2]
VIEWS = DiscriminatorSettings().views


@pytest.fixture
def group(png, response):
    def make(seed: int = 0, *texts: str) -> Group:
        texts = texts or (response(), response(" blue", " max"), "broken", response(" red two"))
        messages = ({"role": "user", "content": "<image> count red"},)
        prompt = Prompt(f"p{seed}", messages, (png(seed),), response(" red two", " count"))
        none = np.zeros(0, np.int32)
        rollouts = (
            Rollout(prompt.id, i, none, none, np.zeros(0, np.float32), none, t, "stop") for i, t in enumerate(texts)
        )
        return Group(seed, prompt, tuple(rollouts))

    return make


@pytest.fixture
def asked(endpoint, token):
    """A group's answer from the endpoint, and what it says of itself."""

    def ask(group: Group):
        with Client(endpoint.url, token) as client:
            prompt = group.prompt
            texts = [r.text for r in group.rollouts]
            answer = client.score([dict(m) for m in prompt.messages], texts, prompt.images, prompt.reference)
            return answer, client.model()

    return ask


def test_verdicts_and_metrics_are_those_of_the_runs_own_judge(folder, asked, group):
    answer, model = asked(group())
    check_model(model, ServedSettings(url="http://x"), VIEWS)
    ours, stats = judged_group(group(), answer, model)
    [theirs] = judge(load_discriminator(folder).eval(), Encoder(folder, 512), [group()], 0)
    for one, other in zip(ours.verdicts, theirs.group.verdicts, strict=True):
        assert (one.valid, one.reason, one.judge_version) == (other.valid, other.reason, 0)
        assert one.reward == pytest.approx(other.reward, rel=1e-5)
        for name in ("scores", "reference_scores", "parts"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5)
    ranges = {name: stats.pop(name) for name in list(stats) if name.startswith(("group/lowest", "group/highest"))}
    expected = judged_metrics([theirs])
    assert stats == {name: pytest.approx(expected[name], rel=1e-5) for name in stats}
    assert ranges["group/lowest/reward"] == 0 < ranges["group/highest/reward"] == max(v.reward for v in ours.verdicts)
    assert ranges["group/highest/perception"] == max(v.parts.get("perception", 0) for v in ours.verdicts)
    assert stats["discriminator/identical/perception"] == pytest.approx(1 / 3)
    assert {f"discriminator/{what}/{view.name}" for what in ("gap", "pair_accuracy") for view in VIEWS} <= set(stats)


def test_another_judge_than_the_run_began_with_is_refused(asked, group):
    answer, model = asked(group())
    other = answer.model_copy(update={"model": Judge(name="discriminator", version="another")})
    with pytest.raises(OtherJudge, match="went over from version .* to another"):
        judged_group(group(), other, model)
    with pytest.raises(OtherJudge, match="served.version is abc"):
        check_model(model, ServedSettings(url="http://x", version="abc"), VIEWS)
    whole = (ViewSettings(name="whole", tags=("caption", "think", "answer")),)
    with pytest.raises(
        OtherJudge, match=r"judges perception \(caption\); reasoning .* but discriminator.views are whole"
    ):
        check_model(model, ServedSettings(url="http://x"), whole)
    with pytest.raises(OtherJudge, match="served.images is false"):
        check_model(model, ServedSettings(url="http://x", images=False), VIEWS)


def test_a_run_is_told_early_what_is_wrong_with_its_endpoint(endpoint, token, monkeypatch):
    def settings(*more: str) -> RunSettings:
        return load_config(RunSettings, None, ["align.judge=serve", f"served.url={endpoint.url}", *more])

    monkeypatch.setenv("PRISM_SERVE_TOKEN", token)
    check_served(settings())
    monkeypatch.setenv("OTHER", "wrong")
    for more, what in (
        ("served.token_variable=OTHER", "wrong_token"),
        ("served.version=abc", "served.version is abc"),
    ):
        with pytest.raises(ValueError, match=what):
            check_served(settings(more))
    check_served(load_config(RunSettings))
    check_served(settings("served.images=true", "rollout.max_images=8", "rollout.max_model_len=8000"))
    for more, what in (
        ("rollout.max_images=9", "takes 8 images a prompt .its limits.images. but rollout.max_images is 9"),
        ("rollout.max_model_len=8400", "takes prompts of 8192 tokens .* but this run's have up to 8304"),
    ):
        with pytest.raises(ValueError, match=what):
            check_served(settings(more))
    with pytest.raises(ConfigError, match="served.url is empty"):
        load_config(RunSettings, None, ["rlvr.judge=serve"])
    with pytest.raises(ConfigError, match="served.url"):
        settings("served.url=http://user:secret@host/")
    assert columns_for("rlvr", load_config(RunSettings)) == ("reward_model",)
    assert columns_for("rlvr", settings("rlvr.judge=serve")) == ("teacher_response",)


def test_images_that_an_endpoint_would_not_take_are_refused(listening, make_folder, tmp_path, token, monkeypatch):
    """They are sent at the size at which the policy sees them, of which its prompt's longest length tells the most."""
    monkeypatch.setenv("PRISM_SERVE_TOKEN", token)
    blind = make_folder(tmp_path / "blind", sees_images=False)
    with listening(blind, limits={"image_pixels": 163_839, "images": 0}) as endpoint:
        asking = ["rlvr.judge=serve", f"served.url={endpoint.url}"]
        check_served(load_config(RunSettings, None, [*asking, "served.images=false"]))
        check_served(load_config(RunSettings, None, [*asking, "rollout.max_images=0"]))
        with pytest.raises(ValueError, match="takes 0 images a prompt"):
            check_served(load_config(RunSettings, None, asking))
    with listening(limits={"image_pixels": 163_839}) as endpoint:
        asking = ["rlvr.judge=serve", f"served.url={endpoint.url}", "rollout.max_response_tokens=96"]
        check_served(load_config(RunSettings, None, [*asking, "rollout.max_model_len=255"]))
        with pytest.raises(ValueError, match="of 163839 pixels .its limits.image_pixels. but .* up to 163840"):
            check_served(load_config(RunSettings, None, [*asking, "rollout.max_model_len=256"]))


def test_a_pool_judges_groups_in_an_actor_of_its_own(cluster, listening, other_folder, token, group, response):
    """More responses than a request may have go in several; a change of weights at the endpoint ends the run."""

    async def scenario(url: str, endpoint) -> tuple[list[Ticket], str]:
        settings = ServedSettings(url=url, concurrency=4)
        with pytest.raises(EndpointError, match="wrong_token"):
            await ServedPool.start(settings, VIEWS, "wrong")
        pool = await ServedPool.start(settings, VIEWS, token)
        assert (pool.version, pool.wants_ratios, await pool.learn([], 0)) == (0, False, {})
        groups = [group(i) for i in range(4)]
        tickets = [Ticket(g.id, g.prompt.id, g.id, ray.put(g), stats={"other": 1.0}) for g in groups]
        judged = await asyncio.gather(*(pool.judge(ticket) for ticket in tickets))
        await asyncio.to_thread(endpoint.call, endpoint.service.load(other_folder))
        with pytest.raises(OtherJudge, match="went over from version") as caught:
            await pool.judge(tickets[0])
        pool.shutdown()
        return judged, str(caught.value)

    with listening(limits={"responses": 3}) as endpoint:
        judged, _ = asyncio.run(scenario(endpoint.url, endpoint))
    for index, ticket in enumerate(judged):
        verdicts = ray.get(ticket.ref).verdicts
        assert [v.valid for v in verdicts] == [True, True, False, True] and ticket.id == index
        assert ticket.stats["other"] == 1.0 and "discriminator/gap/reasoning" in ticket.stats
        assert all(v.reference_scores == verdicts[0].reference_scores for v in verdicts if v.valid)


async def verdicts_of(url: str, token: str, asked: list[Group], **settings) -> list[tuple[Verdict, ...]]:
    """What a pool's judge says of groups."""
    pool = await ServedPool.start(ServedSettings(url=url, **settings), VIEWS, token)
    try:
        judged = [await pool.judge(Ticket(g.id, g.prompt.id, g.id, ray.put(g))) for g in asked]
    finally:
        pool.shutdown()
    return [ray.get(ticket.ref).verdicts for ticket in judged]


def test_a_judge_that_sees_no_images_is_sent_none(cluster, listening, make_folder, tmp_path, token, group):
    blind = make_folder(tmp_path / "blind", sees_images=False)
    with listening(blind) as endpoint:
        seen, unseen = (asyncio.run(verdicts_of(endpoint.url, token, [group()], images=i)) for i in (True, False))
    assert [v.valid for v in unseen[0]] == [True, True, False, True] and unseen == seen
    with listening(blind, limits={"images": 0}) as endpoint:
        assert asyncio.run(verdicts_of(endpoint.url, token, [group()], images=False)) == seen


def test_a_response_that_the_endpoint_would_not_take_is_an_invalid_one(cluster, listening, token, group, response):
    long = response(" blå" * 80)
    asked = [group(0, response(), long, response(" blue")), group(0, long, long)]
    with listening(limits={"response_bytes": 300}) as endpoint:
        some, none = asyncio.run(verdicts_of(endpoint.url, token, asked))
        fine = group(0, response())
        unusable = replace(fine, prompt=replace(fine.prompt, reference=long))
        with pytest.raises(EndpointError, match=r"prompt p0: the reference has 465 bytes; .*response_too_long"):
            asyncio.run(verdicts_of(endpoint.url, token, [unusable]))
    assert [v.valid for v in some] == [True, False, True] and [v.valid for v in none] == [False, False]
    assert some[1].reason == "465 bytes, and the endpoint takes 300 (its limits.response_bytes)"
    assert (some[1].reward, some[1].scores) == (0.0, {})


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_is_aligned_and_reinforced_by_a_served_discriminator(listening, token, tmp_path):
    """Without warm-up and verifier, through the real front door; the endpoint says what it was asked."""
    build_tiny(tmp_path / "policy", vocabulary(), TinyModelSettings(), seed=0)
    create_discriminator(tmp_path / "policy", tmp_path / "judge", DiscriminatorSettings(), seed=0)
    settings = [
        "name=served", f"runs={tmp_path}", "stages=[align, rlvr]", "cluster.cpus=2", "trainer.cpus_per_rank=0.5",
        "rollout.cpus_per_engine=0.5", "learner.cpus_per_rank=0.5", "testbed.pretrain=64", "testbed.base=512",
        "testbed.sft=64", "testbed.align=48", "testbed.rlvr=24", "testbed.evaluate=16", "testbed.evaluate_unseen=4",
        "base.pretrain.steps=4", "base.clean.steps=150", "sft.steps=6", "rollout.group_size=4",
        "rollout.max_response_tokens=64", "align.updates=2", "align.loop.groups_per_step=2", "rlvr.updates=2",
        "rlvr.loop.groups_per_step=2", "align.judge=serve", "rlvr.judge=serve",
    ]  # fmt: skip
    with listening(tmp_path / "judge") as endpoint:
        program = [sys.executable, str(ROOT / "jobs" / "align.py"), *settings, f"served.url={endpoint.url}"]
        environment = os.environ | {"PRISM_SERVE_TOKEN": token, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(program, capture_output=True, text=True, timeout=800, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        assert endpoint.service.batcher.batches > 0
    run = tmp_path / "served"
    assert not (run / "warmup").exists() and (run / "rlvr" / "checkpoint" / "config.json").exists()
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] in ("align", "rlvr")]
    assert [row["step"] for row in rows] == [1, 2, 1, 2]
    assert all("discriminator/valid" in row and "policy/loss" in row for row in rows)
    assert any("discriminator/gap/perception" in row for row in rows)
