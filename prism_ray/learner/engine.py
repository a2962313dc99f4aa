"""The one DeepSpeed wrapper: a module, AdamW and a schedule, on any number of ranks, with any ZeRO stage.

Gradients of the ranks are summed, not averaged: whoever computes a loss divides by global denominators, so the result
depends neither on the number of ranks nor on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from prism_ray.config.learner import OptimiserSettings

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""DeepSpeed would otherwise compile a shared-memory operator at first use, for minutes; gloo does without."""


def init_process_group(rank: int, world_size: int, host: str, port: int, timeout_s: float) -> None:
    """Join the group of `world_size` processes that meets at host:port; NCCL where CUDA answers, else gloo.

    Raises after `timeout_s` if not all have come; the same limit then holds for every collective.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks; Ray shows each actor only its own device
    _quiet()
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=world_size,
    )


@dataclass(frozen=True)
class StepReport:
    """One optimiser step: global gradient norm before clipping, the learning rate used, and whether it was skipped
    because that norm is not finite (nothing changed then, the schedule included)."""

    grad_norm: float
    lr: float
    skipped: bool


class TrainEngine:
    """Trains `module` (moved to this rank's device) in an existing process group, Ray Train's included.

    Any number of `backward` calls, then `step`. `total_steps` is where a cosine schedule ends. Under ZeRO-3 the
    forward pass must go through `run`, and all ranks must run equally many.
    """

    def __init__(self, module: nn.Module, settings: OptimiserSettings, total_steps: int | None = None) -> None:
        if not torch.distributed.is_initialized():
            raise RuntimeError("TrainEngine needs a process group; call init_process_group first")
        if settings.schedule == "cosine" and not total_steps:
            raise ValueError("schedule: cosine needs the total number of steps; give total_steps, or set constant")
        _quiet()
        self.settings = settings
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        root = _Root(module.to(self.device))
        optimiser = _optimiser([p for p in module.parameters() if p.requires_grad], settings)
        schedule: Any = LambdaLR(optimiser, _factor(settings, total_steps))
        self._engine: Any = deepspeed.initialize(
            model=root, optimizer=optimiser, lr_scheduler=schedule, config=_config(settings)
        )[0]

    @property
    def module(self) -> Any:
        return self._engine.module.module

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(module, *args, **kwargs) as DeepSpeed's forward pass."""
        return self._engine(function, *args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those since the last step.

        Scaled here because DeepSpeed averages over the ranks, and cannot sum under ZeRO-3.
        """
        self._engine.backward(loss * torch.distributed.get_world_size(), scale_wrt_gas=False)

    def step(self) -> StepReport:
        """Sum the gradients over the ranks, clip, update; leaves the gradients empty."""
        lr = self._engine.get_lr()[0]
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm()
        return StepReport(math.inf if skipped else float(norm), lr, skipped)

    @property
    def equal_forwards(self) -> bool:
        """Whether all ranks must run equally many forward passes before a step (their gradients or parameters are
        divided among them and exchanged in each)."""
        return self.settings.zero_stage >= 2

    def over_ranks(self, values: Sequence[float], how: str) -> list[float]:
        """The `sum` or `max` of each value over the ranks, in float64."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        operation = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}[how]
        torch.distributed.all_reduce(tensor, operation)
        return tensor.tolist()

    def weights(self) -> dict[str, Tensor]:
        """All parameters by the module's own names, whole, copied to the CPU. Every rank must call it."""
        gather = GatheredParameters if self.settings.zero_stage == 3 else _as_they_are
        found = {}
        for name, parameter in self.module.named_parameters():
            with gather([parameter]):
                found[name] = parameter.detach().to("cpu", copy=True)
        return found

    def save(self, folder: str | Path, tag: str) -> None:
        """Write weights, optimiser and schedule under folder/tag. Every rank must call it."""
        self._engine.save_checkpoint(str(folder), tag=tag)

    def load(self, folder: str | Path, tag: str) -> None:
        """Go back to what `save` wrote, on as many ranks as wrote it. Every rank must call it."""
        if not (Path(folder) / tag).is_dir():
            raise FileNotFoundError(f"{folder}: no checkpoint {tag}; name one that was saved there")
        self._engine.load_checkpoint(str(folder), tag=tag)

    def destroy(self) -> None:
        """Release what DeepSpeed holds; the process group stays."""
        self._engine.destroy()


class _Root(nn.Module):
    """Runs any function of the module as its forward pass, so that DeepSpeed's root hooks see it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.module, *args, **kwargs)


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, reports the norm and skips a step whose gradient is not finite.

    ZeRO's optimisers do this themselves; without ZeRO (stage 0) DeepSpeed would apply such a step. It reads the two
    attributes set here from any optimiser. Gradients are summed over ranks before, so all ranks decide alike.
    """

    def __init__(self, parameters: list[nn.Parameter], clip: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._clip = clip
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = float(nn.utils.clip_grad_norm_(held, self._clip, foreach=True))
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step()


def _optimiser(parameters: list[nn.Parameter], s: OptimiserSettings) -> torch.optim.AdamW:
    options: dict[str, Any] = {"lr": s.lr, "betas": s.betas, "weight_decay": s.weight_decay, "fused": True}
    if s.zero_stage == 0:
        return _GuardedAdamW(parameters, s.grad_clip, **options)
    return torch.optim.AdamW(parameters, **options)


def _config(s: OptimiserSettings) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # a formality: micro-batches have any size
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": s.grad_clip if s.zero_stage else 0.0,
        "bf16": {"enabled": s.precision == "bfloat16"},
        "zero_optimization": {"stage": s.zero_stage, "overlap_comm": False},
        "steps_per_print": None,
    }


def _factor(s: OptimiserSettings, total_steps: int | None) -> Callable[[int], float]:
    """Share of the peak learning rate at each step, counted from 0."""

    def factor(step: int) -> float:
        if step < s.warmup_steps:
            return (step + 1) / s.warmup_steps
        if s.schedule == "constant" or not total_steps:
            return 1.0
        left = max(1, total_steps - s.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - s.warmup_steps) / left)))

    return factor


@contextlib.contextmanager
def _as_they_are(parameters: list[nn.Parameter]):
    yield


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
