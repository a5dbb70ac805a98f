"""Query the index: references, searches and records of names.

This module reads the index's tables and does not use the store.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, get_args

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Select,
    String,
    and_,
    case,
    cast,
    exists,
    func,
    literal,
    or_,
    select,
    tuple_,
)

from veneer.errors import ConfigError, quoted
from veneer.library import index as ix
from veneer.library.names import Reference

Order = Literal["name", "added", "gain", "size", "rank"]
"""Sort order of a search: by name, or newest, largest gain, largest size or highest rank first."""
_ORDERS: tuple[Order, ...] = get_args(Order)
_HEALTHS = ("sound", "faulty", "unknown")
"""Possible results of an adapter's last checks; unknown if no check has run."""

_T = TypeVar("_T")
_MAX_IN = 500  # maximum number of values in an IN list


@dataclass
class Version:
    """One version of a name, with a description of its content.

    entry: the manifest's sha256.
    digest: the adapter's digest, "" if the adapter could not be read.
    size: total bytes of the files.
    rank: 0 if the adapter's modules have different ranks or no rank.
    gain: relative change of the held-out loss (`describe_files.Gain`).
    health: sound, faulty or unknown.
    aliases: the aliases that point to this version."""

    name: str
    version: int
    entry: str
    added: str
    source: str
    digest: str
    format: str
    kind: str
    base: str
    fingerprint: str
    licence: str
    created: str
    size: int
    rank: int
    gain: float | None
    health: str
    card: dict[str, Any]
    tags: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    trigger_words: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, **asdict(self)}


@dataclass(frozen=True)
class SearchPage:
    """A page of search results.

    total: number of matches on all pages.
    facets: for each of base, kind, rank, tag and health, a dict from value to number of matches, the most
        frequent value first. A facet's own filter does not limit its counts, except for tag."""

    versions: list[Version]
    total: int
    facets: dict[str, dict[str, int]]


@dataclass(frozen=True)
class AdapterFamily:
    """The parents, children and versions of an adapter.

    unknown: digests of parents that are not in the library.
    versions: all versions of the adapter's name, newest first.
    """

    parents: list[Version]
    unknown: list[str]
    children: list[Version]
    versions: list[Version]

    def names(self) -> dict[str, list[str]]:
        """Return the family as references, with the digests of unknown parents, for JSON."""
        known_versions = {"parents": self.parents, "children": self.children, "versions": self.versions}
        return {role: [v.reference for v in versions] for role, versions in known_versions.items()} | {
            "unknown_parents": self.unknown
        }


def _health() -> ColumnElement[str]:
    c, e = ix.checks.c, ix.entries.c
    return case(
        (exists().where(c.entry == e.id, c.ok.is_(False)), literal("faulty")),
        (exists().where(c.entry == e.id), literal("sound")),
        else_=literal("unknown"),
    ).label("health")


def _versions() -> Select[Any]:
    v, e, f = ix.versions.c, ix.entries.c, ix.figures.c
    columns = (v.name, v.version, v.entry, v.added, v.source, e.digest, e.format, e.kind, e.base, e.fingerprint)
    more = (e.licence, e.created, e.size, f.rank, f.gain, _health(), e.card)
    return _with_content(select(*columns, *more))


def _with_content(query: Select[Any]) -> Select[Any]:
    v, e, f = ix.versions.c, ix.entries.c, ix.figures.c
    return query.join_from(ix.versions, ix.entries, v.entry == e.id).join(ix.figures, v.entry == f.entry)


def find_versions(connection: Connection, reference: Reference) -> list[Version]:
    """Return the versions that a reference names.

    There is at most one, except for a digest prefix, which can match several adapters. The result then has
    one version per adapter: the version that was added last."""
    v, e, a, n = ix.versions.c, ix.entries.c, ix.name_aliases.c, ix.names.c
    if reference.prefix:
        rows = connection.execute(
            _versions()
            .where(or_(_begins(e.digest, reference.prefix), _begins(e.id, reference.prefix.removeprefix("sha256:"))))
            .order_by(v.added.desc(), v.name, v.version.desc())
        ).all()
        firsts = {row.digest or row.entry: row for row in reversed(rows)}
        return _load_versions(connection, sorted(firsts.values(), key=lambda row: (row.name, row.version)))
    query = _versions().where(v.name == reference.name)
    if reference.version is not None:
        query = query.where(v.version == reference.version)
    elif reference.alias:
        pointed = select(a.version).where(a.name == reference.name, a.alias == reference.alias)
        query = query.where(v.version == pointed.scalar_subquery())
    else:
        query = query.where(v.version == select(n.latest).where(n.name == reference.name).scalar_subquery())
    return _load_versions(connection, connection.execute(query).all())


