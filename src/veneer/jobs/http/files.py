"""OpenAI's file routes: /v1/files, and /v1/uploads for files in parts.

Request bodies stream to disk; `large_bodies` sets their limits. At most `_AT_ONCE` uploads run concurrently,
shared between tenants. A separate thread pool hashes and copies bytes, fairly between tenants, so that a
large file never delays another request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.jobs.files import Files, Upload, UploadedFile
from veneer.jobs.http.route import thread_route
from veneer.serve.engine.admission import FairPool, SharedQuantity
from veneer.serve.http.bodies import Body, Strict, at_most, checked
from veneer.serve.http.downloads import file_response
from veneer.serve.http.errors import Json, in_thread
from veneer.serve.http.guard import needs
from veneer.serve.http.service import caller_of
from veneer.serve.request import Refused, invalid

T = TypeVar("T")
_DATABASE = "the database of uploaded files"

_AT_ONCE = 32
_THREADS = 2
"""Threads that hash and copy uploads."""
_FORM = 4096
"""Maximum bytes of a form besides its file, and of each text field."""
_PURPOSE = "files here are for fine-tuning; send purpose=fine-tune"


def large_bodies(files: Files) -> Mapping[str, int]:
    """Return path pattern -> maximum body bytes of routes that spool bodies to disk."""
    return {"/v1/files": files.limits.file + 4 * _FORM, "/v1/uploads/[^/]+/parts": files.limits.part + 4 * _FORM}


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class UploadBody(Body):
    filename: str = Field(min_length=1, max_length=512)
    purpose: Literal["fine-tune"]
    bytes: int = Field(ge=1, lt=1 << 53)
    mime_type: str = Field(max_length=200, description="text/jsonl, as OpenAI has it; the name's ending counts here")
    expires_after: ExpiresAfter | None = None


class CompleteBody(Body):
    part_ids: Annotated[list[Annotated[str, Field(max_length=100)]], at_most(10_000)] = Field(min_length=1)
    md5: str | None = Field(default=None, max_length=64)


def file_routes(files: Files) -> APIRouter:
    """Return the file routes."""
    router = APIRouter(tags=["OpenAI files"], route_class=thread_route(_DATABASE), dependencies=[needs("train")])
    coming = SharedQuantity("uploads", _AT_ONCE)
    copying = FairPool(_THREADS, "veneer-files")

    async def copied(request: HttpRequest, size: int, do: Callable[[], T]) -> T:
        """Run work on `size` bytes in the copy threads."""
        caller = caller_of(request)
        return await in_thread(_DATABASE, do, run=lambda work: copying.run(caller.tenant, caller.weight, size, work))

    @asynccontextmanager
    async def form(request: HttpRequest, wanted: str) -> AsyncIterator[tuple[FormData, UploadFile]]:
        """Yield a form and its file; the file is removed afterwards."""
        caller = caller_of(request)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise invalid("a form is expected", None, "send multipart/form-data")
        coming.take(caller.tenant, caller.weight, 1)
        try:
            async with request.form(max_files=1, max_fields=8, max_part_size=_FORM) as read:
                sent = read.get(wanted)
                if not isinstance(sent, UploadFile):
                    raise invalid(f"the form has no file under {wanted!r}", wanted)
                yield read, sent
        finally:
            coming.give(caller.tenant, 1)

    @router.post("/v1/files", summary="Upload a file of training data.", openapi_extra=_posted("file", "purpose"))
    async def create(request: HttpRequest) -> Response:
        async with form(request, "file") as (read, sent):
            known = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
            if unknown := sorted(set(read) - known):
                raise invalid(f"unknown key {unknown[0][:100]!r}", unknown[0][:100])
            if read.get("purpose") != "fine-tune":
                raise invalid(f"{str(read.get('purpose'))[:40]!r} is not a purpose of files here", "purpose", _PURPOSE)
            if (sent.size or 0) > files.limits.file:
                raise Refused(
                    f"the file has more than {files.limits.file:,} bytes",
                    status=413,
                    code="too_large",
                    param="file",
                    fix="send it in parts: POST /v1/uploads",
                )
            keep = _keep(read)
            tenant, name = caller_of(request).tenant, sent.filename or ""
            made = await copied(
                request, sent.size or 0, lambda: files.add(tenant, name, "fine-tune", sent.file, keep=keep)
            )
        return Json(_shown_file(made))

    @router.get("/v1/files", summary="The caller's files, the newest first.")
    def listed(
        request: HttpRequest,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: Annotated[str | None, Query(max_length=100)] = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=40)] = None,
    ) -> Any:
        page: dict[str, Any] = {"purpose": purpose, "limit": limit, "after": after, "newest_first": order == "desc"}
        found, more = files.list(caller_of(request).tenant, **page)
        return page_shown([_shown_file(file) for file in found], more)

    @router.get("/v1/files/{id}", summary="One of them.")
    def retrieve(request: HttpRequest, id: str) -> Any:
        return _shown_file(files.get(caller_of(request).tenant, id))

    @router.get("/v1/files/{id}/content", summary="What is in it.")
    def content(request: HttpRequest, id: str) -> Response:
        file = files.get(caller_of(request).tenant, id)
        name = quote(file.filename, errors="replace")
        return file_response(files.open(file), file.bytes, f"attachment; filename*=UTF-8''{name}")

    @router.delete("/v1/files/{id}", summary="Remove it. A job that reads it has its own copy.")
    def remove(request: HttpRequest, id: str) -> Any:
        files.delete(caller_of(request).tenant, id)
        return {"id": id, "object": "file", "deleted": True}

    @router.post("/v1/uploads", summary="Begin a file that comes in parts.")
    def begin(request: HttpRequest, body: UploadBody) -> Response:
        keep = body.expires_after.seconds if body.expires_after else None
        made = files.begin(caller_of(request).tenant, body.filename, body.purpose, body.bytes, keep=keep)
        return Json(_shown_upload(made), headers=body.headers)

    @router.post("/v1/uploads/{id}/parts", summary="A part of it.", openapi_extra=_posted("data"))
    async def part(request: HttpRequest, id: str) -> Response:
        tenant = caller_of(request).tenant
        await in_thread(_DATABASE, lambda: files.get_upload(tenant, id))  # before the client sends a large body
        async with form(request, "data") as (read, sent):
            if unknown := sorted(set(read) - {"data"}):
                raise invalid(f"unknown key {unknown[0][:100]!r}", unknown[0][:100])
            made = await copied(request, sent.size or 0, lambda: files.add_part(tenant, id, sent.file))
        return Json({"id": made.id, "object": "upload.part", "created_at": int(made.created), "upload_id": id})

    @router.post("/v1/uploads/{id}/complete", summary="The file of these parts, in this order.")
    async def complete(request: HttpRequest, id: str, body: CompleteBody) -> Response:
        tenant = caller_of(request).tenant
        size = (await in_thread(_DATABASE, lambda: files.get_upload(tenant, id))).bytes
        done = await copied(request, size, lambda: files.complete(tenant, id, body.part_ids, body.md5))
        return Json(_shown_upload(done))

    @router.post("/v1/uploads/{id}/cancel", summary="Give it up; what was sent of it is removed.")
    def cancel(request: HttpRequest, id: str) -> Any:
        return _shown_upload(files.cancel(caller_of(request).tenant, id))

    return router


def page_shown(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """Return a page in OpenAI's format."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


def _keep(read: FormData) -> float | None:
    given = {key: read[f"expires_after[{key}]"] for key in ("anchor", "seconds") if f"expires_after[{key}]" in read}
    return float(checked(ExpiresAfter, given, "expires_after").seconds) if given else None  # type: ignore[attr-defined]


def _shown_file(file: UploadedFile) -> dict[str, Any]:
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


def _shown_upload(upload: Upload) -> dict[str, Any]:
    """Return an upload in OpenAI's format."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": int(upload.created),
        "expires_at": int(upload.expires),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": None if upload.file is None else _shown_file(upload.file),
    }


def _posted(file: str, *texts: str) -> dict[str, Any]:
    """Return the OpenAPI description of a multipart form."""
    fields: dict[str, Any] = {file: {"type": "string", "format": "binary"}, **{t: {"type": "string"} for t in texts}}
    form = {"schema": {"type": "object", "properties": fields, "required": list(fields)}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form}}}
