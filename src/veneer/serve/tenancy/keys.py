"""API keys: made here, shown once, and known afterwards only by their hash.

    vnr-3f9a0c21d4-Q1x…          vnr-, ten hexadecimal digits that find the row (its id), and a secret

The secret is 256 random bits, so the hash is plain SHA-256 over the whole key. Slow hashes such as bcrypt are for
passwords, which people choose and others guess: against 2²⁵⁶ possibilities nobody guesses, at any speed, and a slow
hash at every request would only give whoever sends wrong keys a way to keep the server busy.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from veneer.errors import ConfigError
from veneer.models.home import veneer_home

_KEY = re.compile(r"vnr-([0-9a-f]{10})-[A-Za-z0-9_-]{43}")


def make_key() -> tuple[str, str]:
    """(id, key) of a new key."""
    identity = secrets.token_hex(5)
    return identity, f"vnr-{identity}-{secrets.token_urlsafe(32)}"


def make_admin_key() -> str:
    """A new admin key. It is not kept anywhere: the server is given it, or its hash."""
    return f"vnr-admin-{secrets.token_urlsafe(32)}"


def key_id(key: str) -> str | None:
    """The id in a key; None for text that is not a key."""
    found = _KEY.fullmatch(key)
    return found[1] if found else None


def hash_key(key: str) -> str:
    """The hash of a key: all that is kept of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def same(key: str, kept: str) -> bool:
    """Whether `kept` is the hash of `key`, compared in constant time."""
    return hmac.compare_digest(hash_key(key), kept)


def default_database() -> str:
    """Where tenants are kept unless a command says otherwise."""
    return str(veneer_home() / "tenants.sqlite")


def database_here() -> str | None:
    """That database, if there is one."""
    return default_database() if Path(default_database()).is_file() else None


def admin_hash(key: str) -> str:
    """The hash of an admin key that is given as itself or as `sha256:` and its hash. Raises ConfigError."""
    if key.startswith("sha256:"):
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", key):
            raise ConfigError("the admin key's hash is not a SHA-256 digest", fix="sha256: and 64 hexadecimal digits")
        return key.removeprefix("sha256:")
    if len(key) < 20:
        raise ConfigError("the admin key is shorter than 20 characters", fix="openssl rand -base64 32")
    return hash_key(key)
