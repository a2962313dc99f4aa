"""Settings of the rollout room: the vLLM engines, what they sample and how their pool watches over them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prism_ray.config.base import Settings

TransportName = Literal["shared_memory", "gloo", "nccl", "sparse_nccl", "ipc", "sharded_rdt"]


class RolloutSettings(Settings):
    """A pool of vLLM engines and how it samples."""

    engines: int = Field(default=1, ge=1)
    """vLLM engines, each an actor with its own copy of the policy; a group of rollouts stays on one of them."""
    cpus_per_engine: float = Field(default=1.0, ge=0)
    """CPU cores Ray reserves for an engine. On the CPU backend one engine computes with one thread whatever is
    reserved: a tiny model gains nothing from more."""
    gpus_per_engine: int = Field(default=0, ge=0)
    """GPUs of an engine; more than one means tensor parallelism over them."""

    group_size: int = Field(default=8, ge=1)
    """Rollouts of one prompt; advantages are taken within the group."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits when sampling; the learner must compute its log-probs at the same temperature."""
    max_response_tokens: int = Field(default=96, ge=1)
    """A response is cut here. The testbed's have about 56 tokens."""
    max_model_len: int = Field(default=256, ge=2)
    """Longest prompt and response together, image tokens included; a prompt may have what the response leaves."""
    max_images: int = Field(default=1, ge=0)
    """Most images in one prompt; vLLM reserves memory for them."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers the engine computes in. float32 keeps engine and learner equal to 1e-6; bfloat16 is for GPUs, where the
    correction absorbs the mismatch."""
    kv_cache_gb: float | None = Field(default=0.25, gt=0)
    """Memory for keys and values; 0.25 GB holds 256 of the tiny model's sequences. Unset: what vLLM finds free."""
    max_concurrent: int = Field(default=256, ge=1)
    """Sequences decoded together. A decoding step costs 15-20 ms of Python whatever the tiny model's size, so fewer
    than 128 waste most of it."""
    max_batched_tokens: int = Field(default=8192, ge=1)
    """Tokens of one engine step, prompts included; small values make prompts wait, large ones make decoding wait."""
    enforce_eager: bool = True
    """No compilation, no CUDA graphs: the engine starts in seconds. Turn it off for large models on GPUs."""
    prefix_caching: bool = True
    """Rollouts of a group share the keys and values of their prompt, in whole blocks (128 tokens on the CPU)."""
    kv_on_update: Literal["recompute", "keep"] = "recompute"
    """What new weights do to rollouts under way. `recompute`: their keys and values are computed anew, so every
    token's log-prob is exactly that of the version it is attributed to. `keep`: they go on with old keys and values
    (cheaper for long responses; the behaviour policy is then a mixture of versions). Cached prompts and images
    of older weights are never used for new rollouts in either case."""
    weights: TransportName = "shared_memory"
    """How new weights reach the engines. `shared_memory`: through the object store and a file, on any machine. The
    others set a copy aside in the learner's memory (a second copy of the weights in `dtype`; for `sparse_nccl` a third)
    from which each engine fetches it: `gloo` over the network between CPUs, `nccl` between GPUs, `sparse_nccl` likewise
    but only what has changed since (small steps in bfloat16 leave most numbers as they are; dense policies only), `ipc`
    within a GPU that a learner rank and an engine share (`cluster.layout: colocated`), `sharded_rdt` (needs the package
    nixl) where each worker of a large engine fetches only its slice."""
    weights_bucket_mb: float = Field(default=256.0, gt=0)
    """Weights travel in pieces of this size, except through shared memory: small ones cost round trips, large ones
    memory of the engine, which holds a piece beside the weights."""
    seed: int = 0
    """Added to the run's seed for the engines' random numbers; engine i uses their sum + i."""

    sleep_level: Literal[0, 1, 2] = 0
    """Whether engines can sleep, and how deeply: 0 not at all; the colocated layout (`cluster.layout`) needs 1 or 2,
    and puts them to sleep while the learner trains. vLLM gives the memory of keys and values back in both; at 1 its
    weights wait in the host's memory, at 2 they are thrown away, since new ones come before it wakes, which saves a
    copy of the policy per engine there."""

    partial: Literal["continue", "regenerate"] = "continue"
    """What becomes of an unfinished rollout whose engine was lost or removed. `continue`: another engine goes on from
    the tokens that are known, which keep their log-probs and versions. `regenerate`: it is sampled from the beginning,
    as an environment with side effects in mid-response would need."""
    progress_s: float = Field(default=2.0, gt=0)
    """How often an engine tells what its unfinished rollouts have so far, where `partial` is `continue`; a lost engine
    takes with it what came since. The news of 256 sequences cost an engine 7 to 10 ms."""

    heartbeat_s: float = Field(default=10.0, gt=0)
    """An engine whose actor or vLLM process does not answer for so long hangs, and is replaced like a dead one. Longer
    than the longest single decoding step; exchanges of weights are not counted."""
    generate_timeout_s: float = Field(default=300.0, gt=0)
    """How long an engine may take for a group, its own queue included, before it counts as hung although it answers."""
    control_timeout_s: float = Field(default=120.0, gt=0)
    """The same for new weights, health checks and shutdown."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """The same for an engine's start, which takes 20 s on two idle cores and minutes for large models."""
    max_restarts: int = Field(default=2, ge=0)
    """How often an engine is replaced within `restart_window_s` before the pool goes on without it, and gives up if it
    was the last."""
    restart_window_s: float = Field(default=3600.0, gt=0)
    """Older restarts are forgotten: a third death in a week is no sign of a fault that restarting cannot mend."""
    max_losses: int = Field(default=3, ge=0)
    """How often one group may lose its engine before the run ends with the group's number: a prompt that kills engines
    would kill all of them."""

    @model_validator(mode="after")
    def _prompt_has_room(self) -> RolloutSettings:
        if self.max_response_tokens >= self.max_model_len:
            raise ValueError(
                f"rollout.max_response_tokens is {self.max_response_tokens} but rollout.max_model_len only "
                f"{self.max_model_len}; the prompt needs room too"
            )
        return self

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, image tokens included."""
        return self.max_model_len - self.max_response_tokens
