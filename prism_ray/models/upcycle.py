"""Sparse upcycling: a dense Qwen3-VL becomes a Qwen3-VL-MoE in which every MLP is a mixture of copies of itself.

Attention, vision tower, norms and embeddings are copied; an expert is the dense MLP plus Gaussian noise; the router
starts near uniform. Without noise the mixture computes exactly what the dense model did, because
routing weights are normalised to one. Noise is drawn for each weight by its name, so that a model upcycled in memory
and one upcycled weight by weight from its files are the same.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from prism_ray.models.load import HEAD, check_policy, save_made

_DENSE = "Qwen3VLForConditionalGeneration"


@dataclass(frozen=True)
class Upcycling:
    """`experts` copies of every MLP, `top_k` of them active per token. `expert_noise` and `router_init` are standard
    deviations, both absolute. Deterministic in `seed`."""

    experts: int
    top_k: int
    expert_noise: float
    router_init: float
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k is {self.top_k} but must lie between 1 and experts = {self.experts}")

    def config(self, dense: Any) -> Qwen3VLMoeConfig:
        """The mixture's configuration: the dense one with every MLP sparse and no shared expert."""
        source = dense.to_dict()
        text = _without_identity(source["text_config"])
        text |= {
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": text["intermediate_size"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,  # transformers always normalises; vLLM asks for the key
        }
        top = {k: v for k, v in _without_identity(source).items() if k not in ("text_config", "vision_config")}
        config = Qwen3VLMoeConfig(text_config=text, vision_config=_without_identity(source["vision_config"]), **top)
        config._attn_implementation = dense._attn_implementation
        return config

    def made_of(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Every weight of the mixture, with the dense model's weights that `make` makes it of."""
        sources: dict[str, tuple[str, ...]] = {}
        for name in names:
            layer, mlp, projection = name.partition(".mlp.")
            if ".language_model.layers." not in name or not mlp:
                sources[name] = (name,)
            elif projection == "down_proj.weight":
                sources[f"{layer}.mlp.experts.down_proj"] = (name,)
            elif projection == "gate_proj.weight":
                sources[f"{layer}.mlp.experts.gate_up_proj"] = (name, f"{layer}.mlp.up_proj.weight")
                sources[f"{layer}.mlp.gate.weight"] = (name,)  # only its width and precision
        return sources

    def make(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """This weight of the mixture, in memory of its own."""
        if name.endswith(".mlp.gate.weight"):
            shape = self.experts, parts[0].shape[1]
            return (torch.randn(shape, generator=self._generator(name)) * self.router_init).to(parts[0])
        if ".mlp.experts." not in name:
            return parts[0].detach().clone()
        weight = torch.cat(list(parts)).detach()
        experts = weight.expand(self.experts, *weight.shape).clone()
        generator = self._generator(name)
        for expert in experts if self.expert_noise else ():  # one at a time: the noise is a copy, too
            expert += self.expert_noise * torch.randn(weight.shape, generator=generator).to(weight)
        return experts

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest))


def upcycle(dense: Qwen3VLForConditionalGeneration, upcycling: Upcycling) -> Qwen3VLMoeForConditionalGeneration:
    """The mixture of `dense`, in its precision; both exist then. Raises ValueError if it is no dense Qwen3-VL."""
    _require_dense(type(dense).__name__)
    with torch.device("meta"):
        moe = Qwen3VLMoeForConditionalGeneration(upcycling.config(dense.config))
    state = dense.state_dict()
    made = {n: upcycling.make(n, [state[s] for s in sources]) for n, sources in upcycling.made_of(state).items()}
    moe.load_state_dict(made, strict=True, assign=True)
    _copy_buffers(dense, moe)
    moe.tie_weights()
    moe.generation_config = copy.deepcopy(dense.generation_config)
    return moe.train(dense.training)


def upcycle_folder(
    source: str | Path,
    target: str | Path,
    upcycling: Upcycling,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str | None = None,
) -> None:
    """Write the mixture of the dense Qwen3-VL in the folder `source` as the folder `target`, weight by weight.

    Neither model is ever in memory: only one file's weights, of at most `shard_size` as `save_made` has it, with the
    weight that is being made. The outcome is that of `upcycle` on the model loaded in `dtype`, to the bit. Raises
    ValueError if `source` is no dense Qwen3-VL, or lacks weights.
    """
    check_policy(source)
    dense: Any = AutoConfig.from_pretrained(source)
    _require_dense(dense.architectures[0])
    config = upcycling.config(dense)
    with torch.device("meta"):
        moe: Any = Qwen3VLMoeForConditionalGeneration(config)
    shapes = moe.to(dtype).state_dict()
    reader = _reader(Path(source))
    sources = upcycling.made_of(reader)
    wanted = [n for n in shapes if not (n == HEAD and config.tie_word_embeddings)]
    if missing := [s for n in wanted for s in sources.get(n, (n,)) if s not in reader]:
        raise ValueError(f"{source}: the weight {missing[0]} is missing; the checkpoint is incomplete, copy it again")

    def make(name: str) -> Tensor:
        return upcycling.make(name, [reader[s]().to(dtype) for s in sources[name]])

    config.architectures = [Qwen3VLMoeForConditionalGeneration.__name__]
    save_made(shapes, make, target, source, config, shard_size)


def _require_dense(architecture: str) -> None:
    if architecture != _DENSE:
        raise ValueError(f"upcycling starts from a dense Qwen3-VL, not from a {architecture}")


def _reader(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Every weight in the folder's files, as a function that reads it; files are mapped into memory, not held there."""
    reader: dict[str, Callable[[], Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        reader |= {name: lambda file=file, name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return reader


def _copy_buffers(dense: PreTrainedModel, moe: PreTrainedModel) -> None:
    """Non-persistent buffers (rotary frequencies) are in no state dict; the two models' agree by construction."""
    for name, buffer in dense.named_buffers():
        owner, _, leaf = name.rpartition(".")
        moe.get_submodule(owner).register_buffer(leaf, buffer.detach().clone(), persistent=False)


def _without_identity(config: dict) -> dict:
    drop = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype")
    return {k: v for k, v in config.items() if k not in drop}
