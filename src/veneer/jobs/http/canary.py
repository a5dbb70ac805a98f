"""Operator's routes that promote or roll back a job's adapter.

POST /admin/jobs/ID/promote, /rollback       the new route or alias; null if it was removed
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from veneer.jobs.canary import promote_job, rollback_job
from veneer.jobs.store import JobStore, UnknownJob
from veneer.serve.http.guard import needs
from veneer.serve.tenancy.admin import AdminRoute
from veneer.serve.tenancy.store import UnknownName
from veneer.serve.tenancy.tenants import Tenants


def canary_routes(jobs: JobStore, tenants: Tenants) -> APIRouter:
    """Return the routes, for a server whose `tenants` have an admin key."""
    router = APIRouter(prefix="/admin/jobs", tags=["admin"], route_class=AdminRoute, dependencies=[needs("administer")])

    def changes(what: str, change: Any) -> None:
        @router.post(f"/{{job}}/{what}", name=f"{what} a job")
        def moved(job: str) -> dict[str, Any]:
            try:
                placement = change(jobs, tenants.store, None, job)
            except UnknownJob as error:
                raise UnknownName(error.what, where=error.where, fix=error.fix) from error
            return {"job": job, **placement.json}

    changes("promote", promote_job)
    changes("rollback", rollback_job)
    return router
