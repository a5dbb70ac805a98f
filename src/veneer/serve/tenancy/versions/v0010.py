"""First revision of the tenants' database. `library.migrate` creates its tables, so this script never runs.

Later revisions have their own scripts, and every database from this revision on stays readable.
"""

revision = "0010"
down_revision = None


def upgrade() -> None:
    raise NotImplementedError
