"""`veneer library …`: adapters under names, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AsJson, LibraryIndex
from veneer.cli.output import cut_list, field, print_json, print_table, say
from veneer.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from veneer.library.library import Added, Library
    from veneer.library.queries import Version

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Keep adapters under names, in one place.")

_Reference = Annotated[
    str,
    typer.Argument(
        help="support, acme/support@2, support@prod or the beginning of a sha256: digest.", show_default=False
    ),
]
_Tags = Annotated[list[str] | None, typer.Option("--tag", help="A tag for it; repeat for several.")]
_Name = Annotated[str, typer.Argument(help="The name to keep it under: support, acme/support.", show_default=False)]
_place: dict[str, str | None] = {"location": None, "index": None}


@app.callback()
def _where(
    location: Annotated[
        str | None,
        typer.Option(
            "--at", envvar="VENEER_LIBRARY", help="A directory or URL; by default `library` in the veneer home."
        ),
    ] = None,
    index: LibraryIndex = None,
) -> None:
    """Keep adapters under names, with versions, aliases and tags; share them; check them."""
    _place.update(location=location, index=index)


def _open() -> Library:
    from veneer.library.library import open_library

    return open_library(_place["location"], _place["index"])


@app.command(epilog="Example: veneer library add runs/quickstart support --tag routing")
def add(
    path: Annotated[Path, typer.Argument(help="A PEFT folder, a run's folder, or a file.", show_default=False)],
    name: _Name,
    tag: _Tags = None,
    alias: Annotated[str | None, typer.Option("--alias", help="Point this alias to it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Keep an adapter as the next version of a name. What is there already is not stored twice."""
    with _open() as library:
        added = library.add(path, name, tags=tag or ())
        if alias is not None:
            added.version = library.alias(added.version.reference, alias)
    _added(added, as_json)


