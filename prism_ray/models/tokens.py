"""Whose the token ids are that travel with a prompt.

They are computed once, far from where they are read. Meanwhile a stage may have another tokenizer or chat template, and
a judge may be shown another text: what the ids were made of travels with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_FILES = ("tokenizer*", "vocab*", "merges*", "*tokens*.json", "*chat_template*", "*processor_config.json")
"""What a Hugging Face folder writes prompts with; `models.load` copies these files byte by byte."""


def writer_of(folder: str | Path) -> str:
    """A digest of a checkpoint's tokenizer, processor and chat template: equal ones make equal ids of a text. ""
    where a folder has none of them, but weights alone."""
    folder, digest = Path(folder), hashlib.blake2b(digest_size=16)
    if not (files := sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()})):
        return ""
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def made_of(writer: str, messages: Sequence[Mapping[str, str]]) -> str:
    """`Prompt.tokens_of` of these messages in the tokens of this writer."""
    said = json.dumps([writer, [[turn["role"], turn["content"]] for turn in messages]])
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
