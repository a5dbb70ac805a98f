"""Routes for jobs: OpenAI's fine-tuning, its events, checkpoints and tuned models; sample images.

    POST /v1/fine_tuning/jobs        model, training_file and the other fields of `jobs.openai.TuningBody`; also
                                     `after`: actions after training, with file ids instead of paths
    GET  …/jobs, …/jobs/ID, …/jobs/ID/events, …/jobs/ID/checkpoints
    POST …/jobs/ID/cancel, /pause, /resume
    DELETE /v1/models/ft:…           deletes one of the tenant's own tuned models
    GET  /v1/jobs/ID/samples/STEP    a job's sample images after a step, as PNG; also for the operator

The other model routes also accept the names of tuned models. A job is visible only to its owner.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from veneer.errors import ConfigError, quoted
from veneer.jobs.checkpoints import sample_file
from veneer.jobs.files import Files, UploadedFile
from veneer.jobs.http.files import openai_page
from veneer.jobs.http.route import blocking, thread_route
from veneer.jobs.input_files import LINE_FILES, copy_input, remove_inputs
from veneer.jobs.openai import (
    METRIC_KINDS,
    FormSettings,
    TuningBody,
    checkpoint_id,
    checkpoint_to_openai,
    event_number,
    event_to_openai,
    job_to_openai,
    result_file,
    suffix_of,
    tuning_config,
)
from veneer.jobs.post_training import AfterJob, check_after
from veneer.jobs.store import UNFINISHED, Job, JobStore, UnknownJob, WrongState
from veneer.library.library import NotInLibrary
from veneer.library.names import name_of, new_tuned, parse_tuned
from veneer.serve.engine.admission import FairPool
from veneer.serve.http.errors import Json
from veneer.serve.http.guard import needs
from veneer.serve.http.service import Service, caller_of, service_of
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, invalid
from veneer.serve.settings import QuotaLimits
from veneer.serve.tenancy.store import Store
from veneer.train.config.load import config_from
from veneer.train.config.section import BASE_MODEL
from veneer.train.rewards.graders import MultiGrader, ScoreModelGrader, has_python, parse_grader
from veneer.train.rewards.sandbox import Sandbox

_TABLE = "the table of jobs"
_PAGE = 100
_LINES = (".jsonl",)
_HELD_OUT, _HELD_ROWS, _HELD_TOKENS = 16, 1000, 1024
"""Limits on a client's evaluation: number of files, rows, and tokens per completion."""

_Limit = Annotated[int, Query(ge=1, le=_PAGE)]
_After = Annotated[str | None, Query(max_length=100)]


