"""The distributed loop at max_staleness 0, fed the same rollouts, equals the reference loop: losses and weights."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import LearnerSettings, OptimiserSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.config.runtime import LoopSettings
from prism_ray.config.testbed import TestbedSettings
from prism_ray.config.verify import VerifySettings
from prism_ray.corpora.rows import prompt_from_row
from prism_ray.discriminator.model import create_discriminator, load_discriminator
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.learner.group import LearnerGroup
from prism_ray.learner.step import Recipe
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout, Ticket
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.truth import truth_of
from prism_ray.testbed.words import vocabulary
from prism_ray.verify.pool import VerifierPool
from tests.end_to_end.reference_loop import Judge, Model, Question, Response, Settings, align_step, grpo_step

UPDATES, PROMPTS, ROLLOUTS, TOKENS = 3, 2, 3, 24
TOLERANCE = 1e-3
"""Of the movement of the weights (root mean square over all of them), how much may differ in float32. Not a maximum:
AdamW divides by the gradient's own size, so an entry whose gradient is rounding noise moves as far as any other."""
DISCRIMINATOR = DiscriminatorSettings(head_dropout=0.0)
OPTIMISER = OptimiserSettings(lr=2e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny untrained policy, a discriminator upcycled from it, and a few prompts."""
    folder = tmp_path_factory.mktemp("world")
    build_tiny(folder / "policy", vocabulary(), TinyModelSettings(), seed=3)
    create_discriminator(folder / "policy", folder / "judge", DISCRIMINATOR, 0)
    sizes = dict.fromkeys(["pretrain", "base", "sft", "rlvr", "evaluate", "evaluate_unseen"], 1)
    write_corpora(folder / "corpora", TestbedSettings(align=UPDATES * PROMPTS, **sizes), seed=0)
    rows = pq.read_table(folder / "corpora" / "align.parquet").to_pylist()
    return folder, [prompt_from_row(row) for row in rows]


def question(prompt: Prompt) -> Question:
    def reward(text: str) -> float:
        truth = truth_of(text, prompt.extra)
        return 0.8 * truth.answer + 0.2 * truth.format

    text = prompt.messages[-1]["content"].replace("<image>", "")
    return Question(text, prompt.images[0], prompt.reference, reward)


def policy_model(folder: Path) -> Model:
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return Model(network, AutoProcessor.from_pretrained(folder), Encoder(folder, 99).banned_ids)


def rollouts_of(policy: Model, prompts: list[Prompt], step: int) -> list[list[Response]]:
    """Sampled responses; one of each group is the reference with a slip, so that valid ones exist, and off-policy:
    behaviour log-probs are shifted, so that the correction matters."""
    groups = []
    for index, prompt in enumerate(prompts):
        asked = question(prompt)
        group = policy.sample(asked, ROLLOUTS - 2, TOKENS, 1.0, seed=100 * step + index)
        for text in (prompt.reference.replace(" red", " blue"), prompt.reference.replace(" 1", " 7")):
            tokens = [*policy.processor.tokenizer(text, add_special_tokens=False)["input_ids"], policy.end]
            group.append(Response(tokens, policy.logp(asked, tokens).detach(), text))
        for response in group:
            noise = torch.randn(len(response.tokens), generator=torch.Generator().manual_seed(step))
            response.behaviour = response.behaviour + 0.8 * noise
        groups.append(group)
    return groups


def as_group(number: int, prompt: Prompt, responses: list[Response], encoder: Encoder, version: int) -> Group:
    ids = encoder.prompt(prompt).token_ids.numpy().astype(np.int32)
    rollouts = []
    for index, r in enumerate(responses):
        tokens = np.array(r.tokens, np.int32)
        versions = np.full(len(tokens), version, np.int32)
        rollouts.append(Rollout(prompt.id, index, ids, tokens, r.behaviour.numpy(), versions, r.text, "stop"))
    return Group(number, prompt, tuple(rollouts))


class Recorded:
    """The reference loop's rollouts in the place of engines; it also stands in for the stream and the journal."""

    def __init__(self, groups: list[Group]):
        self.groups, self.position = groups, 0

    async def take(self):
        self.position += 1
        return f"p{self.position}", self.position - 1, None

    async def generate(self, ticket: Ticket) -> Ticket:
        group = self.groups[ticket.position]
        tokens = sum(len(r.token_ids) for r in group.rollouts)
        return replace(
            ticket, ref=ray.put(replace(group, id=ticket.id)), oldest_version=group.oldest_version, tokens=tokens
        )

    async def publish(self, weights, version):
        return {}

    async def append(self, ticket):
        pass


async def distributed(folder: Path, groups: list[Group], judge, advantage: AdvantageSettings):
    """Train on the recorded groups with the product; returns the metrics of each step and the policy's weights."""
    rows: list[dict[str, float]] = []

    async def on_step(state, metrics):
        rows.append(metrics)

    recipe = Recipe(advantage, ObjectiveSettings(dual_clip=None), CorrectionSettings(kind="tis_token"), 1.0, 256)
    settings = LearnerSettings(lr=OPTIMISER.lr, cpus_per_rank=0.5)
    learner = await LearnerGroup.create(folder / "policy", settings, recipe, 99)
    recorded = Recorded(groups)
    loop = Loop(
        recorded, recorded, judge, learner, recorded, LoopSettings(groups_per_step=PROMPTS, max_staleness=0), on_step
    )
    await loop.run(UPDATES, LoopState())
    weights = await (await learner.weights())
    learner.shutdown()
    return rows, weights


def adamw(module: torch.nn.Module, settings: OptimiserSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), settings.lr, settings.betas, weight_decay=settings.weight_decay)


