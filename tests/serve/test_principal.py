"""Permissions: every kind of principal calls every route."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from fastapi import APIRouter, FastAPI

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, responses, toy_app
from veneer.jobs.http.files import file_routes
from veneer.jobs.http.tinker import training_routes
from veneer.jobs.http.tinker_samples import sampling_routes
from veneer.jobs.http.tinker_weights import weights_routes
from veneer.jobs.http.tuning import sample_routes, tuning_routes
from veneer.library.upload_stage import UploadStage
from veneer.serve.access import OpenAccess
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.guard import permissions_of
from veneer.serve.http.surfaces.adapters import adapter_routes
from veneer.serve.http.surfaces.feedback import feedback_routes
from veneer.serve.http.surfaces.images import images_routes
from veneer.serve.principal import PERMISSIONS, ROLES, STRANGER, Permission, Principal
from veneer.serve.request import Refused
from veneer.serve.tenancy.admin import admin_router, tenant_router
from veneer.studio.access import key_routes

KINDS = {
    "key": Principal("key"),
    "door": Principal("door"),
    "acme": Principal("tenant", "acme", lambda name: name.startswith("acme/")),
    "globex": Principal("tenant", "globex", lambda name: name.startswith("globex/")),
    "acme-caller": Principal("tenant", "acme", roles=("caller",)),
    "acme-auditor": Principal("tenant", "acme", roles=("auditor",)),
    "acme-owner": Principal("tenant", "acme", roles=("owner",)),
    "open": Principal("open"),
    "operator": Principal("operator"),
}
PUBLIC = {"/health", "/ping", "/ready", "/version", "/studio/enter", "/studio/leave"}
OPERATE = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"}
OPERATE |= {"/v1/lora_adapter/load", "/v1/lora_adapter/unload", "/v1/loras", "/v1/loras/{lora_name:path}"}
TRAIN = ("/v1/files", "/v1/uploads", "/v1/fine_tuning/", "/v1/jobs/", "/api/v1/")


def permission_of(method: str, path: str) -> Permission:
    """Return the permission that the documentation gives for a route."""
    if path in PUBLIC or "{signature}" in path:
        return "public"
    if path == "/metrics":
        return "metrics"
    if path.startswith("/admin"):
        return "administer"
    if path.startswith("/v1/tenant/"):
        return "keys" if path.startswith("/v1/tenant/keys") else "audit"
    if path in OPERATE:
        return "operate"
    if path.startswith(TRAIN) or (method, path) == ("DELETE", "/v1/models/{model:path}"):
        return "train"
    if path.startswith("/v1/feedback"):
        return "feedback"
    if path.startswith("/v1/adapter"):
        changes = path.startswith("/v1/adapters") and method != "GET"
        return "write" if changes else "read"
    return "infer"


class ByName(OpenAccess):
    """A tenancy in which each principal's name is also its key."""

    keyless = False

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        if key not in KINDS:
            raise Refused("no valid API key", status=401, code="unauthorized")
        return KINDS[key]


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    staging, nothing = UploadStage(1 << 20), MagicMock()  # placeholders: denied requests never reach these objects
    makers = (feedback_routes, file_routes, tuning_routes, sample_routes, training_routes, sampling_routes)
    routers = [images_routes, key_routes(ByName()), *(each(nothing) for each in (*makers, weights_routes))]
    routers += [adapter_routes(nothing, staging, ByName()), admin_router(nothing, ToyCatalog())]
    routers.append(tenant_router(nothing))
    yield toy_app(ToyEngine(ToyText()), ToyCatalog(), ByName(), routers=routers, unguarded=("/studio",))
    staging.close()


def routes_of(app: FastAPI) -> list[tuple[str, str, BodyRoute]]:
    found = []
    for each in app.router.routes:
        inner = getattr(each, "original_router", None)
        for route in inner.routes if isinstance(inner, APIRouter) else ():
            found += [(method, route.path, route) for method in sorted(route.methods)]
    return found


