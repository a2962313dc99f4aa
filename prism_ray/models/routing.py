"""Telling the routers of a mixture of experts something that stands in no hidden state.

What is given is added to the router's input alone: attention and experts compute with the hidden state as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn

ROUTER_SHIFT = "router_shift_ND"
"""Name of the argument by which every decoder layer gets what its router is to add, [tokens, hidden size]."""


def make_routers_shiftable(language_model: Any) -> None:
    """Let every router of a Qwen3-VL-MoE text model add what the model is called with as `ROUTER_SHIFT`, if it is.

    It comes as an argument of the layer, so that gradient checkpointing, which computes a layer again, has it too.
    """
    for layer in language_model.layers:
        layer.register_forward_pre_hook(_take, with_kwargs=True)
        layer.mlp.gate.register_forward_pre_hook(_add)
        layer.mlp.gate.shift_ND = None


def _take(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    layer.mlp.gate.shift_ND = kwargs.get(ROUTER_SHIFT)
    return args, {name: value for name, value in kwargs.items() if name != ROUTER_SHIFT}


def _add(gate: nn.Module, args: tuple) -> tuple | None:
    shift_ND: Any = gate.shift_ND
    if shift_ND is None:
        return None
    gate.shift_ND = None  # it holds a graph, which must not outlive its batch  # pyright: ignore[reportArgumentType]
    return (args[0] + shift_ND, *args[1:])
