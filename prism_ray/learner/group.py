"""The learner as Ray actors: data-parallel ranks, and the `LearnerGroup` by which a loop trains them.

Groups stay in the object store: a rank receives references and fetches its own share.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch

from prism_ray.config.learner import LearnerSettings
from prism_ray.learner.engine import TrainEngine, init_process_group
from prism_ray.learner.policy import reference_policy, trainable_policy
from prism_ray.learner.step import Outcome, Recipe, figures, update
from prism_ray.learner.work import prepare
from prism_ray.models.encode import Encoder
from prism_ray.models.load import save_weights
from prism_ray.models.packing import balance
from prism_ray.records import Group, Ratios
from prism_ray.runtime.protocols import Ticket
from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP, Lost, Watched
from prism_ray.weights.transports import TRANSPORTS, Offer, Superseded, Wire, make_sender

TAG = "policy"
LINKS = "links"
"""The concurrency group of what engines ask a rank; each that fetches weights takes one of its threads for as long."""

log = logging.getLogger(__name__)


class LearnerRank:
    """One process of the group: a part of every batch, and (by ZeRO stage) a part of the optimiser's state.

    All methods but `alive` and those of engines' links run in one thread, one after the other.
    """

    def __init__(
        self,
        rank: int,
        folder: str,
        settings: LearnerSettings,
        recipe: Recipe,
        max_prompt_tokens: int,
        wire: Wire | None = None,
    ):
        torch.set_num_threads(max(1, math.ceil(settings.cpus_per_rank)))
        self.rank, self.folder, self.settings, self.recipe = rank, folder, settings, recipe
        self.wire, self.staged = wire, 0
        self.encoder = Encoder(folder, max_prompt_tokens)

    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> None:
        """Answers, also while the rank computes."""

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet."""
        return _free_address()

    def connect(self, host: str, port: int, total_steps: int | None) -> None:
        """Join the process group and build the engine."""
        init_process_group(self.rank, self.settings.ranks, host, port, self.settings.timeout_s)
        model = trainable_policy(self.folder, self.settings)
        self.engine = TrainEngine(model, self.settings, total_steps)
        self.reference = None
        if self.recipe.objective.kl_coef:
            sampling = self.recipe.temperature, self.encoder.banned_ids
            self.reference = reference_policy(self.folder, self.engine, self.settings, *sampling)
        if self.wire is not None:
            self.sender = make_sender(self.wire, self.engine, self.folder, self.rank, _free_address)

    def update(self, refs: list[Any], version: int) -> Outcome:
        """This rank's share of an update, given as references to groups."""
        groups: list[Group] = ray.get(refs, timeout=self.settings.timeout_s)
        work = prepare(groups, self.encoder, self.recipe.views)
        return update(self.engine, work, self.recipe, version, self.encoder.banned_ids, self.reference)

    def weights(self) -> tuple[dict[str, np.ndarray], bool]:
        """The weights (of rank 0; the others take part and return nothing) and a word that they are there.

        numpy knows no bfloat16: such weights come as float32, which holds them exactly.
        """
        weights = self.engine.weights()
        if self.rank:
            return {}, True
        plain = {n: w.float() if w.dtype == torch.bfloat16 else w for n, w in weights.items()}
        return {name: weight.numpy() for name, weight in plain.items()}, True

    def stage(self, number: int) -> None:
        """Set the weights aside for engines to fetch, as the `number`th of this learner; from then on, training may go
        on."""
        self.staged = number  # first: who reads meanwhile will be told
        self.sender.stage()

    # An engine's link (`weights.transports.Sender`), in threads of their own: training goes on meanwhile.

    @ray.method(concurrency_group=LINKS)
    def link_prepare(self, link: str, workers: int) -> dict[str, Any]:
        return self.sender.prepare(link, workers)

    @ray.method(concurrency_group=LINKS)
    def link_meet(self, link: str) -> None:
        self.sender.meet(link)

    @ray.method(concurrency_group=LINKS)
    def link_updates(self, link: str, number: int) -> list[dict[str, Any]]:
        self._confirm(number)
        return self.sender.updates(link)

    @ray.method(concurrency_group=LINKS)
    def link_send(self, link: str) -> None:
        self.sender.send(link)

    @ray.method(concurrency_group=LINKS)
    def link_confirm(self, link: str, number: int) -> None:
        self._confirm(number)

    def _confirm(self, number: int) -> None:
        if self.staged != number:
            raise Superseded(f"learner rank {self.rank} has replaced the weights that an engine was to fetch")

    def save(self, folder: str) -> None:
        self.engine.save(folder, TAG)

    def load(self, folder: str) -> None:
        self.engine.load(folder, TAG)

    def export(self, folder: str) -> None:
        weights = self.engine.weights()
        if self.rank == 0:
            save_weights(weights, folder, like=self.folder)


