"""Episodes of two turns by real engines, environments and learner: what is recorded is what the model computes."""

import io
import zlib
from dataclasses import replace

import pytest
import torch
from PIL import Image

from prism_ray.codec import decode, encode
from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.config.verify import VerifySettings
from prism_ray.learner.work import prepare
from prism_ray.models.batch import collate_shared
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy, save_policy
from prism_ray.models.logprobs import response_logprobs
from prism_ray.records import Ticket
from prism_ray.report.metrics import MetricsLog, read_metrics
from prism_ray.report.summary import Summary
from prism_ray.rollout.episodes import EpisodePool
from prism_ray.stages.replay import batches, describe, read_record, replay
from prism_ray.stages.run import _rlvr
from prism_ray.stages.session import Session
from prism_ray.testbed.corpora import write_corpora

TALKING = "slow_environment:prism-test/Talking-v0"
LONGEST = 120
"""Tokens of an episode after its prompt."""


@pytest.fixture(scope="module")
def talkative(folder, tmp_path_factory):
    """The policy, but a token in ten is the last: all embeddings have a direction in common, the end token most."""
    policy = load_policy(folder)
    weight = policy.model.language_model.embed_tokens.weight.data
    direction = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()
    weight += direction
    weight[Encoder(folder, 200).end_id] += 2.2 * direction
    talkative = tmp_path_factory.mktemp("talkative")
    save_policy(policy, talkative, like=folder)
    return talkative


@pytest.fixture
def engines(shared_pool, run, talkative):
    run(shared_pool.load(talkative, 0))
    shared_pool.max_response_tokens = LONGEST
    yield shared_pool
    shared_pool.max_response_tokens = None


@pytest.fixture
def play(engines, run, talkative, ask):
    """Plays a group; returns its ticket and what it refers to."""
    pools = []

    def play(number=7, ticket=None, **settings):
        pool = EpisodePool(VerifySettings(environment=TALKING, max_turns=2, **settings), talkative).over(engines)
        pools.append(pool)
        prompt = Encoder(talkative, 200).tokenised(ask("p", seed=1))
        ticket = run(pool.generate(ticket or Ticket(number, "p", 3, prompt)))
        return ticket, run(_value(ticket.ref))

    yield play
    for pool in pools:
        pool.shutdown()


async def _value(ref):
    return await ref


def learned(folder, groups):
    """What a learner makes of these groups: its work, and its log-probs [N, R]."""
    encoder = Encoder(folder, 200)
    work = prepare(groups, encoder, ())
    with torch.no_grad():
        batch = collate_shared(work.samples)
        logp_BR, _ = response_logprobs(load_policy(folder).eval(), batch, banned_ids=encoder.banned_ids)
    logp_NR = torch.zeros_like(logp_BR)
    logp_NR[batch.indices] = logp_BR
    return work, logp_NR


def largest(values_NR, mask_NR):
    return float((values_NR * mask_NR).abs().max())


@pytest.mark.timeout(300)
def test_what_the_engine_recorded_is_what_the_learner_computes(play, talkative, engines):
    ticket, group = play()
    both = [r for r in group.rollouts if r.turns]
    assert len(both) >= 2, "no episode had two turns, so nothing was tested"
    work, logp_NR = learned(talkative, [group])
    assert largest(work.behaviour_NR - logp_NR, work.mask_NR) < 1e-4
    assert work.mask_NR.sum().item() == sum(r.sampled for r in group.rollouts)

    encoder = Encoder(talkative, 200)
    image = encoder.processor.image_token_id
    for rollout in both:
        own, others = rollout.token_ids[rollout.mask], rollout.token_ids[~rollout.mask]
        assert image not in own and (others == image).sum() == 6 and len(rollout.images) == 1
        assert (own[:-1] == encoder.end_id).sum() == 1 and not rollout.logp[~rollout.mask].any()
        said = b"".join(encoder.pieces[i] for i in rollout.last_response)
        assert rollout.text == said.decode(errors="replace")
        assert len(rollout.token_ids) <= LONGEST
    verdicts = {r.index: v for r, v in zip(group.rollouts, group.verdicts, strict=True)}
    for rollout in both:
        verdict = verdicts[rollout.index]
        assert verdict.reward == len(rollout.text) % 2 and verdict.parts["turns"] == 2.0
        assert verdict.parts["letters"] == len(rollout.turns[0]["content"]) + len(rollout.text)
    assert ticket.position == 3 and ticket.stats["verify/turns"] > 1 and ticket.stats["rollout/seconds"] > 0
    assert ticket.tokens == sum(len(r.token_ids) for r in group.rollouts)

    asked = replace(group.prompt, token_ids=(), tokens_of="")
    computed, others = learned(talkative, [replace(group, prompt=asked)])
    assert largest(others - logp_NR, work.mask_NR) == 0, "not what the prompt's ids are when they are computed anew"
    assert all(torch.equal(a.response_ids, b.response_ids) for a, b in zip(computed.samples, work.samples, strict=True))

    again = decode(encode(group))
    assert largest(learned(talkative, [again])[1] - logp_NR, work.mask_NR) == 0, "not what a journal gives back"

    shown = replace(both[0], images=(_recoloured(both[0].images[0]),))
    changed = replace(group, rollouts=(shown,), verdicts=group.verdicts[:1])
    _, seen = learned(talkative, [changed])
    first = int(shown.mask.argmin())
    before = logp_NR[[r.index for r in group.rollouts].index(shown.index), : seen.shape[1]]
    assert (seen[0, :first] - before[:first]).abs().max() < 1e-5
    assert (seen[0, first:] - before[first:]).abs().max() > 1e-3, "the second picture does not reach the model"


