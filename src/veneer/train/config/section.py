"""The base class of configuration sections: strict, frozen models.

Each field has a description and the reason for its default.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, doc: str, why: str = "", **limits: Any) -> Any:
    """Return a field with a default, a description, and the reason for the default."""
    return Field(default, description=doc, json_schema_extra={"why": why}, **limits)


BASE_MODEL = "base"
"""Name that selects the base without adapters as a teacher or judge."""
SERVER_KEYS = ("key", "timeout", "patience", "at_once")
"""Keys for requests to a model on a server."""
SOURCES = ("hub:", "reasoning-gym:")
"""Prefixes of row sources that are not files."""


class Section(BaseModel):
    """A section of a configuration. Frozen; rejects unknown keys and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False)


def changed_keys(section: Section) -> list[str]:
    """Return the keys with values that differ from the default."""
    return [key for key, f in type(section).model_fields.items() if getattr(section, key) != f.default]
