"""Revision 0010, the first revision of the index.

`library.migrate` creates this revision; the script never runs. Every later revision has its own script, so
every database from this revision on can be migrated."""

revision = "0010"
down_revision = None


def upgrade() -> None:
    raise NotImplementedError
