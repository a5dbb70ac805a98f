"""Checks before a route handles a request: permission, Host, Origin and Content-Type.

    router = APIRouter(route_class=BodyRoute, dependencies=[needs("train")])      for all routes of a router
    @router.get("/metrics", dependencies=[needs("metrics")])                      for one route

`BodyRoute` (bodies.py) checks the permission before it reads the body. Every route must declare a
permission.

Any page that a user visits can make the browser send requests to servers on the user's machine. The page can
also use an attacker's domain that resolves to this machine (DNS rebinding). So a server without keys accepts
only known hosts, and a request that has a cookie or can change something must come from the server's own
pages or an `--allowed-origin`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from veneer.serve.principal import Permission, Principal
from veneer.serve.request import Refused
from veneer.serve.settings import HERE, HttpSettings

_EXEMPT = ("/health", "/ping", "/ready", "/metrics")
"""Paths that accept any Host, because probes and scrapers use IP addresses."""
_SAFE = ("GET", "HEAD", "OPTIONS")
_NO_PREFLIGHT = ("", "text/plain", "application/x-www-form-urlencoded")
"""Content types that browsers send across sites without a preflight.

Does not include multipart/form-data, which some routes accept."""
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Need:
    """The dependency that `needs` returns."""

    permission: Permission

    def __call__(self, request: Request) -> None:
        principal_of(request.scope).require(self.permission)


def needs(permission: Permission) -> Any:
    """Return a FastAPI dependency that requires a permission.

    A request needs the permissions of all its dependencies.
    """
    return Depends(Need(permission))


def permissions_of(dependencies: Iterable[Any]) -> list[Permission]:
    """Return the permissions that the dependencies of a route or router require."""
    return [each.dependency.permission for each in dependencies if isinstance(each.dependency, Need)]


def principal_of(scope: Scope) -> Principal:
    """Return the principal of the request, which `serve.http.app.AuthMiddleware` has set."""
    principal: Principal = scope["veneer.principal"]
    return principal


def check_source(scope: Scope, settings: HttpSettings, keyless: bool) -> None:
    """Raise Refused (421, 403) for a request that another site's page could have sent.

    `keyless`: the server accepts requests without a key (see Tenancy).
    """
    headers = Headers(scope=scope)
    hosts = {*HERE, *settings.allowed_hosts}
    if keyless and scope["path"] not in _EXEMPT and _hostname(headers.get("host", "")) not in hosts:
        message = f"a server without keys accepts only the Host {', '.join(sorted(filter(None, hosts)))}"
        fix = "name the Host in allowed_hosts of veneer serve --config, or use --api-keys"
        raise Refused(message, status=421, code="misdirected", fix=fix)
    _check_origin(scope, headers, settings.allowed_origins)


def _check_origin(scope: Scope, headers: Headers, allowed: Collection[str]) -> None:
    """Raise Refused (403) for a cross-site request that has a cookie or can change something."""
    origin = headers.get("origin")
    if origin is None or _same_origin(origin, headers.get("host", "")) or origin in allowed:
        return
    changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
    if "cookie" in headers or (changes and "*" not in allowed):
        fix = "to allow that page, start veneer serve with --allowed-origin"
        raise Refused("the request came from another site's page", status=403, code="forbidden", fix=fix)


def check_content_type(scope: Scope, headers: Headers) -> None:
    """Raise Refused (415) for a body type that browsers send without a preflight.

    Any site could send such a request."""
    has_body = headers.get("transfer-encoding") is not None or headers.get("content-length", "0") != "0"
    if scope["method"] not in _SAFE and has_body and (kind := media_type(headers)) in _NO_PREFLIGHT:
        message = f"unsupported Content-Type {kind}" if kind else "the body has no Content-Type"
        fix = "use application/json for JSON, application/octet-stream for a file"
        raise Refused(message, status=415, code="unsupported_media_type", fix=fix)


def media_type(headers: Headers) -> str:
    """Return the Content-Type in lower case, without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same_origin(origin: str, host: str) -> bool:
    try:
        page = urlsplit(origin)
        here, usual = urlsplit(f"{page.scheme}://{host}"), _PORTS.get(page.scheme)
        return usual is not None and (page.hostname, page.port or usual) == (here.hostname, here.port or usual)
    except ValueError:
        return False
