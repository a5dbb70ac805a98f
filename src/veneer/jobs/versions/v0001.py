"""The tables of jobs, which a new database gets from `veneer.jobs.tables`."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Do nothing: this is the first revision."""
