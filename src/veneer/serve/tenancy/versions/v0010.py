"""The first revision of the tenants' database: `library.migrate` creates its tables, so this script never runs.

Every later revision is a script of its own, and every database from this revision on stays readable."""

revision = "0010"
down_revision = None


def upgrade() -> None:
    raise NotImplementedError
