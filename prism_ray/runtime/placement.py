"""The placement plan on a Ray cluster: its groups of bundles as placement groups, and a sentence where they must wait.

A group of actors is given options for each of its actors (`options`), and needs to know nothing else of placement.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import ray
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.planning import layout
from prism_ray.planning.layout import Bundle, Group, Layout, Misfit, Node, assign, described
from prism_ray.runtime.cluster import ClusterError, joins

TELL_AFTER_S = 10.0
"""Seconds after which somebody who waits for resources is told what for."""
UNBIND_AFTER_S = 5.0
"""Seconds after which a group may lie on other nodes than the plan's."""
LOOK_EVERY_S = 0.1
HEAD = "node:__internal_head__"
"""The resource by which Ray marks a cluster's head."""
STRATEGIES = {"pack": "PACK", "anywhere": "PACK"}
"""By Ray's names; a single bundle lies on one node by any of them, on one that is in use already by this."""

log = logging.getLogger(__name__)


def nodes() -> tuple[Node, ...]:
    """The cluster's nodes as they are now."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: HEAD not in node["Resources"])
    addresses = [node["NodeManagerAddress"] for node in alive]
    unique = len(set(addresses)) == len(alive)  # not where several are on one machine
    return tuple(
        Node(
            address if unique else node["NodeID"][:8],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            head=HEAD in node["Resources"],
            id=node["NodeID"],
        )
        for node, address in zip(alive, addresses, strict=True)
    )


def check(layouts: Sequence[Layout], settings: ClusterSettings) -> None:
    """Refuse layouts that do not fit on the cluster's nodes: ClusterError with one sentence.

    A cluster that was joined may still be growing, and is given `pending_timeout_s`.
    """
    growing, began, told = joins(settings), time.monotonic(), False
    while True:
        there = nodes()
        try:
            for one in layouts:
                assign(one, there)
            return
        except Misfit as misfit:
            waited = time.monotonic() - began
            if not growing or waited > settings.pending_timeout_s:
                raise ClusterError(_after(str(misfit), settings.pending_timeout_s if growing else 0)) from None
            if waited > TELL_AFTER_S and not told:
                log.warning("waiting for the cluster to grow: %s", misfit)
                told = True
        time.sleep(min(1.0, settings.pending_timeout_s))


def _after(sentence: str, seconds: float) -> str:
    """The sentence, and how long it was waited for that to change."""
    if not seconds:
        return sentence
    return f"{sentence} (waited {seconds:g} s; raise cluster.pending_timeout_s if nodes are still to come)"


class Places(Protocol):
    """Where engines go, which come and go while the others work."""

    async def take(self, index: int) -> dict[str, Any]:
        """Ray's options for the actor of engine `index`, whose place is reserved when this returns."""
        ...

    def leave(self, index: int) -> None:
        """Engine `index` was removed for good."""
        ...


class Anywhere:
    """Engines go wherever Ray finds room."""

    async def take(self, index: int) -> dict[str, Any]:
        return {}

    def leave(self, index: int) -> None: ...


ANYWHERE = Anywhere()


