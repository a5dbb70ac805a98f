"""What sections of a configuration are made of: strict, frozen models, whose fields say what they mean and why."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, doc: str, why: str = "", **limits: Any) -> Any:
    """A field: default, one line of meaning, and the reason for the default where it is a choice."""
    return Field(default, description=doc, json_schema_extra={"why": why}, **limits)


BASE_MODEL = "base"
"""The name of a teacher or a judge that means the base with nothing on it."""
HOW_ASKED = ("key", "timeout", "patience", "at_once")
"""Keys of whoever asks a model on a server: how it is asked, and not what."""
SOURCES = ("hub:", "reasoning-gym:", "verifiers:")
"""What the name of rows begins with that are no file."""


class Section(BaseModel):
    """One section of a configuration: frozen, with no unknown keys and no numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False)


def how_asked(section: Section) -> dict[str, Any]:
    """Return the values of `HOW_ASKED` in the section of a model on a server."""
    return {key: getattr(section, key) for key in HOW_ASKED}


def changed_keys(section: Section) -> list[str]:
    """The keys that are not at their default."""
    return [key for key, f in type(section).model_fields.items() if getattr(section, key) != f.default]
