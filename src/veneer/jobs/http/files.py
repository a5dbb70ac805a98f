"""OpenAI's routes for files: /v1/files.

Request bodies are written to disk as they arrive; `large_bodies` sets the size limits. At most `_MAX_UPLOADS`
uploads run concurrently, and this number is divided between the tenants. A separate thread pool, also shared
fairly, hashes and copies the bytes, so that a large file does not delay other requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.jobs.files import Files, UploadedFile
from veneer.jobs.http.route import thread_route
from veneer.serve.engine.admission import FairPool, SharedQuantity
from veneer.serve.http.bodies import Strict, checked
from veneer.serve.http.downloads import file_response
from veneer.serve.http.errors import Json, in_thread
from veneer.serve.http.guard import needs
from veneer.serve.http.service import caller_of
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, invalid

_DATABASE = "the database of uploaded files"
_MAX_UPLOADS = 32
_THREADS = 2
"""Number of threads that hash and copy uploads."""
_FORM_BYTES = 4096
"""Maximum size of a text field in a form, in bytes."""
_FIELDS = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
_FORM = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string"}},
    "required": ["file", "purpose"],
}
"""OpenAPI schema of an upload's form."""


def large_bodies(files: Files) -> Mapping[str, int]:
    """Return path pattern -> maximum body size, for routes that write bodies to disk."""
    return {"/v1/files": files.max_bytes + 4 * _FORM_BYTES}


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


def file_routes(files: Files) -> APIRouter:
    """Return the routes for files."""
    router = APIRouter(tags=["OpenAI files"], route_class=thread_route(_DATABASE), dependencies=[needs("train")])
    uploads = SharedQuantity("uploads", _MAX_UPLOADS)
    copying = FairPool(_THREADS, "veneer-files")

    async def add(principal: Principal, form: FormData) -> UploadedFile:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise invalid("the form has no file under 'file'", "file")
        if unknown := sorted(set(form) - _FIELDS):
            raise invalid(f"unknown key {unknown[0][:100]!r}", unknown[0][:100])
        if (purpose := form.get("purpose")) != "fine-tune":
            fix = "files here are for fine-tuning; send purpose=fine-tune"
            raise invalid(f"{str(purpose)[:40]!r} is not a supported purpose", "purpose", fix)
        size = upload.size or 0
        if size > files.max_bytes:
            message, fix = f"the file has more than {files.max_bytes:,} bytes", "send its rows in several files"
            raise Refused(message, status=413, code="too_large", param="file", fix=fix)
        ttl, name = _ttl(form), upload.filename or ""
        do = partial(files.add, principal.tenant, name, "fine-tune", upload.file, ttl=ttl)
        return await in_thread(_DATABASE, do, lambda work: copying.run(principal.tenant, principal.weight, size, work))

    body = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}

    @router.post("/v1/files", summary="Upload a file of training data", openapi_extra=body)
    async def create(request: HttpRequest) -> Response:
        principal = caller_of(request)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise invalid("a form is expected", None, "send multipart/form-data")
        uploads.take(principal.tenant, principal.weight, 1)
        try:
            async with request.form(max_files=1, max_fields=8, max_part_size=_FORM_BYTES) as form:
                return Json(_to_openai(await add(principal, form)))
        finally:
            uploads.give(principal.tenant, 1)

    @router.get("/v1/files", summary="List the caller's files, newest first")
    def list_files(
        request: HttpRequest,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: Annotated[str | None, Query(max_length=100)] = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=40)] = None,
    ) -> Any:
        page: dict[str, Any] = {"purpose": purpose, "limit": limit, "after": after, "newest_first": order == "desc"}
        page_files, more = files.list(caller_of(request).tenant, **page)
        return openai_page([_to_openai(file) for file in page_files], more)

    @router.get("/v1/files/{id}", summary="Get a file's description")
    def retrieve(request: HttpRequest, id: str) -> Any:
        return _to_openai(files.get(caller_of(request).tenant, id))

    @router.get("/v1/files/{id}/content", summary="Download a file")
    def content(request: HttpRequest, id: str) -> Response:
        file = files.get(caller_of(request).tenant, id)
        name = quote(file.filename, errors="replace")
        return file_response(files.open(file), file.bytes, f"attachment; filename*=UTF-8''{name}")

    @router.delete("/v1/files/{id}", summary="Delete a file; jobs that use the file have their own copy")
    def remove(request: HttpRequest, id: str) -> Any:
        files.delete(caller_of(request).tenant, id)
        return {"id": id, "object": "file", "deleted": True}

    return router


def openai_page(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """Return one page of a list in OpenAI's format."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


def _ttl(form: FormData) -> float | None:
    """Return the form's time to live in seconds; None if not given. Raises Refused."""
    values = {key: form[f"expires_after[{key}]"] for key in ("anchor", "seconds") if f"expires_after[{key}]" in form}
    return float(checked(ExpiresAfter, values, "expires_after").seconds) if values else None  # type: ignore[attr-defined]


def _to_openai(file: UploadedFile) -> dict[str, Any]:
    """Return a file in OpenAI's format."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created),
        "expires_at": None if file.expires is None else int(file.expires),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
