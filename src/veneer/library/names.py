"""Syntax and meaning of adapter names: `[namespace/]name[@version|@alias]`.

    support            the latest version of the name `support`
    support@latest     the same
    support@2          version 2 of `support`
    support@prod       the version that the alias `prod` of `support` points to
    acme/support@2     version 2 of `acme/support`: the name `support` in the namespace `acme`
    sha256:3fa9c1      the adapter (or the entry) whose digest starts with these digits

OpenAI's names for fine-tuned models start with `ft:` and the base; the organization becomes the namespace:

    ft:smollm2-135m:acme:support:kq7vz2mh                  acme/support-kq7vz2mh
    ft:smollm2-135m::support:kq7vz2mh:ckpt-step-40         support-kq7vz2mh@ckpt-step-40
    ft:smollm2-135m:acme::kq7vz2mh                         acme/kq7vz2mh

The library, a server's adapters, routes, limits, prices and HTTP bodies all use these names. Library names
become file names, so they are lower case. A name that only a server uses can have capital letters (`cased`),
because clients written for other servers send them. No part of a name can contain a separator of paths, URLs
or mixes. This module only parses text.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from veneer.errors import ConfigError, quoted

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
_ALIAS = re.compile(r"[a-z]([a-z0-9._-]{0,48}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+-]{0,99}")
_PREFIX = re.compile(r"sha256:[0-9a-f]{4,64}")
_TUNED = re.compile(r"ft:([^:@]{1,200}):([^:@/]*):([^:@/]*):([^:@/]+)(?::ckpt-step-(\d{1,9}))?")
_LETTERS = "bcdfghjkmpqrstvwxz"
_TUNED_LAST = re.compile(rf"(?:(.+)-)?([{_LETTERS}][{_LETTERS}2-9]{{7}})")
"""Pattern of a fine-tuned adapter's name without namespace: `SUFFIX-ID` or `ID`.

An id never looks like a number, because a number after the last colon of an `ft:` name is parsed as a
strength."""
_RESERVED = {"latest", "con", "prn", "aux", "nul"}


@dataclass(frozen=True)
class Reference:
    """A parsed reference: a digest prefix, or a name with a version or an alias.

    The name includes its namespace. Without version and alias, the reference means the latest version."""

    name: str = ""
    version: int | None = None
    alias: str = ""
    prefix: str = ""


@dataclass(frozen=True)
class TunedName:
    """OpenAI's name for a fine-tuned model: `ft:BASE:ORGANISATION:SUFFIX:ID`.

    The name of a checkpoint (`step`) ends in `:ckpt-step-N`. The organization is the namespace. Organization
    and suffix can be empty."""

    base: str
    organisation: str
    suffix: str
    id: str
    step: int | None = None

    def __str__(self) -> str:
        end = "" if self.step is None else f":{checkpoint_alias(self.step)}"
        return f"ft:{self.base}:{self.organisation}:{self.suffix}:{self.id}{end}"

    @property
    def last(self) -> str:
        """The library name, without its namespace."""
        return f"{self.suffix}-{self.id}" if self.suffix else self.id

    @property
    def reference(self) -> str:
        """The adapter's reference in the library."""
        name = f"{self.organisation}/{self.last}" if self.organisation else self.last
        return name if self.step is None else f"{name}@{checkpoint_alias(self.step)}"


def new_tuned(base: str, organisation: str, suffix: str) -> TunedName:
    """Return a name for a new fine-tuned model, with a random id."""
    id = secrets.choice(_LETTERS) + "".join(secrets.choice(_LETTERS + "23456789") for _ in range(7))
    return TunedName(base, organisation, suffix, id)


def tuned_of(base: str, name: str) -> TunedName | None:
    """Return OpenAI's name for an adapter in the library.

    None if the library name does not have the form that `new_tuned` creates."""
    organisation, _, last = name.rpartition("/")
    match = _TUNED_LAST.fullmatch(last)
    name_of_last = None if match is None else TunedName(base, organisation, match[1] or "", match[2])
    return name_of_last if name_of_last is not None and parse_tuned(str(name_of_last)) == name_of_last else None


def organisation_of(tenant: str) -> str:
    """Return OpenAI's organization id for a tenant; an empty tenant is the operator."""
    return f"org-{tenant or 'veneer'}"


