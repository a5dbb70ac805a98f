"""The base of configuration sections: strict, frozen models.

Their fields have a description and the reason for the default.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, doc: str, why: str = "", **limits: Any) -> Any:
    """Return a field: default, description, and the reason for the default."""
    return Field(default, description=doc, json_schema_extra={"why": why}, **limits)


BASE_MODEL = "base"
"""The name of a teacher or a judge for the base without adapters."""
SERVER_KEYS = ("key", "timeout", "patience", "at_once")
"""Keys that set how a model on a server is asked."""
SOURCES = ("hub:", "reasoning-gym:")
"""Prefixes of row sources that are not files."""


class Section(BaseModel):
    """A section of a configuration: frozen, no unknown keys, only finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False)


def changed_keys(section: Section) -> list[str]:
    """Return the keys whose values differ from the default."""
    return [key for key, f in type(section).model_fields.items() if getattr(section, key) != f.default]
