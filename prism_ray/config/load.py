"""Settings from a YAML file and dotted overrides, with one clear sentence for everything that is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from prism_ray.config import yaml12
from prism_ray.config.base import Settings
from prism_ray.config.describe import default_of, fields, nested

S = TypeVar("S", bound=Settings)


class ConfigError(ValueError):
    """Something in a configuration is wrong; `problems` has one sentence for each thing, naming field and cure."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load_config(cls: type[S], files: Path | Sequence[Path] | None = None, overrides: Sequence[str] | None = None) -> S:
    """Build `cls` from YAML files and overrides like `learner.lr=3e-4`.

    Files are laid over each other: a later one wins setting by setting, and leaves alone what it does not name. The
    overrides win over all files. Raises ConfigError naming every problem at once, with the file it stands in.
    """
    files = [files] if isinstance(files, Path) else list(files or ())
    return _built(cls, [(str(file), _read(file)) for file in files], overrides or ())


def settings_of(cls: type[S], data: dict[str, Any]) -> S:
    """Build `cls` from plain data that stands in somebody else's file. Raises ConfigError naming every problem."""
    return _built(cls, [("args", data)], ())


def _built(cls: type[S], layers: list[tuple[str, dict[str, Any]]], overrides: Sequence[str]) -> S:
    data: dict[str, Any] = {}
    for _, layer in layers:
        data = _laid_over(cls, data, deepcopy(layer))
    typed: dict[str, Any] = {}
    problems = [p for o in overrides if (p := _override(typed, o) or _override(data, o))]
    if problems:
        raise ConfigError(problems)
    try:
        return cls.model_validate(_completed(cls, data, None))
    except ValidationError as error:
        found = [_located(cls, detail, layers, typed) for detail in error.errors(include_url=False)]
        raise ConfigError(list(dict.fromkeys(found))) from None


def to_yaml(settings: Settings) -> str:
    """Every setting as YAML which `load_config` reads back to an equal object."""
    return yaml12.dump(_plain(settings.model_dump()))


def changed(settings: Settings) -> dict[str, tuple[Any, Any]]:
    """What differs from the defaults of its class: dotted name -> (default, value)."""
    return _changed(settings, {key: default_of(info) for key, info in type(settings).model_fields.items()}, "")


def _changed(settings: Settings, defaults: dict[str, Any], prefix: str) -> dict[str, tuple[Any, Any]]:
    differing: dict[str, tuple[Any, Any]] = {}
    for key in type(settings).model_fields:
        value, default = getattr(settings, key), defaults[key]
        if isinstance(value, Settings) and type(value) is type(default):
            inner = {name: getattr(default, name) for name in type(default).model_fields}
            differing |= _changed(value, inner, f"{prefix}{key}.")
        elif value != default:
            differing[prefix + key] = (default, value)
    return differing


def _plain(value: Any) -> Any:
    """`value` in the types YAML knows. (Pydantic's own JSON mode would turn an infinite float into null.)"""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml12.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            [f"The config file {path} cannot be read ({error.strerror}); give an existing one."]
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"The config file {path} is not valid YAML; correct it there: {reason}"]) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise ConfigError([f"The config file {path} holds a {kind} at its top; write `name: value` lines instead."])
    return data


