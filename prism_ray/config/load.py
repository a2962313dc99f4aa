"""Settings from a YAML file and dotted overrides, with one clear sentence for everything that is wrong."""

from __future__ import annotations

import difflib
import json
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


def load_config(cls: type[S], path: Path | None = None, overrides: list[str] | None = None) -> S:
    """Build `cls` from a YAML file (None: its defaults) and overrides like `learner.lr=3e-4`, which win.

    Raises ConfigError naming every problem at once.
    """
    data = _read(path) if path is not None else {}
    problems = [p for override in overrides or () if (p := _override(data, override))]
    if problems:
        raise ConfigError(problems)
    try:
        return cls.model_validate(_completed(cls, data, None))
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError(list(dict.fromkeys(_sentence(cls, detail) for detail in details))) from None


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
        info = cls.model_fields.get(key)
        section = nested(info.annotation) if info else []
        if info and len(section) == 1 and isinstance(value, dict):
            inner = getattr(default, key) if default is not None else default_of(info)
            value = _completed(section[0], value, inner if type(inner) is section[0] else None)
        complete[key] = value
    return complete


def _sentence(cls: type[Settings], error: ErrorDetails) -> str:
    known = {field.name: field for field in fields(cls)}
    name = _dotted(known, error["loc"])
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
