"""The plan of a run: placement, memory, flow and disk of every stage, and what makes it impossible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prism_ray.config.run import RunSettings
from prism_ray.planning.architecture import Architecture, architecture_of, tiny
from prism_ray.planning.disk import Item, disk_items
from prism_ray.planning.flow import Flow, Rates, flow, phases
from prism_ray.planning.hardware import GIB, Hardware
from prism_ray.planning.layout import Layout, Misfit, Placed, assign, judges_itself, layouts
from prism_ray.planning.usage import Usage, host_problems, kv_tokens, problems_of, usages


@dataclass
class Plan:
    """Everything that `jobs/plan.py` shows. `problems` are sentences, each naming the setting to change; none of them
    means that the run can be started. `remarks` are no reason not to."""

    policy: Architecture
    judge: Architecture
    hardware: Hardware
    layouts: tuple[Layout, ...]
    placed: dict[str, Placed] = field(default_factory=dict)
    usages: list[Usage] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    disk: list[Item] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def models_of(settings: RunSettings) -> tuple[Architecture, Architecture]:
    """The policy and the discriminator that is made of it, or of `discriminator.policy`. Raises PlanError."""
    policy = tiny(settings.model) if settings.policy is None else architecture_of(settings.policy, "policy")
    own = settings.discriminator.policy
    start = policy if own is None else architecture_of(own, "discriminator.policy")
    return policy, start.upcycled(settings.discriminator)


def make_plan(settings: RunSettings, hardware: Hardware, rates: Mapping[str, Rates] | None = None) -> Plan:
    """The plan of the configured stages on this cluster; `rates` by stage, where they are measured. Raises PlanError
    where a model is not known."""
    policy, judge = models_of(settings)
    plan = Plan(policy, judge, hardware, layouts(settings))
    for layout in plan.layouts:
        try:
            plan.placed[layout.stage] = assign(layout, hardware.nodes)
        except Misfit as misfit:
            plan.problems.append(str(misfit))
    plan.usages = usages(settings, policy, judge, hardware)
    for usage in plan.usages:
        plan.problems += problems_of(usage, settings, policy, hardware)
    plan.problems += host_problems(plan.usages, plan.placed, settings, policy, hardware)
    plan.problems += _splits(settings)
    room = kv_tokens(settings, policy, hardware)
    for stage in phases(settings):
        if stage in settings.stages:
            known = (rates or {}).get(stage, Rates())
            plan.flows.append(flow(stage, settings, policy, judge, hardware, room, known))
    _remark(plan, settings)
    plan.disk = disk_items(settings, policy, judge)
    needed = sum(item.bytes for item in plan.disk)
    if hardware.disk_gib is not None and needed > hardware.disk_gib * GIB:
        plan.problems.append(
            f"the run's folder will hold {needed / GIB:.0f} GiB but {hardware.disk_gib:.0f} GiB are free; set runs to "
            "a larger disk, or journal.keep to false"
        )
    plan.problems = list(dict.fromkeys(plan.problems))
    return plan


def _splits(settings: RunSettings) -> list[str]:
    """Groups and batches that cannot be divided among their ranks: a group stays on one."""
    s, found = settings, []
    for stage, phase in phases(s).items():
        if stage not in s.stages:
            continue
        groups = phase.loop.groups_per_step
        name = "align" if stage == "align" else "rlvr"
        if groups < s.learner.ranks:
            found.append(
                f"{name}.loop.groups_per_step is {groups} but a group stays on one of learner.ranks = "
                f"{s.learner.ranks}; lower learner.ranks or raise {name}.loop.groups_per_step"
            )
        if judges_itself(stage, s) and groups < s.discriminator.ranks:
            found.append(
                f"align.loop.groups_per_step is {groups} but every one of discriminator.ranks = "
                f"{s.discriminator.ranks} needs a group; lower discriminator.ranks"
            )
    for name, supervised in (("sft", s.sft), ("references", s.references)):
        if name in s.stages and supervised.batch % s.trainer.ranks:
            found.append(
                f"{name}.batch is {supervised.batch} but trainer.ranks is {s.trainer.ranks}; make {name}.batch a "
                "multiple of trainer.ranks"
            )
    return found


def _remark(plan: Plan, settings: RunSettings) -> None:
    for f in plan.flows:
        if f.room < f.sequences:
            plan.remarks.append(
                f"{f.stage}: {f.sequences} rollouts may be under way but the engines decode {f.room:.0f} at once; more "
                "rollout.engines or rollout.max_concurrent would shorten an update, if generation is what it waits for"
            )
    if plan.hardware.gpus:
        booked = {lay.stage: sum(g.total("GPU") for g in lay.groups) for lay in plan.layouts}
        for stage, gpus in booked.items():
            if gpus and plan.hardware.gpus - gpus >= 1:
                plan.remarks.append(f"{stage}: {plan.hardware.gpus - gpus:g} of {plan.hardware.gpus:g} GPUs are idle")
