"""The memory of every kind of actor in a run, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prism_ray.config.learner import OptimiserSettings
from prism_ray.config.rollout import TransportName
from prism_ray.config.run import RunSettings
from prism_ray.planning import layout
from prism_ray.planning.architecture import Architecture
from prism_ray.planning.hardware import GIB, Hardware
from prism_ray.planning.layout import Placed
from prism_ray.planning.memory import (
    NUMBER,
    Memory,
    Pass,
    activations,
    judge_pass,
    kv_bytes,
    training_state,
)

CONTEXT = 3 * GIB
"""Assumed of every process on a GPU: CUDA's context, NCCL's buffers, what the allocator cannot use."""
VLLM_SHARE = 0.92
"""Of a GPU's memory that vLLM takes where `rollout.kv_cache_gb` is unset (its default `gpu_memory_utilization`)."""


STAGED: dict[TransportName, int] = {
    "shared_memory": 0, "gloo": 1, "nccl": 1, "sparse_nccl": 2, "ipc": 1, "sharded_rdt": 1,
}  # fmt: skip
"""Copies of the policy, in the engines' type, that a learner rank sets aside for engines to fetch (`rollout.weights`).
`gloo` keeps its own in the host's memory."""


@dataclass(frozen=True)
class Usage:
    """What one actor of a kind needs at its peak, and what it may have. `share` of a GPU is what it books (0: none, it
    computes in its host's memory)."""

    actor: str
    stage: str
    memory: Memory
    share: float
    cures: str
    """Settings that make it smaller, the most effective first."""
    awake: int = 0
    """Of an actor that shares its GPU with an engine: what it keeps there while the engine samples."""

    def limit(self, hardware: Hardware) -> int | None:
        """Bytes it may have on its GPU; None without one."""
        return int(self.share * hardware.gpu_gib * GIB) if self.share else None


def usages(settings: RunSettings, policy: Architecture, judge: Architecture, hardware: Hardware) -> list[Usage]:
    """One for each kind of actor of the configured stages."""
    s, found = settings, []
    stages = set(s.stages)
    if stages & set(layout.SUPERVISED) - ({"base"} if s.policy is not None else set()):
        found.append(_trainer(s, policy))
    if stages & set(layout.SAMPLING):
        found.append(_engine(s, policy, hardware))
    if stages & set(layout.TRAINED):
        found.append(_learner(s, policy))
    if any(layout.judges_itself(stage, s) for stage in stages):
        found.append(_rank(s, judge))
        if s.discriminator.scorers:
            found.append(_scorer(s, judge))
    return found


def kv_tokens(settings: RunSettings, policy: Architecture, hardware: Hardware) -> float | None:
    """Tokens whose keys and values one engine holds; None where nobody knows (vLLM takes what is free on the CPU)."""
    r = settings.rollout
    if r.gpus_per_engine == 0 and r.kv_cache_gb is None:
        return None
    engine = _engine(settings, policy, hardware)
    return engine.memory.kv_cache / kv_bytes(policy, r.dtype, max(1, r.gpus_per_engine))