def tuning_routes(queue: TuningQueue) -> APIRouter:
    """Return the routes for fine-tuning, which add jobs to `queue`."""
    jobs, files = queue.jobs, queue.files
    router = APIRouter(tags=["OpenAI fine-tuning"], route_class=thread_route(_TABLE), dependencies=[needs("train")])

    @router.post("/v1/fine_tuning/jobs", summary="Fine-tune the base or a tuned model on an uploaded file")
    async def create(request: HttpRequest, body: TuningBody) -> Response:
        job = await queue.create(service_of(request), caller_of(request), body)
        return Json(job_to_openai(job), headers=body.headers)

    @router.get("/v1/fine_tuning/jobs", summary="List the caller's jobs, newest first")
    def listed(request: HttpRequest, limit: _Limit = 20, after: _After = None) -> Any:
        if any(key.startswith("metadata") for key in request.query_params):
            raise invalid("this server cannot filter jobs by metadata", "metadata")
        page_jobs, more = _openai_jobs(jobs, caller_of(request).tenant, after, limit)
        return {"object": "list", "data": [job_to_openai(job) for job in page_jobs], "has_more": more}

    @router.get("/v1/fine_tuning/jobs/{id}", summary="Get a job")
    def retrieve(request: HttpRequest, id: str) -> Any:
        job = _job(jobs, caller_of(request).tenant, id)
        return job_to_openai(job, _results(jobs, files, job))

    def changes(action: str, summary: str, change: Callable[[str, str], Job]) -> None:
        @router.post(f"/v1/fine_tuning/jobs/{{id}}/{action}", summary=summary, name=action)
        def changed(request: HttpRequest, id: str) -> Any:
            job = _job(jobs, caller_of(request).tenant, id)
            try:
                return job_to_openai(change(job.tenant, id))
            except WrongState as error:
                param, fix = "fine_tune_id", error.fix
                raise Refused(error.what, status=400, code="wrong_state", param=param, fix=fix) from error

    changes("cancel", "Cancel a job", jobs.cancel)
    changes("pause", "Pause a job", jobs.pause)
    changes("resume", "Resume a paused job from its last checkpoint", jobs.resume)

    @router.get("/v1/fine_tuning/jobs/{id}/events", summary="List a job's events, newest first")
    def events(request: HttpRequest, id: str, limit: _Limit = 20, after: _After = None) -> Any:
        job = _job(jobs, caller_of(request).tenant, id)
        number = 0 if after is None else event_number(job, after)
        if number is None:
            raise invalid(f"the job has no event {quoted(str(after))}", "after")
        page_events, more = jobs.events(job.tenant, id, after=number, limit=limit, newest=True, diagnostics=False)
        job = jobs.get(job.tenant, id)  # read after the events, because the job's state decides what the events show
        return {"object": "list", "data": [event_to_openai(job, event) for event in page_events], "has_more": more}

    @router.get("/v1/fine_tuning/jobs/{id}/checkpoints", summary="List a job's published checkpoints, newest first")
    def checkpoints(request: HttpRequest, id: str, limit: _Limit = 10, after: _After = None) -> Any:
        job = _job(jobs, caller_of(request).tenant, id)
        points = [point for point in jobs.checkpoints(job.tenant, id) if point.reference]
        ids = [checkpoint_id(job, point.step) for point in points]
        if after is not None and after not in ids:
            raise invalid(f"the job has no checkpoint {quoted(after)}", "after")
        first = 0 if after is None else ids.index(after) + 1
        data = [checkpoint_to_openai(job, point) for point in points[first : first + limit]]
        return openai_page(data, first + limit < len(points))

    @router.delete("/v1/models/{model:path}", summary="Delete a tuned model or one of its checkpoints")
    def remove(request: HttpRequest, model: str) -> Any:
        principal, library = caller_of(request), jobs.library
        # Raises Refused (404) if the model does not exist or is not visible.
        service_of(request).catalog.card(model, principal)
        tuned = parse_tuned(model)
        if tuned is None or tuned.organisation != principal.tenant:
            message = f"the model {quoted(model)} cannot be deleted here"
            fix = "you can delete only your own fine-tuned models: ft:…"
            raise Refused(message, status=403, code="forbidden", param="model", fix=fix)
        try:
            reference = tuned.reference if tuned.step is None else library.find(tuned.reference).reference
            library.remove(reference, with_aliases=True)
        except NotInLibrary as error:
            raise Refused("The model does not exist.", status=404, code="model_not_found", param="model") from error
        return {"id": model, "object": "model", "deleted": True}

    return router


def sample_routes(jobs: JobStore) -> APIRouter:
    """Return the route for jobs' sample images."""
    router = APIRouter(tags=["jobs"], route_class=thread_route(_TABLE), dependencies=[needs("train")])

    @router.get("/v1/jobs/{id}/samples/{step}", summary="Get a job's sample images after a step")
    def sample(request: HttpRequest, id: str, step: int) -> Response:
        try:
            job = jobs.get(caller_of(request).owner, id)
            return FileResponse(sample_file(jobs, job, step), media_type="image/png")
        except ConfigError as error:  # the job or the step does not exist
            raise Refused(error.what, status=404, code="not_found", param=error.where, fix=error.fix) from None

    return router


