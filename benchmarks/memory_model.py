"""The memory that `jobs/plan.py` predicts for a learner rank against what a real update holds.

    python benchmarks/memory_model.py [--quick]

A small Qwen3-VL is built and updated twice by the learner's own code and DeepSpeed, each case in a process of its own.
`state` is what lies in memory after an update (weights and optimiser), `gradients` what has come when the optimiser's
step begins (with ZeRO 1 that includes DeepSpeed's bucket; ZeRO 3 keeps both all the time), `peak` the most that the
second update adds to the state at any moment. On a CPU every tensor that an operation returns is counted while it
lives, also what is offloaded; what kernels need inside is not. On CUDA the allocator counts. A ratio is predicted over
measured.
"""

from __future__ import annotations

import copy
import gc
import json
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from common import conditions, finish, parse
from learner_step import RECIPE, make_groups
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prism_ray.config.learner import LearnerSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.learner.engine import TrainEngine, init_process_group
from prism_ray.learner.policy import trainable_policy
from prism_ray.learner.step import update
from prism_ray.learner.work import prepare
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.planning.architecture import architecture_of
from prism_ray.planning.memory import Pass, activations, training_state
from prism_ray.testbed.words import vocabulary

SHAPE = TinyModelSettings(
    hidden_size=256, layers=6, mlp_size=768, heads=8, key_value_heads=4, vision_hidden_size=128, vision_mlp_size=256,
    vision_depth=4,
)  # fmt: skip
"""6.3 million parameters: large enough that nothing but the model counts, small enough for a minute."""
VISION = r"^model\.visual\."
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "zero1": {"zero_stage": 1},
    "zero2_bfloat16": {"zero_stage": 2, "precision": "bfloat16"},
    "zero3_bfloat16": {"zero_stage": 3, "precision": "bfloat16", "gradient_checkpointing": True},
    "offload": {"zero_stage": 2, "precision": "bfloat16", "offload": "optimizer", "gradient_checkpointing": True},
    "frozen_vision": {"freeze": [VISION]},
}
QUICK = ("plain", "checkpointing")


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, while they live, less those of the tensors that were
    there before and go. `highest` is their most."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.bytes = self.highest = 0
        for storage in storages():
            self._see(storage)
        self.bytes = self.highest = 0  # what was there before is where the count begins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.highest = max(self.highest, self.bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)


def storages() -> list[Any]:
    """The memory of all tensors that Python knows of, each once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type != "meta"]
    return list({t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


def held() -> int:
    """Its bytes."""
    return sum(storage.nbytes() for storage in storages())


class Watched:
    """A `TrainEngine` that notes how large its batches are and what is held when its step begins."""

    def __init__(self, engine: TrainEngine) -> None:
        self._engine, self.device = engine, engine.device
        self.tokens = self.visual = self.at_start = self.at_step = 0

    @property
    def equal_forwards(self) -> bool:
        return self._engine.equal_forwards

    def run(self, function: Any, batch: Any, **options: Any) -> Any:
        self.at_start = self.at_start or held()
        self.tokens = max(self.tokens, batch.computed_tokens)
        self.visual = max(self.visual, int(batch.grid_thw.prod(dim=1).sum()) // 4)
        return self._engine.run(function, batch, **options)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def over_ranks(self, values: Any, how: str) -> list[float]:
        return self._engine.over_ranks(values, how)

    def step(self, part: float = 1.0) -> Any:
        self.at_step = held()
        return self._engine.step(part)


def child(case: str, folder: str, file: str) -> None:
    """Run one case and write what was measured to `file`."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_process_group(0, 1, "127.0.0.1", port, 600)
    settings = LearnerSettings(lr=1e-6, **CASES[case])
    encoder = Encoder(folder, 100_000)
    work = prepare(make_groups(encoder, 4, 8, (60, 200), 96), encoder, DEFAULT_VIEWS)
    # A copy, as on a GPU: the loaded tensors themselves stay in memory behind the model, in the host's.
    loaded = trainable_policy(folder, settings)
    before = held()
    engine = TrainEngine(copy.deepcopy(loaded), settings)
    watched = Watched(engine)
    update(watched, work, RECIPE, 0, encoder.banned_ids)
    state = held() - before
    watched = Watched(engine)
    with Live() as live:
        update(watched, work, RECIPE, 1, encoder.banned_ids)
    measured = {
        "state": state, "gradients": watched.at_step - watched.at_start, "peak": live.highest, "tokens": watched.tokens,
        "visual": watched.visual,
    }  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held_now = torch.cuda.memory_allocated()
        update(watched, work, RECIPE, 2, encoder.banned_ids)
        measured["peak"] = torch.cuda.max_memory_allocated() - held_now
    Path(file).write_text(json.dumps(measured))


def predicted(case: str, folder: str, measured: dict[str, int]) -> dict[str, int]:
    """The same figures as the plan has them."""
    settings = LearnerSettings(lr=1e-6, **CASES[case])
    model = architecture_of(folder, "policy")
    trained = model.trained(settings.freeze)
    state = training_state(model.total, trained, settings, 1)
    run = Pass(
        measured["tokens"], measured["visual"], settings.precision, settings.gradient_checkpointing,
        trains_vision=VISION not in settings.freeze,
    )  # fmt: skip
    settled, coming = state.weights + state.optimiser + state.host, state.gradients + state.buffers
    if settings.zero_stage == 3:  # keeps its gradients' memory and its bucket from one update to the next
        settled, coming = settled + coming, 0
    # At its step ZeRO 2 has given the bucket back, but at its peak it was there.
    at_step = state.gradients if settings.zero_stage == 2 else coming
    return {"state": settled, "gradients": at_step, "peak": coming + activations(model, run)}


def main() -> None:
    arguments = parse(__doc__)
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder) / "policy", vocabulary(), SHAPE, seed=0)
        for case in QUICK if arguments.quick else CASES:
            file = Path(folder) / f"{case}.json"
            command = [sys.executable, __file__, "--child", case, str(Path(folder) / "policy"), str(file)]
            subprocess.run(command, check=True)
            measured = json.loads(file.read_text())
            expected = predicted(case, str(Path(folder) / "policy"), measured)
            for name, size in expected.items():
                if not size:
                    continue
                figures[f"{case}/{name}_mib"] = [round(size / 2**20, 1), round(measured[name] / 2**20, 1)]
                ratios[f"{case}/{name}"] = round(size / measured[name], 4)
            figures[f"{case}/tokens"] = measured["tokens"]
            print(case, json.dumps({k: v for k, v in figures.items() if k.startswith(f"{case}/")}), flush=True)
    finish("memory_model", ratios, figures, conditions())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