@app.command(epilog="Example: veneer library mix softer support@2:0.6 billing:0.4 --alias prod")
def mix(
    name: _Name,
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:STRENGTH]...", help="Adapters of the library.", show_default=False),
    ],
    tag: _Tags = None,
    alias: Annotated[str | None, typer.Option("--alias", help="Point this alias to it.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The base's folder of safetensors: for DoRA and full copies.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Keep a mix as an adapter of its own: the exact sum of strength·ΔW, as the next version of a name."""
    from veneer.adapters.mix import keep_mix

    with _open() as library:
        added, made = keep_mix(library, adapters, name, alias=alias, tags=tag or (), base=base)
    if as_json:
        print_json({"new": added.new, "version": added.version.to_dict(), "mix": made.to_dict()})
        return
    _added(added, as_json)
    print(f"{made.error:.3%} off the true change (‖ΔW‖ {made.norm:.4g})")


def _added(added: Added, as_json: bool) -> None:
    if as_json:
        print_json({"new": added.new, "left_out": added.left_out, "version": added.version.to_dict()})
        return
    v = added.version
    print(f"{v.reference}  {v.digest or 'sha256:' + v.entry}  {v.size:,} bytes")
    if not added.new:
        print("note: the name had this content already; there is no new version")
    if added.left_out:
        print(f"note: not part of the adapter, left out: {', '.join(cut_list(added.left_out))}")


_All = Annotated[bool, typer.Option("--all-versions", help="Every version, not each name's latest.")]
_Limit = Annotated[int, typer.Option("--limit", min=1, help="At most so many.")]
_Skip = Annotated[int, typer.Option("--skip", min=0, help="Leave out so many first.")]
_Without = Annotated[str, typer.Option("--without", help="Leave out what has a tag that begins so: `steps-of:`.")]
_Sort = Annotated[
    str, typer.Option("--sort", help="name, added (newest first), gain (most first), size or rank (largest first).")
]


@app.command("list", epilog="Example: veneer library list --sort added --limit 20")
def list_(
    all_versions: _All = False,
    without: _Without = "",
    sort: _Sort = "name",
    limit: _Limit = 50,
    after: _Skip = 0,
    as_json: AsJson = False,
) -> None:
    """The adapters in the library, and how many there are of which base, kind, rank, tag and health."""
    _listing(as_json, limit, after, "", order=sort, all_versions=all_versions, without=without)


@app.command(epilog='Example: veneer library search "invoice german" --base smollm2-135m --tag routing')
def search(
    text: Annotated[str, typer.Argument(help="Words; each is in the name, a tag or the card.")] = "",
    name: Annotated[str, typer.Option("--name", help="The name begins so.")] = "",
    tag: _Tags = None,
    base: Annotated[str, typer.Option("--base", help="The base's name, or its fingerprint's beginning.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="text or image.")] = "",
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Its rank; 0 for those of several.")] = None,
    health: Annotated[str, typer.Option("--health", help="What verify found: sound, faulty or unknown.")] = "",
    trigger: Annotated[str, typer.Option("--trigger", help="One of its trigger words.")] = "",
    parent: Annotated[str, typer.Option("--parent", help="The digest of an adapter that it was made from.")] = "",
    all_versions: _All = False,
    without: _Without = "",
    sort: _Sort = "name",
    limit: _Limit = 50,
    after: _Skip = 0,
    as_json: AsJson = False,
) -> None:
    """Find adapters by words, name, tag, base, kind, rank, health, trigger word or parent; all that is given has to
    fit."""
    asked = {"name": name, "tags": tag or (), "base": base, "kind": kind, "rank": rank, "health": health}
    asked |= {"trigger": trigger, "parent": parent, "without": without}
    _listing(as_json, limit, after, text, order=sort, all_versions=all_versions, **asked)


def _listing(as_json: bool, limit: int, after: int, text: str, **asked: Any) -> None:
    with _open() as library:
        found = library.browse(text, limit=limit, offset=after, **asked)
        older = 0
        if not found.versions and not asked.get("all_versions"):
            older = library.browse(text, limit=0, **{**asked, "all_versions": True}).total
    more = after + len(found.versions) < found.total
    if as_json:
        versions = [v.to_dict() for v in found.versions]
        print_json({"versions": versions, "more": more, "total": found.total, "facets": found.facets})
        return
    if not found.versions:
        said = {k: v for k, v in asked.items() if k not in ("all_versions", "order")}
        empty = "nothing fits" if text or after or any(v not in ("", (), None) for v in said.values()) else _EMPTY
        print(f"no latest version fits; of older ones {older}: --all-versions" if older else empty)
        return
    print_table(
        ("adapter", "aliases", "base", "rank", "gain", "format", "size", "health", "tags"),
        [
            (
                v.reference,
                ",".join(v.aliases),
                v.base,
                str(v.rank or ""),
                _share(v.gain),
                v.format,
                f"{v.size / 1e6:,.1f} MB",
                v.health,
                " ".join(v.tags),
            )
            for v in found.versions
        ],
    )
    if more:
        print(f"… and {found.total - after - len(found.versions):,} more: --skip {after + limit}")


_EMPTY = "the library is empty: veneer library add PATH NAME"


def _share(gain: float | None) -> str:
    return "" if gain is None else f"{gain:+.0%} loss"


@app.command(epilog="Example: veneer library show support@prod")
def show(reference: _Reference, as_json: AsJson = False) -> None:
    """What is known of an adapter, its relatives, what the last looks at it found, and where its files are here."""
    from veneer.formats.card import opening
    from veneer.library.describe import card_prompt, card_sample, gain_of

    with _open() as library:
        version = library.find(reference)
        files = library.files(version.entry)
        path: str | Path
        try:
            path = library.resolve(version.reference)
        except AdapterError as error:  # all else is still known
            path = f"not here: {error.what}"
        family, checks = library.family(version.reference), library.checks(version.reference)
    if as_json:
        kept = {n: {"sha256": sha256, "size": size} for n, (sha256, size) in files.items()}
        print_json({**version.to_dict(), "path": str(path), "files": kept, "family": family.names(), "checks": checks})
        return
    sample = card_sample(version.card) or {}
    _show(
        version,
        {
            "gain": str(gain_of(version.card) or ""),
            **{f"made from {n}": r for n, r in enumerate([*(v.reference for v in family.parents), *family.unknown], 1)},
            "made of it": [v.reference for v in family.children],
            **{f"check {c['name']}": f"{_MARKS[c['ok']]}, {c['at']}: {c['detail']}" for c in checks},
            "system": opening(card_prompt(version.card))[0],
            **(
                {"asked": sample["prompt"], "base said": sample["base"], "it said": sample["adapter"]} if sample else {}
            ),
            "path": path,
            **{f"file {n}": f"sha256:{h}, {size:,} bytes" for n, (h, size) in files.items()},
        },
    )


_MARKS = {True: "ok", False: "FAILED", None: "not known"}


def _show(version: Version, more: dict[str, Any]) -> None:
    hidden = ("card", "name", "version", "gain", "parents")
    known = {k.replace("_", " "): v for k, v in version.to_dict().items() if k not in hidden}
    for key, value in (known | more).items():
        if value:
            shown = ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
            print(f"{field(key):<14} {field(shown)}")


@app.command(epilog="Example: veneer library tag support@2 routing customer-a")
def tag(
    reference: _Reference,
    tags: Annotated[list[str], typer.Argument(help="Tags, without spaces.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Put tags on a version."""
    with _open() as library:
        _changed(library.tag(reference, *tags), as_json)


@app.command(epilog="Example: veneer library untag support@2 customer-a")
def untag(
    reference: _Reference,
    tags: Annotated[list[str], typer.Argument(help="Tags that it has.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Take tags off a version."""
    with _open() as library:
        _changed(library.untag(reference, *tags), as_json)


@app.command(epilog="Example: veneer library alias support@2 prod")
def alias(
    reference: _Reference,
    alias: Annotated[str, typer.Argument(help="The alias, as in support@prod.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Let name@alias mean this version from now on. `veneer library remove name@alias` takes an alias away."""
    with _open() as library:
        _changed(library.alias(reference, alias), as_json)


def _changed(version: Version, as_json: bool) -> None:
    if as_json:
        print_json(version.to_dict())
    else:
        aliases = ", ".join(f"{version.name}@{a}" for a in version.aliases) or "none"
        print(f"{version.reference}  aliases: {aliases}  tags: {' '.join(version.tags) or 'none'}")


@app.command(epilog="Example: veneer library remove support@1")
def remove(
    reference: Annotated[str, typer.Argument(help="A name, name@version or name@alias.", show_default=False)],
    with_aliases: Annotated[
        bool, typer.Option("--with-aliases", help="Also take away the aliases that point to what is removed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a name with all its versions, one version, or an alias. `veneer library gc` frees the space later."""
    with _open() as library:
        gone = library.remove(reference, with_aliases=with_aliases)
    print_json({"removed": gone}) if as_json else print(f"removed {', '.join(gone)}")


@app.command(epilog="Example: veneer library verify support@prod")
def verify(
    references: Annotated[
        list[str] | None, typer.Argument(help="Adapters to read whole; none: every file.", show_default=False)
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove corrupt files, and write the names' records anew.")
    ] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="First make the index again from the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every file and compare it with its sha256, and the names' records with the index; or check these adapters
    alone, their contents too. What is found of an adapter is remembered with it: `list` and `show` have it.

    Exit code 0 if all is right, 2 if anything is not."""
    from veneer.library import upkeep

    if references:
        if repair or rebuild:
            raise ConfigError("--repair and --rebuild are for the whole library", fix="give no adapter")
        _verify_each(references, as_json)
        return
    made = upkeep.rebuild(_place["location"], _place["index"]) if rebuild else None
    with _open() as library:
        found = upkeep.verify_library(library, repair=repair, say=say)
    ok = found.ok and not (made and made.lost)
    if as_json:
        print_json({"ok": ok, **vars(found), "rebuilt": vars(made) if made else None})
    else:
        if made:
            print(f"made the index again: {made.versions:,} versions of {made.names:,} names")
        for line in made.lost if made else ():
            print(f"LOST      {line}")
        for title, lines in (("MISSING", found.missing), ("CORRUPT", found.corrupt), ("RECORD", found.records)):
            for line in lines:
                print(f"{title:<9} {line}")
        for line in found.repaired:
            print(f"repaired  {line}")
        print(f"{found.files:,} files read, {found.bytes:,} bytes; {len(found.orphans):,} that no adapter has (see gc)")
    if not ok:
        raise typer.Exit(2)


def _verify_each(references: list[str], as_json: bool) -> None:
    from veneer.adapters.inspect import verify_kept

    with _open() as library:
        found = {library.find(r).reference: verify_kept(library, r) for r in references}
    good = {reference: all(c.ok is not False for c in checks) for reference, checks in found.items()}
    if as_json:
        each = {r: {"ok": good[r], "checks": [vars(c) for c in checks]} for r, checks in found.items()}
        print_json({"ok": all(good.values()), "adapters": each})
    else:
        for reference, checks in found.items():
            for c in checks:
                print(f"{reference}  {_MARKS[c.ok]:<9} {c.name:<10} {field(' '.join(c.detail.split()))}")
    if not all(good.values()):
        raise typer.Exit(2)


@app.command(epilog="Example: veneer library gc --dry-run")
def gc(
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds for which what was removed or begun stays.")
    ] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the files that no name leads to any more. Safe while others add, move aliases or collect."""
    from veneer.library import upkeep

    with _open() as library:
        done = upkeep.gc(library, grace=grace, dry_run=dry_run)
    if as_json:
        print_json({**vars(done), "dry_run": dry_run})
        return
    would = "would remove" if dry_run else "removed"
    print(f"{would} {done.entries:,} adapters, {done.files:,} files, {done.bytes:,} bytes; debris: {done.debris:,}")


@app.command(epilog="Example: veneer library pull hf:owner/name support")
def pull(
    place: Annotated[str, typer.Argument(help="hf:owner/name[@revision], a URL or a path.", show_default=False)],
    name: Annotated[str, typer.Argument(help="The name to keep it under; by default the place's last part.")] = "",
    tag: _Tags = None,
    as_json: AsJson = False,
) -> None:
    """Add an adapter from the Hugging Face hub, or from a URL such as s3://bucket/folder."""
    from veneer.library import transfer

    with _open() as library:
        _added(transfer.pull(library, place, name, tags=tag or ()), as_json)


@app.command(epilog="Example: veneer library push support@prod hf:owner/name")
def push(
    reference: _Reference,
    place: Annotated[str, typer.Argument(help="hf:owner/name[@branch], a URL or a path.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Make a new hub repository public, not private.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy an adapter to the Hugging Face hub, or to a URL such as s3://bucket/folder."""
    from veneer.library import transfer

    with _open() as library:
        where = transfer.push(library, reference, place, public=public)
    print_json({"reference": reference, "place": where}) if as_json else print(where)


@app.command(epilog="Example: veneer library export adapters.tar support billing@prod")
def export(
    target: Annotated[Path, typer.Argument(help="A new .tar file, or a new folder.", show_default=False)],
    references: Annotated[
        list[str] | None, typer.Argument(help="Names or versions; none: everything.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write adapters with their names, tags and aliases to one file or folder. Equal content gives equal bytes."""
    from veneer.library import transfer

    with _open() as library:
        done = transfer.export_to(library, target, references or ())
    if as_json:
        print_json({**vars(done), "path": str(done.path)})
    else:
        print(f"{done.path}: {len(done.versions):,} versions, {done.files:,} files, {done.bytes:,} bytes")


@app.command("import", epilog="Example: veneer library import adapters.tar")
def import_(
    source: Annotated[Path, typer.Argument(help="What `veneer library export` wrote.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Add what an export holds, each file checked."""
    from veneer.library import transfer

    with _open() as library:
        done = transfer.import_from(library, source)
    if as_json:
        print_json(vars(done))
        return
    print(f"new: {', '.join(done.new) or 'none'}; here already: {len(done.known):,}")
    for note in done.notes:
        print(f"note: {note}")
