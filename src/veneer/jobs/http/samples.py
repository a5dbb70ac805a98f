"""What a job has drawn: GET /v1/jobs/ID/samples/STEP, the sheet of sample pictures after a step, as PNG. A job is there
for who made it, and for the operator."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from veneer.errors import ConfigError
from veneer.jobs.steps import sample_file
from veneer.jobs.store import JobStore
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.guard import needs
from veneer.serve.http.service import caller_of
from veneer.serve.request import Refused


def sample_routes(jobs: JobStore) -> APIRouter:
    router = APIRouter(tags=["jobs"], route_class=BodyRoute, dependencies=[needs("train")])

    @router.get("/v1/jobs/{id}/samples/{step}", summary="The sample pictures that a job has drawn after a step.")
    async def sample(request: HttpRequest, id: str, step: int) -> Response:
        caller = caller_of(request)

        def found() -> Response:
            job = jobs.get(caller.owner, id)
            return FileResponse(sample_file(jobs, job, step), media_type="image/png")

        try:
            return await asyncio.to_thread(found)
        except ConfigError as error:  # no such job, or no such sheet
            raise Refused(error.what, status=404, code="not_found", param=error.where, fix=error.fix) from None

    return router
