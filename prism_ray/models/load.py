"""Policies from and to Hugging Face folders, dense and mixture-of-experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

ARCHITECTURES = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
_TIED = "lm_head.weight"


def load_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The Qwen3-VL or Qwen3-VL-MoE model in a Hugging Face folder, on the CPU, with SDPA attention, in train mode."""
    check_policy(folder)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").train()


def save_policy(model: Any, folder: str | Path, like: str | Path) -> None:
    """Write the model as a Hugging Face folder; tokenizer, processor and templates are copied from `like`."""
    model.config.architectures = [type(model).__name__]
    _write(model.state_dict(), Path(folder), Path(like), model.config)


def save_weights(weights: Mapping[str, Any], folder: str | Path, like: str | Path) -> None:
    """Write weights (tensors or arrays by the model's own parameter names) as a Hugging Face folder like `like`."""
    tensors = {name: torch.as_tensor(value) for name, value in weights.items()}
    _write(tensors, Path(folder), Path(like), AutoConfig.from_pretrained(like))


def check_policy(folder: str | Path) -> None:
    """Raise FileNotFoundError or ValueError, naming the folder, unless it is a complete Qwen3-VL checkpoint."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; give the folder of a Hugging Face Qwen3-VL checkpoint")
    found = json.loads((folder / "config.json").read_text()).get("architectures") or ["none"]
    if found[0] not in ARCHITECTURES:
        raise ValueError(f"{folder}: architecture {found[0]} is not supported; use one of {', '.join(ARCHITECTURES)}")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no *.safetensors file; the checkpoint is incomplete, copy it again")


def _write(weights: Mapping[str, Tensor], folder: Path, like: Path, config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in like.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
            shutil.copy(file, folder / file.name)
    config.save_pretrained(folder)
    tied = config.tie_word_embeddings
    files = {n: _as_filed(n, w) for n, w in weights.items() if not (tied and n == _TIED)}
    split = split_torch_state_dict_into_shards(files, filename_pattern="model{suffix}.safetensors")
    for name, members in split.filename_to_tensors.items():
        save_file({member: files[member] for member in members}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _as_filed(name: str, weight: Tensor) -> Tensor:
    """A weight as published files hold it.

    Experts are transposed there, and both transformers and vLLM expect that; transformers' own `save_pretrained`
    writes them as they lie in memory, which vLLM cannot read. transformers goes by the shape when it
    reads, so square experts cannot be filed in a form that both understand.
    """
    weight = weight.detach().cpu()
    if not name.endswith(_EXPERTS):
        return weight.contiguous()
    if weight.shape[1] == weight.shape[2]:
        raise ValueError(f"{name}: square experts cannot be saved unambiguously; change moe_intermediate_size")
    return weight.transpose(1, 2).contiguous()
