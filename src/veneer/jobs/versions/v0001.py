"""The first revision of the jobs' tables, which `veneer.jobs.tables` defines."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Do nothing, because this is the first revision."""
