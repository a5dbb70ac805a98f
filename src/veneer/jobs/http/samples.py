"""GET /v1/jobs/ID/samples/STEP: a job's sample images after a step, as PNG.

Only the job's owner and the operator can see a job."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from veneer.errors import ConfigError
from veneer.jobs.http.route import thread_route
from veneer.jobs.step_actions import sample_file
from veneer.jobs.store import JobStore
from veneer.serve.http.guard import needs
from veneer.serve.http.service import caller_of
from veneer.serve.request import Refused


def sample_routes(jobs: JobStore) -> APIRouter:
    router = APIRouter(tags=["jobs"], route_class=thread_route("the table of jobs"), dependencies=[needs("train")])

    @router.get("/v1/jobs/{id}/samples/{step}", summary="Get a job's sample images after a step")
    def sample(request: HttpRequest, id: str, step: int) -> Response:
        try:
            job = jobs.get(caller_of(request).owner, id)
            return FileResponse(sample_file(jobs, job, step), media_type="image/png")
        except ConfigError as error:  # the job or the step does not exist
            raise Refused(error.what, status=404, code="not_found", param=error.where, fix=error.fix) from None

    return router