def search(
    connection: Connection,
    text: str = "",
    *,
    tags: Sequence[str] = (),
    base: str = "",
    limit: int | None = None,
    offset: int = 0,
    **more: Any,
) -> list[Version]:
    """Return the versions that match every filter, sorted by name and version.

    Searches only the latest version of each name, unless `all_versions` is set.

    text: every word must appear in the name, a tag or the card (base, trigger words, licence, …); case does
        not matter.
    tags: the version must have all of these tags.
    base: the base's full name, the last part of its name, or a prefix of its fingerprint.
    more: name (a prefix of the version's name), trigger (one of the adapter's trigger words, in any case),
        parent (a parent's digest or a prefix of it), all_versions."""
    conditions = [*_match_conditions(text, **more), *_tagged(tags), *_of_base(base)]
    return _page(connection, conditions, (), limit, offset)


def _page(
    connection: Connection,
    conditions: Sequence[ColumnElement[bool]],
    order: Sequence[ColumnElement[Any]],
    limit: int | None,
    offset: int,
) -> list[Version]:
    """Return the matching versions.

    The keys are selected and sorted first, because sorting whole rows with cards is slow."""
    v = ix.versions.c
    keys = _with_content(select(v.name, v.version)).where(*conditions).order_by(*order, v.name, v.version)
    page = [tuple(row) for row in connection.execute(keys.limit(limit).offset(offset))]
    versions: dict[Any, Version] = {}
    for keys_part in _parts(page):
        rows = connection.execute(_versions().where(tuple_(v.name, v.version).in_(keys_part))).all()
        versions |= {(each.name, each.version): each for each in _load_versions(connection, rows)}
    return [versions[key] for key in page]


def browse(
    connection: Connection,
    text: str = "",
    *,
    base: str = "",
    kind: str = "",
    rank: int | None = None,
    tags: Sequence[str] = (),
    health: str = "",
    without: str = "",
    order: Order = "name",
    can_access: Callable[[str], bool] | None = None,
    limit: int | None = 60,
    offset: int = 0,
    **more: Any,
) -> SearchPage:
    """Return a page of the versions that match every filter, with counts per facet.

    text, base, tags and `more` (name, trigger, parent, all_versions): as in `search`.
    kind: text or image. health: sound, faulty or unknown.
    rank: 0 for adapters whose modules have different ranks or no rank.
    without: exclude versions that have a tag with this prefix.
    can_access: reference -> whether the principal can see the version; None: all are visible.

    Raises ConfigError for an unknown order or health."""
    for facet, value, allowed in (("order", order, _ORDERS), ("health", health, ("", *_HEALTHS))):
        if value not in allowed:
            raise ConfigError(f"no {facet} is called {quoted(value)}", fix=f"one of {', '.join(filter(None, allowed))}")
    v, e, f, t = ix.versions.c, ix.entries.c, ix.figures.c, ix.tags.c
    filters: dict[str, Sequence[ColumnElement[bool]]] = {
        "base": _of_base(base),
        "kind": [e.kind == kind] if kind else (),
        "rank": [f.rank == rank] if rank is not None else (),
        "health": [_health() == health] if health else (),
        "tag": _tagged(tags),
    }
    used = [(facet, conditions_of) for facet, conditions_of in filters.items() if conditions_of]
    flags = [case((and_(*each), 1), else_=0).label(f"is_{facet}") for facet, each in used]
    conditions = [
        *_match_conditions(text, **more),
        *([_accessible(connection, can_access)] if can_access is not None else []),
    ]
    if without:
        other_tags = ix.tags.alias().c
        excluded = other_tags.tag.startswith(without, autoescape=True)
        conditions.append(~exists().where(other_tags.name == v.name, other_tags.version == v.version, excluded))
    facets: dict[str, Counter[str]] = {facet: Counter() for facet in filters}
    each = _with_content(select(e.base, e.kind, f.rank, _health(), *flags)).where(*conditions).subquery()
    total = 0
    for *row, count in connection.execute(select(each, func.count()).group_by(*each.c)):
        missed = {flag.name for flag, fits in zip(flags, row[4:], strict=True) if not fits}
        total += count * (not missed)
        for facet, value in zip(filters, row[:4], strict=False):
            facets[facet][str(value)] += count * (missed <= {f"is_{facet}"})
    conditions += [condition for conditions_of in filters.values() for condition in conditions_of]
    tagged = _with_content(select(t.tag, func.count().label("many"))).join(
        ix.tags, and_(t.name == v.name, t.version == v.version)
    )
    tags_found = connection.execute(tagged.where(*conditions).group_by(t.tag)).all()
    facets["tag"].update({row.tag: row.many for row in tags_found})
    orders: dict[str, Sequence[ColumnElement[Any]]] = {
        "name": (),
        "added": (v.added.desc(),),
        "gain": (f.gain.is_(None), f.gain),
        "size": (e.size.desc(),),
        "rank": (f.rank.desc(),),
    }
    page = _page(connection, conditions, orders[order], limit, offset)
    ranked = {w: dict(sorted(n.items(), key=lambda item: (-item[1], item[0]))) for w, n in facets.items()}
    ranked = {w: {value: count for value, count in n.items() if count} for w, n in ranked.items()}
    return SearchPage(page, total, ranked)