def _recoloured(data):
    picture = io.BytesIO()
    Image.open(io.BytesIO(data)).point(lambda value: 255 - value).save(picture, format="PNG")
    return picture.getvalue()


SECOND_STRUCK = {"struck": zlib.crc32(b"7/1")}
"""The seed of rollout 1 of group 7."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "reason", "limits"),
    [
        ("raise", "verifier failed: RuntimeError: no idea", {}),
        ("hang", "verifier took longer than 8 s", {"timeout_s": 8.0}),
    ],
)
def test_an_environment_that_fails_in_its_second_turn_is_worth_nothing_and_counted(play, fault, reason, limits):
    ticket, group = play(options={"fault": fault, **SECOND_STRUCK}, **limits)
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        if rollout.index == 1:
            assert verdict.reward == 0.0 and not verdict.valid and verdict.reason.startswith(reason)
            assert len(rollout.turns) == 2, "it did not fail in its second turn"
        else:
            assert verdict.reward == len(rollout.text) % 2 and verdict.parts["turns"] == 2.0
    assert ticket.stats["verify/failed"] == 0.25


@pytest.mark.timeout(300)
def test_a_process_that_is_lost_by_chance_costs_nothing(play, tmp_path, caplog):
    """The episodes are played again up to where they were."""
    ticket, group = play(options={"fault": "crash", "once": str(tmp_path / "met"), **SECOND_STRUCK})
    assert (tmp_path / "met").exists() and "judged again response by response" in caplog.text
    assert ticket.stats["verify/failed"] == 0.0
    assert [v.reward for v in group.verdicts] == [len(r.text) % 2 for r in group.rollouts]


@pytest.mark.timeout(300)
def test_episodes_that_a_policy_began_that_is_taken_back_begin_anew(engines, run, talkative, ask, caplog):
    """The engines go back to version 0 while the environment thinks about the first turn of version 3's."""
    pool = EpisodePool(VerifySettings(environment=TALKING, max_turns=2), talkative).over(engines)
    answered, seen = pool._answered, []

    async def going_back(number, ticket, verdicts):
        seen.append(ticket.oldest_version)
        if len(seen) == 1:
            await engines.load(talkative, 0)
        return await answered(number, ticket, verdicts)

    async def drive():
        await engines.load(talkative, 3)
        pool._answered = going_back
        ticket = await pool.generate(Ticket(1, "p", 0, ask("p", seed=1)))
        return await ticket.ref

    try:
        group = run(drive())
    finally:
        pool.shutdown()
    assert seen[:2] == [3, 0] and group.newest_version == 0
    assert "its episodes begin anew" in caplog.text


SMALL = [
    "name=turns", "verify.environment=prism_ray.testbed.turns:prism/TestbedTurns-v0", "verify.max_turns=2",
    "rollout.group_size=4", "rollout.max_images=2", "rollout.max_model_len=320", "rollout.max_response_tokens=120",
    "learner.cpus_per_rank=0.5", "learner.ranks=2", "learner.lr=1e-3", "journal.keep=true",
    "rlvr.updates=2", "rlvr.loop.groups_per_step=4", "rlvr.loop.checkpoint_every=1",
    *(f"testbed.{split}=8" for split in ("pretrain", "base", "sft", "align", "evaluate", "evaluate_unseen")),
    "testbed.rlvr=32",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(400)
def test_rlvr_trains_on_episodes_and_its_journal_replays(engines, run, talkative, tmp_path):
    settings = load_config(RunSettings, None, [f"runs={tmp_path}", *SMALL])
    corpora = write_corpora(tmp_path / "corpora", settings.testbed, seed=0)
    metrics = MetricsLog(tmp_path / "turns")
    session = Session(settings, metrics, Summary(tmp_path / "turns", "turns"))
    session._pool = engines
    session.corpora = {name: [path] for name, path in corpora.items()}
    session.stage_folder("align").mkdir(parents=True)
    (session.stage_folder("align") / "checkpoint").symlink_to(talkative)
    session.stage_folder("rlvr").mkdir(parents=True)
    try:
        run(_rlvr(session, "rlvr", "align", 2))
    finally:
        metrics.close()

    rows = read_metrics(tmp_path / "turns" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(1 < row["verify/turns"] <= 2 and row["verify/failed"] == 0 for row in rows)

    journal = session.journal("rlvr")
    record = read_record(journal)
    trained = dict(batches(journal, record))
    groups = [group for version in sorted(trained) for group in trained[version]]
    assert len(groups) == 8 and all(len(g.verdicts) == 4 for g in groups)
    both = [r for g in groups for r in g.rollouts if len(r.images) == 1 and not r.mask.all()]
    assert both and all(len(r.token_ids) <= 120 for g in groups for r in g.rollouts)
    of_first = [g for g in trained[0] if g.newest_version == 0]
    work, logp_NR = learned(talkative, of_first)
    assert largest(work.behaviour_NR - logp_NR, work.mask_NR) < 1e-4
    shown = next(g for g in groups if any(r.turns for r in g.rollouts))
    assert "<image>" in describe(journal, shown.id)

    again = []
    run(replay(settings, "rlvr", journal, talkative, lambda step, numbers: again.append(numbers)))
    assert [n["policy/loss"] for n in again] == pytest.approx([row["policy/loss"] for row in rows], abs=1e-5)
