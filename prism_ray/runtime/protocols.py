"""What the loop needs of the rooms around it: four small protocols; a `Ticket` travels between them.

The loop handles ids, versions and references; the payload of a ticket stays in Ray's object store (or is a plain
object in a simulation). Whoever fulfils these protocols can be trained by the loop.
"""

from __future__ import annotations

from typing import Any, Protocol

from prism_ray.records import Ratios, Ticket

__all__ = ["Judge", "Learner", "Prompts", "Ratios", "Rollouts", "Ticket"]


class Prompts(Protocol):
    """The stream of prompts, endless (epoch after epoch) and deterministic in its seed."""

    async def take(self) -> tuple[str, int, Any]:
        """The next prompt: its id, its position in the stream and a reference to the `Prompt`."""
        ...


class Rollouts(Protocol):
    """What turns a prompt into a group of rollouts, and takes new weights while it does."""

    async def generate(self, ticket: Ticket) -> Ticket:
        """Sample the prompt's group; the returned ticket refers to a `Group` without verdicts."""
        ...

    async def publish(self, weights: Any, version: int) -> dict[str, float]:
        """Give every engine the weights of `version`, between two decoding steps. Returns metrics."""
        ...


class Judge(Protocol):
    """What turns a group of rollouts into verdicts: discriminator or verifier.

    `version` counts the judge's own updates (a verifier stays at 0); `wants_ratios` says whether it weighs what it
    learns from by the learner's ratios, for which it then has to wait.
    """

    @property
    def version(self) -> int: ...
    @property
    def wants_ratios(self) -> bool: ...

    async def judge(self, ticket: Ticket) -> Ticket:
        """Judge the group; the returned ticket refers to a `Group` with verdicts, and knows the oldest version that
        gave one. Verdicts that the group has already are replaced.

        Dynamic sampling needs, in its stats, the ranges that `config.runtime.LOWEST` describes.
        """
        ...

    async def learn(self, tickets: list[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        """Train on the groups the policy learns from (a verifier does nothing). Returns metrics.

        `ratios` are given if `wants_ratios`.
        """
        ...


class Learner(Protocol):
    """The policy's trainer."""

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        """One optimiser step on judged groups, from `version` to `version + 1`. Returns metrics."""
        ...

    def ratios(self) -> Ratios:
        """Of the last update's groups."""
        ...

    async def weights(self) -> Any:
        """A reference to the current weights, in the form `Rollouts.publish` takes."""
        ...