def family_of(connection: Connection, version: Version) -> AdapterFamily:
    """Return the family of a version: parents, children and all versions of its name.

    Parents and children are found by the digests in the cards."""
    v, e, p = ix.versions.c, ix.entries.c, ix.parents.c

    def select_versions(condition: ColumnElement[bool]) -> list[Version]:
        rows = connection.execute(_versions().where(condition).order_by(v.added.desc(), v.name, v.version.desc()))
        return _load_versions(connection, rows.all())

    parents = select_versions(e.digest.in_(version.parents)) if version.parents else []
    children = select_versions(v.entry.in_(select(p.entry).where(p.parent == version.digest))) if version.digest else []
    found_digests = {each.digest for each in parents}
    unknown = [d for d in version.parents if d not in found_digests]
    return AdapterFamily(parents, unknown, children, select_versions(v.name == version.name))


def size_of_prefix(connection: Connection, beginning: str) -> int:
    """Return the total bytes of all versions whose name starts with `beginning`.

    Content that several versions share counts for each of them."""
    query = _with_content(select(func.sum(ix.entries.c.size))).where(_begins(ix.versions.c.name, beginning, "\x7f"))
    return int(connection.scalar(query) or 0)


def checks_of(connection: Connection, entry: str) -> list[dict[str, Any]]:
    """Return an entry's last check results, each with name, ok, detail and at."""
    c = ix.checks.c
    rows = connection.execute(select(c.name, c.ok, c.detail, c.at).where(c.entry == entry).order_by(c.at, c.name))
    return [dict(row._mapping) for row in rows]


def _match_conditions(
    text: str = "", *, name: str = "", trigger: str = "", parent: str = "", all_versions: bool = False
) -> list[ColumnElement[bool]]:
    v, e, n, t = ix.versions.c, ix.entries.c, ix.names.c, ix.tags.c
    conditions: list[ColumnElement[bool]] = []
    if not all_versions:
        conditions.append(exists().where(n.name == v.name, n.latest == v.version))
    for word in text.lower().split():
        like = "%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        tagged = select(t.name, t.version).where(func.lower(t.tag).like(like, escape="\\"))
        conditions.append(
            or_(
                e.words.like(like, escape="\\"),
                v.name.like(like, escape="\\"),
                tuple_(v.name, v.version).in_(tagged),  # one scan of the tags is faster than a lookup per version
            )
        )
    if name:
        conditions.append(_begins(v.name, name, "\x7f"))
    if trigger:
        w = ix.triggers.c
        conditions.append(v.entry.in_(select(w.entry).where(w.lower == trigger.lower())))
    if parent:
        p = ix.parents.c
        conditions.append(v.entry.in_(select(p.entry).where(_begins(p.parent, parent))))
    return conditions


