"""What a run's `resize.yaml` may say while the run goes on: the same names as in its configuration."""

from __future__ import annotations

from pydantic import Field

from prism_ray.config.base import Settings


class WantedEngines(Settings):
    """The rollout engines wanted from now on."""

    engines: int | None = Field(default=None, ge=1)
    """Rollout engines. At least one, because the learner would starve. Unset: as many as the configuration says."""


class WantedScorers(Settings):
    """The discriminator's scorers wanted from now on."""

    scorers: int | None = Field(default=None, ge=1)
    """Scorers of a discriminator that was started with one or more; where its ranks judge there is nothing to resize.
    Unset: as many as the configuration says."""


class ResizeSettings(Settings):
    """`runs/<name>/resize.yaml`: what a run takes over while it goes on, without stopping the learner."""

    rollout: WantedEngines = WantedEngines()
    """Rollout engines."""
    discriminator: WantedScorers = WantedScorers()
    """Scorers."""

    def wanted(self) -> dict[str, int | None]:
        """Each number by its name in the configuration; None: the configuration's own."""
        return {"rollout.engines": self.rollout.engines, "discriminator.scorers": self.discriminator.scorers}
