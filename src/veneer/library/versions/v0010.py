"""The first revision of the index, which never runs.

`library.migrate` creates its tables.

Every later revision is a script of its own, and every database from this revision on stays readable."""

revision = "0010"
down_revision = None


def upgrade() -> None:
    raise NotImplementedError
