"""First revision of the tenants' database. `library.migrate` creates its tables, so this script never runs.

Each later revision has its own script. Databases created at this revision or later stay readable.
"""

revision = "0010"
down_revision = None


def upgrade() -> None:
    raise NotImplementedError