def _laid_over(cls: type[Settings], lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`, key by key within sections; what is not a section (a list, a table of weights) is whole."""
    merged = dict(lower)
    for key, value in upper.items():
        section = _section(cls, key)
        below = lower.get(key)
        if section is not None and isinstance(value, dict) and isinstance(below, dict):
            value = _laid_over(section, below, value)
        merged[key] = value
    return merged


def _section(cls: type[Settings], key: str) -> type[Settings] | None:
    """The settings class that the field `key` holds, if it holds one."""
    info = cls.model_fields.get(key)
    found = nested(info.annotation) if info else []
    return found[0] if len(found) == 1 else None


def _override(data: dict[str, Any], override: str) -> str:
    """Put one `dotted.name=value` into `data`. Returns what is wrong with it ("" if nothing)."""
    name, equals, text = override.partition("=")
    *parents, last = name.strip().split(".")
    if not equals or not all((*parents, last)):
        return f"The override {override!r} is not of the form name=value; write it like learner.lr=3e-4."
    try:
        value = yaml12.parse(text)
    except YAMLError as error:
        reason = " ".join(str(error).split())
        return f"The value of the override {override!r} is not valid YAML; quote or correct it: {reason}"
    for parent in parents:
        below = data.setdefault(parent, {})
        if below is None:
            below = data[parent] = {}
        if not isinstance(below, dict):
            return f"The override {override!r} goes into {parent}, which the config file sets to {below!r}; remove one."
        data = below
    data[last] = value
    return ""


def _completed(cls: type[Settings], data: dict[str, Any], default: Settings | None) -> dict[str, Any]:
    """`data` with what it leaves out of a section taken from the default its parent gives that section.

    Pydantic alone would take it from the section's class, so that naming one field would reset the others.
    """
    complete = {} if default is None else {key: getattr(default, key) for key in cls.model_fields}
    for key, value in data.items():
        section = _section(cls, key)
        if section is not None and isinstance(value, dict):
            inner = getattr(default, key) if default is not None else default_of(cls.model_fields[key])
            value = _completed(section, value, inner if type(inner) is section else None)
        complete[key] = value
    return complete


def _located(
    cls: type[Settings], error: ErrorDetails, layers: Sequence[tuple[str, dict[str, Any]]], typed: dict[str, Any]
) -> str:
    """The sentence for an error, after the names of the files that the setting comes from (none for an override)."""
    known = {field.name: field for field in fields(cls)}
    name = _dotted(known, error["loc"])
    parts = name.split(".") if name else []
    naming = [file for file, layer in layers if parts and _names(layer, parts)]
    if not (name in known and known[name].section):  # of a section several files may be to blame
        naming = [] if _names(typed, parts) else naming[-1:]
    return f"{', '.join(naming)}: {_sentence(known, name, error)}" if naming else _sentence(known, name, error)


def _names(data: Any, parts: Sequence[str]) -> bool:
    """Whether `data` says something of the setting of these parts, or of the section or list it is in as a whole."""
    for part in parts:
        if not isinstance(data, dict):
            return True
        if part not in data:
            return False
        data = data[part]
    return True


def _sentence(known: dict[str, Any], name: str, error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        nearest = " or ".join(_nearest(name, list(known)))
        cure = f"did you mean {nearest}?" if nearest else "--help lists every setting."
        return f"There is no setting {name}; {cure}"
    if error["type"] == "missing":
        return f"The setting {name} is missing; give it in the config file or as {name}=VALUE."
    message = error["msg"]
    if message.startswith("Input should be "):
        default = f" (default: {known[name].default})" if name in known and not known[name].section else ""
        should = message.removeprefix("Input should be ")
        return f"The setting {name} is {_quoted(error['input'])} but should be {should}{default}."
    where = f"The setting {name} cannot be used: " if name else ""
    return where + message.removeprefix("Value error, ").rstrip(".") + "."


def _dotted(known: dict[str, Any], location: tuple[int | str, ...]) -> str:
    """Pydantic's location as a dotted name; tags that it adds for the members of a union are left out."""
    name = ""
    for i, part in enumerate(location):
        longer = f"{name}.{part}" if name else str(part)
        is_section = name in known and known[name].section
        if is_section and longer not in known and i < len(location) - 1:
            continue
        name = longer
    return name


def _nearest(name: str, names: list[str]) -> list[str]:
    """The valid names most like a wrong one: a similar one beside it, else the same last part elsewhere, else any."""
    head, _, last = name.rpartition(".")
    siblings = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == head}
    if near := difflib.get_close_matches(last, list(siblings), 1):
        return [siblings[near[0]]]
    elsewhere = [n for n in names if n.rpartition(".")[2] == last]
    return elsewhere[:3] or difflib.get_close_matches(name, names, 1)


def _quoted(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
