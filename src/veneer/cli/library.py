"""`veneer library …`: store, find, verify and share named adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.command import Result, command
from veneer.cli.options import LibraryIndex
from veneer.cli.output import cut_list, field, say, table
from veneer.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from veneer.library.library import Added, Library
    from veneer.library.queries import Version

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Store, share and verify named adapters.")

Reference = Annotated[
    str,
    typer.Argument(help="support, acme/support@2, support@prod or a prefix of a sha256: digest.", show_default=False),
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A tag; repeatable.")]
Alias = Annotated[str | None, typer.Option(help="Point this alias to the new version.")]
Name = Annotated[
    str, typer.Argument(help="Name to store the adapter under, such as support or acme/support.", show_default=False)
]
_location: dict[str, str | None] = {"location": None, "index": None}


@app.callback()
def _set_location(
    location: Annotated[
        str | None,
        typer.Option(
            "--at", envvar="VENEER_LIBRARY", help="A directory or URL; default: `library` in the veneer home."
        ),
    ] = None,
    index: LibraryIndex = None,
) -> None:
    """Store adapters with versions, aliases and tags, and share and verify them."""
    _location.update(location=location, index=index)


def _open() -> Library:
    from veneer.library.library import open_library

    return open_library(_location["location"], _location["index"])


library_command = partial(command, app, _open)


@library_command("add", "veneer library add runs/quickstart support --tag routing")
def add(
    library: Library,
    path: Annotated[Path, typer.Argument(help="A PEFT folder, a run's folder, or a file.", show_default=False)],
    name: Name,
    tag: Tags = None,
    alias: Alias = None,
) -> Result:
    """Store an adapter as the next version of a name.

    If the name already has the same content, no version is added."""
    added = library.add(path, name, tags=tag or ())
    if alias is not None:
        added.version = library.alias(added.version.reference, alias)
    return _added(added)


@library_command("mix", "veneer library mix softer support@2:0.6 billing:0.4 --alias prod")
def mix(
    library: Library,
    name: Name,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[:STRENGTH]...", help="Adapters in the library.", show_default=False)
    ],
    tag: Tags = None,
    alias: Alias = None,
    base: Annotated[
        str | None, typer.Option(help="The base's safetensors folder; needed for DoRA and full copies.")
    ] = None,
) -> Result:
    """Store a mix of adapters, the exact sum of strength·ΔW, as one adapter.

    The result becomes the next version of the name."""
    from veneer.adapters.mix import add_mix

    added, mixed = add_mix(library, adapters, name, alias=alias, tags=tag or (), base=base)
    value = {"new": added.new, "version": added.version.to_dict(), "mix": mixed.to_dict()}
    return Result(value, f"{_added(added).text}\nrelative error {mixed.error:.3%} (‖ΔW‖ {mixed.norm:.4g})")


def _added(added: Added) -> Result:
    v = added.version
    lines = [f"{v.reference}  {v.digest or 'sha256:' + v.entry}  {v.size:,} bytes"]
    if not added.new:
        lines.append("note: the name already has this content; no new version was added")
    if added.left_out:
        lines.append(f"note: left out, because not part of the adapter: {', '.join(cut_list(added.left_out))}")
    value = {"new": added.new, "left_out": added.left_out, "version": v.to_dict()}
    return Result(value, "\n".join(lines))


@library_command("list", "veneer library list --sort added --limit 20")
@library_command("search", 'veneer library search "invoice german" --base smollm2-135m --tag routing')
def search(
    library: Library,
    text: Annotated[str, typer.Argument(help="Words that must all occur in the name, a tag or the card.")] = "",
    name: Annotated[str, typer.Option("--name", help="Prefix of the name.")] = "",
    tag: Tags = None,
    base: Annotated[str, typer.Option("--base", help="Base name, or prefix of the base's fingerprint.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="text or image.")] = "",
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Rank; 0: adapters with several ranks.")] = None,
    health: Annotated[str, typer.Option("--health", help="Result of verify: sound, faulty or unknown.")] = "",
    without: Annotated[
        str, typer.Option("--without", help="Exclude adapters with a tag that starts with this, such as `steps-of:`.")
    ] = "",
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="List every version, not only the latest of each name.")
    ] = False,
    sort: Annotated[str, typer.Option(help="name, added (newest first), gain, size or rank (largest first).")] = "name",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of results.")] = 50,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Number of results to skip.")] = 0,
) -> Result:
    """List the adapters that match all of the given filters.

    The JSON output also has counts per base, kind, rank, tag and health."""
    filters: dict[str, Any] = {"name": name, "tags": tag or (), "base": base, "kind": kind, "rank": rank}
    filters |= {"health": health, "without": without}
    page = library.browse(text, order=sort, all_versions=all_versions, limit=limit, offset=skip, **filters)
    more = page.total - skip - len(page.versions)
    versions = [v.to_dict() for v in page.versions]
    value = {"versions": versions, "more": more > 0, "total": page.total, "facets": page.facets}
    if not page.versions:
        older = 0 if all_versions else library.browse(text, all_versions=True, limit=0, **filters).total
        if older:
            return Result(value, f"no latest version matches; matching older versions: {older} (--all-versions)")
        empty = not skip and all(v in ("", (), None) for v in (text, *filters.values()))
        return Result(value, "the library is empty: veneer library add PATH NAME" if empty else "no matches")
    rows = [
        (
            *(v.reference, ",".join(v.aliases), v.base, str(v.rank or "")),
            "" if v.gain is None else f"{v.gain:+.0%} loss",
            *(v.format, f"{v.size / 1e6:,.1f} MB", v.health, " ".join(v.tags)),
        )
        for v in page.versions
    ]
    lines = table(("adapter", "aliases", "base", "rank", "gain", "format", "size", "health", "tags"), rows)
    return Result(value, f"{lines}\n… and {more:,} more: --skip {skip + limit}" if more > 0 else lines)


@library_command("show", "veneer library show support@prod")
def show(library: Library, reference: Reference) -> Result:
    """Show an adapter's metadata, parents, children, most recent checks and files."""
    from veneer.formats.card import opening
    from veneer.library.describe_files import card_prompt, card_sample, gain_of

    version = library.find(reference)
    files = library.files(version.entry)
    path: str | Path
    try:
        path = library.resolve(version.reference)
    except AdapterError as error:  # the metadata can be shown without the files
        path = f"unavailable: {error.what}"
    family, checks = library.family(version.reference), library.checks(version.reference)
    file_rows = {n: {"sha256": sha256, "size": size} for n, (sha256, size) in files.items()}
    value = {**version.to_dict(), "path": str(path), "files": file_rows, "family": family.names(), "checks": checks}
    sample = card_sample(version.card)
    more = {
        "gain": str(gain_of(version.card) or ""),
        **{f"made from {n}": r for n, r in enumerate([*(v.reference for v in family.parents), *family.unknown], 1)},
        "children": [v.reference for v in family.children],
        **{f"check {c['name']}": f"{_MARKS[c['ok']]}, {c['at']}: {c['detail']}" for c in checks},
        "system": opening(card_prompt(version.card))[0],
        **(
            {"asked": sample["prompt"], "base said": sample["base"], "adapter said": sample["adapter"]}
            if sample
            else {}
        ),
        "path": path,
        **{f"file {n}": f"sha256:{h}, {size:,} bytes" for n, (h, size) in files.items()},
    }
    return Result(value, "\n".join(_lines(version, more)))


