"""What training costs a tenant, and how much of it there may be."""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Column

from veneer.library.database import Key

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "tenant_training",
        Column("tenant", Key(), primary_key=True),
        Column("price", BigInteger, nullable=False),
        Column("budget", BigInteger),
        Column("jobs", BigInteger),
    )
