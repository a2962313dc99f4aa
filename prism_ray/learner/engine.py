"""The one DeepSpeed wrapper: a module, AdamW and a schedule, on any number of ranks, with any ZeRO stage.

Gradients of the ranks are summed, not averaged: whoever computes a loss divides by global denominators, so the result
depends neither on the number of ranks nor on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from prism_ray.config.learner import OptimiserSettings
from prism_ray.learner.checkpoints import Writer, read_writer, restore_random_state, write_state
from prism_ray.models.adapters import original_weights

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

    Any number of `backward` calls, then `step`. `total_steps` is where the schedule ends. Under ZeRO-3 the
    forward pass must go through `run`, and all ranks must run equally many.
    """

    def __init__(self, module: nn.Module, settings: OptimiserSettings, total_steps: int | None = None) -> None:
        if not torch.distributed.is_initialized():
            raise RuntimeError("TrainEngine needs a process group; call init_process_group first")
        if settings.schedule != "constant" and not total_steps:
            what = f"schedule: {settings.schedule}"
            raise ValueError(f"{what} needs the total number of steps; give total_steps, or set constant")
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

    def step(self, part: float = 1.0) -> StepReport:
        """Sum the gradients over the ranks, clip, update; leaves the gradients empty.

        `part` of the learning rate that the schedule gives: AdamW's steps do not become smaller with the gradient.
        """
        groups = self._engine.optimizer.param_groups
        usual = [group["lr"] for group in groups]
        for group, lr in zip(groups, usual, strict=True):
            group["lr"] = lr * part
        lr = self._engine.get_lr()[0]
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        if skipped:  # then the schedule has not set the next rate either
            for group, rate in zip(groups, usual, strict=True):
                group["lr"] = rate
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

    def stream_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole and with its adapter merged, on this rank's device, in the order of the module.

        Names are those before `add_lora`. Every rank must iterate to the end. A tensor is valid until the next one is
        asked for: it may be the parameter's own memory, which ZeRO-3 divides again.
        """
        gather = GatheredParameters if self.settings.zero_stage == 3 else _as_they_are
        for weight in original_weights(self.module):
            with gather(weight.parts):
                yield weight.name, weight.merged().to(self.device)

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what `stream_weights` will yield, in its order; no communication."""
        bases = [(weight.name, weight.base) for weight in original_weights(self.module)]
        return {name: (tuple(getattr(base, "ds_shape", base.shape)), base.dtype) for name, base in bases}

    def weights(self) -> dict[str, Tensor]:
        """What `stream_weights` yields, copied to the CPU. Every rank must call it."""
        return {name: weight.to("cpu", copy=True) for name, weight in self.stream_weights()}

    def save(self, folder: str | Path, tag: str) -> None:
        """Write weights, optimiser, schedule and random states under folder/tag. Every rank must call it."""
        self._engine.save_checkpoint(str(folder), tag=tag)
        write_state(Path(folder) / tag, torch.distributed.get_rank(), self._layout)

    def load(self, folder: str | Path, tag: str) -> None:
        """Go back to what `save` wrote, to the bit. Every rank must call it.

        On another number of ranks numbers go on equal up to rounding, and random states are left as they are, for they
        belonged to the ranks. With ZeRO the checkpoint is converted for it, which needs the folder to be writable and
        room for a copy. Raises ValueError for a checkpoint of a ZeRO stage that this one cannot read.
        """
        checkpoint = Path(folder) / tag
        writer, reader = read_writer(checkpoint), self._layout
        if writer.zero_stage != reader.zero_stage and {writer.zero_stage, reader.zero_stage} != {1, 2}:
            raise ValueError(
                f"{checkpoint} was written with zero_stage {writer.zero_stage}, which cannot be read with zero_stage "
                f"{reader.zero_stage}; set zero_stage to {writer.zero_stage}"
            )
        if writer != reader and reader.zero_stage:
            self._load_converted(checkpoint)
        else:
            self._engine.load_checkpoint(str(folder), tag=tag)
        if writer.ranks == reader.ranks:
            restore_random_state(checkpoint, torch.distributed.get_rank())

    @property
    def _layout(self) -> Writer:
        return Writer(torch.distributed.get_world_size(), self.settings.zero_stage)

    def _load_converted(self, checkpoint: Path) -> None:
        """Load by way of DeepSpeed's universal checkpoint, which rank 0 writes beside the checkpoint."""
        universal = checkpoint.with_name(f"{checkpoint.name}.universal")
        error = ""
        if torch.distributed.get_rank() == 0:
            try:
                _convert(checkpoint, universal)
            except Exception as raised:  # the other ranks must hear of it, whatever it is
                error = f"{type(raised).__name__}: {raised}"
                shutil.rmtree(universal, ignore_errors=True)
        if self.over_ranks([error != ""], "max")[0]:
            raise RuntimeError(f"{checkpoint} cannot be converted for another number of ranks: {error or 'see rank 0'}")
        self._engine._config.load_universal_checkpoint = True  # DeepSpeed has a setting for it, but asks at each load
        try:
            self._engine.load_checkpoint(str(universal.parent), tag=universal.name)
        finally:
            self._engine._config.load_universal_checkpoint = False
        self.over_ranks([0.0], "max")  # all have read it
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(universal)
            (universal.parent / "latest_universal").unlink(missing_ok=True)

    def destroy(self) -> None:
        """Release what DeepSpeed holds; the process group stays."""
        self._engine.destroy()


def _convert(checkpoint: Path, universal: Path) -> None:
    """Write `checkpoint` as a universal one, which any number of ranks can read."""
    shutil.rmtree(universal, ignore_errors=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint), "output_folder": str(universal)}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it chatters
        ds_to_universal.main(argparse.Namespace(**folders, **options, inject_missing_state=True))


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
    zero: dict[str, Any] = {"stage": s.zero_stage, "overlap_comm": False}
    if s.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if s.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a formality: micro-batches have any size
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": s.grad_clip if s.zero_stage else 0.0,
        "bf16": {"enabled": s.precision == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves; DeepSpeed's own must be compiled at first use
        "steps_per_print": None,
    }


def _factor(s: OptimiserSettings, total_steps: int | None) -> Callable[[int], float]:
    """Share of the peak learning rate at each step, counted from 0."""

    def factor(step: int) -> float:
        if step < s.warmup_steps:
            return (step + 1) / s.warmup_steps
        if s.schedule == "constant" or not total_steps:
            return 1.0
        done = min(1.0, (step - s.warmup_steps) / max(1, total_steps - s.warmup_steps))
        return 1.0 - done if s.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor


@contextlib.contextmanager
def _as_they_are(parameters: list[nn.Parameter]):
    yield


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