_MARKS = {True: "ok", False: "FAILED", None: "not known"}


def _lines(version: Version, more: dict[str, Any]) -> Iterator[str]:
    hidden = ("card", "name", "version", "gain", "parents")
    fields = {k.replace("_", " "): v for k, v in version.to_dict().items() if k not in hidden}
    for key, value in (fields | more).items():
        if value:
            text = ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
            yield f"{field(key):<14} {field(text)}"


@library_command("tag", "veneer library tag support@2 routing customer-a")
def tag(
    library: Library,
    reference: Reference,
    tags: Annotated[list[str], typer.Argument(help="Tags, without spaces.", show_default=False)],
) -> Result:
    """Add tags to a version."""
    return _changed(library.tag(reference, *tags))


@library_command("untag", "veneer library untag support@2 customer-a")
def untag(
    library: Library,
    reference: Reference,
    tags: Annotated[list[str], typer.Argument(help="Tags to remove.", show_default=False)],
) -> Result:
    """Remove tags from a version."""
    return _changed(library.untag(reference, *tags))


@library_command("alias", "veneer library alias support@2 prod")
def alias(
    library: Library,
    reference: Reference,
    alias: Annotated[str, typer.Argument(help="The alias, such as prod in support@prod.", show_default=False)],
) -> Result:
    """Point the alias name@alias to a version.

    To remove an alias: veneer library remove name@alias."""
    return _changed(library.alias(reference, alias))


def _changed(version: Version) -> Result:
    aliases = ", ".join(f"{version.name}@{a}" for a in version.aliases) or "none"
    tags = " ".join(version.tags) or "none"
    return Result(version.to_dict(), f"{version.reference}  aliases: {aliases}  tags: {tags}")


@library_command("remove", "veneer library remove support@1")
def remove(
    library: Library,
    reference: Annotated[str, typer.Argument(help="A name, name@version or name@alias.", show_default=False)],
    with_aliases: Annotated[
        bool, typer.Option("--with-aliases", help="Also remove aliases of the removed versions.")
    ] = False,
) -> Result:
    """Remove a version, an alias, or a name with all its versions.

    To free the disk space, run `veneer library gc` later."""
    removed = library.remove(reference, with_aliases=with_aliases)
    return Result({"removed": removed}, f"removed {', '.join(removed)}")


