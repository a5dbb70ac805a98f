"""What names of tenants, adapters and aliases may look like here, and which names a pattern matches.

    support      the adapter of that name, every version of it (support@2, support@prod)
    support@2    that version alone
    acme/*       every name that begins so; `*` stands for any text, and is the only sign with a meaning
    *            every name

A name is text that is compared with other text. It never becomes a path; even so, nothing that could escape one is let
in. Digests (sha256:…) are names of no tenant's own, so a pattern matches them only where it says `sha256:` itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from veneer.errors import ConfigError

__all__ = ["adapter_of", "check_name", "check_pattern", "check_tenant", "seeing"]

_TENANT = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:+-]{0,199}")
_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._/@:+*-]{0,199}")


def check_tenant(name: str) -> str:
    """Raises ConfigError for what cannot name a tenant."""
    if not _TENANT.fullmatch(name) or ".." in name or name == "all":
        raise ConfigError(
            f"{name!r} cannot name a tenant",
            where="tenant",
            fix="lower-case letters, digits and . _ - between them, at most 64; not `all`",
        )
    return name


def check_name(name: str, what: str = "adapter") -> str:
    """Raises ConfigError for what cannot name an adapter or an alias."""
    if not _NAME.fullmatch(name) or not _contained(name):
        raise ConfigError(f"{name!r} cannot name an {what}", where=what, fix=_FIX)
    return name


def check_pattern(pattern: str) -> str:
    """Raises ConfigError for what cannot be a pattern of names."""
    if not _PATTERN.fullmatch(pattern) or not _contained(pattern):
        raise ConfigError(f"{pattern!r} is no pattern of names", where="adapters", fix=f"{_FIX}; * for any text")
    return pattern


_FIX = "letters, digits and . _ / @ : + -, at most 200, not beginning with a sign, no empty or dotted parts"


def _contained(name: str) -> bool:
    return not any(part in ("", ".", "..") for part in name.split("/"))


def adapter_of(name: str) -> str:
    """What limits and prices count a name under: the adapter, whatever its version."""
    return name.partition("@")[0]


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
        return any(of_names.fullmatch(n) is not None for n in {name, adapter_of(name)})

    return sees
