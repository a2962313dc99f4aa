"""How a stage of the loop flows: tokens under way, seconds of an update, who waits for whom, how old rollouts are.

The rates are measured (an earlier run's metrics) or assumed (what the hardware could do, times a usual efficiency);
which of the two is said with every figure. An estimate from assumed rates tells apart a factor of two, not of 1.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prism_ray.config.run import RunSettings
from prism_ray.config.stages import PhaseSettings
from prism_ray.planning.architecture import Architecture
from prism_ray.planning.hardware import Hardware
from prism_ray.planning.layout import judges_itself
from prism_ray.planning.memory import NUMBER

MFU = 0.35
"""Assumed share of a GPU's peak that training reaches; 0.3 to 0.45 is usual for dense models of this size."""
MEMORY_EFFICIENCY = 0.6
"""Assumed share of a GPU's memory bandwidth that decoding reaches."""
RESPONSE_SHARE = 0.3
"""Assumed mean length of a response as a share of the longest. The paper's runs end near 2,900 of 8,192 tokens."""
WAITS_LITTLE = 0.1
"""Share of its time: a learner that waits for less is what the others wait for."""
PROMPT_SHARE = 0.5
"""Assumed mean length of a prompt, image included, as a share of the longest."""


@dataclass(frozen=True)
class Rates:
    """Tokens a second of one engine and of one learner rank, mean tokens of a response and a prompt; None: unknown."""

    engine: float | None = None
    rank: float | None = None
    response: float | None = None
    prompt: float | None = None
    source: str = "assumed"
    engines_waited: bool = False
    """The learner hardly ever waited, so engines did: what they sampled says nothing of what they could have."""


@dataclass(frozen=True)
class Flow:
    """What is expected of a stage; seconds are of one update."""

    stage: str
    sequences: int
    """Most rollouts under way at once."""
    tokens: int
    """The same in tokens, all at their greatest length."""
    room: float
    """Rollouts that all engines together can decode at once."""
    generate_s: float | None = None
    judge_s: float | None = None
    train_s: float | None = None
    update_s: float | None = None
    bottleneck: str = "unknown"
    staleness: float = 0.0
    """Expected of a rollout's oldest token, in updates."""
    source: str = ""


