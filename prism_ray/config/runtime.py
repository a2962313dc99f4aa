"""Settings of the actor-learner loop, its journal and the Ray cluster it runs on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prism_ray.config.base import Settings

LOWEST, HIGHEST = "group/lowest/", "group/highest/"
"""What `dynamic_sampling` looks at: a judge notes on a group's ticket, under these prefixes, the least and greatest
value of the `reward` and of each of its parts among the group's rollouts; 1 is all right and 0 all wrong."""


class LoopSettings(Settings):
    """One run of the loop: alignment and RLVR each have theirs."""

    groups_per_step: int = Field(default=16, ge=1)
    """Prompts (each with its group of rollouts) in one optimiser step; 16 x 8 is the testbed's measured setting."""
    max_staleness: int = Field(default=1, ge=0)
    """Most optimiser steps between a rollout's oldest token and the update it trains. 0 is synchronous training; 1
    lets generation and learning overlap; larger values only help when generation times vary widely."""
    max_judge_lag: int = Field(default=4, ge=0)
    """Most discriminator updates between the weights that scored a group and those that are trained beside it; a group
    that waited longer is scored anew, which costs a hundredth of sampling it anew. With as many discriminator updates
    as policy updates it stays below `max_staleness` + 2. A verifier has no versions."""
    stall_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds the learner waits without any group arriving before the run fails, saying what it was waiting for; must
    exceed the longest time a group can take."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Updates between checkpoints of the loop (weights, optimiser, judge, consumed prompts): what a crash can cost."""
    dynamic_sampling: str | None = Field(default=None, min_length=1)
    """What must vary among a group's rollouts for it to be trained on: `reward`, or a part of the verifier's reward
    such as `accuracy` (DAPO). Other groups teach nothing; they are dropped, and the next prompt takes their place.
    Unset: every group trains. Worth its cost where many groups are all right or all wrong (`reward/equal_groups`)."""
    dynamic_sampling_limit: int = Field(default=10, ge=1)
    """How many times `groups_per_step` groups may be dropped while one batch's worth of others is found before the run
    fails: the task is then too easy or too hard, and sampling on would burn GPUs for nothing."""


class JournalSettings(Settings):
    """Where judged trajectories are kept before they count."""

    segment_mb: float = Field(default=64.0, gt=0)
    """Size at which a new segment file begins; old segments are removed once a checkpoint no longer needs them."""
    fsync: bool = False
    """Wait for the disk at each append. Off: an operating-system crash may cost the last seconds of rollouts, which
    are then generated again; a killed process costs nothing either way."""
    keep: bool = False
    """Keep every segment, and note which groups trained which update, so that `jobs/replay.py` can train on them again.
    Off: the disk holds only what no checkpoint has consumed."""
    salvage: bool = False
    """Go on without the records that a damaged disk has changed, and sample their prompts again. Off: the run fails
    and names the file and the byte, because damage that nobody knows of spreads."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for the journal's actor to write a group, or to read what a killed run left, before the run fails
    and names it."""
    heartbeat_s: float = Field(default=30.0, gt=0)
    """A journal's actor that answers no ping for so long hangs: it is replaced, and asked again."""


class ClusterSettings(Settings):
    """The Ray cluster."""

    address: str | None = None
    """Cluster to join, `HOST:6379` or `auto`; unset: RAY_ADDRESS if set (`ray job submit` sets it), else a private
    cluster on this machine."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs a private cluster offers; unset: those of this machine."""
    object_store_mb: int = Field(default=512, ge=80)
    """Memory of a private cluster's object store; it holds prompts, groups and weights on their way."""
    metrics_port: int | None = Field(default=None, ge=1024, le=65535)
    """Port at which a private cluster offers its metrics to Prometheus (the nodes of a cluster that is joined have
    theirs); unset: one that is free, which the log names, so that two runs on a machine do not meet."""
    pending_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds to wait for the cluster to grant the actors their CPUs and GPUs before failing with what is missing; what
    is waited for is logged after ten. Of engines and scorers added while a run goes on, before going on without them. A
    cluster whose autoscaler must first start nodes needs minutes."""
    resize_poll_s: float = Field(default=2.0, gt=0)
    """How often a run looks whether its `resize.yaml` asks for more or fewer engines or scorers. An engine takes 20 s
    to start: to look more often gains nothing."""
    layout: Literal["split", "colocated"] = "split"
    """`split`: engines and learner have GPUs of their own and work at the same time. `colocated`: each learner rank
    shares its GPU with an engine, which sleeps while the ranks train (`rollout.sleep_level`); so the two take turns,
    which needs a `max_staleness` of 0. Worth it where there are too few GPUs to divide."""
    max_recoveries: int = Field(default=3, ge=0)
    """How many times in a row a stage may be taken up again from one checkpoint after a learner rank or the judge's
    trainer was lost; the next checkpoint starts the count anew. What dies every time (out of memory) should fail, not
    go round in circles."""
    stop_grace_s: float = Field(default=120.0, ge=0)
    """Seconds a stage has to save its state and end after Ctrl-C or SIGTERM; then it is ended as it is, and the next
    run goes on from its last checkpoint. Must hold one update and one checkpoint, and stay below what a scheduler
    grants before it kills; for `ray job stop` that is RAY_JOB_STOP_WAIT_TIME_S, and 3 s where it is not set."""