class TuningQueue:
    """Queues jobs from OpenAI's route and from the Studio's form.

    `sandbox`: runs Python graders; if None, jobs with Python graders are refused."""

    def __init__(
        self, jobs: JobStore, files: Files, tenants: Store | None = None, sandbox: Sandbox | None = None
    ) -> None:
        self.jobs, self.files, self.tenants, self.sandbox = jobs, files, tenants, sandbox
        self.copying = FairPool(1, "veneer-inputs")  # copies inputs, which can be gigabytes from a remote store
        self.previewing = FairPool(1, "veneer-rows")  # reads the first rows of files

    async def create(
        self, service: Service, principal: Principal, body: TuningBody, settings: FormSettings | None = None
    ) -> Job:
        """Queue a job on the caller's uploaded files. Raises Refused.

        settings: additional settings from the Studio's form."""
        do = partial(self._create, service, principal, body, settings)
        return await blocking(_TABLE, do, lambda work: self.copying.run(principal.tenant, principal.weight, 1, work))

    def _create(self, service: Service, principal: Principal, body: TuningBody, settings: FormSettings | None) -> Job:
        tenant, jobs, files, grader = principal.tenant, self.jobs, self.files, None
        start = _initial_adapter(service, principal, body.model)
        if body.reinforced is not None:
            grader = _resolve_grader(service, principal, _parse_grader(body.reinforced.grader, self.sandbox))
        training = _file(files, tenant, body.training_file, "training_file", _LINES if settings is None else LINE_FILES)
        validation = body.validation_file and _file(files, tenant, body.validation_file, "validation_file")
        ids = body.after.evaluate.files if body.after is not None and body.after.evaluate is not None else []
        if len(ids) > _HELD_OUT:
            raise invalid(f"{len(ids)} files of held-out rows; the maximum is {_HELD_OUT}", "after.evaluate.data")
        held_out = [_file(files, tenant, each, "after.evaluate.data") for each in ids]
        size = sum(file.bytes for file in (training, validation, *held_out) if file)
        _check_unfinished(jobs, tenant, size, files.quotas.limits)
        tuned = new_tuned(service.catalog.base, tenant, suffix_of(body.suffix))
        shown_keys = {"model", "training_file", "validation_file", "suffix", "metadata"}
        request = body.model_dump(mode="json", include=shown_keys)
        request |= {"kind": body.kind, "hyperparameters": body.numbers.model_dump(), "tuned": str(tuned)}
        request["after"] = None if body.after is None else body.after.model_dump(mode="json", exclude_unset=True)
        if body.reinforced is not None and grader is not None:
            # The request is stored with the client's grader; the run uses the resolved grader.
            request["reinforcement"] = body.reinforced.to_json()
            body.reinforced.grader = grader
        metadata: dict[str, Any] = {"openai": request, "input": tuned.id, "bytes": size, "publish": "checkpoints"}
        try:
            uploads = {"train": training} | ({"validation": validation} if validation else {})
            paths = {part: copy_input(files, tuned.id, part, file) for part, file in uploads.items()}
            base, length = service.reader.name, service.reader.context
            config = tuning_config(body, settings, base=base, start=start, files=paths, length=length)
            if body.after is not None:
                after = _after(files, tuned.id, body.after, held_out)
                plain, _ = config_from({**config, "output": {"directory": str(paths["train"].parent)}})
                check_after(after, plain, name_of(tuned.reference), tenant, self.tenants)
                metadata["after"] = after.model_dump(mode="json")
            if tenant:
                service.tenancy.grant_namespace(tenant)
            return jobs.create(tenant, config, name=tuned.last, about=metadata)
        except BaseException:
            remove_inputs(tuned.id)
            raise


# -- jobs --------------------------------------------------------------------------------------------------------------


def _initial_adapter(service: Service, principal: Principal, model: str) -> str | None:
    """Return the adapter from which training continues; None for the base.

    Raises Refused if the model is not served here."""
    base = service.catalog.base
    if service.engine.makes != "texts":
        message = "this server generates pictures, but fine-tuning jobs need a text model"
        raise invalid(message, "model", "see `veneer train`")
    if model == base:
        return None
    if (tuned := parse_tuned(model)) is not None and tuned.base == base:
        return service.catalog.resolve(model, principal).adapters[0]
    message = f"The model {quoted(model)} is not served here, so it cannot be fine-tuned"
    fix = f"model={base!r}, or a model that was fine-tuned from it"
    raise Refused(message, status=400, code="model_not_available", param="model", fix=fix)


def _parse_grader(source: Any, sandbox: Sandbox | None) -> Any:
    """Parse a client's grader. This call blocks.

    Raises Refused if the grader is invalid, or if it is a Python grader and there is no sandbox; the Python
    source is then not parsed."""
    param = "method.reinforcement.grader"
    if sandbox is None and has_python(source):
        fix = "the operator can allow Python graders: veneer serve --train --python-graders"
        message, param = "this server does not run Python graders", f"{param}.type"
        raise Refused(message, status=403, code="grader_not_allowed", param=param, fix=fix)
    return parse_grader(source, param)


def _resolve_grader(service: Service, principal: Principal, grader: Any) -> dict[str, Any]:
    """Return a job's grader, with the clients' model names replaced by the run's names.

    Raises Refused if the caller cannot use one of the models."""

    def named(each: Any) -> Any:
        if not isinstance(each, ScoreModelGrader):
            return each
        resolved = service.catalog.resolve(each.model, principal)
        return each.model_copy(update={"model": resolved.adapters[0] if resolved.mix else BASE_MODEL})

    if isinstance(grader, MultiGrader):
        grader = grader.model_copy(update={"graders": {name: named(each) for name, each in grader.graders.items()}})
    values: dict[str, Any] = named(grader).model_dump(mode="json", exclude_unset=True)
    return values


