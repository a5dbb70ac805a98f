"""What names may look like, and what a reference means.

    support            the latest version of the name `support`
    support@latest     the same
    support@2          its version 2
    support@prod       the version that its alias `prod` points to
    sha256:3fa9c1      the adapter (or the entry) whose digest begins so

Names become file names, parts of URLs and words of a mix, so they are lower case and hold no separator of any of these.
Knows text alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from veneer.errors import ConfigError

__all__ = ["Reference", "check_alias", "check_file_name", "check_name", "check_tag", "parse_reference"]

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")
_ALIAS = re.compile(r"[a-z]([a-z0-9._-]{0,48}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+-]{0,99}")
_PREFIX = re.compile(r"sha256:[0-9a-f]{4,64}")
_RESERVED = {"latest", "con", "prn", "aux", "nul"}


@dataclass(frozen=True)
class Reference:
    """A parsed reference: a digest's prefix, or a name with a version or an alias (neither: the latest version)."""

    name: str = ""
    version: int | None = None
    alias: str = ""
    prefix: str = ""


def parse_reference(text: str) -> Reference:
    """Raises ConfigError for text that can be no reference."""
    if text.startswith("sha256:"):
        if not _PREFIX.fullmatch(text):
            raise ConfigError(f"{text!r} is no digest", fix="sha256: and 4 to 64 hexadecimal digits in lower case")
        return Reference(prefix=text)
    name, at, which = text.partition("@")
    check_name(name)
    if not at or which == "latest":
        return Reference(name)
    if which.isascii() and which.isdigit() and len(which) < 10:
        return Reference(name, version=int(which))
    check_alias(which)
    return Reference(name, alias=which)


def check_name(name: str) -> None:
    """Raises ConfigError for what cannot name an adapter."""
    if not _NAME.fullmatch(name) or ".." in name or name in _RESERVED:
        likely = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:100]
        raise ConfigError(
            f"{name!r} cannot name an adapter in a library",
            fix="lower-case letters, digits and . _ - between them, at most 100"
            + (f"; for example {likely}" if _NAME.fullmatch(likely) and likely not in _RESERVED else ""),
        )


def check_alias(alias: str) -> None:
    """Raises ConfigError for what cannot be an alias: it must not look like a version."""
    if not _ALIAS.fullmatch(alias) or alias in _RESERVED:
        raise ConfigError(
            f"{alias!r} cannot be an alias",
            fix="a lower-case letter, then letters, digits and . _ - (at most 50), not `latest`; as in support@prod",
        )


def check_tag(tag: str) -> None:
    """Raises ConfigError for what cannot be a tag."""
    if not _TAG.fullmatch(tag):
        raise ConfigError(f"{tag!r} cannot be a tag", fix="letters, digits and . _ : / = + -, at most 100, no spaces")


def check_file_name(name: str) -> None:
    """Raises ConfigError for a name that is no plain file name everywhere."""
    plain = name not in ("", ".", "..") and not any(c in '/\\:*?"<>|' or ord(c) < 32 or ord(c) == 127 for c in name)
    try:
        plain = plain and len(name.encode("utf-8")) <= 200
    except UnicodeEncodeError:
        plain = False
    if not plain or name.startswith(".") or name.endswith((".", " ")):
        raise ConfigError(f"{name!r} is no plain file name", fix="rename the file")
