"""How weights travel from the learner to the engines, and what both sides say to each other on the way.

`shared_memory` carries arrays through Ray's object store and a file (`files.py`, `shared_memory.py`). Every other
transport has the learner set a copy of its weights aside (`staging.py`) and *offer* it: training goes on while each
engine fetches the copy over a link of its own, between two of its decoding steps. A link for each engine, rather than
one group of all of them, because a group's broadcast hangs for everybody when one member dies, could not grow or
shrink, and would have all engines stand still for the slowest.

The learner's side is a `Sender` on each rank; which ranks an engine talks to is in the `Offer`. The engine's side is
vLLM's own weight-transfer engine of that backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prism_ray.config.rollout import RolloutSettings, TransportName
from prism_ray.weights.files import checkpoint_files, shapes_in

if TYPE_CHECKING:
    from prism_ray.weights.source import Trainer


@dataclass(frozen=True)
class Transport:
    """Facts of a transport: the name of vLLM's backend, the learner's side (module of this room and class), whether
    every rank has a part for an engine to fetch (else rank 0 has all), and vLLM's executor where only one will do."""

    backend: str
    module: str = ""
    sender: str = ""
    every_rank: bool = False
    executor: str | None = None


TRANSPORTS: dict[TransportName, Transport] = {
    "shared_memory": Transport("prism_ray_shared_memory"),
    "gloo": Transport("prism_ray_gloo", "gloo", "GlooSender"),
    "nccl": Transport("nccl", "nccl", "NcclSender"),
    "sparse_nccl": Transport("sparse_nccl", "sparse_nccl", "SparseNcclSender"),
    "ipc": Transport("ipc", "ipc", "IpcSender", every_rank=True),
    "sharded_rdt": Transport("sharded_rdt", "sharded_rdt", "ShardedRdtSender", executor="ray"),
}
"""Shared memory has no sender: it takes what the learner hands over."""


@dataclass(frozen=True)
class Wire:
    """What the learner must know of the way to the engines.

    `dtype` is the engines' own, in which weights travel; `bucket_bytes` is how much of them travels at a time.
    `timeout_s` ends every wait for an engine.
    """

    transport: TransportName
    dtype: str
    bucket_bytes: int
    timeout_s: float

    @classmethod
    def of(cls, settings: RolloutSettings) -> Wire | None:
        """The way to engines with these settings; None for shared memory."""
        if settings.weights == "shared_memory":
            return None
        bucket = int(settings.weights_bucket_mb * 2**20)
        return cls(settings.weights, settings.dtype, bucket, settings.control_timeout_s)


class Superseded(RuntimeError):
    """The learner has set newer weights aside in place of those that were offered, or is gone. An engine that was
    taking them may have some of both; it stands still, and holds no version, until it has taken others."""


@dataclass(frozen=True)
class Offer:
    """Weights that a learner has set aside, for every engine that asks: what `Learner.weights` gives instead of arrays.

    `ranks` are the actors to ask and `learner` says which group they are of, because a link outlives many offers but
    not its learner; `number` counts what that learner has set aside.
    """

    learner: str
    number: int
    ranks: tuple[Any, ...]


class Sender(Protocol):
    """The learner's side of a transport, on one rank. Errors are those of the engine's link alone.

    `stage` runs in step with training, on all ranks; the rest runs beside it, in a thread for each engine. What a
    method tells vLLM is the dictionary that vLLM's own init and update dataclasses take.
    """

    def stage(self) -> None:
        """Set the weights as they are now aside. Every rank must call it."""
        ...

    def prepare(self, link: str, workers: int) -> dict[str, Any]:
        """Begin a link to an engine of so many workers; returns vLLM's init info. A link of that name is ended."""
        ...

    def meet(self, link: str) -> None:
        """Meet the engine's workers, who do the same with that info at the same time."""
        ...

    def updates(self, link: str) -> list[dict[str, Any]]:
        """vLLM's update info, once for each part in which the engine is to take the weights."""
        ...

    def send(self, link: str) -> None:
        """Send, while the engine takes those updates."""
        ...


class Link(Protocol):
    """An engine's end of its link to a learner, about one offer: a `Sender`'s methods, wherever it is."""

    @property
    def learner(self) -> str: ...
    async def prepare(self, workers: int) -> dict[str, Any]: ...
    async def meet(self) -> None: ...
    async def updates(self) -> list[dict[str, Any]]: ...
    async def send(self) -> None: ...
    async def confirm(self) -> None:
        """Superseded if what was taken was being overwritten meanwhile."""
        ...


def make_sender(
    wire: Wire, trainer: Trainer, folder: str | Path, rank: int, free_port: Callable[[], tuple[str, int]]
) -> Sender:
    """The learner's side on `rank`, for engines that were started on a checkpoint like that in `folder`.

    `free_port` gives an address of this machine that engines can reach. Imports vLLM, which takes seconds.
    """
    transport = TRANSPORTS[wire.transport]
    sender = getattr(importlib.import_module(f"prism_ray.weights.{transport.module}"), transport.sender)
    return sender(wire, trainer, shapes_in(checkpoint_files(folder)), rank, free_port)


def merged(updates: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One engine's updates from what each rank said: with all ranks' handles, where there are any.

    Raises ValueError if the ranks cut their weights into different parts.
    """
    first, *others = updates
    for other in others:
        if len(other) != len(first):
            raise ValueError(f"learner ranks offer weights in {len(first)} and {len(other)} parts; they must be equal")
    parts = zip(*updates, strict=True)
    return [_with_all_handles(part) for part in parts]


def _with_all_handles(part: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    whole = dict(part[0])
    if "ipc_handles" in whole:
        whole["ipc_handles"] = {uuid: handle for said in part for uuid, handle in said["ipc_handles"].items()}
    return whole


def seen_by_vllm(settings: RolloutSettings) -> Transport:
    """Facts of the configured transport, with the executor that vLLM is to use."""
    transport = TRANSPORTS[settings.weights]
    default = "mp" if settings.gpus_per_engine > 1 else "uni"
    return replace(transport, executor=transport.executor or default)
