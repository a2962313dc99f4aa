"""Settings of the actor-learner loop, its journal and the Ray cluster it runs on."""

from __future__ import annotations

from pydantic import Field

from prism_ray.config.base import Settings


class LoopSettings(Settings):
    """One run of the loop: alignment and RLVR each have theirs."""

    groups_per_step: int = Field(default=16, ge=1)
    """Prompts (each with its group of rollouts) in one optimiser step; 16 x 8 is the testbed's measured setting."""
    max_staleness: int = Field(default=1, ge=0)
    """Most optimiser steps between a rollout's oldest token and the update it trains. 0 is synchronous training; 1
    lets generation and learning overlap; larger values only help when generation times vary widely."""
    stall_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds the learner waits for the next batch before the run fails, saying what it was waiting for; must exceed
    the longest time a group can take."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Updates between checkpoints of the loop (weights, optimiser, judge, consumed prompts): what a crash can cost."""


class JournalSettings(Settings):
    """Where judged trajectories are kept before they count."""

    segment_mb: float = Field(default=64.0, gt=0)
    """Size at which a new segment file begins; old segments are removed once a checkpoint no longer needs them."""
    fsync: bool = False
    """Wait for the disk at each append. Off: an operating-system crash may cost the last seconds of rollouts, which
    are then generated again; a killed process costs nothing either way."""


class ClusterSettings(Settings):
    """The Ray cluster."""

    address: str | None = None
    """Cluster to join (`auto` inside `ray job submit`); unset: RAY_ADDRESS if set, else a private one on this
    machine."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs a private cluster offers; unset: those of this machine."""
    object_store_mb: int = Field(default=512, ge=80)
    """Memory of a private cluster's object store; it holds prompts, groups and weights on their way."""
    pending_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds to wait for the cluster to grant the actors their CPUs and GPUs before failing with what is missing."""
