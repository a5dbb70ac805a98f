"""Alembic's environment, in which `library.migrate` runs Alembic's commands.

The commands use the connection and the transaction of `library.migrate`."""

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
except (AttributeError, NameError):  # this module was imported outside Alembic: there is no command to run
    pass
else:
    _run()
