"""Settings of the verifiers."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from prism_ray.config.base import Settings


class VerifySettings(Settings):
    """The Gymnasium environment that gives verifiable rewards, and how it is run."""

    environment: str = "prism_ray.testbed.environment:prism/Testbed-v0"
    """Id of the environment in Gymnasium's own form: `module:namespace/Name-v0` imports the module, which registers
    it. `prism/Answer-v0` compares answers with the ground truth by every rule; `prism/Math-v0`, `prism/Number-v0` and
    `prism/MultipleChoice-v0` by those of one kind. Your own works the same way, with its module."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of the environment: `{limit_s: 5}` gives all symbolic comparisons of an answer, in
    `prism/Answer-v0`, five seconds of processor time together in place of two, for long expressions."""
    max_turns: int = Field(default=1, ge=1)
    """Most responses of an episode: above 1 the environment may answer a response, and the policy goes on. All that
    follows the prompt, the environment's tokens too, must fit into `rollout.max_response_tokens`, and all its images
    into `rollout.max_images`. 1: every response is judged by itself, in a process without a tokenizer. RLVR, curation
    and `jobs/evaluate.py` with `by=verifier` play episodes; the stage that evaluates asks for single responses."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds a group of rollouts may take to be judged; then the process is replaced and the group judged again,
    response by response, each with this limit and worth 0 beyond it. Rules take milliseconds."""
    heartbeat_s: float = Field(default=30.0, gt=0)
    """A process that answers no ping for so long counts as dead. It answers while it judges, unless the environment
    is stuck inside a native library: keep it above what yours computes there in one go."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds a verifier's process may take to start."""
    workers: int = Field(default=1, ge=1)
    """Processes that judge, a group at a time each. One keeps up with rules; verifiers that compute want several."""
    worker_cpus: float = Field(default=0.0, ge=0)
    """CPUs that Ray books for each of them. None: rules take milliseconds."""
