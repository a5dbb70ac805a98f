"""API keys: generated here, shown once, and stored only as a hash.

    vnr-3f9a0c21d4-Q1x…          vnr-, the id of the key's row (ten hexadecimal digits), and a secret

The secret has 256 random bits, so a plain SHA-256 of the whole key is enough. Slow hashes such as bcrypt
protect passwords, which can be guessed. Nobody can guess 256 random bits, and with a slow hash per request, a
client with wrong keys could keep the server busy.
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
    """Return a new key as (id, key)."""
    identity = secrets.token_hex(5)
    return identity, f"vnr-{identity}-{secrets.token_urlsafe(32)}"


def make_admin_key() -> str:
    """Return a new admin key. The key is not stored: pass the key or its hash to the server."""
    return f"vnr-admin-{secrets.token_urlsafe(32)}"


def key_id(key: str) -> str | None:
    """Return a key's id, or None if the text is not a key."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def hash_key(key: str, role: str = "trainer") -> str:
    """Return the hash of a key. Only the hash is stored.

    The hash of a key with another role than `trainer` covers the role. So a server of an earlier version,
    which knows no roles and runs beside this one during an upgrade, refuses the key instead of accepting the
    key with a trainer's permissions.
    """
    text = key if role == "trainer" else f"{role}:{key}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def matches_hash(key: str, stored_hash: str, role: str = "trainer") -> bool:
    """Return whether `stored_hash` is the hash of `key`, compared in constant time."""
    return hmac.compare_digest(hash_key(key, role), stored_hash)


def default_database() -> str:
    """Return the default location of the tenants' database."""
    return str(veneer_home() / "tenants.sqlite")


def database_here() -> str | None:
    """Return the default database's location if the database exists, otherwise None."""
    return default_database() if Path(default_database()).is_file() else None


def admin_hash(key: str) -> str:
    """Return the hash of an admin key. Raises ConfigError.

    `key`: the key itself, or `sha256:` and the key's hash.
    """
    if key.startswith("sha256:"):
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", key):
            raise ConfigError(
                "the admin key's hash is not a SHA-256 digest", fix="use sha256: followed by 64 hexadecimal digits"
            )
        return key.removeprefix("sha256:")
    if len(key) < 20:
        raise ConfigError(
            "the admin key is shorter than 20 characters", fix="create a key with: openssl rand -base64 32"
        )
    return hash_key(key)