LEARNER_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP | {LINKS: 64})(LearnerRank)


class LearnerGroup:
    """The policy's trainer (`Learner` of runtime/protocols.py), with checkpoints and export.

    Every wait is limited by `settings.timeout_s`; then TimeoutError names a rank that did not answer. A rank that died
    or hangs is `Lost`: what the group held is gone, and another must be made from a checkpoint.
    """

    def __init__(self, ranks: list[Any], settings: LearnerSettings, wire: Wire | None = None) -> None:
        self.ranks, self.settings, self.wire = ranks, settings, wire
        self._name, self._staged = uuid.uuid4().hex, 0
        self._watched = [
            Watched(f"learner rank {number}", rank, settings.heartbeat_s) for number, rank in enumerate(ranks)
        ]
        self._skipped = self._skipped_in_a_row = 0
        self._ratios: Ratios = {}

    @classmethod
    async def create(
        cls,
        folder: str | Path,
        settings: LearnerSettings,
        recipe: Recipe,
        max_prompt_tokens: int,
        total_steps: int | None = None,
        places: Sequence[Mapping[str, Any]] = (),
        wire: Wire | None = None,
    ) -> LearnerGroup:
        """Start the ranks on the policy in `folder`; `places` are Ray's options for the actor of each (none: wherever
        Ray finds room). `wire` is the way weights go to the engines, if not through shared memory."""
        needs = {"num_cpus": settings.cpus_per_rank, "num_gpus": settings.gpus_per_rank}
        where = places or [{}] * settings.ranks
        made = [
            LEARNER_ACTOR.options(**needs | dict(where[rank])).remote(
                rank, _absolute(folder), settings, recipe, max_prompt_tokens, wire
            )
            for rank in range(settings.ranks)
        ]
        group = cls(made, settings, wire)
        try:
            host, port = (await group._wait("start", [rank.address.remote() for rank in made]))[0]
            for watched in group._watched:
                watched.begin()
            await group._all("connect", host, port, total_steps)
        except BaseException:
            group.shutdown()
            raise
        return group

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        """One optimiser step on judged groups, from `version` to `version + 1`. Returns metrics.

        A step whose gradient is not finite changes nothing: it is counted and logged with the trajectories at fault.
        Too many in a row are a RuntimeError.
        """
        shares = split_by_tokens(tickets, len(self.ranks))
        calls = [
            rank.update.remote([ticket.ref for ticket in share], version)
            for rank, share in zip(self.ranks, shares, strict=True)
        ]
        outcomes = await self._wait("update", calls)
        metrics = figures(outcomes)
        self._ratios = {group: ratios for outcome in outcomes for group, ratios in outcome.ratios.items()}
        self._count_skipped(outcomes, version)
        metrics["policy/skipped_total"] = float(self._skipped)
        metrics["staleness/max"] = float(max(version - ticket.oldest_version for ticket in tickets))
        return metrics

    def _count_skipped(self, outcomes: list[Outcome], version: int) -> None:
        if not outcomes[0].skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped += 1
        self._skipped_in_a_row += 1
        suspects = [name for outcome in outcomes for name in outcome.suspects]
        whose = "; not finite are the log-probs, or their gradients, of " + ", ".join(suspects[:8])
        if not suspects:
            whose = "; every trajectory's own log-probs and gradients are finite, so it overflowed inside the network"
        more = f" and {len(suspects) - 8} more" if len(suspects) > 8 else ""
        log.warning("update %d is skipped: its gradient is not finite%s%s", version + 1, whose, more)
        if self._skipped_in_a_row > self.settings.max_skipped:
            raise RuntimeError(
                f"{self._skipped_in_a_row} updates in a row had gradients that are not finite (learner.max_skipped = "
                f"{self.settings.max_skipped}){whose}{more}; lower learner.lr, or look at those trajectories"
            )

    def ratios(self) -> Ratios:
        """Of the last update's groups: current / behaviour of every rollout, before the step."""
        return self._ratios

    async def weights(self) -> Any:
        """The weights as they are now, whatever is trained after that: a reference to `dict[str, np.ndarray]`, by the
        policy's own parameter names, whole; or, where engines fetch them, an `Offer`."""
        if self.wire is not None:
            return await self._offer(self.wire)
        calls = [rank.weights.options(num_returns=2).remote() for rank in self.ranks]
        await self._wait("give its weights", [done for _, done in calls])
        return calls[0][0]

    async def _offer(self, wire: Wire) -> Offer:
        self._staged += 1
        await self._all("stage", self._staged)
        ranks = self.ranks if TRANSPORTS[wire.transport].every_rank else self.ranks[:1]
        return Offer(self._name, self._staged, tuple(ranks))

    async def save(self, folder: str | Path) -> None:
        """Write weights, optimiser and schedule; `load` on as many ranks goes on from there."""
        await self._all("save", _absolute(folder))

    async def load(self, folder: str | Path) -> None:
        """Go back to what `save` wrote."""
        await self._all("load", _absolute(folder))

    async def export(self, folder: str | Path) -> None:
        """Write the policy as a Hugging Face folder with tokenizer and processor."""
        await self._all("export", _absolute(folder))

    def shutdown(self) -> None:
        """End the actors; safe to call twice."""
        for watched in self._watched:
            watched.close()
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return await self._wait(method, [getattr(rank, method).remote(*args) for rank in self.ranks])

    async def _wait(self, what: str, calls: list[Any]) -> list[Any]:
        """The results of one call for each rank."""
        limit = self.settings.timeout_s
        tasks = [
            asyncio.create_task(watched.answer(call, what, limit))
            for watched, call in zip(self._watched, calls, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        except TimeoutError as error:
            raise TimeoutError(
                f"{error} (learner.timeout_s); does the cluster grant {self.settings.ranks} x "
                f"{self.settings.cpus_per_rank:g} CPUs and {self.settings.gpus_per_rank:g} GPUs?"
            ) from error
        except Exception as error:
            if lost := await self._lost(error, tasks):
                raise lost from error
            raise
        finally:
            for task in tasks:
                task.cancel()

    async def _lost(self, error: Exception, tasks: list[asyncio.Task[Any]]) -> Lost | None:
        """The loss of another rank behind this error: those that compute with it fail first, in their collective."""
        if isinstance(error, Lost):
            return None
        try:
            async with asyncio.timeout(2 * self.settings.heartbeat_s):
                for done in asyncio.as_completed(tasks):
                    try:
                        await done
                    except Lost as lost:
                        return lost
                    except Exception:  # of another rank that missed the lost one, or this very error
                        continue
        except TimeoutError:
            pass
        return None


def _free_address() -> tuple[str, int]:
    """This machine, and a port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _absolute(folder: str | Path) -> str:
    """Actors have working directories of their own."""
    return str(Path(folder).resolve())


def split_by_tokens(tickets: Sequence[Ticket], ranks: int) -> list[list[Ticket]]:
    """Whole groups for each rank, with about equal tokens to compute.

    Within a rank groups are ordered by id, so that an update does not depend on who finished first.
    """
    if len(tickets) < ranks:
        raise ValueError(
            f"{len(tickets)} groups cannot be split over {ranks} ranks; lower learner.ranks or raise groups_per_step"
        )
    ordered = sorted(tickets, key=lambda t: t.id)
    return [[ordered[i] for i in part] for part in balance([t.total_tokens for t in ordered], ranks)]
