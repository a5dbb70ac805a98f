"""The routes under /admin, which require the admin key, and those under /v1/tenant for a tenant's own records.

They cover tenants, keys, settings, routes, usage and the audit log.

    app.include_router(admin_router(tenants, catalog))
    app.include_router(tenant_router(tenants))

Bodies are strict: an unknown key is an error. Errors have OpenAI's format. Names of routes and adapters,
which can contain a slash, are sent in bodies and queries, not in paths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from veneer.errors import ConfigError, VeneerError
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.guard import needs, principal_of
from veneer.serve.principal import Role
from veneer.serve.request import Refused, invalid
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.ledger import BY, as_csv, usage
from veneer.serve.tenancy.store import ALL, EACH, Store, UnknownName, check_tenant
from veneer.serve.tenancy.tenants import Tenants
from veneer.serve.transient import internal_error, is_transient

if TYPE_CHECKING:
    from veneer.serve.names.catalog import Catalog

_WHO = "admin"
_Lines: TypeAlias = Annotated[int, Query(ge=1, le=1000)]
_Skipped: TypeAlias = Annotated[int, Query(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewTenant(_Body):
    name: str
    weight: float = 1.0
    adapters: list[str] = []


class SettingsBody(manage.SettingsChange):
    """A change of settings; null removes a value."""

    model_config = ConfigDict(strict=True)


class NewKey(_Body):
    label: str = ""
    expires: str | None = Field(None, description="90d, 12h, 30m, or a day such as 2027-01-31")
    role: Role = "trainer"


class Target(_Body):
    adapter: str
    weight: int = 1


class RouteBody(_Body):
    route: str
    tenant: str = ALL
    targets: list[Target]
    shadow: str | None = None
    fraction: float = 1.0
    force: bool = Field(False, description="do not check whether the targets can be served")
    dry_run: bool = Field(False, description="return the change, but do not make it")


class RouteName(_Body):
    route: str
    tenant: str = ALL
    force: bool = False
    dry_run: bool = False


def admin_router(tenants: Tenants, catalog: Catalog) -> APIRouter:
    """Return the admin routes of a server whose `tenants` have an admin key."""
    router = APIRouter(prefix="/admin", tags=["admin"], route_class=AdminRoute, dependencies=[needs("administer")])
    store = tenants.store
    _tenants(router, store)
    _keys(router, store)
    _routes(router, store, catalog)
    _records(router, store, catalog)
    return router


def tenant_router(tenants: Tenants) -> APIRouter:
    """Return the routes for a tenant's own keys, usage and audit log. The operator has `admin_router`."""
    router = APIRouter(prefix="/v1/tenant", tags=["tenant"], route_class=AdminRoute)
    store, keys, audit = tenants.store, [needs("keys")], [needs("audit")]

    def own(request: Request) -> str:
        if tenant := principal_of(request.scope).tenant:
            return tenant
        raise invalid("the admin key belongs to no tenant", fix="use the routes under /admin")

    @router.get("/keys", dependencies=keys)
    def list_keys(tenant: str = Depends(own)) -> dict[str, Any]:
        return _keys_json(store, tenant)

    @router.post("/keys", status_code=201, dependencies=keys)
    def make_key(request: Request, body: NewKey, tenant: str = Depends(own)) -> dict[str, Any]:
        return _new_key(store, tenant, body, principal_of(request.scope).actor)

    @router.delete("/keys/{key}", dependencies=keys)
    def revoke_key(request: Request, key: str, tenant: str = Depends(own)) -> dict[str, Any]:
        actor = principal_of(request.scope).actor
        return manage.show_key(manage.revoke_key(store, key, tenant=tenant, actor=actor))

    @router.get("/usage", response_model=None, dependencies=audit)
    def show_usage(
        by: str = "adapter,day",
        adapter: str | None = None,
        since: str = "",
        until: str = "",
        format: Literal["json", "csv"] = "json",
        tenant: str = Depends(own),
    ) -> Response | dict[str, Any]:
        return _usage_response(store, by, format, tenant=tenant, adapter=adapter, since=since, until=until)

    @router.get("/audit", dependencies=audit)
    def show_audit(
        what: str = "", limit: _Lines = 100, skip: _Skipped = 0, tenant: str = Depends(own)
    ) -> dict[str, Any]:
        with store.reading() as c:
            return {"lines": manage.audit_lines(c, tenant=tenant, action=what, limit=limit, skip=skip)}

    return router


