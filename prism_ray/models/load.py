"""Policies from and to Hugging Face folders, dense and mixture-of-experts.

Files hold the experts of a mixture transposed to how transformers keeps them in memory; transformers (by their shape)
and vLLM (always) transpose them back. transformers' own `save_pretrained` writes them as they lie in memory, which
vLLM cannot read.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from prism_ray.models.attention import IMPLEMENTATION

ARCHITECTURES = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")

HEAD = "lm_head.weight"
"""The output layer; a checkpoint whose output layer is tied to the embedding does not hold it."""

SHARD_SIZE = "5GB"
"""Largest weight file; a larger model becomes several, with an index."""


def load_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The Qwen3-VL or Qwen3-VL-MoE model in a Hugging Face folder, on the CPU, in train mode.

    Its text attention is `models.attention`'s, which takes padded and packed batches; the vision tower's is SDPA.
    """
    check_policy(folder)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=IMPLEMENTATION).train()


def copy_policy(source: str | Path, folder: str | Path) -> None:
    """A copy of the Hugging Face folder `source`, its weights as they are."""
    check_policy(source)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _forget_weights(folder)
    for file in Path(source).iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)


def save_policy(model: Any, folder: str | Path, like: str | Path) -> None:
    """Write the model as a Hugging Face folder; tokenizer, processor and templates are copied from `like`."""
    model.config.architectures = [type(model).__name__]
    _write(model.state_dict(), Path(folder), Path(like), model.config)


def save_weights(weights: Mapping[str, Any], folder: str | Path, like: str | Path) -> None:
    """Write weights (tensors or arrays by the model's own parameter names) as a Hugging Face folder like `like`.

    Every weight keeps its precision, and the configuration names it: bfloat16 stays bfloat16.
    """
    tensors = {name: torch.as_tensor(value) for name, value in weights.items()}
    _write(tensors, Path(folder), Path(like), AutoConfig.from_pretrained(like))


def save_made(
    shapes: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    folder: str | Path,
    like: str | Path,
    config: Any,
    shard_size: int | str | None = None,
) -> None:
    """Write a Hugging Face folder of weights that are made one by one, when their file is written.

    `shapes` has every weight by name, on the meta device and in the form and precision that `make(name)` gives; files
    hold at most `shard_size` bytes (also as "5GB"; unset: `SHARD_SIZE`), a single larger weight has one of its own.
    """
    _write(shapes, Path(folder), Path(like), config, make, shard_size)


def as_filed(name: str, weight: Any) -> Any:
    """A weight (tensor or array) as files hold it: a view of it, transposed if it is a mixture's experts."""
    return weight.swapaxes(1, 2) if name.endswith(_EXPERTS) else weight


def filed_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that `as_filed` gives a weight of this shape."""
    return (shape[0], shape[2], shape[1]) if name.endswith(_EXPERTS) else tuple(shape)


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


def _write(
    weights: Mapping[str, Tensor],
    folder: Path,
    like: Path,
    config: Any,
    make: Callable[[str], Tensor] | None = None,
    shard_size: int | str | None = None,
) -> None:
    """`weights`, or what `make` makes in their place; of that never more than one file's."""
    tied = config.tie_word_embeddings
    files = {n: as_filed(n, w.detach()) for n, w in weights.items() if not (tied and n == HEAD)}
    _check_experts(files)
    folder.mkdir(parents=True, exist_ok=True)
    for file in like.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
            shutil.copy(file, folder / file.name)
    _of_precision(config, files.values()).save_pretrained(folder)
    _forget_weights(folder)
    split = split_torch_state_dict_into_shards(
        files, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size or SHARD_SIZE
    )
    for name, members in split.filename_to_tensors.items():
        shard = {m: (files[m] if make is None else as_filed(m, make(m))).cpu().contiguous() for m in members}
        save_file(shard, folder / name, metadata={"format": "pt"})
        del shard  # or it would still be there while the next file's weights are made
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _forget_weights(folder: Path) -> None:
    """A shard that stayed behind would be read as a part of the model that is written now."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()


def _check_experts(weights: Mapping[str, Tensor]) -> None:
    """transformers goes by the shape when it reads, so square experts have no form that both it and vLLM understand."""
    for name, weight in weights.items():
        if name.endswith(_EXPERTS) and weight.shape[1] == weight.shape[2]:
            raise ValueError(f"{name}: square experts cannot be saved unambiguously; change moe_intermediate_size")


def _of_precision(config: Any, weights: Iterable[Tensor]) -> Any:
    """A copy of the configuration that names the precision most of the weights have.

    Loaders that are not told another one go by it, and would cast the weights to what `like` once was.
    """
    config = copy.deepcopy(config)
    numbers: Counter[torch.dtype] = Counter()
    for weight in weights:
        numbers[weight.dtype] += weight.numel()
    for part in (config, config.text_config, config.vision_config):
        part.dtype = numbers.most_common(1)[0][0]
    return config
