"""The first revision of the index, which never runs; `library.migrate` makes it.

Every later revision has its own script, and every database from this revision on can be migrated."""

revision = "0010"
down_revision = None


def upgrade() -> None:
    raise NotImplementedError
