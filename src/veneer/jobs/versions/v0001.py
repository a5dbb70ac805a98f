"""The first revision of the jobs' tables; `veneer.jobs.tables` defines them."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Do nothing, because this is the first revision."""