def deviation(weights: Mapping[str, Any], own: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """Root mean square of the difference, over that of the movement since `before`."""
    assert set(own) <= set(weights)
    there = torch.cat([torch.tensor(np.asarray(weights[n])).flatten() for n in own])
    here, start = (torch.cat([side[n].flatten() for n in own]) for side in (own, before))
    movement = (here - start).square().mean().sqrt()
    assert movement > 1e-5, "nothing moved, so nothing was compared"
    return float((there - here).square().mean().sqrt() / movement)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_grpo_equals_the_reference(world, cluster):
    folder, prompts = world
    policy, encoder = policy_model(folder / "policy"), Encoder(folder / "policy", 99)
    optimiser, groups, losses = adamw(policy.network, OPTIMISER), [], []
    before = snapshot(policy.network)
    for step in range(UPDATES):
        chosen = prompts[step * PROMPTS : (step + 1) * PROMPTS]
        responses = rollouts_of(policy, chosen, step)
        groups += [as_group(0, p, r, encoder, step) for p, r in zip(chosen, responses, strict=True)]
        losses.append(grpo_step(policy, optimiser, [question(p) for p in chosen], responses, Settings()))

    judge = VerifierPool(VerifySettings())
    advantage = AdvantageSettings(estimator="grpo", credit="all_tokens")
    rows, weights = asyncio.run(distributed(folder, groups, judge, advantage))
    assert [row["policy/loss"] for row in rows] == pytest.approx(losses, abs=1e-5)
    assert any(abs(loss) > 1e-3 for loss in losses), "nothing was learned, so nothing was compared"
    assert deviation(weights, snapshot(policy.network), before) < TOLERANCE


def test_alignment_equals_the_reference(world, cluster, tmp_path):
    folder, prompts = world
    policy, encoder = policy_model(folder / "policy"), Encoder(folder / "policy", 99)
    trained = load_discriminator(folder / "judge", DISCRIMINATOR)
    processor = AutoProcessor.from_pretrained(folder / "policy")
    judge = Judge(trained.backbone, trained.head, processor, Settings())
    optimiser, judge_optimiser = adamw(policy.network, OPTIMISER), adamw(trained, DISCRIMINATOR.optimiser)
    before, judge_before, groups, losses = snapshot(policy.network), snapshot(trained), [], []
    for step in range(UPDATES):
        chosen = prompts[step * PROMPTS : (step + 1) * PROMPTS]
        responses = rollouts_of(policy, chosen, step)
        groups += [as_group(0, p, r, encoder, step) for p, r in zip(chosen, responses, strict=True)]
        asked = [question(p) for p in chosen]
        losses.append(align_step(policy, judge, optimiser, judge_optimiser, asked, responses, Settings()))

    async def product():
        pool = await DiscriminatorPool.start(folder / "judge", DISCRIMINATOR, 99)
        rows, weights = await distributed(folder, groups, pool, AdvantageSettings())
        await pool.export(tmp_path / "judge")
        pool.shutdown()
        return rows, weights

    rows, weights = asyncio.run(product())
    assert [row["policy/loss"] for row in rows] == pytest.approx([a for a, _ in losses], abs=1e-4)
    assert [row["discriminator/loss"] for row in rows] == pytest.approx([b for _, b in losses], rel=1e-3)
    assert deviation(weights, snapshot(policy.network), before) < TOLERANCE
    ours = snapshot(load_discriminator(tmp_path / "judge", DISCRIMINATOR))
    assert deviation(ours, snapshot(trained), judge_before) < TOLERANCE
