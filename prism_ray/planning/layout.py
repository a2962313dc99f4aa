"""The placement plan: which actors a stage needs, what each reserves, and which of them must share a node.

Pure: `runtime/placement.py` turns it into Ray's placement groups, `jobs/plan.py` shows it. Engines stay for the whole
run; learner and judge come with a stage and go with it. The coordinator is the driver: it reserves nothing and runs
where the job was started, which under `ray job submit` is the head, with the journal's actor beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import LearnerSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.run import STAGES, RunSettings, StageName
from prism_ray.config.trainer import TrainerSettings

Resource = Literal["CPU", "GPU"]
RESOURCES: tuple[Resource, ...] = ("GPU", "CPU")
TINY = 1e-9
"""Sums of fractions are compared up to this."""

LEARNER, TRAINER, JUDGE_RANKS, VERIFIERS, READERS = "learner", "trainer", "judge ranks", "verifiers", "readers"
SCORERS = "scorer"
"""What the names of the scorers' groups begin with."""
SHARE = 0.5
"""Of a GPU that an engine and a learner rank have together, what each is granted: half, since both see all of it."""

SUPERVISED: tuple[StageName, ...] = ("base", "sft", "references")
SAMPLING: tuple[StageName, ...] = ("warmup", "align", "rlvr", "rlvr-sft", "rlvr-references", "evaluate")
JUDGED: tuple[StageName, ...] = ("warmup", "align")
TRAINED: tuple[StageName, ...] = ("align", "rlvr", "rlvr-sft", "rlvr-references")


def engine(index: int) -> str:
    """The name of an engine's group."""
    return f"engine {index}"


def scorer(index: int) -> str:
    """The name of a scorer's group."""
    return f"{SCORERS} {index}"


@dataclass(frozen=True)
class Bundle:
    """What is reserved on one node for one actor (in the colocated layout: for an engine and a learner rank)."""

    cpus: float
    gpus: float = 0.0

    def of(self, resource: Resource) -> float:
        return self.gpus if resource == "GPU" else self.cpus

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names, without zeros."""
        return {name: self.of(name) for name in RESOURCES if self.of(name)}

    def __str__(self) -> str:
        return " and ".join(f"{amount:g} {_plural(name, amount)}" for name, amount in self.resources.items()) or "none"


@dataclass(frozen=True)
class Group:
    """Bundles that are reserved at once. `pack`: on as few nodes as can be, since their actors talk to each other all
    the time; `anywhere`: wherever there is room. A single bundle lies on one node in any case.

    Ray Train makes the trainer's placement group; readers and verifiers have none and take what is free."""

    name: str
    bundles: tuple[Bundle, ...]
    strategy: Literal["pack", "anywhere"]
    setting: str
    """What of the configuration asks for it, with its value."""

    def total(self, resource: Resource) -> float:
        return sum(bundle.of(resource) for bundle in self.bundles)


@dataclass(frozen=True)
class Layout:
    """Everything that one stage reserves, in the order of reservation: what is hardest to place first."""

    stage: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    name: str
    cpus: float
    gpus: float = 0.0
    head: bool = False
    id: str = ""
    """Ray's, where it is a real one."""


def layouts(settings: RunSettings) -> tuple[Layout, ...]:
    """The layout of every stage the configuration names, in the order in which they run."""
    return tuple(layout(s, settings) for s in STAGES if s in settings.stages and _computes(s, settings))


def judges_itself(stage: str, settings: RunSettings) -> bool:
    """Whether the run's own discriminator works in a stage, and not one that is served elsewhere."""
    return stage in JUDGED and not (stage == "align" and settings.align.judge == "serve")


def layout(stage: StageName, settings: RunSettings) -> Layout:
    """What a stage reserves. Engines are counted in a supervised stage only where an earlier stage has started them."""
    s = settings
    groups: list[Group] = []
    before = STAGES[: STAGES.index(stage)]
    if stage in SAMPLING or set(before) & set(s.stages) & set(SAMPLING):
        groups += engines(s.rollout, s)
    if stage in SUPERVISED:
        groups.append(trainer(s.trainer))
    if stage in TRAINED and s.cluster.layout == "split":
        groups.append(learner(s.learner))
    if judges_itself(stage, s):
        groups += judge(s.discriminator)
    if stage in TRAINED and stage != "align" and s.rlvr.judge == "own" and s.verify.worker_cpus:
        setting = f"verify.workers = {s.verify.workers}"
        bundles = (Bundle(s.verify.worker_cpus),) * s.verify.workers
        groups.append(Group(VERIFIERS, bundles, "anywhere", setting))
    if _computes(stage, s):
        setting = f"corpora.readers = {s.corpora.readers}"
        groups.append(Group(READERS, (Bundle(s.corpora.reader_cpus),) * s.corpora.readers, "anywhere", setting))
    return Layout(stage, tuple(groups))


