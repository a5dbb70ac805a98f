"""Answers that tenants let be kept, and what is said of them."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Boolean, Column, Float, Integer, Text

from veneer.library.database import Key

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "tenant_feedback_terms",
        Column("tenant", Key(), primary_key=True),
        Column("days", Float, nullable=False),
        Column("names", Text, nullable=False),
    )
    op.create_table(
        "tenant_answers",
        Column("tenant", Key(), primary_key=True),
        Column("id", Key(), primary_key=True),
        Column("at", Float, nullable=False),
        Column("expires", Float, nullable=False),
        Column("whose", Key(), nullable=False),
        Column("name", Key(), nullable=False),
        Column("adapters", Text, nullable=False),
        Column("asked", Text, nullable=False),
        Column("choices", Text, nullable=False),
    )
    op.create_index("ix_tenant_answers_expires", "tenant_answers", ["expires"])
    op.create_index("tenant_answers_whose", "tenant_answers", ["tenant", "whose"])
    op.create_table(
        "tenant_feedback",
        Column("tenant", Key(), primary_key=True),
        Column("answer", Key(), primary_key=True),
        Column("choice", Integer, primary_key=True, autoincrement=False),
        Column("at", Float, nullable=False),
        Column("up", Boolean),
        Column("corrected", Text),
        Column("rejected", Text),
    )
    op.create_table(
        "tenant_forgotten",
        Column("tenant", Key(), primary_key=True),
        Column("what", Key(), primary_key=True),
        Column("at", Float, nullable=False),
    )
