import importlib
import pkgutil

import pytest

import prism_ray.config
from prism_ray.config.base import Settings


def settings_classes() -> list[type[Settings]]:
    for module in pkgutil.iter_modules(prism_ray.config.__path__, "prism_ray.config."):
        importlib.import_module(module.name)
    found, todo = [], [Settings]
    while todo:
        children = [c for c in todo.pop().__subclasses__() if c.__module__.startswith("prism_ray.config.")]
        found += children
        todo += children
    return found


@pytest.mark.parametrize("cls", settings_classes(), ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_class_and_every_field_have_a_docstring(cls):
    assert cls.__doc__, f"{cls.__name__} needs a docstring"
    without = [name for name, field in cls.model_fields.items() if not (field.description or "").strip()]
    assert not without, f"write a docstring with its reason under {', '.join(without)}"
