"""Adds roles of keys, and indexes for usage of one tenant and of whole requests.

Servers of revision 0010 can continue during the migration and after it: they insert keys without a role, and
name all columns that they read. Usage waits in their journals while the indexes are built.
"""

from alembic import op
from sqlalchemy import Column, Text

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("tenant_keys", Column("role", Text, nullable=False, server_default="trainer"))
    op.create_index("tenant_sums_tenant", "tenant_sums", ["tenant", "adapter", "day"])
    op.create_index("tenant_sums_adapter", "tenant_sums", ["adapter", "day"])
