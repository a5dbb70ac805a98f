"""Questions to the index: a reference, a search, and what the index says of one name.

Knows the tables; nothing of the store.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, func, or_, select, tuple_

from veneer.library import index as ix
from veneer.library.names import Reference

_SOME = 500  # values in one IN list


@dataclass
class Version:
    """One version of a name, with what is known of its content. `entry`: the manifest's sha256. `digest`: the
    adapter's, "" if it could not be read. `size`: bytes of all its files. `aliases`: those that point here now."""

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


def _versions() -> Select[Any]:
    v, e = ix.versions.c, ix.entries.c
    columns = (v.name, v.version, v.entry, v.added, v.source, e.digest, e.format, e.kind, e.base, e.fingerprint)
    return select(*columns, e.licence, e.created, e.size, e.card).join_from(ix.versions, ix.entries, v.entry == e.id)


def find_versions(connection: Connection, wanted: Reference) -> list[Version]:
    """The version that a reference means: none, or one; for a digest's prefix that fits several adapters one of each.
    Among versions of the same adapter the one added last stands for all."""
    v, e, a, n = ix.versions.c, ix.entries.c, ix.name_aliases.c, ix.names.c
    if wanted.prefix:
        rows = connection.execute(
            _versions()
            .where(or_(_begins(e.digest, wanted.prefix), _begins(e.id, wanted.prefix.removeprefix("sha256:"))))
            .order_by(v.added.desc(), v.name, v.version.desc())
        ).all()
        firsts = {row.digest or row.entry: row for row in reversed(rows)}
        return _full(connection, sorted(firsts.values(), key=lambda row: (row.name, row.version)))
    query = _versions().where(v.name == wanted.name)
    if wanted.version is not None:
        query = query.where(v.version == wanted.version)
    elif wanted.alias:
        pointed = select(a.version).where(a.name == wanted.name, a.alias == wanted.alias)
        query = query.where(v.version == pointed.scalar_subquery())
    else:
        query = query.where(v.version == select(n.latest).where(n.name == wanted.name).scalar_subquery())
    return _full(connection, connection.execute(query).all())


def search(
    connection: Connection,
    text: str = "",
    *,
    name: str = "",
    tags: Sequence[str] = (),
    base: str = "",
    trigger: str = "",
    parent: str = "",
    all_versions: bool = False,
    limit: int | None = None,
    offset: int = 0,
) -> list[Version]:
    """The versions that fit all of what is given, ordered by name and version; the latest of each name alone unless
    `all_versions`.

    text: each of its words is somewhere in name, tags, or card (base, trigger words, licence, …), in any case.
    name: begins with this. tags: has all of them. base: the base's name, whole or its last part, or a beginning of its
    fingerprint. trigger: one of its trigger words, in any case. parent: the digest of an adapter it was made from, or
    its beginning."""
    v, e, n, t = ix.versions.c, ix.entries.c, ix.names.c, ix.tags.c
    query = select(v.name, v.version)
    if text or base:
        query = query.join(ix.entries, v.entry == e.id)
    if not all_versions:
        query = query.join(ix.names, and_(n.name == v.name, n.latest == v.version))
    conditions: list[ColumnElement[bool]] = []
    for word in text.lower().split():
        like = "%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        tagged = select(t.name, t.version).where(func.lower(t.tag).like(like, escape="\\"))
        conditions.append(
            or_(
                e.words.like(like, escape="\\"),
                v.name.like(like, escape="\\"),
                tuple_(v.name, v.version).in_(tagged),  # one pass over the tags, not a look for each version
            )
        )
    if name:
        conditions.append(_begins(v.name, name, "\x7f"))
    for tag in tags:
        conditions.append(exists().where(t.name == v.name, t.version == v.version, t.tag == tag))
    if base.startswith("sha256:"):
        conditions.append(_begins(e.fingerprint, base))
    elif base:
        conditions.append(or_(e.base == base, e.base_name == base.lower()))
    if trigger:
        w = ix.triggers.c
        conditions.append(v.entry.in_(select(w.entry).where(w.lower == trigger.lower())))
    if parent:
        p = ix.parents.c
        conditions.append(v.entry.in_(select(p.entry).where(_begins(p.parent, parent))))
    query = query.where(*conditions)
    if limit is not None or offset:  # choose by keys first: sorting whole rows, cards and all, is what takes the time
        query = query.order_by(v.name, v.version).limit(limit).offset(offset)
    page = query.subquery()
    rows = _versions().join(page, and_(page.c.name == v.name, page.c.version == v.version))
    return _full(connection, connection.execute(rows.order_by(v.name, v.version)).all())


def _begins(column: ColumnElement[Any], prefix: str, after: str = "g") -> ColumnElement[bool]:
    """A range that an index serves. `after`: a character behind all that can follow, for hexadecimal "g"."""
    return and_(column >= prefix, column < prefix + after)


def _full(connection: Connection, rows: Sequence[Any]) -> list[Version]:
    """The rows as versions, with what stands in other tables."""
    t, a, w, p = ix.tags.c, ix.name_aliases.c, ix.triggers.c, ix.parents.c
    names, entries = sorted({r.name for r in rows}), sorted({r.entry for r in rows})
    tags: dict[Any, list[str]] = defaultdict(list)
    pointers: dict[Any, list[str]] = defaultdict(list)
    words: dict[Any, list[str]] = defaultdict(list)
    origins: dict[Any, list[str]] = defaultdict(list)
    for some in _parts(names):
        for row in connection.execute(select(t.name, t.version, t.tag).where(t.name.in_(some)).order_by(t.tag)):
            tags[row.name, row.version].append(row.tag)
        for row in connection.execute(select(a.name, a.version, a.alias).where(a.name.in_(some)).order_by(a.alias)):
            pointers[row.name, row.version].append(row.alias)
    for some in _parts(entries):
        for entry, word in connection.execute(select(w.entry, w.word).where(w.entry.in_(some)).order_by(w.word)):
            words[entry].append(word)
        for entry, parent in connection.execute(select(p.entry, p.parent).where(p.entry.in_(some)).order_by(p.parent)):
            origins[entry].append(parent)
    return [
        Version(
            **{**r._mapping, "card": json.loads(r.card)},
            tags=tags[r.name, r.version],
            aliases=pointers[r.name, r.version],
            trigger_words=words[r.entry],
            parents=origins[r.entry],
        )
        for r in rows
    ]


def _parts(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[i : i + _SOME] for i in range(0, len(values), _SOME))


def record(connection: Connection, name: str) -> dict[str, Any]:
    """What the index says of a name, as it stands in the store and in exports."""
    n, a = ix.names.c, ix.name_aliases.c
    following = connection.scalar(select(n.next).where(n.name == name)) or 1
    pointers = connection.execute(select(a.alias, a.version).where(a.name == name)).all()
    found = _full(connection, connection.execute(_versions().where(ix.versions.c.name == name)).all())
    return {
        "veneer-name": 1,
        "name": name,
        "next": following,
        "aliases": {row.alias: row.version for row in pointers},
        "versions": {
            str(v.version): {
                "entry": v.entry,
                "added": v.added,
                "source": v.source,
                "tags": v.tags,
                "digest": v.digest,
                "format": v.format,
                "card": v.card,
            }
            for v in found
        },
    }
