"""What a settings class consists of: every dotted name with its type, default and docstring, for people and tools."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from prism_ray.config.base import Settings

REQUIRED = "(required)"
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Field:
    """One field by its full dotted name; `section` is whether it only holds further settings, `item` what it is a list
    of, if of settings."""

    name: str
    type: str
    default: Any
    doc: str
    section: bool
    item: type[Settings] | None = None


def nested(annotation: Any) -> list[type[Settings]]:
    """The settings classes a field of this annotation may hold directly (`X`, `X | None`, `X | Y`)."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [c for argument in typing.get_args(annotation) for c in nested(argument)]
    return []


def type_name(annotation: Any) -> str:
    """A type as a person writes it: `float`, `str | None`, `'a' | 'b'`, `tuple[int, ...]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Ellipsis:
        return "..."
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(a) for a in arguments)}]"
    return getattr(annotation, "__name__", str(annotation))


def default_of(field: FieldInfo) -> Any:
    """A field's default, or REQUIRED."""
    default = field.get_default(call_default_factory=True, validated_data={})
    return REQUIRED if default is PydanticUndefined else default


def fields(cls: type[Settings], prefix: str = "", within: Any = None) -> Iterator[Field]:
    """Every field of `cls` and of the settings inside it, in order, sections before their content.

    `within` is what the section is where nobody sets it: its content, if of this class, decides the defaults.
    """
    for key, info in cls.model_fields.items():
        inner = nested(info.annotation)
        doc = " ".join((info.description or "").split())
        default = getattr(within, key) if type(within) is cls else default_of(info)
        yield Field(prefix + key, _full_type(info), default, doc, bool(inner), _item(info.annotation))
        for inner_cls in inner:
            yield from fields(inner_cls, f"{prefix}{key}.", default)


def describe(cls: type[Settings]) -> str:
    """The help text: every dotted field with its type, default and docstring."""
    lines = []
    for field in fields(cls):
        if field.section:
            lines.append(f"\n{field.name}: {field.doc}")
            if field.default is None:
                lines.append("    unset by default; set it as a whole or field by field")
        else:
            lines.append(f"  {field.name}: {field.type} = {_shown(field.default)}")
            lines += _wrapped(field.doc, "      ")
            for inner in fields(field.item) if field.item else ():
                lines.append(f"      - {inner.name}: {inner.type} = {_shown(inner.default)}")
                lines += _wrapped(inner.doc, "          ")
    return "\n".join(lines).strip("\n")


def _item(annotation: Any) -> type[Settings] | None:
    """The settings class that a list or tuple of this annotation holds."""
    if typing.get_origin(annotation) not in (list, tuple):
        return None
    return next(iter(nested(typing.get_args(annotation)[0])), None)


def _wrapped(doc: str, indent: str) -> list[str]:
    return textwrap.wrap(doc, 110, initial_indent=indent, subsequent_indent=indent)


def _shown(default: Any) -> str:
    if isinstance(default, tuple) and default and isinstance(default[0], Settings):
        return ", ".join(str(item) for item in default)
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "''" if default == "" else str(default)


def _full_type(info: FieldInfo) -> str:
    bounds = [f"{sign} {getattr(m, key)}" for m in info.metadata for key, sign in _BOUNDS.items() if hasattr(m, key)]
    return " ".join([type_name(info.annotation), ", ".join(bounds)]).strip()