def _keys_json(store: Store, tenant: str) -> dict[str, Any]:
    now = time.time()
    return {"keys": [manage.show_key(k) | {"state": k.state(now)} for k in manage.list_keys(store, tenant)]}


def _new_key(store: Store, tenant: str, body: NewKey, actor: str) -> dict[str, Any]:
    expires = manage.when(body.expires, time.time()) if body.expires else None
    row, key = manage.make_tenant_key(store, tenant, label=body.label, expires=expires, role=body.role, actor=actor)
    return {**manage.show_key(row), "key": key}


def _usage_response(store: Store, by: str, format: str, **filters: Any) -> Response | dict[str, Any]:
    names = [name for name in by.split(",") if name]
    with store.reading() as c:
        rows = usage(c, by=names, **filters)
    return PlainTextResponse(as_csv(rows, names), media_type="text/csv") if format == "csv" else {"usage": rows}


def _tenants(router: APIRouter, store: Store) -> None:
    @router.get("/tenants")
    def list_tenants() -> dict[str, Any]:
        settings = store.refresh()
        return {"tenants": [manage.show_settings(settings, name) for name in settings.tenants]}

    @router.post("/tenants", status_code=201)
    def add_tenant(body: NewTenant) -> dict[str, Any]:
        return asdict(manage.add_tenant(store, body.name, weight=body.weight, adapters=body.adapters, actor=_WHO))

    @router.get("/tenants/{tenant}")
    def show_tenant(tenant: str) -> dict[str, Any]:
        return manage.show_settings(store.refresh(), manage.get_tenant(store, tenant).name)

    @router.patch("/tenants/{tenant}")
    def change_tenant(tenant: str, body: SettingsBody, adapter: str = ALL) -> dict[str, Any]:
        values = body.model_dump(exclude_unset=True)
        return manage.change_settings(store, check_tenant(tenant), values, adapter=adapter, actor=_WHO)

    @router.delete("/tenants/{tenant}")
    def remove_tenant(tenant: str) -> dict[str, Any]:
        manage.remove_tenant(store, tenant, actor=_WHO)
        return {"removed": tenant}

    @router.get("/settings")
    def show_settings() -> dict[str, Any]:
        settings = store.refresh()
        return {"settings": [manage.show_settings(settings, ALL), manage.show_settings(settings, EACH)]}

    @router.patch("/settings")
    def change_settings(body: SettingsBody, tenant: Literal["all", "*"] = "all", adapter: str = ALL) -> dict[str, Any]:
        values = body.model_dump(exclude_unset=True)
        return manage.change_settings(store, ALL if tenant == "all" else EACH, values, adapter=adapter, actor=_WHO)


def _keys(router: APIRouter, store: Store) -> None:
    @router.get("/tenants/{tenant}/keys")
    def list_keys(tenant: str) -> dict[str, Any]:
        return _keys_json(store, tenant)

    @router.post("/tenants/{tenant}/keys", status_code=201)
    def make_key(tenant: str, body: NewKey) -> dict[str, Any]:
        return _new_key(store, tenant, body, _WHO)

    @router.delete("/tenants/{tenant}/keys/{key}")
    def revoke_key(tenant: str, key: str) -> dict[str, Any]:
        return manage.show_key(manage.revoke_key(store, key, tenant=tenant, actor=_WHO))