def whole_run(settings: RunSettings) -> tuple[Group, ...]:
    """Everything that may be reserved at once, engines first: what each is given must leave room for the others."""
    stages = set(settings.stages)
    split = settings.cluster.layout == "split" and stages & set(TRAINED)
    own = [learner(settings.learner)] if split else []
    judges = judge(settings.discriminator) if any(judges_itself(s, settings) for s in stages) else []
    return (*engines(settings.rollout, settings), *own, *judges)


def engines(rollout: RolloutSettings, settings: RunSettings | None = None) -> list[Group]:
    """A group for each engine: all of its GPUs are one bundle, and so on one node, as tensor parallelism needs them.

    In the colocated layout the bundle holds a learner rank as well.
    """
    bundle = Bundle(rollout.cpus_per_engine, rollout.gpus_per_engine)
    if settings is not None and settings.cluster.layout == "colocated":
        bundle = Bundle(bundle.cpus + settings.learner.cpus_per_rank, bundle.gpus)
    setting = f"rollout.engines = {rollout.engines}"
    if rollout.gpus_per_engine > 1:
        setting += f" with rollout.gpus_per_engine = {rollout.gpus_per_engine}"
    return [Group(engine(i), (bundle,), "anywhere", setting) for i in range(rollout.engines)]


def learner(settings: LearnerSettings) -> Group:
    """The learner's ranks where they have GPUs of their own."""
    bundles = (Bundle(settings.cpus_per_rank, settings.gpus_per_rank),) * settings.ranks
    return Group(LEARNER, bundles, "pack", f"learner.ranks = {settings.ranks}")


def trainer(settings: TrainerSettings) -> Group:
    """The ranks of a supervised stage, which Ray Train places, packed by its default."""
    bundles = (Bundle(settings.cpus_per_rank, settings.gpus_per_rank),) * settings.ranks
    return Group(TRAINER, bundles, "pack", f"trainer.ranks = {settings.ranks}")


def judge(settings: DiscriminatorSettings) -> list[Group]:
    """The discriminator's ranks, packed, and each scorer wherever there is room."""
    ranks = (Bundle(settings.cpus_per_rank, settings.gpus_per_rank),) * settings.ranks
    groups = [Group(JUDGE_RANKS, ranks, "pack", f"discriminator.ranks = {settings.ranks}")]
    one = (Bundle(settings.cpus_per_scorer, settings.gpus_per_scorer),)
    setting = f"discriminator.scorers = {settings.scorers}"
    return groups + [Group(scorer(i), one, "anywhere", setting) for i in range(settings.scorers)]


def _computes(stage: StageName, settings: RunSettings) -> bool:
    """A policy of the user's own is its own base."""
    return stage != "base" or settings.policy is None


# Where the bundles would lie


@dataclass
class _Room:
    """What is free on a node while bundles are dealt out; GPUs one by one, as a part of one is a part of one."""

    node: Node
    cpus: float
    gpus: list[float] = field(default_factory=list)

    def holds(self, bundle: Bundle) -> bool:
        return self.cpus + TINY >= bundle.cpus and self._chosen(bundle.gpus) is not None

    def take(self, bundle: Bundle) -> None:
        self.cpus -= bundle.cpus
        for index in self._chosen(bundle.gpus) or ():
            self.gpus[index] -= min(1.0, bundle.gpus)

    def _chosen(self, gpus: float) -> list[int] | None:
        if not gpus:
            return []
        part = min(1.0, gpus)
        fitting = sorted((free, i) for i, free in enumerate(self.gpus) if free + TINY >= part)
        count = max(1, round(gpus))
        return [i for _, i in fitting[:count]] if len(fitting) >= count else None


Placed = dict[str, tuple[str, ...]]
"""Of every group the node of each of its bundles."""


class Misfit(ValueError):
    """The bundles do not fit on the nodes; one sentence: what is asked for, what is there, what to change."""


