"""Settings of the supervised stages: vision pre-training and clean SFT of the base model, noisy SFT, references."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prism_ray.config.base import Settings


class SupervisedSettings(Settings):
    """One supervised run: cross-entropy on response tokens, AdamW, gradients clipped."""

    steps: int = Field(ge=1)
    """Optimiser steps; the corpus is read again from its start when it is used up."""
    batch: int = Field(default=16, ge=1)
    """Examples per optimiser step, over all ranks together."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's momenta; the short second one suits runs of a few hundred steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; nothing over-fits in so few epochs."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up; cosine falls to 0 at the last step."""


class BaseSettings(Settings):
    """How the testbed's base model is made; on real data the base is a published checkpoint and this is not used."""

    pretrain: SupervisedSettings = SupervisedSettings(steps=200, lr=2e-3)
    """Vision pre-training: linear colour and digit heads on the visual tokens. Without it digits stay at chance."""
    clean: SupervisedSettings = SupervisedSettings(steps=2400, lr=3e-3)
    """SFT on clean responses to a mixture of questions. "Each" questions are learned late and at once: after 800 steps
    .30 of the greedy answers are right, after 1600 .94 with one seed but .13 with another, which needs 2400."""


class SftSettings(SupervisedSettings):
    """SFT on the noisy public corpus, whose drift the alignment then repairs."""

    steps: int = Field(default=350, ge=1)
    """Optimiser steps: enough to adopt the corpus' faults at T = 1 while the greedy answer keeps half its accuracy."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
