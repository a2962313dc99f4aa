"""More or fewer engines and scorers while a run goes on: what its `resize.yaml` says, as far as the cluster grants it.

The file is looked at every `cluster.resize_poll_s`. It says what is wanted, not what to do: it holds for as long as it
is there, for a run that is resumed too, and without it the configuration's numbers hold. Nothing here ends a run: a
file that cannot be used, and a cluster that has no room, are a warning, and what is there goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.resize import ResizeSettings
from prism_ray.config.runtime import ClusterSettings

FILE = "resize.yaml"

log = logging.getLogger(__name__)


class WishFile:
    """What a run's `resize.yaml` says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: bytes | str | None = None
        self._wanted = ResizeSettings().wanted()

    def read(self) -> dict[str, int | None]:
        """The number wanted of each thing by its name in the configuration; None: as configured.

        A file that cannot be used leaves what the last good one said, with one warning for each of its versions.
        """
        try:
            content: bytes | str | None = self.path.read_bytes()
        except FileNotFoundError:
            content = None
        except OSError as error:
            content = str(error)
        if content != self._seen:
            self._seen = content
            self._take(there=content is not None)
        return self._wanted

    def _take(self, there: bool) -> None:
        try:
            said = load_config(ResizeSettings, self.path) if there else ResizeSettings()
        except ConfigError as error:
            log.warning("%s is not used, nothing is resized: %s", self.path, " ".join(error.problems))
        else:
            self._wanted = said.wanted()


class Cluster(Protocol):
    """Who grants room for more actors of one kind: `Room`."""

    def ask(self, count: int) -> None:
        """From now on ask for room for so many."""
        ...

    def granted(self) -> int:
        """For how many of them there is room."""
        ...

    def size(self) -> Mapping[str, float]:
        """All resources of the cluster, used or not; more of them are a reason to ask again."""
        ...


class Room:
    """Asks Ray for room for more actors, each of which `needs` resources of one node.

    A placement group for each is the question. It is held only until it is answered and given back before the actor
    takes its place. While it waits, Ray's autoscaler counts it as demand and starts nodes for it
    (`ray.autoscaler.sdk.request_resources` would set the size of the whole cluster, over the head of its other users).
    """

    def __init__(self, needs: Mapping[str, float]) -> None:
        self._bundle = {resource: amount for resource, amount in needs.items() if amount}
        self._groups: list[PlacementGroup] = []
        self._asked = 0

    def ask(self, count: int) -> None:
        """Ask for room for so many; 0 gives everything back."""
        self._asked = count
        if not self._bundle:  # they need nothing, and Ray refuses to reserve nothing
            return
        while len(self._groups) > count:
            remove_placement_group(self._groups.pop())
        while len(self._groups) < count:
            self._groups.append(placement_group([self._bundle]))

    def granted(self) -> int:
        if not self._bundle:
            return self._asked
        return sum(placement_group_table(group).get("state") == "CREATED" for group in self._groups)

    def size(self) -> Mapping[str, float]:
        return ray.cluster_resources()


class Follower:
    """Brings one pool to the number that is wanted of it; `step` is to be called again and again.

    Growing waits until the cluster grants room for all that is missing, at most `pending_timeout_s`; then what was
    granted is taken and the rest left, until another number is wanted or the cluster has grown. (To go on asking would
    take the resources of an actor that died from its successor.)
    """

    def __init__(
        self, name: str, count: int, resize: Callable[[int], Awaitable[None]], room: Cluster, settings: ClusterSettings
    ) -> None:
        """A pool of `count`; `name` is the setting that says so."""
        self.name, self.count = name, count
        self._resize, self._room, self._settings = resize, room, settings
        self._wanted = count
        self._asking_since: float | None = None
        self._refused_at: Mapping[str, float] | None = None

    async def step(self, wanted: int) -> None:
        """Do what can be done now toward `wanted`."""
        if wanted != self._wanted:
            log.info("%s: %d are wanted, %d are there", self.name, wanted, self.count)
            self._wanted, self._refused_at = wanted, None
            self._stop_asking()
        if not self._may_ask():
            return
        if wanted < self.count:
            await self._become(wanted)
        elif wanted > self.count:
            await self._grow()

    def close(self) -> None:
        """Give back what the cluster has reserved."""
        self._stop_asking()

    def _may_ask(self) -> bool:
        if self._refused_at is None:
            return True
        now = self._room.size()
        return any(amount > self._refused_at.get(resource, 0.0) for resource, amount in now.items())

    async def _grow(self) -> None:
        missing = self._wanted - self.count
        if self._asking_since is None:
            self._asking_since, self._refused_at = time.monotonic(), None
            self._room.ask(missing)
        granted, limit = self._room.granted(), self._settings.pending_timeout_s
        if granted < missing and time.monotonic() - self._asking_since < limit:
            return
        self._stop_asking()
        if granted < missing:
            self._refused_at = self._room.size()
            log.warning(
                "%s: %d are wanted, but the cluster has not granted room for more than %d within %g s "
                "(cluster.pending_timeout_s); more follow when it has grown or resize.yaml changes",
                self.name, self._wanted, self.count + granted, limit,
            )  # fmt: skip
        if granted:
            await self._become(self.count + granted)

    def _stop_asking(self) -> None:
        if self._asking_since is not None:
            self._asking_since = None
            self._room.ask(0)

    async def _become(self, count: int) -> None:
        began, before = time.monotonic(), self.count
        try:
            await self._resize(count)
        except Exception as error:  # whatever it is, a run does not end because it could not be made larger or smaller
            self._refused_at = self._room.size()
            log.warning("%s could not be changed from %d to %d: %s", self.name, before, count, error)
            if count > before:
                await self._settle(before)
            return
        self.count = count
        log.info("%s is %d instead of %d after %.0f s", self.name, count, before, time.monotonic() - began)

    async def _settle(self, count: int) -> None:
        """Back to what was there, so that the pool wants no more than it has."""
        try:
            await self._resize(count)
        except Exception as error:
            log.warning("%s could not go back to %d: %s", self.name, count, error)


class Elastic:
    """Follows the `resize.yaml` in a run's folder; each pool of the run is followed while it is there."""

    def __init__(self, folder: Path, settings: ClusterSettings) -> None:
        self._wishes, self._settings = WishFile(folder / FILE), settings

    def follow(
        self, name: str, count: int, needs: Mapping[str, float], resize: Callable[[int], Awaitable[None]]
    ) -> Following:
        """Keep a pool, which has `count` actors that need such resources each, at the number that is wanted."""
        return Following(self._wishes, Follower(name, count, resize, Room(needs), self._settings), self._settings)


class Following:
    """One pool being followed, from its making to `shutdown`."""

    def __init__(self, wishes: WishFile, follower: Follower, settings: ClusterSettings) -> None:
        self._wishes, self._follower, self._settings = wishes, follower, settings
        self._configured = follower.count
        self._task = asyncio.create_task(self._follow())

    def shutdown(self) -> None:
        """Leave the pool as it is."""
        self._task.cancel()

    async def _follow(self) -> None:
        try:
            while True:
                wanted = self._wishes.read()[self._follower.name]
                await self._follower.step(self._configured if wanted is None else wanted)
                await asyncio.sleep(self._settings.resize_poll_s)
        except Exception:  # whatever it is, the run goes on as it is
            log.warning("%s follows resize.yaml no longer", self._follower.name, exc_info=True)
        finally:
            self._follower.close()
