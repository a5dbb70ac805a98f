"""The index's first tables, which its first versions made by themselves and called version 1."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing is before it."""