class Placement:
    """The placement groups that a run holds, by the names of the plan's groups.

    Left to itself Ray would put each engine on the emptiest node and leave the learner none that is whole. So bundles
    are bound to the nodes that the plan gives them, as long as what the plan does not know of leaves them free.
    """

    def __init__(self, settings: ClusterSettings, plan: Sequence[Group] = ()) -> None:
        """`plan` are all groups that may be held at once (without one, they lie where Ray puts them)."""
        self._settings, self._plan = settings, plan
        self._held: dict[str, tuple[Group, PlacementGroup | None]] = {}

    async def reserve(self, groups: Iterable[Group]) -> None:
        """Reserve these groups, those that are not held yet; returns once the cluster has granted all of them.

        Where it does not, the log says what for after `TELL_AFTER_S`, and after `cluster.pending_timeout_s` the new
        ones are given up: ClusterError.
        """
        new = [group for group in groups if group.name not in self._held]
        if not new:
            return
        where = await asyncio.to_thread(self._targets, new)
        try:
            for group in new:
                self._held[group.name] = group, _requested(group, where.get(group.name))
            await self._granted(new)
        except BaseException:
            self.release(*(group.name for group in new))
            raise

    def holds(self, name: str) -> bool:
        return name in self._held

    def is_granted(self, name: str) -> bool:
        """Whether a held group has all it reserved; not if a node of its was lost."""
        group, _ = self._held[name]
        return not self._pending([group])

    def _targets(self, new: Sequence[Group]) -> dict[str, list[str]]:
        """For every new group of the plan the ids of its nodes; none where the plan does not fit any more."""
        there = nodes()
        known, ids = {node.id: node.name for node in there}, {node.name: node.id for node in there}
        fixed: dict[str, tuple[str, ...]] = {}
        now = dict(self._held)  # others are reserved meanwhile
        for name, (group, held) in now.items():
            lies = placement_group_table(held)["bundles_to_node_id"] if held is not None else {}
            at = [known.get(lies.get(i, "")) for i in range(len(lies))]
            if len(at) == len(group.bundles) and all(at):
                fixed[name] = tuple(str(node) for node in at)
        names = {group.name for group in self._plan}
        more = [group for name, (group, _) in now.items() if name in fixed and name not in names]
        plan = [group for group in (*self._plan, *more) if all(bundle.resources for bundle in group.bundles)]
        try:
            placed = assign(Layout("run", tuple(plan)), there, fixed)
        except Misfit:
            return {}
        return {g.name: [ids[node] for node in placed[g.name]] for g in new if g.name in placed}

    def options(self, name: str, index: int = 0) -> dict[str, Any]:
        """Ray's options for actor `index` of a group; none where it is not held, or reserves nothing."""
        group, held = self._held.get(name, (None, None))
        if group is None or held is None or not group.bundles[index].resources:
            return {}
        bundle = sum(bool(b.resources) for b in group.bundles[:index])
        strategy = PlacementGroupSchedulingStrategy(held, placement_group_bundle_index=bundle)
        return {"scheduling_strategy": strategy}

    def all_options(self, name: str) -> list[dict[str, Any]]:
        """The same for every actor of a group; an empty list where it is not held."""
        group, _ = self._held.get(name, (None, None))
        return [self.options(name, i) for i in range(len(group.bundles))] if group is not None else []

    def release(self, *kinds: str) -> None:
        """Give back the groups of these names, numbered ones (`scorer` 0, 1, …) by their kind, with whatever actors
        still run there; all groups without a name."""
        for name in [n for n in self._held if not kinds or n in kinds or n.rpartition(" ")[0] in kinds]:
            _, held = self._held.pop(name)
            if held is not None and ray.is_initialized():
                remove_placement_group(held)

    async def _granted(self, new: Sequence[Group]) -> None:
        began, told, limit = time.monotonic(), False, self._settings.pending_timeout_s
        bound = True
        while pending := await asyncio.to_thread(self._pending, new):
            waited = time.monotonic() - began
            if bound and waited > min(UNBIND_AFTER_S, limit / 2):  # somebody else is where the plan would have them
                bound = False
                for group in pending:
                    self.release(group.name)
                    self._held[group.name] = group, _requested(group)
            if waited > limit:
                raise ClusterError(_after(_lacking(pending), limit))
            if waited > TELL_AFTER_S and not told:
                log.warning("waiting for resources: %s", _lacking(pending))
                told = True
            await asyncio.sleep(LOOK_EVERY_S)

    def _pending(self, new: Sequence[Group]) -> list[Group]:
        held = [(group, self._held[group.name][1]) for group in new]
        return [g for g, h in held if h is not None and placement_group_table(h)["state"] != "CREATED"]


class EnginePlaces:
    """The places of a run's engines: one placement group each, so that all GPUs of an engine are on one node and its
    successor finds room where it was.

    In the colocated layout an engine books half of its GPU; a learner rank has the other half.
    """

    def __init__(
        self, placement: Placement, groups: Sequence[Group], colocated: bool, rollout: RolloutSettings
    ) -> None:
        """`groups` are those of the configured engines; more engines are given more of the same kind."""
        self._placement, self._groups, self._rollout = placement, groups, rollout
        self._colocated = colocated

    async def take(self, index: int) -> dict[str, Any]:
        group = self._groups[min(index, len(self._groups) - 1)]
        name = layout.engine(index)
        if self._placement.holds(name) and not await asyncio.to_thread(self._placement.is_granted, name):
            self._placement.release(name)  # its node was lost
        await self._placement.reserve([Group(name, group.bundles, group.strategy, group.setting)])
        shared = {"num_gpus": layout.SHARE} if self._colocated and self._rollout.gpus_per_engine else {}
        return self._placement.options(name) | shared

    def leave(self, index: int) -> None:
        if not self._colocated:
            self._placement.release(layout.engine(index))


def _requested(group: Group, where: Sequence[str] | None = None) -> PlacementGroup | None:
    """Asked of Ray; `where` are the ids of the nodes that its bundles must be on."""
    bundles = [bundle.resources for bundle in group.bundles if bundle.resources]
    if not bundles:
        return None
    selectors = [{NODE_ID_LABEL_KEY: node} for node in where] if where else None
    return placement_group(bundles, strategy=STRATEGIES[group.strategy], bundle_label_selector=selectors)  # pyright: ignore[reportArgumentType]


def _lacking(pending: Sequence[Group]) -> str:
    """What is asked for and not granted, what there is, and what to change."""
    there, free = nodes(), ray.available_resources()
    whole = Bundle(sum(n.cpus for n in there), sum(n.gpus for n in there))
    left = Bundle(free.get("CPU", 0.0), free.get("GPU", 0.0))
    settings = ", ".join(dict.fromkeys(group.setting.partition(" = ")[0] for group in pending))
    return (
        f"{described(pending)} cannot be placed: the cluster has {whole} on {len(there)} nodes, of which {left} are "
        f"free; lower {settings} or what each of them books, or end what else holds the rest"
    )