def _visual(settings: RunSettings, tokens: int) -> int:
    """Most visual tokens of a micro-batch: those of as many of the longest prompts as fit beside the longest
    responses, and at least one."""
    most = settings.rollout
    return min(tokens, most.max_prompt_tokens * max(1, tokens // most.max_model_len))


def _trains_vision(freeze: Sequence[str], policy: Architecture) -> bool:
    vision = sum(size for name, size in policy.parameters.items() if name.startswith("model.visual."))
    return policy.total - policy.trained(freeze) < vision


def _trainer(s: RunSettings, policy: Architecture) -> Usage:
    t = s.trainer
    optimiser = OptimiserSettings(zero_stage=t.zero_stage, precision=t.precision)
    state = training_state(policy.total, policy.trained(t.freeze), optimiser, t.ranks)
    tokens = t.micro_batch * (t.max_prompt_tokens + t.max_response_tokens)
    run = Pass(
        tokens, t.micro_batch * t.max_prompt_tokens, t.precision, t.gradient_checkpointing,
        _trains_vision(t.freeze, policy),
    )  # fmt: skip
    cures = "set trainer.gradient_checkpointing to true, trainer.zero_stage to 3, raise trainer.ranks, or lower "
    cures += "trainer.micro_batch or trainer.max_response_tokens"
    memory = replace(state, activations=activations(policy, run))
    return Usage("trainer rank", "supervised", memory, t.gpus_per_rank, cures)


def _learner(s: RunSettings, policy: Architecture) -> Usage:
    t = s.learner
    state = training_state(policy.total, policy.trained(t.freeze, t.lora), t, t.ranks)
    if t.lora is None and any(p.objective.kl_coef for p in (s.align, s.rlvr)):
        state = replace(state, weights=state.weights + policy.total * NUMBER[t.precision])
    staged = STAGED[s.rollout.weights] * policy.total * NUMBER[s.rollout.dtype]
    place = "host" if s.rollout.weights == "gloo" and t.gpus_per_rank else "weights"
    state = replace(state, **{place: getattr(state, place) + staged})
    tokens = max(t.micro_batch_tokens, s.rollout.max_model_len)
    run = Pass(tokens, _visual(s, tokens), t.precision, t.gradient_checkpointing, _trains_vision(t.freeze, policy))
    cures = "set learner.gradient_checkpointing to true, learner.zero_stage to 3, learner.offload to optimizer, raise "
    cures += "learner.ranks, or lower learner.micro_batch_tokens (not below rollout.max_model_len)"
    memory = replace(state, activations=activations(policy, run))
    return Usage("learner rank", "align, rlvr", memory, t.gpus_per_rank, cures, awake=state.device)


def _engine(s: RunSettings, policy: Architecture, hardware: Hardware) -> Usage:
    r, parts = s.rollout, max(1, s.rollout.gpus_per_engine)
    size = NUMBER[r.dtype]
    step = Pass(r.max_batched_tokens, min(r.max_batched_tokens, r.max_prompt_tokens), r.dtype)
    sampling = r.max_concurrent * policy.vocabulary * 4 * 2  # logits and log-probs, float32
    working = (judge_pass(policy, step) + sampling) // parts
    memory = Memory(weights=policy.total * size // parts, activations=working)
    if r.kv_cache_gb is not None:
        cache = int(r.kv_cache_gb * 1e9)
    else:
        cache = max(0, int(VLLM_SHARE * hardware.gpu_gib * GIB) - memory.device - CONTEXT) if r.gpus_per_engine else 0
    cures = "raise rollout.gpus_per_engine, or lower rollout.kv_cache_gb, rollout.max_batched_tokens or "
    cures += "rollout.max_concurrent"
    # New weights on their way lie in the host's memory, and so do the engine's own while it sleeps.
    asleep = memory.weights if s.cluster.layout == "colocated" and r.sleep_level == 1 else 0
    memory = replace(memory, kv_cache=cache, host=policy.total * 4 // parts + asleep)
    return Usage("engine", "warmup to evaluate", memory, min(1.0, float(r.gpus_per_engine)), cures)


def _rank(s: RunSettings, judge: Architecture) -> Usage:
    d = s.discriminator
    state = training_state(judge.total, judge.total, d.optimiser, d.ranks)
    # The pairs of a view of a group are never split: the prompt once, and the reference with all its rollouts.
    longest = min(s.align.response_limit(s.rollout), len(d.views) * d.max_segment_tokens)
    rollouts = max(min(d.rollouts_per_update, s.rollout.group_size), s.warmup.rollouts)
    tokens = max(d.micro_batch_tokens, s.rollout.max_prompt_tokens + (rollouts + 1) * longest)
    visual = min(tokens, s.rollout.max_prompt_tokens) if d.sees_images else 0
    run = Pass(tokens, visual, d.optimiser.precision, d.gradient_checkpointing)
    cures = "set discriminator.gradient_checkpointing to true, discriminator.optimiser.offload to optimizer, raise "
    cures += "discriminator.gpus_per_rank (up to 1), or lower discriminator.rollouts_per_update"
    memory = replace(state, activations=activations(judge, run))
    return Usage("judge rank", "warmup, align", memory, d.gpus_per_rank, cures)


def _scorer(s: RunSettings, judge: Architecture) -> Usage:
    d = s.discriminator
    tokens = max(d.micro_batch_tokens, s.rollout.max_prompt_tokens + s.align.response_limit(s.rollout))
    run = Pass(tokens, s.rollout.max_prompt_tokens if d.sees_images else 0, d.optimiser.precision)
    size = NUMBER[d.optimiser.precision]
    memory = Memory(weights=judge.total * size, activations=judge_pass(judge, run))
    cures = "raise discriminator.gpus_per_scorer (up to 1), or lower discriminator.micro_batch_tokens"
    return Usage("scorer", "warmup, align", memory, d.gpus_per_scorer, cures)


def problems_of(usage: Usage, s: RunSettings, policy: Architecture, hardware: Hardware) -> list[str]:
    """Sentences on what of an actor does not fit on its GPU."""
    limit, found = usage.limit(hardware), []
    colocated = s.cluster.layout == "colocated"
    if usage.actor == "engine" and usage.memory.kv_cache:
        held = usage.memory.kv_cache / kv_bytes(policy, s.rollout.dtype, max(1, s.rollout.gpus_per_engine))
        if held < s.rollout.max_model_len:
            found.append(
                f"an engine's cache holds {held:.0f} tokens but one rollout may have rollout.max_model_len = "
                f"{s.rollout.max_model_len}; raise rollout.kv_cache_gb or rollout.gpus_per_engine, or lower "
                "rollout.max_model_len"
            )
    if limit is None:
        return found
    if usage.actor == "engine" and s.rollout.kv_cache_gb is None and usage.memory.kv_cache == 0:
        found.append(
            f"an engine has no memory left for keys and values: weights and working memory take "
            f"{_gib(usage.memory.device)} of {_gib(int(VLLM_SHARE * limit))}; raise rollout.gpus_per_engine"
        )
    needed, what = usage.memory.device + CONTEXT, ""
    if colocated and usage.actor == "engine":
        awake = _learner(s, policy).awake
        needed, what = needed + awake + CONTEXT, f" beside what a learner rank keeps there ({_gib(awake)})"
        if s.rollout.kv_cache_gb is None:
            return found  # the configuration refuses that
    if needed > limit:
        who = "an engine" if usage.actor == "engine" else f"a {usage.actor}"
        kind = "the GPU" if usage.share >= 1 else f"its {usage.share:g} of a GPU"
        found.append(f"{who} needs {_gib(needed)}{what} but {kind} has {_gib(limit)}; {usage.cures}")
    return found


def host_problems(
    found: Sequence[Usage], placed: Mapping[str, Placed], s: RunSettings, policy: Architecture, hardware: Hardware
) -> list[str]:
    """Nodes whose memory the actors on them exceed: what is offloaded, weights on their way, and all that computes on
    the CPU."""
    kinds = {usage.actor: usage for usage in found}
    names = {
        layout.TRAINER: ("trainer rank",), layout.LEARNER: ("learner rank",), layout.JUDGE_RANKS: ("judge rank",),
        "scorer": ("scorer",), "engine": ("engine", "learner rank") if s.cluster.layout == "colocated" else ("engine",),
    }  # fmt: skip
    sentences = []
    for stage, groups in placed.items():
        held: dict[str, int] = {}
        for name, nodes in groups.items():
            actors = (actor for actor in names.get(name.rstrip("0123456789 "), ()) if actor in kinds)
            for usage in (kinds[a] for a in actors if a != "learner rank" or stage in layout.TRAINED):
                for node in nodes:
                    held[node] = held.get(node, 0) + usage.memory.host + (0 if usage.share else usage.memory.device)
        limit = hardware.node_gib * GIB
        for node, needed in held.items():
            if needed > limit:
                sentences.append(
                    f"{node} would hold {_gib(needed)} in its own memory in stage {stage} but has {_gib(int(limit))}; "
                    "lower rollout.engines, or offload less (learner.offload, discriminator.optimiser.offload)"
                )
    weights = 2 * 4 * policy.total  # float32, two versions at a time
    if s.cluster.object_store_mb * 2**20 < weights and set(s.stages) & set(layout.TRAINED) and not s.cluster.address:
        sentences.append(
            f"the policy's weights travel through the object store, {_gib(weights)} of them, but "
            f"cluster.object_store_mb is {s.cluster.object_store_mb}; raise it to {-(-weights // 2**20)} or more"
        )
    return sentences


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size > GIB / 10 else f"{size / 2**20:.0f} MiB"
