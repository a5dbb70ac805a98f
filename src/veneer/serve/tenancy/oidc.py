"""Tokens of an OpenID Connect issuer, accepted beside API keys.

    users = OidcUsers(OidcSettings("https://id.example.com", "veneer"))
    user = await users.user(token)                 tenant, roles and subject of a signed token

A token is a JWT that the issuer signed with one of its published keys (a JWKS). The algorithms are fixed here
and asymmetric, so neither a token nor the JWKS can choose `none`, or use a public key as a shared secret. The
server fetches the keys once an hour, and at most every ten seconds for an unknown key id, so invented key ids
cost no requests to the issuer. While the issuer does not answer, the keys that were fetched last are used for
a day.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError, MissingExtraError, quoted
from veneer.serve.principal import ROLES, Role
from veneer.serve.request import Refused
from veneer.serve.settings import OidcSettings

_log = logging.getLogger("veneer.serve.tenancy")

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"]
_MAX_TOKEN = 8 << 10
_MAX_BODY = 256 << 10
_MAX_KEYS = 64
_SECONDS = 5.0
"""Seconds that the issuer has for each answer."""
_FRESH, _USABLE, _PAUSE = 3600.0, 86400.0, 10.0
"""Seconds after which keys are fetched again, until which they can be used, and between two attempts."""
_LEEWAY = 30
"""Seconds by which the clocks of the issuer and the server can differ."""


@dataclass(frozen=True)
class OidcUser:
    """`subject`: the issuer's identifier of the user or service."""

    tenant: str
    roles: tuple[Role, ...]
    subject: str


def is_token(key: str) -> bool:
    """Return whether a bearer key has the form of a JWT, which no API key has."""
    return key.startswith("eyJ") and key.count(".") == 2