def _check_unfinished(jobs: JobStore, tenant: str, more: int, limits: QuotaLimits) -> None:
    """Check the number and the total input bytes of a tenant's unfinished jobs. Raises Refused.

    The limit on bytes is separate from uploads: a job keeps its inputs even if the client deletes the uploaded
    files, and with a remote store each job has its own copies."""
    unfinished, _ = jobs.jobs(tenant, limit=1000, states=UNFINISHED)
    used = sum(int(job.about.get("bytes", 0)) for job in unfinished)
    fix = "wait until jobs finish, or cancel some"
    if len(unfinished) >= limits.jobs:
        message = f"{limits.jobs:,} jobs are not finished, and that is the limit (jobs)"
        raise Refused(message, status=429, code="rate_limit_exceeded", retry_after=60.0, fix=fix)
    if used + more > limits.disk:
        message = f"the inputs of unfinished jobs have {used:,} bytes; {more:,} more would exceed {limits.disk:,}"
        raise Refused(message, status=400, code="storage_full", param="training_file", fix=fix)


def _after(files: Files, id: str, after: AfterJob, uploads: Sequence[UploadedFile]) -> AfterJob:
    """Return the request's `after` section, with paths instead of file ids.

    Raises Refused."""
    if after.evaluate is None:
        return after
    for key, most in {"limit": _HELD_ROWS, "max_new_tokens": _HELD_TOKENS}.items():
        if (getattr(after.evaluate, key) or 0) > most:
            raise invalid(f"at most {most:,}, because evaluations are not billed", f"after.evaluate.{key}")
    held_out = after.evaluate.model_copy(update={"limit": after.evaluate.limit or _HELD_ROWS})
    after = after.model_copy(update={"evaluate": held_out})
    paths = [str(copy_input(files, id, f"held-out/{n}", file)) for n, file in enumerate(uploads)]
    return after.on(paths) if paths else after


def _file(files: Files, tenant: str, id: str, param: str, endings: tuple[str, ...] = _LINES) -> UploadedFile:
    try:
        upload = files.get(tenant, id)
    except Refused as error:
        if error.status != 404:
            raise
        message, fix = f"invalid {param}: there is not a file {quoted(id)}", "upload it first: POST /v1/files"
        raise Refused(message, status=400, code="file_not_found", param=param, fix=fix) from error
    if upload.purpose != "fine-tune" or not upload.filename.lower().endswith(endings):
        message, fix = f"invalid {param}: {quoted(upload.filename)} is not a training file", "JSON lines: .jsonl"
        raise Refused(message, status=400, code="invalid_file_format", param=param, fix=fix)
    return upload


def _job(jobs: JobStore, tenant: str, id: str) -> Job:
    """Return a tenant's job. Raises Refused if it does not exist or another API created it."""
    with suppress(UnknownJob):
        job = jobs.get(tenant, id)
        if "openai" in job.about:
            return job
    message = f"Could not find fine tune: {id[:100]}"
    raise Refused(message, status=404, code="fine_tune_not_found", param="fine_tune_id")


def _results(jobs: JobStore, files: Files, job: Job) -> list[str]:
    """Return the ids of a job's result files: one file if the job succeeded, else none.

    The first call creates the file."""
    if job.state != "succeeded":
        return []
    id = f"file-{hashlib.sha256(job.id.encode()).hexdigest()[:24]}"
    with suppress(Refused):  # the file does not exist yet
        return [files.get(job.tenant, id).id]
    content = result_file(jobs.events_of(job.tenant, job.id, *METRIC_KINDS))
    files.add(job.tenant, f"{job.name.replace('/', '-')}.csv", "fine-tune-results", io.BytesIO(content), id=id)
    return [id]


def _openai_jobs(jobs: JobStore, tenant: str, after: str | None, limit: int) -> tuple[list[Job], bool]:
    """Return (a page of the jobs that this API created, whether there are more)."""
    if after is not None:
        _job(jobs, tenant, after)
    matches: list[Job] = []
    more = True
    while more and len(matches) <= limit:
        page, more = jobs.jobs(tenant, after=after, limit=_PAGE)
        matches += [job for job in page if "openai" in job.about]
        after = page[-1].id if page else after
    return matches[:limit], len(matches) > limit
