"""What a run's folder will hold: checkpoints to resume from, the models that stages hand over, the journal."""

from __future__ import annotations

from dataclasses import dataclass

from prism_ray.config.run import RunSettings
from prism_ray.planning.architecture import Architecture
from prism_ray.planning.flow import RESPONSE_SHARE, phases
from prism_ray.planning.layout import judges_itself
from prism_ray.planning.memory import NUMBER

TOKEN_BYTES = 12 + 4
"""Of a token in the journal: id, log-prob and version, and about four bytes of its text."""
IMAGE_BYTES = 512 * 1024
"""Assumed of a prompt's images, as they are compressed."""


@dataclass(frozen=True)
class Item:
    """Something in the run's folder, at its largest."""

    name: str
    bytes: int


def disk_items(settings: RunSettings, policy: Architecture, judge: Architecture) -> list[Item]:
    """Everything large that the configured stages leave or need, the largest state of one stage at a time: a stage's
    state is removed when it is done."""
    s = settings
    trained = policy.trained(s.learner.freeze, s.learner.lora)
    small, judge_small = NUMBER[s.learner.precision], NUMBER[s.discriminator.optimiser.precision]
    states: dict[str, int] = {}
    items: list[Item] = []
    for stage in s.stages:
        if stage in ("sft", "references") or (stage == "base" and s.policy is None):
            size = NUMBER[s.trainer.precision]
            states[stage] = _training_state(policy.total, policy.trained(s.trainer.freeze), size)
            items.append(Item(f"{stage}/checkpoint", policy.total * size))
        elif stage == "warmup":
            items.append(Item("warmup/upcycled (float32)", judge.total * 4))
            items.append(Item("warmup/checkpoint", judge.total * judge_small))
        elif stage in phases(s):
            states[stage] = _training_state(policy.total, trained, small)
            items.append(Item(f"{stage}/checkpoint", policy.total * small))
            items.append(Item(f"{stage}: journal", _journal(s, stage)))
            if judges_itself(stage, s):
                states[stage] += _training_state(judge.total, judge.total, judge_small)
                items.append(Item("align/discriminator", judge.total * judge_small))
    if states:
        stage = max(states, key=lambda name: states[name])
        # While a checkpoint is written the one before it is still there.
        items.append(Item(f"{stage}/state, two checkpoints", 2 * states[stage]))
    return items


def _training_state(total: int, trained: int, size: int) -> int:
    """Bytes of a checkpoint to resume from: the weights, and float32 master weights and two momenta of what trains."""
    return total * size + 12 * trained


def _journal(settings: RunSettings, stage: str) -> int:
    phase = phases(settings)[stage]
    loop = phase.loop
    held = (
        phase.updates if settings.journal.keep else min(phase.updates, loop.checkpoint_every + loop.max_staleness + 1)
    )
    response = RESPONSE_SHARE * phase.response_limit(settings.rollout)
    group = settings.rollout.group_size * response * TOKEN_BYTES + IMAGE_BYTES
    return int(held * loop.groups_per_step * group)