class OidcUsers:
    """The users of one issuer. Runs on the server's event loop."""

    def __init__(self, settings: OidcSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Contacts nobody. Raises ConfigError, MissingExtraError."""
        if not re.fullmatch(r"(https://|http://(localhost|127\.0\.0\.1)[:/])[^\s?#]+", settings.issuer):
            message = f"{quoted(settings.issuer)} is not the https:// address of an issuer of tokens"
            raise ConfigError(message, where="oidc.issuer", fix="use the issuer's exact URL, as in its tokens' iss")
        try:
            from joserfc.jwt import JWTClaimsRegistry
        except ImportError as error:
            raise MissingExtraError("tokens of an issuer need joserfc", extra="fleet") from error
        self.settings, self._clock = settings, clock
        needed: dict[str, Any] = {name: {"essential": True} for name in ("iss", "aud", "exp", "sub")}
        needed["iss"]["value"], needed["aud"]["value"] = settings.issuer, settings.audience
        self._claims = JWTClaimsRegistry(leeway=_LEEWAY, **needed)
        self._keys: Mapping[str, Any] = {}
        self._fetched = self._tried = float("-inf")
        self._lock = asyncio.Lock()

    async def user(self, token: str) -> OidcUser:
        """Return the user of a token.

        Raises Refused: 401 for a token that is not valid, 403 for one without a tenant or a role, and 503 if
        the issuer's keys cannot be fetched.
        """
        from joserfc import jwt
        from joserfc.errors import JoseError

        if len(token) > _MAX_TOKEN:
            raise _invalid()
        key = await self._key(_key_id(token))
        try:
            claims = jwt.decode(token, key, algorithms=_ALGORITHMS).claims
            self._claims.validate(claims)
        except (JoseError, ValueError, TypeError) as error:
            raise _invalid() from error
        names, subject = _claim(claims, self.settings.role_claim), str(claims["sub"])
        roles = [self.settings.roles.get(str(n), str(n)) for n in (names if isinstance(names, list) else [names])]
        known = tuple(role for role in ROLES if role in roles)
        tenant = _claim(claims, self.settings.tenant_claim)
        if not isinstance(tenant, str) or not known or not 0 < len(subject) <= 255 or not subject.isprintable():
            claims_read = f"{self.settings.tenant_claim!r} and {self.settings.role_claim!r}"
            raise token_refused(f"the token's claims {claims_read} name no tenant, or no role ({', '.join(ROLES)})")
        return OidcUser(tenant, known, subject)

    async def _key(self, kid: str) -> Any:
        """Return the issuer's key with this id; fetch the keys if they are old or lack it."""
        if (key := self._known(kid, _FRESH)) is None:
            key = self._known(kid, _USABLE)
            if key is None or not self._lock.locked():  # with a usable key, only one request waits for the issuer
                async with self._lock:
                    if self._known(kid, _FRESH) is None and self._clock() - self._tried >= _PAUSE:
                        await self._fetch()
                key = self._known(kid, _USABLE)
        if key is None:
            if self._fetched < self._tried:  # the last attempt failed, so the issuer could have this key
                message = "tokens cannot be checked now, because the issuer of tokens does not answer"
                raise Refused(message, status=503, code="overloaded", retry_after=_PAUSE)
            raise _invalid()
        return key

    def _known(self, kid: str, seconds: float) -> Any:
        if self._clock() - self._fetched > seconds:
            return None
        return next(iter(self._keys.values())) if not kid and len(self._keys) == 1 else self._keys.get(kid)

    async def _fetch(self) -> None:
        """Replace the keys with those that the issuer publishes; log a failure."""
        import httpx

        try:
            async with httpx.AsyncClient(timeout=_SECONDS) as client, asyncio.timeout(2 * _SECONDS):
                found = await _read_json(client, f"{self.settings.issuer.rstrip('/')}/.well-known/openid-configuration")
                if found["issuer"] != self.settings.issuer:
                    raise ValueError(f"the issuer calls itself {str(found['issuer'])[:200]!r}")
                self._keys = _public_keys(await _read_json(client, str(found["jwks_uri"])))
            self._fetched = self._clock()
        except Exception as error:  # whatever the issuer answers
            _log.warning("the keys of %s cannot be fetched: %s", self.settings.issuer, error or type(error).__name__)
            self._tried = self._clock()
        else:
            self._tried = self._fetched


async def _read_json(client: Any, url: str) -> Any:
    body = b""
    async with client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for chunk in answer.aiter_bytes():
            body += chunk
            if len(body) > _MAX_BODY:
                raise ValueError(f"{url} has more than {_MAX_BODY:,} bytes")
    return json.loads(body)


def _public_keys(jwks: Any) -> dict[str, Any]:
    """Return the usable signature keys of a JWKS by id. Keys of unknown types are left out."""
    from joserfc import jwk
    from joserfc.errors import JoseError

    keys = {}
    for each in jwks["keys"][:_MAX_KEYS]:
        if each.get("kty") in ("RSA", "EC", "OKP") and each.get("use", "sig") == "sig":
            try:
                keys[str(each.get("kid", ""))] = jwk.import_key(each)
            except (JoseError, ValueError, TypeError):
                _log.warning("a key of the issuer of tokens is not used, because it cannot be read")
    return keys


def _key_id(token: str) -> str:
    try:
        head = json.loads(base64.urlsafe_b64decode(f"{token.partition('.')[0]}==="))
        return str(head.get("kid", ""))
    except (ValueError, AttributeError, RecursionError) as error:
        raise _invalid() from error


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """Return a claim by its name, or by a path such as realm_access.roles; None if it is missing."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def token_refused(message: str) -> Refused:
    """Return the error for a valid token that gives no access to this server."""
    return Refused(message, status=403, code="forbidden", fix="ask the operator of the issuer or of this server")


def _invalid() -> Refused:
    fix = "get a new token for this server's audience, or use an API key"
    return Refused("the token is not valid", status=401, code="unauthorized", fix=fix)
