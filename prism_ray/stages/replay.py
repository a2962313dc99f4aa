"""Replay: what a journal says happened, and training on it again without engines.

A journal that was kept (`journal.keep`) holds every judged group and which of them trained which update. Trained again
from the same start with the same settings, the same groups give the same losses: what a run computed can be looked at
without what made it unrepeatable, the timing of its engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.table import Table

from prism_ray.config.run import RunSettings
from prism_ray.config.stages import PhaseSettings
from prism_ray.learner.group import LearnerGroup
from prism_ray.planning import layout
from prism_ray.records import Group, Ticket
from prism_ray.runtime import journal
from prism_ray.runtime.placement import Placement
from prism_ray.stages.phase import recipe_of

STARTS = {"align": "sft", "rlvr": "align", "rlvr-sft": "sft", "rlvr-references": "references"}
"""The stages that have a journal, and that whose checkpoint each starts from."""


class ReplayError(ValueError):
    """A journal that cannot be replayed; the message says what is missing."""


@dataclass
class Record:
    """What a journal says: the tickets of all groups by id, the groups of each update by the version it starts from,
    and the ids of groups that may not be used any more (what sampled them was undone)."""

    tickets: dict[int, dict[str, Any]] = field(default_factory=dict)
    updates: dict[int, tuple[int, ...]] = field(default_factory=dict)
    void: set[int] = field(default_factory=set)

    def fate(self, group: int) -> str:
        """What became of a group: `update 7`, `void` or `waiting`."""
        for version, groups in self.updates.items():
            if group in groups:
                return f"update {version + 1}"
        return "void" if group in self.void else "waiting"


def read_record(folder: Path, salvage: bool = False) -> Record:
    """Read the journal in `folder`, with the segments that were put away."""
    record = Record()
    for entry in _entries(folder, salvage):
        if "group" in entry:
            record.tickets[entry["ticket"]["id"]] = entry["ticket"]
        elif "update" in entry:
            record.updates[entry["update"]] = tuple(entry["groups"])
        else:
            record.updates = {v: groups for v, groups in record.updates.items() if v < entry["resumed"]}
            used = {group for groups in record.updates.values() for group in groups}.union(entry["groups"])
            record.void |= record.tickets.keys() - used
    return record


def batches(folder: Path, record: Record, salvage: bool = False) -> Iterator[tuple[int, list[Group]]]:
    """The groups of each update that counts, in order, with the version it starts from. In memory are those of one
    update, and those that wait for theirs."""
    last = {e["update"]: number for number, e in enumerate(_entries(folder, salvage)) if "update" in e}
    wanted = {group for groups in record.updates.values() for group in groups}
    held: dict[int, Group] = {}
    for number, entry in enumerate(_entries(folder, salvage)):
        if "group" in entry and entry["ticket"]["id"] in wanted:
            held[entry["ticket"]["id"]] = entry["group"]
        elif "update" in entry and last[entry["update"]] == number and entry["update"] in record.updates:
            version = entry["update"]
            if missing := [group for group in record.updates[version] if group not in held]:
                raise ReplayError(f"update {version + 1} trained on group {missing[0]}, which is not in the journal")
            yield version, [held.pop(group) for group in record.updates[version]]


def _entries(folder: Path, salvage: bool) -> Iterator[dict[str, Any]]:
    yield from journal.read(folder / journal.KEPT, salvage)
    yield from journal.read(folder, salvage)


async def replay(
    settings: RunSettings,
    stage: str,
    folder: Path,
    start: Path,
    on_update: Callable[[int, dict[str, float]], None],
    updates: int | None = None,
    salvage: bool = False,
    midway: bool = False,
) -> None:
    """Train the policy in `start` on the updates of the journal in `folder` (all, or the first so many), as the stage
    did; `on_update` gets the number of each, from 1, and its metrics. `midway`: `start` is the policy of the first
    recorded update, whichever that is (the optimiser begins anew). Needs Ray.

    Raises ReplayError where the journal does not say what was trained on.
    """
    record = read_record(folder, salvage)
    if not record.updates:
        raise ReplayError(f"{folder} does not say which groups trained which update; run with journal.keep=true")
    if (first := min(record.updates)) and not midway:
        raise ReplayError(f"{folder} begins with update {first + 1}; name the policy of then with --start")
    phase, planned = _phase(settings, stage)
    held = Placement(settings.cluster)
    await held.reserve([layout.learner(settings.learner)])
    learner = await LearnerGroup.create(
        start,
        phase.optimiser.over(settings.learner, planned),
        recipe_of(settings, phase),
        settings.rollout.max_prompt_tokens,
        planned,
        held.all_options(layout.LEARNER),
    )
    try:
        for done, (version, groups) in enumerate(batches(folder, record, salvage), start=1):
            tickets = [Ticket(ref=ray.put(group), **record.tickets[group.id]) for group in groups]
            on_update(version + 1, await learner.update(tickets, version))
            if done == updates:
                break
    finally:
        learner.shutdown()
        held.release()


def _phase(settings: RunSettings, stage: str) -> tuple[PhaseSettings, int]:
    """The stage's settings, and its updates (the arm without alignment has alignment's too)."""
    if stage == "align":
        return settings.align, settings.align.updates
    return settings.rlvr, settings.rlvr.updates + (settings.align.updates if stage == "rlvr-sft" else 0)


def overview(folder: Path, salvage: bool = False) -> Table:
    """A row for each judged group in the journal."""
    record = read_record(folder, salvage)
    table = Table(title=f"{folder}: {len(record.tickets)} groups, {len(record.updates)} updates", title_justify="left")
    for name in ("group", "prompt", "position", "versions", "judge", "rewards", "valid", "tokens", "trained"):
        table.add_column(name)
    for group in _groups(folder, salvage):
        ticket = record.tickets[group.id]
        lengths = [r.sampled for r in group.rollouts]
        table.add_row(
            str(group.id),
            group.prompt.id,
            str(ticket["position"]),
            f"{group.oldest_version}–{group.newest_version}",
            str(ticket["judge_version"]),
            _spread([v.reward for v in group.verdicts]),
            f"{sum(v.valid for v in group.verdicts)}/{len(group.verdicts)}",
            f"{min(lengths)}–{max(lengths)}",
            record.fate(group.id),
        )
    return table


def describe(folder: Path, group_id: int, salvage: bool = False) -> str:
    """One group: its prompt, and each rollout with its verdict."""
    for group in _groups(folder, salvage):
        if group.id == group_id:
            break
    else:
        raise ReplayError(f"{folder} has no group {group_id}; --show without a number lists those it has")
    lines = [f"group {group.id}, prompt {group.prompt.id}"]
    lines += [f"  {message['role']}: {message['content']}" for message in group.prompt.messages]
    lines += [f"  reference: {group.prompt.reference}"] if group.prompt.reference else []
    lines += [f"  ground truth: {group.prompt.ground_truth}"] if group.prompt.ground_truth else []
    for one in group.trajectories:
        rollout, verdict = one.rollout, one.verdict
        versions = ", ".join(map(str, sorted(set(rollout.versions.tolist()))))
        lines.append(
            f"rollout {rollout.index}: {rollout.sampled} tokens of version {versions}, mean log-prob "
            f"{rollout.logp.sum() / max(1, rollout.sampled):.3f}, ended by {rollout.finish_reason}"
        )
        lines += [f"  {message['role']}: {message['content']}" for message in rollout.turns]
        lines.append(f"  {rollout.text}")
        lines.append(f"  reward {verdict.reward:.4f}" + ("" if verdict.valid else f", invalid: {verdict.reason}"))
        for name, values in (("score", verdict.scores), ("of the reference", verdict.reference_scores)):
            lines += [f"  {name}: {_named(values)}"] if values else []
        lines += [f"  parts: {_named(verdict.parts)}"] if verdict.parts else []
    return "\n".join(lines)


def _groups(folder: Path, salvage: bool) -> Iterator[Group]:
    """Every group once, as it was last written, by id."""
    found = {entry["group"].id: entry["group"] for entry in _entries(folder, salvage) if "group" in entry}
    for group_id in sorted(found):
        yield found[group_id]


def _spread(values: list[float]) -> str:
    return f"{min(values):.3f} … {max(values):.3f}, mean {np.mean(values):.3f}" if values else ""


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
