"""Settings of the verifiers."""

from __future__ import annotations

from pydantic import Field

from prism_ray.config.base import Settings


class VerifySettings(Settings):
    """The Gymnasium environment that gives verifiable rewards, and how it is run."""

    environment: str = "prism_ray.testbed.environment:prism/Testbed-v0"
    """Id of the environment in Gymnasium's own form: `module:namespace/Name-v0` imports the module, which registers
    it. `prism_ray.verify.answer:prism/Answer-v0` compares with the ground truth; your own works the same way."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds a group of rollouts may take to be judged; then the process is replaced and the group is worth 0. Rules
    take milliseconds, so only an answer made to hang a verifier ever meets it."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds a verifier's process may take to start."""
    workers: int = Field(default=1, ge=1)
    """Processes that judge, a group at a time each. One keeps up with rules; verifiers that compute want several."""
    worker_cpus: float = Field(default=0.0, ge=0)
    """CPUs that Ray books for each of them. None: rules take milliseconds."""