def assign(plan: Layout, nodes: Sequence[Node], fixed: Placed | None = None) -> Placed:
    """A node, by name, for every bundle; groups in `fixed` lie where it says. Raises Misfit."""
    _check_totals(plan, nodes)
    rooms = {n.name: _Room(n, n.cpus, [1.0] * int(n.gpus)) for n in nodes}
    placed: Placed = {group.name: (fixed or {})[group.name] for group in plan.groups if group.name in (fixed or {})}
    for group in (g for g in plan.groups if g.name in placed):
        for bundle, name in zip(group.bundles, placed[group.name], strict=True):
            rooms[name].take(bundle)
    for group in (g for g in plan.groups if g.name not in placed):
        whole = _holding_all(rooms.values(), group) if group.strategy == "pack" else None
        found: list[str] = []
        for bundle in group.bundles:
            fitting = [room for room in rooms.values() if room.holds(bundle)]
            if not fitting:
                raise Misfit(_no_room(plan, group, bundle, nodes))
            room = whole or min(fitting, key=lambda r: _preference(r, group, bundle, found))
            room.take(bundle)
            found.append(room.node.name)
        placed[group.name] = tuple(found)
    return placed


def _holding_all(rooms: Iterable[_Room], group: Group) -> _Room | None:
    """The fullest node that has room for the whole group."""

    def holds_all(room: _Room) -> bool:
        trial = replace(room, gpus=list(room.gpus))
        for bundle in group.bundles:
            if not trial.holds(bundle):
                return False
            trial.take(bundle)
        return True

    return min(filter(holds_all, rooms), key=lambda room: _preference(room, None, group.bundles[0], ()), default=None)


def _preference(room: _Room, group: Group | None, bundle: Bundle, others: Sequence[str]) -> tuple[float, ...]:
    """Lowest first. Not where GPUs are, without need of one; then, for what is packed over several nodes, where the
    others are or else the emptiest; for the rest the fullest, so that whole nodes stay free for what needs them."""
    free = sum(room.gpus) if bundle.gpus else room.cpus
    wasted = float(bool(room.gpus) and not bundle.gpus)
    if group is not None and group.strategy == "pack":
        return wasted, -float(room.node.name in others), -free
    return wasted, free


def _check_totals(plan: Layout, nodes: Sequence[Node]) -> None:
    there = {"CPU": sum(n.cpus for n in nodes), "GPU": sum(n.gpus for n in nodes)}
    for resource in RESOURCES:
        asked = sum(group.total(resource) for group in plan.groups)
        if asked > there[resource] + TINY:
            raise Misfit(
                f"the configuration asks for {asked:g} {resource}s in stage {plan.stage} ({_askers(plan, resource)}) "
                f"but the cluster has {there[resource]:g}; lower one of these or what each books, or use a larger "
                "cluster"
            )


def _askers(plan: Layout, resource: Resource) -> str:
    """Who asks for how much: `rollout.engines = 3: 3, learner.ranks = 4: 4`."""
    amounts: dict[str, float] = {}
    for group in plan.groups:
        if amount := group.total(resource):
            amounts[group.setting] = amounts.get(group.setting, 0.0) + amount
    return ", ".join(f"{setting}: {amount:g}" for setting, amount in amounts.items())


def _no_room(plan: Layout, group: Group, bundle: Bundle, nodes: Sequence[Node]) -> str:
    largest = max(nodes, key=lambda n: (n.gpus, n.cpus))
    alone = _Room(largest, largest.cpus, [1.0] * int(largest.gpus))
    what = f"{group.setting} asks for {bundle} on one node"
    if not any(_Room(n, n.cpus, [1.0] * int(n.gpus)).holds(bundle) for n in nodes):
        short = "GPUs" if bundle.gpus > sum(alone.gpus) else "CPUs"
        return (
            f"{what} but the largest node has {Bundle(largest.cpus, largest.gpus)}; lower the {short} that one of "
            "these books, or use larger nodes"
        )
    others = ", ".join(dict.fromkeys(g.setting for g in plan.groups if g.setting != group.setting))
    return (
        f"{what} in stage {plan.stage} but beside {others} none of the {len(nodes)} nodes has so much left together, "
        "although the cluster as a whole has; lower one of these, or give the nodes more CPUs"
    )


def described(groups: Iterable[Group]) -> str:
    """Groups in words, those of one setting together: `rollout.engines = 3 (3 x 1 GPU and 4 CPUs)`."""
    counts: dict[str, tuple[int, Bundle]] = {}
    for group in groups:
        count, bundle = counts.get(group.setting, (0, group.bundles[0]))
        counts[group.setting] = (count + len(group.bundles), bundle)
    return ", ".join(f"{setting} ({count} x {bundle})" for setting, (count, bundle) in counts.items())


def _plural(resource: str, amount: float) -> str:
    return resource if amount == 1 else f"{resource}s"