def _tagged(tags: Sequence[str]) -> list[ColumnElement[bool]]:
    t, v = ix.tags.alias().c, ix.versions.c  # aliased, so that a query can also use the table to count tags
    return [exists().where(t.name == v.name, t.version == v.version, t.tag == tag) for tag in tags]


def _of_base(base: str) -> list[ColumnElement[bool]]:
    e = ix.entries.c
    if base.startswith("sha256:"):
        return [_begins(e.fingerprint, base)]
    return [or_(e.base == base, e.base_name == base.lower())] if base else []


def _accessible(connection: Connection, can_access: Callable[[str], bool]) -> ColumnElement[bool]:
    """Return a condition that selects the versions that `can_access` accepts.

    The accepted references are sent to the database as one JSON value."""
    v = ix.versions.c
    references = (f"{name}@{version}" for name, version in connection.execute(select(v.name, v.version)))
    visible = json.dumps([reference for reference in references if can_access(reference)])
    values = (
        func.json_array_elements_text(cast(literal(visible, String), JSON)).table_valued("value")
        if connection.dialect.name == "postgresql"
        else func.json_each(visible).table_valued("value")
    )
    return (v.name + "@" + cast(v.version, String)).in_(select(values.c.value))


def _begins(column: ColumnElement[Any], prefix: str, after: str = "g") -> ColumnElement[bool]:
    """Return a prefix condition on a column, in a form that can use an index.

    after: a character that sorts after every possible character; "g" for hexadecimal."""
    return and_(column >= prefix, column < prefix + after)


def _load_versions(connection: Connection, rows: Sequence[Any]) -> list[Version]:
    """Return a Version for each row, with tags, aliases, trigger words and parents."""
    t, a, w, p = ix.tags.c, ix.name_aliases.c, ix.triggers.c, ix.parents.c
    names, entries = sorted({r.name for r in rows}), sorted({r.entry for r in rows})

    def grouped(keys: Sequence[Any], value: Any, among: Sequence[str]) -> dict[Any, list[str]]:
        groups: dict[Any, list[str]] = defaultdict(list)
        for part in _parts(among):
            for *key, each in connection.execute(select(*keys, value).where(keys[0].in_(part)).order_by(value)):
                groups[tuple(key)].append(each)
        return groups

    tags, aliases = grouped((t.name, t.version), t.tag, names), grouped((a.name, a.version), a.alias, names)
    words, parents = grouped((w.entry,), w.word, entries), grouped((p.entry,), p.parent, entries)
    return [
        Version(
            **{**r._mapping, "card": json.loads(r.card)},
            tags=tags[r.name, r.version],
            aliases=aliases[r.name, r.version],
            trigger_words=words[r.entry,],
            parents=parents[r.entry,],
        )
        for r in rows
    ]


def _parts(values: Sequence[_T]) -> Iterable[Sequence[_T]]:
    return (values[i : i + _MAX_IN] for i in range(0, len(values), _MAX_IN))


def record(connection: Connection, name: str) -> dict[str, Any]:
    """Return a name's record in the form used in the store and in exports."""
    n, a = ix.names.c, ix.name_aliases.c
    following = connection.scalar(select(n.next).where(n.name == name)) or 1
    pointers = connection.execute(select(a.alias, a.version).where(a.name == name)).all()
    versions = _load_versions(connection, connection.execute(_versions().where(ix.versions.c.name == name)).all())
    kept = ("entry", "added", "source", "tags", "digest", "format", "card")
    by_number = {str(v.version): {field: getattr(v, field) for field in kept} for v in versions}
    aliases = {row.alias: row.version for row in pointers}
    return {"veneer-name": 1, "name": name, "next": following, "aliases": aliases, "versions": by_number}
