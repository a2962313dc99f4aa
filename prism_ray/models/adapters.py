"""What of a model trains: parameters frozen by pattern, and low-rank adapters (LoRA, arXiv 2106.09685) by peft.

Adapters are put into the model in place: its own sub-modules stay where the forward pass looks for them. Its weights
are still known by their original names, with the adapters merged where somebody asks for them.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prism_ray.config.learner import LoraSettings

_ADAPTER = "default"


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the training of every parameter whose name a regular expression finds (`^model\\.visual\\.`).

    Raises ValueError for a pattern that finds none, and where nothing would be left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in parameters if re.search(pattern, name)]
        if not found:
            raise ValueError(f"freeze: {pattern!r} matches no parameter{_near(pattern, parameters)}")
        for name in found:
            parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze: {list(patterns)} leave no parameter to train; remove a pattern")


def add_lora(model: nn.Module, settings: LoraSettings, seed: int = 0) -> None:
    """Give the targeted linear layers adapters, in their own precision, and freeze everything else.

    A layer whose weight is frozen already gets none, nor does one whose weight is tied to another module's: merged,
    its adapter would change that one too. The adapters depend on `seed` and the layers only and change nothing yet
    (their second factor is 0); torch's global random state is left as it was. Raises ValueError for a target that no
    such layer has.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad and uses[id(module.weight)] == 1:
            kinds[name.rpartition(".")[2]].append(name)
    for target in settings.targets:
        if target not in kinds:
            known = ", ".join(sorted(kinds)) or "none"
            raise ValueError(f"lora.targets: no trainable linear layer is called {target!r}; there are: {known}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[name for target in settings.targets for name in kinds[target]],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _ADAPTER)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While this lasts the model computes what it did before `add_lora`; without adapters it changes nothing."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class OriginalWeight:
    """A parameter of the model as it was before `add_lora`, and the adapter on it, if any."""

    name: str
    base: nn.Parameter
    down: nn.Parameter | None = None
    up: nn.Parameter | None = None
    scaling: float = 0.0

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameters that `merged` reads."""
        return [part for part in (self.base, self.down, self.up) if part is not None]

    def merged(self) -> Tensor:
        """The weight in its own precision, the adapter added in float32: base + scaling · up @ down.

        Without an adapter it is the parameter's own memory.
        """
        if self.down is None or self.up is None:
            return self.base.detach()
        change = self.scaling * (self.up.detach().float() @ self.down.detach().float())
        return (self.base.detach().float() + change).to(self.base.dtype)


def original_weights(model: nn.Module) -> Iterator[OriginalWeight]:
    """Every parameter under the name it had before `add_lora`, in the order of the model's modules."""
    adapted: dict[int, tuple[Any, Any, float]] = {}
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        down, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        adapted[id(layer.base_layer.weight)] = (down.weight, up.weight, layer.scaling[_ADAPTER])
    added = {id(factor) for down, up, _ in adapted.values() for factor in (down, up)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in added:
            adapter = adapted.get(id(parameter), (None, None, 0.0))
            yield OriginalWeight(name.replace(".base_layer.", "."), parameter, *adapter)


def _near(pattern: str, names: Iterable[str]) -> str:
    """A hint: parameters, or modules that hold them, whose names are like the pattern without its signs."""
    known = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    near = difflib.get_close_matches(re.sub(r"[\\^$()*+?]", "", pattern).strip("."), sorted(known), 3, 0.4)
    return f"; there are {', '.join(near)}" if near else ""