def measured(rows: Iterable[Mapping[str, Any]], stage: str, settings: RunSettings, source: str) -> Rates:
    """The rates in a run's metrics of a stage, over its second half, when caches are warm and lengths have settled."""
    mine = [row for row in rows if row.get("stage") == stage and "time/step_s" in row]
    mine = mine[len(mine) // 2 :]
    if not mine:
        return Rates(source=f"nothing measured of {stage} in {source}")

    def mean(name: str) -> float | None:
        found = [float(row[name]) for row in mine if row.get(name) is not None]
        return sum(found) / len(found) if found else None

    pool, engines = mean("rollout/tokens_per_second"), mean("rollout/engines") or settings.rollout.engines
    response = mean("rollout/response_tokens")
    busy = [float(r["time/step_s"]) * (1 - float(r.get("learner/wait_share", 0.0))) for r in mine]
    waited = sum(float(r.get("learner/wait_share", 0.0)) for r in mine) / len(mine) < WAITS_LITTLE
    rank = None
    if response is not None and sum(busy):
        tokens = _tokens(phases(settings)[stage], settings, PROMPT_SHARE * settings.rollout.max_prompt_tokens, response)
        rank = tokens / (sum(busy) / len(busy)) / settings.learner.ranks
    engine = None if pool is None else pool / engines
    return Rates(engine, rank, response, None, f"measured in {source}", waited)


def _tokens(phase: PhaseSettings, settings: RunSettings, prompt: float, response: float) -> float:
    """Tokens of an update; a prompt is computed once for its rollouts."""
    return phase.loop.groups_per_step * (prompt + settings.rollout.group_size * response)


def phases(settings: RunSettings) -> dict[str, PhaseSettings]:
    """The settings of every stage that is a loop."""
    rlvr = dict.fromkeys(("rlvr", "rlvr-sft", "rlvr-references"), settings.rlvr)
    return {"align": settings.align, **rlvr}


def flow(
    stage: str,
    settings: RunSettings,
    policy: Architecture,
    judge: Architecture,
    hardware: Hardware,
    kv_tokens: float | None,
    rates: Rates,
) -> Flow:
    """What is expected of the stage; `kv_tokens` is what one engine's cache holds (None: unknown)."""
    phase, r = phases(settings)[stage], settings.rollout
    groups, ahead = phase.loop.groups_per_step, phase.loop.max_staleness
    longest = phase.response_limit(r)
    response = rates.response or RESPONSE_SHARE * longest
    prompt = rates.prompt or PROMPT_SHARE * r.max_prompt_tokens
    sequences = (ahead + 1) * groups * r.group_size
    held = float("inf") if kv_tokens is None else kv_tokens / (prompt + response / 2)
    per_engine = max(1.0, min(r.max_concurrent, held))
    under_way = (ahead + 1) * groups * (r.max_prompt_tokens + r.group_size * longest)
    room = per_engine * r.engines
    found = Flow(stage, sequences, under_way, room, source=rates.source)
    batch = min(per_engine, sequences / r.engines)
    step_s = _decoding_step(policy, r.dtype, r.gpus_per_engine, batch * (prompt + response / 2), hardware)
    engine = rates.engine or (batch / step_s if step_s else None)
    rank = rates.rank or _training_rate(policy, settings.learner.gradient_checkpointing, hardware, settings)
    if engine is None or rank is None:
        return found
    generate = groups * r.group_size * response / (engine * r.engines)
    train = _tokens(phase, settings, prompt, response) / (rank * settings.learner.ranks)
    if rates.engines_waited:
        generate = min(generate, train)
    itself = judges_itself(stage, settings)
    judging = _judging(settings, judge, hardware, groups, prompt, response) if itself else 0.0
    taking = {"generation": generate, "the judge": judging, "the learner": train}
    slowest = max(reversed(taking), key=lambda name: taking[name])  # of equals the last
    if ahead:
        update = taking[slowest]
    else:  # in turn, and an update waits for the longest response
        generate = max(generate, longest * (batch / engine))
        update = generate + max(judging, train)
        slowest = "generation" if generate > update / 2 else slowest
    staleness = ahead * min(1.0, room / sequences)
    return Flow(stage, sequences, under_way, room, generate, judging, train, update, slowest, staleness, rates.source)


def _decoding_step(model: Architecture, dtype: str, gpus: int, context: float, hardware: Hardware) -> float | None:
    """Seconds of one decoding step: reading all weights and the `context` tokens' keys and values once."""
    if not gpus:
        return None
    read = (model.active + model.kv_numbers * context) * NUMBER[dtype]
    return read / (gpus * hardware.gpu_tb_per_s * 1e12 * MEMORY_EFFICIENCY)


def _training_rate(model: Architecture, again: bool, hardware: Hardware, settings: RunSettings) -> float | None:
    """Tokens a second of a rank: 6 operations a parameter and token, 8 where activations are computed again."""
    if not settings.learner.gpus_per_rank:
        return None
    return hardware.gpu_tflops * 1e12 * MFU / ((8 if again else 6) * model.active)


def _judging(
    settings: RunSettings, judge: Architecture, hardware: Hardware, groups: int, prompt: float, response: float
) -> float:
    """Seconds of the judge's update and, without scorers, of judging. Each view reads the prompt once and then the
    reference and the rollouts, at most whole."""
    d = settings.discriminator
    if not d.gpus_per_rank:
        return 0.0
    rollouts = min(d.rollouts_per_update, settings.rollout.group_size)
    trained = groups * d.updates_per_step * len(d.views) * (prompt + (rollouts + 1) * response)
    judged = 0.0 if d.scorers else groups * len(d.views) * (prompt + (settings.rollout.group_size + 1) * response)
    operations = (trained * (8 if d.gradient_checkpointing else 6) + judged * 2) * judge.active
    return operations / (hardware.gpu_tflops * 1e12 * MFU * d.ranks)
