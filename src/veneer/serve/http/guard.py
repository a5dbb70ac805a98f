"""What a request must have before a route sees any of it: a permission, this server's Host, its own Origin.

    router = APIRouter(route_class=BodyRoute, dependencies=[needs("train")])      for all routes of a router
    @router.get("/metrics", dependencies=[needs("metrics")])                      for one of them

`BodyRoute` (bodies.py) asks for the permission before the body is read, and refuses a route that names none.

A browser sends requests of any page that a user visits: to servers on the user's machine, and under a name of that
page's own that resolves to this machine (DNS rebinding). So a server without keys answers to the hosts it is told, and
whatever could change something or carries a cookie must come from the server's own pages or from `--allowed-origin`.
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
from veneer.serve.settings import HttpSettings

HERE = ("localhost", "127.0.0.1", "::1")
_EXEMPT = ("/health", "/ping", "/ready", "/metrics")
"""Paths that answer under any Host: probes and scrapers call by IP."""
_SAFE = ("GET", "HEAD", "OPTIONS")
_UNASKED = ("", "text/plain", "application/x-www-form-urlencoded")
"""Types that a browser sends across sites without a preflight. So is multipart/form-data, which has its own routes."""
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Need:
    """The dependency that `needs` makes."""

    permission: Permission

    def __call__(self, request: Request) -> None:
        principal_of(request.scope).require(self.permission)


def needs(permission: Permission) -> Any:
    """A FastAPI dependency: the permission that a route needs. All that are named have to be there."""
    return Depends(Need(permission))


def permissions_of(dependencies: Iterable[Any]) -> list[Permission]:
    """The permissions that a route's or a router's dependencies name."""
    return [each.dependency.permission for each in dependencies if isinstance(each.dependency, Need)]


def principal_of(scope: Scope) -> Principal:
    """Who sent the request, as `serve.http.app.Door` established it."""
    principal: Principal = scope["veneer.principal"]
    return principal


def check_source(scope: Scope, settings: HttpSettings, keyless: bool) -> None:
    """Raises Refused (421, 403) for a request that a page of another site may have sent. `keyless`: of the Tenancy."""
    headers = Headers(scope=scope)
    if keyless and scope["path"] not in _EXEMPT:
        _check_host(headers, {*HERE, *settings.allowed_hosts})
    _check_origin(scope, headers, settings.allowed_origins)


def _check_host(headers: Headers, allowed: Collection[str]) -> None:
    """Raises Refused (421) for a Host that is none of `allowed`, of a server that needs no key."""
    if _hostname(headers.get("host", "")) not in allowed:
        raise Refused(
            f"a server without keys answers only to the Host {', '.join(sorted(filter(None, allowed)))}",
            status=421, code="misdirected", fix="start veneer serve with --allowed-host NAME, or with --api-keys",
        )  # fmt: skip


def _check_origin(scope: Scope, headers: Headers, allowed: Collection[str]) -> None:
    """Raises Refused (403) for what could change something, or carries a cookie, and comes from another site's page."""
    origin = headers.get("origin")
    if origin is None or _same_origin(origin, headers.get("host", "")) or origin in allowed:
        return
    cookie = "cookie" in headers
    changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
    if cookie or (changes and "*" not in allowed):
        raise Refused(
            "the request came from another site's page", status=403, code="forbidden",
            fix="to allow that page, start veneer serve with --allowed-origin",
        )  # fmt: skip


def check_content_type(scope: Scope, headers: Headers) -> None:
    """Raises Refused (415) for a body of a type that any page's form or script may send anywhere without asking."""
    has_body = headers.get("transfer-encoding") is not None or headers.get("content-length", "0") != "0"
    if scope["method"] not in _SAFE and has_body and (kind := media_type(headers)) in _UNASKED:
        raise Refused(
            f"unsupported Content-Type {kind}" if kind else "the body has no Content-Type", status=415,
            code="unsupported_media_type", fix="use application/json for JSON, application/octet-stream for a file",
        )  # fmt: skip


def media_type(headers: Headers) -> str:
    """The Content-Type without its parameters, in lower case."""
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
