"""What every settings class shares: frozen, unknown keys refused, each field's docstring is its `--help`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all configuration classes; write a docstring with its reason under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
