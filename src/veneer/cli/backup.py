"""`veneer backup …`: save and restore the library, the jobs and the tenants' database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.options import AsJson, JobsLibrary, LibraryIndex, TenantsDatabase
from veneer.cli.output import print_json

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Back up and restore the library, jobs and tenants.")

_Archive = Annotated[Path, typer.Argument(metavar="FILE", help="The archive, such as monday.tar.", show_default=False)]


@app.command(epilog="Example: veneer backup create monday.tar")
def create(
    path: _Archive,
    library: JobsLibrary = None,
    index: LibraryIndex = None,
    tenants: TenantsDatabase = None,
    as_json: AsJson = False,
) -> None:
    """Write an archive that only this user can read. Servers and workers can run meanwhile."""
    from veneer.jobs.backup import LEFT_OUT, write_backup
    from veneer.library.library import open_library
    from veneer.serve.tenancy.store import tenants_at

    with open_library(library, index) as opened, tenants_at(tenants) as store:
        manifest = write_backup(path, opened, store)
    _report(path, manifest, as_json, f"left out: {LEFT_OUT}")


@app.command(epilog="Example: veneer backup check monday.tar")
def check(path: _Archive, as_json: AsJson = False) -> None:
    """Check every byte of an archive. The exit code is 2 if the archive is incomplete or damaged."""
    from veneer.jobs.backup import check_backup

    _report(path, check_backup(path), as_json)


@app.command(epilog="Example: veneer backup restore monday.tar")
def restore(
    path: _Archive,
    library: JobsLibrary = None,
    index: LibraryIndex = None,
    tenants: TenantsDatabase = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Rename existing folders and SQLite files first, instead of refusing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check an archive and restore it to an empty place. Stop servers and workers first."""
    from veneer.jobs.backup import restore_backup
    from veneer.library.library import library_location
    from veneer.serve.tenancy.keys import default_database

    where = library or library_location()
    manifest = restore_backup(path, where, index, tenants or default_database(), replace=replace)
    _report(path, manifest, as_json)


def _report(path: Path, manifest: dict[str, Any], as_json: bool, note: str = "") -> None:
    files = manifest["files"]
    size, count = sum(size for size, _ in files.values()), sum(manifest["rows"].values())
    if as_json:
        print_json(
            {"path": str(path), "created": manifest["created"], "files": len(files), "bytes": size}
            | {"rows": manifest["rows"]}
        )
        return
    print(f"{path}: {count:,} rows, {len(files):,} files, {size:,} bytes, from {manifest['created']}")
    if note:
        print(note)
