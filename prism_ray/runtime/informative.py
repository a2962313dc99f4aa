"""Dynamic sampling (DAPO, arXiv 2503.14476): groups whose rollouts were all judged alike are dropped, and replaced.

Such a group has no advantage and teaches nothing. The published form samples more prompts than a batch needs and throws
the surplus away; where groups finish one by one, the surplus is what is late, and so the long responses. Here nothing
is thrown away but uninformative groups, each of which frees its one place at the gate. What is trained on is therefore
the first informative groups in the order of the stream, however long each takes.
"""

from __future__ import annotations

from collections import Counter

from prism_ray.config.runtime import HIGHEST, LOWEST, LoopSettings
from prism_ray.runtime.protocols import Ticket


class TooFewInformative(RuntimeError):
    """Nearly every group is judged alike; the message says how, and what to change."""


class Informative:
    """Tells which judged groups may train, counts the others, and ends the loop where there are too many of those."""

    def __init__(self, settings: LoopSettings):
        self._what, self._step = settings.dynamic_sampling, settings.groups_per_step
        self._most = settings.dynamic_sampling_limit * settings.groups_per_step
        self._since_batch: Counter[str] = Counter()
        """Verdicts on groups since the last whole batch's worth was kept: what the limit is about."""
        self._since_metrics: Counter[str] = Counter()

    def keeps(self, ticket: Ticket) -> bool:
        """Whether the group may train; to be asked once for each group.

        Raises TooFewInformative, and ValueError where the judge does not note what is asked for.
        """
        if self._what is None:
            return True
        low, high = self._range(ticket)
        verdict = "kept" if high > low else "right" if low >= 0.5 else "wrong"
        self._since_metrics[verdict] += 1
        self._since_batch[verdict] += 1
        if self._since_batch["kept"] == self._step:
            self._since_batch.clear()
        if self._since_batch["right"] + self._since_batch["wrong"] > self._most:
            raise TooFewInformative(self._sentence())
        return verdict == "kept"

    def metrics(self) -> dict[str, float]:
        """Of the groups judged since the last call: the share that was dropped, and the shares of those dropped because
        all their rollouts were right, or wrong (half of 1 or more counts as right)."""
        right, wrong = self._since_metrics["right"], self._since_metrics["wrong"]
        judged = self._since_metrics.total()
        self._since_metrics.clear()
        shares = {"dropped": right + wrong, "dropped_right": right, "dropped_wrong": wrong}
        return {f"reward/{name}_share": count / judged for name, count in shares.items()} if judged else {}

    def _range(self, ticket: Ticket) -> tuple[float, float]:
        try:
            return ticket.stats[f"{LOWEST}{self._what}"], ticket.stats[f"{HIGHEST}{self._what}"]
        except KeyError:
            known = sorted(name.removeprefix(LOWEST) for name in ticket.stats if name.startswith(LOWEST))
            raise ValueError(
                f"loop.dynamic_sampling is {self._what!r}, but the judge of this stage notes "
                f"{', '.join(known) or 'nothing that could vary'}; name one of those, or set it to null"
            ) from None

    def _sentence(self) -> str:
        right, wrong, kept = (self._since_batch[name] for name in ("right", "wrong", "kept"))
        extreme, cure = ("easy", "harder") if right > wrong else ("hard", "easier")
        return (
            f"{right + wrong} groups were alike in {self._what} ({right} all right, {wrong} all wrong) while {kept} of "
            f"the {self._step} that an update needs were not: the task is too {extreme} for this policy. Raise this "
            f"stage's loop.dynamic_sampling_limit to go on, or begin it anew with {cure} prompts, a larger "
            "rollout.group_size, or loop.dynamic_sampling: null"
        )