def checkpoint_alias(step: int) -> str:
    """Return the alias for the checkpoint of a step."""
    return f"ckpt-step-{step}"


def parse_tuned(text: str) -> TunedName | None:
    """Parse OpenAI's name for a fine-tuned model; return None for any other text."""
    match = _TUNED.fullmatch(text)
    if match is None:
        return None
    base, organisation, suffix, id, step = match.groups()
    return TunedName(base, organisation, suffix, id, None if step is None else int(step))


def parse_reference(text: str, *, cased: bool = False) -> Reference:
    """Parse a reference. Raises ConfigError if it is invalid.

    cased: allow capitals in names."""
    if (tuned := parse_tuned(text)) is not None:
        text = tuned.reference
    if text.startswith("sha256:"):
        if not _PREFIX.fullmatch(text):
            raise ConfigError(f"{text!r} is not a digest", fix="sha256: and 4 to 64 hexadecimal digits in lower case")
        return Reference(prefix=text)
    name, at, selector = text.partition("@")
    check_name(name, cased=cased)
    if not at or selector == "latest":
        return Reference(name)
    if selector.isascii() and selector.isdigit() and len(selector) < 10:
        return Reference(name, version=int(selector))
    check_alias(selector)
    return Reference(name, alias=selector)


def name_of(reference: str) -> str:
    """Return a reference's name without version or alias.

    Limits, prices and permissions apply to this name."""
    tuned = parse_tuned(reference)
    return (reference if tuned is None else tuned.reference).partition("@")[0]


def likely_name(text: str) -> str:
    """Return a valid library name similar to `text`; "" if no character is usable."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:100].strip("-")


def check_name(name: str, *, cased: bool = False) -> None:
    """Raise ConfigError unless `name` is a valid name, with or without a namespace."""
    text = name.lower() if cased and name.isascii() else name
    namespace, slash, last = text.rpartition("/")
    if not _is_part(last, _NAME) or (slash and not _is_namespace(namespace)):
        likely = likely_name(name)
        letters = "letters" if cased else "lower-case letters"
        fix = f"{letters}, digits and . _ - between them, at most 100; optionally with a namespace and / in front" + (
            f"; for example {likely}" if _is_part(likely, _NAME) else ""
        )
        raise ConfigError(f"{quoted(name)} cannot name an adapter" + ("" if cased else " in a library"), fix=fix)


def check_namespace(namespace: str) -> None:
    """Raise ConfigError for an invalid namespace."""
    if not _is_namespace(namespace):
        problem = f"{quoted(namespace)} cannot be a namespace"
        raise ConfigError(problem, fix="lower-case letters, digits and . _ - between them, at most 64")


def _is_namespace(text: str) -> bool:
    # record files end in .json (names/support.json), so a namespace's folder must not end in .json
    return _is_part(text, _NAMESPACE) and not text.endswith(".json")


def _is_part(text: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(text) is not None and ".." not in text and text not in _RESERVED


def check_alias(alias: str) -> None:
    """Raise ConfigError for an invalid alias. An alias must not look like a version."""
    if not _ALIAS.fullmatch(alias) or alias in _RESERVED:
        fix = "a lower-case letter, then letters, digits and . _ - (at most 50), not `latest`; as in support@prod"
        raise ConfigError(f"{alias!r} cannot be an alias", fix=fix)


def check_tag(tag: str) -> None:
    """Raise ConfigError for an invalid tag."""
    if not _TAG.fullmatch(tag):
        raise ConfigError(f"{tag!r} cannot be a tag", fix="letters, digits and . _ : / = + -, at most 100, no spaces")


def check_file_name(name: str) -> None:
    """Raise ConfigError unless `name` is a valid file name on every operating system."""
    plain = name not in ("", ".", "..") and not any(c in '/\\:*?"<>|' or ord(c) < 32 or ord(c) == 127 for c in name)
    try:
        plain = plain and len(name.encode("utf-8")) <= 200
    except UnicodeEncodeError:
        plain = False
    if not plain or name.startswith(".") or name.endswith((".", " ")):
        raise ConfigError(f"{name!r} is not a plain file name", fix="rename the file")
