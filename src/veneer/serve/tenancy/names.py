"""Names of tenants, and which names a pattern matches. Names of adapters and routes are those of `library.names`.

    support      the adapter of that name, every version of it (support@2, support@prod)
    support@2    that version alone
    acme/*       every name that begins so; `*` stands for any text, and is the only sign with a meaning
    *            every name

A pattern is text that is compared with names. It never becomes a path; even so, nothing that could escape one is let
in. Digests (sha256:…) are names of no tenant's own, so a pattern matches them only where it says `sha256:` itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from veneer.errors import ConfigError, quoted
from veneer.library import names
from veneer.library.names import name_of, parse_reference

__all__ = ["check_name", "check_pattern", "check_reference", "check_tenant", "seeing"]

_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._/@:+*-]{0,199}")


def check_tenant(name: str) -> str:
    """Raises ConfigError for what cannot name a tenant, which is what can be a namespace."""
    try:
        if name == "all":
            raise ConfigError("'all' stands for every tenant", fix="another name")
        names.check_namespace(name)
    except ConfigError as error:
        raise ConfigError(
            f"{quoted(name)} cannot name a tenant", where="tenant", fix=f"{error.fix}; not `all`"
        ) from None
    return name


def check_name(name: str, what: str = "adapter") -> str:
    """Raises ConfigError for what cannot name an adapter, or a route."""
    try:
        names.check_name(name, cased=True)
    except ConfigError as error:
        raise ConfigError(f"{quoted(name)} cannot name a {what}", where=what, fix=error.fix) from None
    return name


def check_reference(text: str, what: str = "adapter") -> str:
    """Raises ConfigError for what names no adapter, with or without a version."""
    try:
        parse_reference(text, cased=True)
    except ConfigError as error:
        raise ConfigError(f"{quoted(text)} cannot name an {what}", where=what, fix=error.fix) from None
    return text


def check_pattern(pattern: str) -> str:
    """Raises ConfigError for what cannot be a pattern of names."""
    if not _PATTERN.fullmatch(pattern) or not _contained(pattern):
        raise ConfigError(
            f"{quoted(pattern)} is no pattern of names", where="adapters", fix="a name, and * for any text"
        )
    return pattern


def _contained(name: str) -> bool:
    return not any(part in ("", ".", "..") for part in name.split("/"))


def seeing(patterns: Iterable[str], also: Iterable[str] = ()) -> Callable[[str], bool]:
    """Whether a name is matched by one of `patterns`, or is one of `also`."""
    exact = frozenset(also)
    plain: list[str] = []
    digests: list[str] = []
    for pattern in patterns:
        (digests if pattern.startswith("sha256:") else plain).append(".*".join(map(re.escape, pattern.split("*"))))
    of_names, of_digests = (re.compile("|".join(f"(?:{p})" for p in ps) or r"(?!)") for ps in (plain, digests))

    def sees(name: str) -> bool:
        if name in exact:
            return True
        if name.startswith("sha256:"):
            return of_digests.fullmatch(name) is not None
        return any(of_names.fullmatch(n) is not None for n in {name, name_of(name)})

    return sees
