"""Which model a discriminator is made from: the policy itself, or a smaller one that reads and writes alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from prism_ray.models.load import ARCHITECTURES, check_policy

_DENSE = ARCHITECTURES[0]


def judge_start(policy: str | Path, own: str | Path | None) -> Path:
    """The folder of the model that the discriminator of `policy` is made from: `own` (`discriminator.policy`) if given.

    Raises ValueError or FileNotFoundError, naming `own`, unless it is a dense Qwen3-VL that gives every text and image
    the tokens that the policy gives it: what is judged would else not be what was sampled.
    """
    if own is None:
        return Path(policy)
    check_policy(own)
    found = json.loads((Path(own) / "config.json").read_text())["architectures"][0]
    if found != _DENSE:
        raise ValueError(f"discriminator.policy: {own} is a {found}; give a dense model ({_DENSE})")
    ours, theirs = _reading(policy), _reading(own)
    if differing := [name for name, value in ours.items() if value != theirs[name]]:
        what = " and ".join(differing)
        raise ValueError(
            f"discriminator.policy: {own} has another {what} than the policy {policy}; give a model of the same family"
        )
    return Path(own)


def _reading(folder: str | Path) -> dict[str, Any]:
    """What decides the tokens of a prompt and of a response, by what a person would call it."""
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer: Any = processor.tokenizer
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    cut = {name: getattr(processor.image_processor, name) for name in ("patch_size", "merge_size", "size")}
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {
        "tokenizer": (tokenizer.get_vocab(), model.get("merges"), tokenizer.eos_token_id),
        "chat template": template,
        "image processor": str(cut),
    }