def _routes(router: APIRouter, store: Store, catalog: Catalog) -> None:
    @router.get("/routes")
    def list_routes() -> dict[str, Any]:
        return {"routes": [routes.route_fields(route) for route in store.refresh().routes.values()]}

    @router.put("/routes")
    def set_route(body: RouteBody) -> dict[str, Any]:
        targets = [(t.adapter, t.weight) for t in body.targets]
        more: dict[str, Any] = {"tenant": body.tenant, "shadow": body.shadow, "fraction": body.fraction}
        if body.route == catalog.base:
            message = f"{body.route} is the base's name, which a route cannot have"
            raise ConfigError(message, where="route", fix="another name")
        now = store.refresh().routes.get((body.tenant, body.route))
        route_after = routes.planned_route(now, body.route, targets, **more)
        if not body.dry_run:
            check = None if body.force else catalog.check
            route_after = routes.set_route(store, body.route, targets, actor=_WHO, check=check, **more)
        return {**routes.route_fields(route_after), "change": routes.route_change(now, route_after)}

    @router.delete("/routes")
    def remove_route(route: str, tenant: str = ALL) -> dict[str, Any]:
        routes.remove_route(store, route, tenant=tenant, actor=_WHO)
        return {"removed": route, "tenant": tenant}

    @router.post("/routes/rollback")
    def rollback(body: RouteName) -> dict[str, Any]:
        with store.reading() as c:
            now, route_after = routes.earlier_route(c, body.route, tenant=body.tenant)
        if not body.dry_run:
            check = None if body.force else catalog.check
            route_after = routes.rollback_route(store, body.route, tenant=body.tenant, actor=_WHO, check=check)
        return {**routes.route_fields(route_after), "change": routes.route_change(now, route_after)}

    @router.get("/routes/history")
    def history(route: str, tenant: str = ALL) -> dict[str, Any]:
        with store.reading() as c:
            return {"moves": routes.route_history(c, route, tenant=tenant)}

    @router.get("/shadows")
    def shadow_log(route: str = "", limit: _Lines = 100) -> dict[str, Any]:
        with store.reading() as c:
            summary = routes.shadow_summary(c, route=route)
            return {"summary": summary, "comparisons": routes.shadow_log(c, route=route, limit=limit)}


def _records(router: APIRouter, store: Store, catalog: Catalog) -> None:
    @router.get("/residents")
    def list_residents() -> dict[str, Any]:
        return {"residents": [{"adapter": name, **asdict(each)} for name, each in catalog.in_memory()]}

    @router.get("/usage", response_model=None)
    def show_usage(
        by: str = ",".join(BY),
        tenant: str | None = None,
        adapter: str | None = None,
        since: str = "",
        until: str = "",
        format: Literal["json", "csv"] = "json",
    ) -> Response | dict[str, Any]:
        return _usage_response(store, by, format, tenant=tenant, adapter=adapter, since=since, until=until)

    @router.get("/audit")
    def show_audit(subject: str = "", what: str = "", limit: _Lines = 100, skip: _Skipped = 0) -> dict[str, Any]:
        with store.reading() as c:
            return {"lines": manage.audit_lines(c, subject=subject, action=what, limit=limit, skip=skip)}

    @router.get("/audit/verify")
    def verify(expect: str = "") -> dict[str, Any]:
        with store.reading() as c:
            head, count, faults = manage.audit_faults(c, expect)
        return {"ok": not faults, "head": head, "lines": count, "faults": faults}


class AdminRoute(BodyRoute):
    """An operator's route, which refuses unknown query parameters."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()
        queries = sorted(str(p.alias) for p in self.dependant.query_params)

        async def handle(request: Request) -> Response:
            for name in request.query_params:
                if name not in queries:
                    raise invalid(f"unknown key {name[:100]}", name, f"of {', '.join(queries)}")
            try:
                return await inner(request)
            except Refused:
                raise
            except (VeneerError, SQLAlchemyError, OSError) as error:
                if not isinstance(error, VeneerError) or is_transient(error):
                    raise internal_error("the tenants' database", error) from error
                status, code = (404, "not_found") if isinstance(error, UnknownName) else (400, "invalid_request")
                raise Refused(error.what, status=status, code=code, param=error.where, fix=error.fix) from error

        return handle