@command(app, nullcontext, "verify", "veneer library verify support@prod")
def verify(
    _: None,  # not opened: a library without an index cannot be opened, and --rebuild creates the index
    references: Annotated[
        list[str] | None, typer.Argument(help="Adapters to verify; default: every file.", show_default=False)
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove corrupt files and rewrite the records.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="First rebuild the index from the files.")] = False,
) -> Result:
    """Verify the whole library, or only the given adapters.

    Without arguments, compares every file with its sha256, and the records of names with the index. With
    arguments, also checks the contents of the given adapters; `list` and `show` report the most recent
    result. The exit code is 0 if everything is valid, otherwise 2."""
    from veneer.library import maintenance as upkeep

    if references:
        if repair or rebuild:
            raise ConfigError("--repair and --rebuild apply to the whole library", fix="omit the adapters")
        with _open() as library:
            return _verify_each(library, references)
    rebuilt = upkeep.rebuild(_location["location"], _location["index"]) if rebuild else None
    with _open() as library:
        report = upkeep.verify_library(library, repair=repair, log=say)
    ok = report.ok and not (rebuilt and rebuilt.lost)
    lines = [f"rebuilt the index: {rebuilt.versions:,} versions of {rebuilt.names:,} names"] if rebuilt else []
    titles = {"LOST": rebuilt.lost if rebuilt else [], "MISSING": report.missing, "CORRUPT": report.corrupt}
    titles |= {"RECORD": report.records, "repaired": report.repaired}
    lines += [f"{title:<9} {line}" for title, each in titles.items() for line in each]
    lines.append(f"{report.files:,} files read, {report.bytes:,} bytes; {len(report.orphans):,} unreferenced (see gc)")
    value = {"ok": ok, **vars(report), "rebuilt": vars(rebuilt) if rebuilt else None}
    return Result(value, "\n".join(lines), 0 if ok else 2)


def _verify_each(library: Library, references: list[str]) -> Result:
    from veneer.adapters.inspect import verify_stored

    checked = {library.find(r).reference: verify_stored(library, r) for r in references}
    good = {reference: all(c.ok is not False for c in checks) for reference, checks in checked.items()}
    each = {r: {"ok": good[r], "checks": [vars(c) for c in checks]} for r, checks in checked.items()}
    found = [(reference, c) for reference, checks in checked.items() for c in checks]
    lines = [f"{r}  {_MARKS[c.ok]:<9} {c.name:<10} {field(' '.join(c.detail.split()))}" for r, c in found]
    ok = all(good.values())
    return Result({"ok": ok, "adapters": each}, "\n".join(lines), 0 if ok else 2)


@library_command("gc", "veneer library gc --dry-run")
def gc(
    library: Library,
    grace: Annotated[
        float, typer.Option(min=0, help="Keep removed adapters and unfinished writes for this many seconds.")
    ] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, but remove nothing.")] = False,
) -> Result:
    """Remove files that no name refers to. Safe to run while the library is being changed."""
    from veneer.library import maintenance as upkeep

    done = upkeep.gc(library, grace=grace, dry_run=dry_run)
    would = "would remove" if dry_run else "removed"
    text = (
        f"{would} {done.entries:,} adapters, {done.files:,} files, {done.bytes:,} bytes, {done.debris:,} leftover files"
    )
    return Result({**vars(done), "dry_run": dry_run}, text)


@library_command("pull", "veneer library pull hf:owner/name support")
def pull(
    library: Library,
    place: Annotated[str, typer.Argument(help="hf:owner/name[@revision], a URL or a path.", show_default=False)],
    name: Annotated[str, typer.Argument(help="Name to store the adapter under; default: the last part of PLACE.")] = "",
    tag: Tags = None,
) -> Result:
    """Add an adapter from the Hugging Face Hub, a path, or a URL (s3://bucket/x)."""
    from veneer.library import transfer

    return _added(transfer.pull(library, place, name, tags=tag or ()))


@library_command("push", "veneer library push support@prod hf:owner/name")
def push(
    library: Library,
    reference: Reference,
    place: Annotated[str, typer.Argument(help="hf:owner/name[@branch], a URL or a path.", show_default=False)],
    public: Annotated[
        bool, typer.Option("--public", help="Create a new Hub repository as public, not private.")
    ] = False,
) -> Result:
    """Copy an adapter to the Hugging Face Hub, a path, or a URL (s3://bucket/x)."""
    from veneer.library import transfer

    where = transfer.push(library, reference, place, public=public)
    return Result({"reference": reference, "place": where}, where)
