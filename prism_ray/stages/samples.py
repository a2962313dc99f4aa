"""Some of what a phase trains on, kept for a person to read: `<stage>/samples.jsonl`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from prism_ray.records import Group, Ticket, Trajectory
from prism_ray.report.metrics import open_to_append
from prism_ray.runtime.supervision import fetch

FILE = "samples.jsonl"
MOST = 24
"""Groups of a phase that are kept, spread evenly over its updates: as many as a person reads."""


class SampleLog:
    """Keeps one group of every so many updates, with its reference, its best and its worst rollout, and their scores.

    An update that is done over, after a fault or an interruption, is written again; its last row counts.
    """

    def __init__(self, folder: Path, updates: int) -> None:
        """`updates` is how many the phase has in all."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._every = max(1, updates // MOST)

    async def note(self, tickets: list[Ticket], version: int) -> None:
        """The update from `version` trains on the judged groups of these tickets."""
        if version % self._every == 0 and tickets:
            group: Group = await fetch(tickets[0].ref, f"judged group {tickets[0].id}")
            with open_to_append(self._path) as file:
                file.write(json.dumps(sample_of(group, version)) + "\n")


def sample_of(group: Group, version: int) -> dict[str, Any]:
    """What is kept of a judged group; of rollouts with equal rewards the first is the best and the last the worst."""
    ranked = sorted(group.trajectories, key=lambda t: -t.verdict.reward)
    prompt, verdicts = group.prompt, group.verdicts
    return {
        "group": group.id,
        "version": version,
        "judge_version": max((v.judge_version for v in verdicts), default=0),
        "question": prompt.messages[-1]["content"] if prompt.messages else "",
        "image": base64.b64encode(prompt.images[0]).decode() if prompt.images else "",
        "reference": prompt.reference,
        "reference_scores": next((v.reference_scores for v in verdicts if v.reference_scores), {}),
        "rollouts": [_rollout(t) for t in (ranked if len(ranked) < 3 else [ranked[0], ranked[-1]])],
    }


def _rollout(trajectory: Trajectory) -> dict[str, Any]:
    rollout, verdict = trajectory.rollout, trajectory.verdict
    return {
        "index": rollout.index,
        "response": rollout.text,
        "reward": verdict.reward,
        "scores": verdict.scores,
        "parts": verdict.parts,
        "reason": verdict.reason,
        **({"turns": list(rollout.turns)} if rollout.turns else {}),
    }