def test_every_route_names_the_documented_permission(app: FastAPI) -> None:
    found = routes_of(app)
    assert len(found) > 90
    wrong = []
    for method, path, route in found:
        named = set(permissions_of(route.dependencies))
        if permission_of(method, path) not in named or not named <= {permission_of(method, path), "infer", "read"}:
            wrong.append((method, path, named))
    assert not wrong


@pytest.mark.parametrize("name", [*KINDS, None])
def test_a_route_is_refused_without_its_permission(app: FastAPI, name: str | None) -> None:
    """The permission is checked before the body is read.

    So a denied request with invalid JSON gets 401 or 403, not an error about its body.
    """
    principal = STRANGER if name is None else KINDS[name]

    headers = {"content-type": "application/json"} | ({} if name is None else {"authorization": f"Bearer {name}"})
    requests = [
        {"method": method, "url": path, "headers": headers, "content": b"{not json"}
        for method, path, route in routes_of(app)
        if not all(principal.can(each) for each in permissions_of(route.dependencies))
    ]
    for answer in responses(app, requests):
        assert answer.status_code == (401 if name is None else 403), (answer.request, answer.text)


def test_a_route_is_allowed_with_its_permission(app: FastAPI) -> None:
    wanted = {(name, path): 200 for name in KINDS for path in ("/v1/models", "/health", "/info")}
    wanted |= {("acme-auditor", path): 403 for path in ("/v1/models", "/info")}
    wanted |= {
        ("key", "/metrics"): 200,
        ("door", "/metrics"): 200,
        ("acme", "/metrics"): 403,
        ("operator", "/metrics"): 200,
    }
    wanted["open", "/metrics"] = 200
    requests = [{"method": "GET", "url": path, "headers": {"authorization": f"Bearer {n}"}} for n, path in wanted]
    assert [answer.status_code for answer in responses(app, requests)] == [*wanted.values()]


def test_a_route_without_a_named_permission_is_an_error() -> None:
    router, plain = APIRouter(route_class=BodyRoute), APIRouter()
    for each in (router, plain):

        @each.get("/forgotten")
        async def forgotten() -> dict[str, int]:
            return {"secret": 1}

        with pytest.raises(ValueError, match="/forgotten declares no permission"):
            toy_app(ToyEngine(ToyText()), ToyCatalog(), routers=[each])
    app = FastAPI()
    app.include_router(router)

    async def enters(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "veneer.principal": Principal("operator")}, receive, send)

    with pytest.raises(Refused) as refused:
        responses(enters, [{"method": "GET", "url": "/forgotten"}])
    assert refused.value.status == 403


def test_a_tenant_changes_its_namespace_and_a_key_nothing() -> None:
    for name, own, other in (("acme", True, False), ("globex", False, True), ("key", False, False)):
        assert (KINDS[name].can_change("acme/x"), KINDS[name].can_change("globex/x")) == (own, other)
        assert not KINDS[name].can_change("acme")
    assert KINDS["operator"].can_change("acme/x")
    assert KINDS["open"].can_change("x")
    assert Principal("key").owner == "" != KINDS["operator"].owner


def test_permissions_grow_from_stranger_to_operator() -> None:
    assert PERMISSIONS["stranger"] < PERMISSIONS["key"] < PERMISSIONS["open"] < PERMISSIONS["operator"]
    assert PERMISSIONS["stranger"] < PERMISSIONS["tenant"] < PERMISSIONS["open"]
    assert PERMISSIONS["stranger"] < ROLES["caller"] < ROLES["trainer"] < ROLES["owner"] < PERMISSIONS["operator"]
    assert PERMISSIONS["stranger"] < ROLES["auditor"] < ROLES["owner"]
    assert not ROLES["auditor"] & (ROLES["trainer"] - PERMISSIONS["stranger"])
    assert not {"metrics", "operate", "administer"} & ROLES["owner"]
    both = Principal("tenant", "acme", roles=("caller", "auditor"))
    assert [both.can(each) for each in ("infer", "audit", "train")] == [True, True, False]
