"""Shadows of pictures: how far apart the pixels are. Versions that had it called it version 1 as well."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("tenant_shadows", Column("distance", Float))
