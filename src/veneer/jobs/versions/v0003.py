"""Add the budget that Tinker clients have reserved, by tenant."""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Column

from veneer.library.database import Key

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "job_reservations",
        Column("tenant", Key(), primary_key=True),
        Column("month", Key(), primary_key=True),
        Column("spent", BigInteger, nullable=False),
    )
