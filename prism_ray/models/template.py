"""The system turn of a checkpoint: written by its chat template wherever a conversation brings none.

Other programs' runners mostly send a question alone. A policy that was trained under a system prompt, which asks for
the response format, would then be evaluated on what it has never seen.
"""

from __future__ import annotations

import json
from pathlib import Path

_BEGIN, _END = "{#- system turn of this checkpoint -#}", "{#- end of system turn -#}"
_PLACES = ("chat_template.json", "tokenizer_config.json")
"""Where older checkpoints have their template, as JSON; `chat_template.jinja` holds nothing else."""


def with_system_turn(template: str, system: str) -> str:
    """The chat template, which lets every conversation without a system turn begin with this one.

    A system turn that an earlier call put there is replaced; an empty `system` takes it away.
    """
    if template.startswith(_BEGIN):
        template = template.partition(_END)[2]
    if not system:
        return template
    turn = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
    condition = "{%- if not messages or messages[0]['role'] != 'system' -%}"
    return f"{_BEGIN}{condition}{{%- set messages = {turn} + messages -%}}{{%- endif -%}}{_END}{template}"


def set_system_turn(folder: str | Path, system: str) -> None:
    """Give the chat templates of a Hugging Face folder this system turn; FileNotFoundError where it has none."""
    folder, found = Path(folder), False
    plain = folder / "chat_template.jinja"
    if plain.exists():
        found = True
        plain.write_text(with_system_turn(plain.read_text(encoding="utf-8"), system), encoding="utf-8")
    for path in (folder / name for name in _PLACES):
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if isinstance(held.get("chat_template"), str):
            found = True
            held["chat_template"] = with_system_turn(held["chat_template"], system)
            path.write_text(json.dumps(held, ensure_ascii=False, indent=2), encoding="utf-8")
    if not found:
        raise FileNotFoundError(f"{folder}: no chat template to put system_prompt into; add a chat_template.jinja")
