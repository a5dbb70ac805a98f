"""Metrics of jobs that ended long ago may be removed."""

from __future__ import annotations

from alembic import op

from veneer.jobs.tables import let_old_metrics_go

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    let_old_metrics_go(op.get_bind())
