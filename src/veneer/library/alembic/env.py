"""Alembic's environment: runs commands of `library.migrate` on its connection.

In the transaction that `library.migrate` has begun."""

from __future__ import annotations

from alembic import context


def _run() -> None:
    attributes = context.config.attributes
    context.configure(
        connection=attributes["connection"], version_table=attributes["version_table"], transaction_per_migration=False
    )
    context.run_migrations()


try:
    context.config  # noqa: B018
except (AttributeError, NameError):  # imported by itself: no command runs
    pass
else:
    _run()
