"""/v1/adapters: the library over HTTP.

Subresources have separate paths, because names contain slashes.

    GET, POST /v1/adapters               search; add an uploaded file
    GET, PATCH, DELETE /v1/adapters/acme/support@2
    GET /v1/adapter_previews/…, /v1/adapter_files/…?to=kohya
    POST /v1/adapter_inspections         report on an uploaded file, which is kept for an hour
    GET /v1/adapter_inspections/{id}/file?to=comfyui

A tenant can find the adapters that are visible to it (`Principal.can_see`), and can add, change, remove and
download adapters in its own namespace; an operator can do so in every namespace. An adapter that is not
visible is a 404. Files, recipes and sources are shown only to principals that can change the adapter.

All changes to the library, from here and from the Studio, go through `add_staged`, `change_adapter` and
`remove_adapter`, which check the principal and write the audit entry.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.errors import AdapterError, ConfigError, UnsafeFileError, quoted
from veneer.formats.convert import layout_ending
from veneer.library.describe_files import card_picture, card_prompt, card_sample, gain_of
from veneer.library.library import Added, Library, NotInLibrary
from veneer.library.queries import Order, Version
from veneer.library.upload_stage import StagedAdapter, UploadStage, UploadTooLarge
from veneer.serve.access import Tenancy
from veneer.serve.engine.admission import FairPool, SharedQuantity
from veneer.serve.http.bodies import Body, BodyRoute, at_most
from veneer.serve.http.downloads import file_response
from veneer.serve.http.errors import Json, KnownErrors, in_thread, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.service import caller_of, service_of
from veneer.serve.principal import Principal
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused, invalid

T = TypeVar("T")
Layout = Literal["peft", "kohya", "diffusers", "comfyui", "gguf", "vllm"]
_Names = Annotated[list[Annotated[str, Field(max_length=100)]], at_most(64)]
_Text = Annotated[str, Field(max_length=512)]
_Word = Annotated[str, Query(max_length=512)]
_Base = Annotated[str, Query(max_length=512, description="for gguf: the adapter's base")]

_AT_ONCE = 16
_THREADS = 2
"""Number of threads that read, convert and hash adapters."""
_LINES, _ITEMS = 40, 500
"""Maximum number of lines in an error about a file, and of items in each list of a report."""
_BINARY = {"type": "string", "format": "binary"}
_BYTES: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BINARY}}}
}


class AdapterQuery(BaseModel):
    """The filters of a search; see `library.queries.browse`."""

    text: _Text = Field(default="", alias="q")
    base: _Text = ""
    kind: Literal["", "text", "image"] = ""
    rank: int | None = Field(default=None, ge=0, lt=1 << 31)
    tags: list[_Text] = Field(default_factory=list, alias="tag", max_length=16)
    health: Literal["", "sound", "faulty", "unknown"] = ""
    name: _Text = ""
    trigger: _Text = ""
    parent: _Text = ""
    all_versions: bool = False
    order: Order = "name"
    limit: int = Field(default=60, ge=0, le=1000)
    offset: int = Field(default=0, ge=0, lt=1 << 31)


class AdapterChange(Body):
    """Aliases and tags to add to and remove from a version."""

    add_aliases: _Names = Field(default_factory=list, description="aliases that will point to this version")
    remove_aliases: _Names = Field(default_factory=list)
    add_tags: _Names = Field(default_factory=list)
    remove_tags: _Names = Field(default_factory=list)


def adapter_bodies(stage: UploadStage) -> dict[str, int]:
    """Return the paths that spool bodies to disk -> size limit, for `create_app`."""
    return dict.fromkeys(("/v1/adapters", "/v1/adapter_inspections"), stage.most)


def adapter_routes(library: Library, stage: UploadStage, tenancy: Tenancy) -> APIRouter:
    """Return the routes for a library."""
    router = APIRouter(tags=["adapters"], route_class=BodyRoute, dependencies=[needs("read")])
    uploads, working = SharedQuantity("uploads", _AT_ONCE), FairPool(_THREADS, "veneer-adapters")

    async def run_work(principal: Principal, size: int, do: Callable[[], T]) -> T:
        """Run `do`, which processes `size` bytes, in the thread pool for adapters."""
        return await in_thread(
            "the library", do, lambda work: working.run(principal.tenant, principal.weight, size, work), _KNOWN
        )

    @asynccontextmanager
    async def posted(request: HttpRequest, filename: str) -> AsyncIterator[StagedAdapter]:
        """Spool the request's body to disk and yield the staged file."""
        principal = caller_of(request)
        uploads.take(principal.tenant, principal.weight, 1)
        try:
            begin = partial(stage.begin, principal.tenant, filename)
            incoming = await in_thread("the disk", begin, known_errors=_FILENAME_ERRORS)
            try:
                async for chunk in request.stream():
                    await in_thread("the disk", partial(incoming.write, chunk), known_errors=_KNOWN)
                yield await run_work(principal, incoming.size, lambda: stage.keep(incoming))
            except BaseException:
                await asyncio.to_thread(stage.drop, incoming)
                raise
        finally:
            uploads.give(principal.tenant, 1)

    @router.get("/v1/adapters", summary="Search the library.")
    async def browse(request: HttpRequest, query: Annotated[AdapterQuery, Query()]) -> Response:
        principal = caller_of(request)
        filters = query.model_dump() | {"can_access": None if principal.can("operate") else principal.sees}
        page = await in_thread("the library", lambda: library.browse(**filters))
        data = [_adapter_json(v, principal) for v in page.versions]
        more = query.offset + len(data) < page.total
        facets = {**page.facets, "base": facet_of_bases(page.facets["base"], principal)}
        return Json({"object": "list", "data": data, "total": page.total, "has_more": more, "facets": facets})

    @router.post(
        "/v1/adapters",
        dependencies=[needs("write")],
        summary="Add an uploaded file to the library under a name.",
        openapi_extra=_BYTES,
    )
    async def add(
        request: HttpRequest,
        name: Annotated[str, Query(max_length=200, description="in the library: support, acme/support")],
        filename: _Word = "adapter.safetensors",
        tag: Annotated[list[_Word] | None, Query(max_length=16)] = None,
        alias: _Word = "",
    ) -> Response:
        principal, quotas = caller_of(request), service_of(request).quotas
        _need_namespace(principal, name)
        async with posted(request, filename) as staged:
            try:
                added = await run_work(
                    principal,
                    staged.size,
                    lambda: add_staged(library, tenancy, quotas, principal, staged, name, tags=tag or (), alias=alias),
                )
            finally:
                await asyncio.to_thread(stage.drop, staged)
        return Json({**_adapter_json(added.version, principal), "new": added.new, "left_out": added.left_out})

    @router.get("/v1/adapters/{reference:path}", summary="Get an adapter.")
    async def show(request: HttpRequest, reference: str) -> Response:
        principal = caller_of(request)
        version = await _read(lambda: _visible_version(library, principal, reference))
        return Json(_adapter_json(version, principal))

    @router.patch(
        "/v1/adapters/{reference:path}",
        dependencies=[needs("write")],
        summary="Change the aliases and tags of a version.",
    )
    async def change(request: HttpRequest, reference: str, body: AdapterChange) -> Response:
        principal = caller_of(request)
        version = await _read(lambda: change_adapter(library, tenancy, principal, reference, body))
        return Json(_adapter_json(version, principal), headers=body.headers)

    @router.delete(
        "/v1/adapters/{reference:path}",
        dependencies=[needs("write")],
        summary="Remove a name with all its versions, one version, or an alias.",
    )
    async def remove(request: HttpRequest, reference: str, with_aliases: bool = False) -> Response:
        principal = caller_of(request)
        removed = await _read(lambda: remove_adapter(library, tenancy, principal, reference, with_aliases=with_aliases))
        return Json({"id": reference, "object": "adapter", "deleted": True, "removed": removed})

    @router.get("/v1/adapter_previews/{reference:path}", summary="Get the preview picture of an adapter.")
    async def preview(request: HttpRequest, reference: str) -> Response:
        principal = caller_of(request)
        version = await _read(lambda: _visible_version(library, principal, reference))
        if (picture := card_picture(version.card)) is None:
            raise Refused(f"{version.reference} has no picture", status=404, code="not_found")
        head = {
            "x-content-type-options": "nosniff",
            "cache-control": "private, max-age=3600",
            "content-security-policy": "default-src 'none'",
        }
        return Response(picture[1], media_type=picture[0], headers=head)

    @router.get(
        "/v1/adapter_files/{reference:path}",
        summary="Download an adapter's file, optionally converted to another layout.",
    )
    async def download(request: HttpRequest, reference: str, to: Layout | None = None, base: _Base = "") -> Response:
        principal = caller_of(request)
        version = await _read(lambda: _changeable_version(library, principal, reference))
        catalog = service_of(request).catalog
        stem = f"{version.name.rpartition('/')[2]}-{version.version}"
        path = await run_work(principal, version.size, lambda: library.resolve(version.reference))
        base = catalog.base if version.fingerprint == catalog.fingerprint else base
        return await file_of(request, path, version.size, stem, to, base)

    @router.post("/v1/adapter_inspections", summary="Inspect an uploaded file.", openapi_extra=_BYTES)
    async def inspect(request: HttpRequest, filename: _Word = "adapter.safetensors") -> Response:
        async with posted(request, filename) as staged:
            report = await run_work(caller_of(request), staged.size, lambda: staged_report(staged))
        fields = {"id": staged.id, "object": "adapter.inspection", "filename": staged.name, "bytes": staged.size}
        return Json({**fields, "expires_at": int(staged.until), "report": report})

    @router.get(
        "/v1/adapter_inspections/{id}/file",
        summary="Download an inspected file, optionally converted to another layout.",
    )
    async def inspected_file(request: HttpRequest, id: str, to: Layout | None = None, base: _Base = "") -> Response:
        if (staged := stage.get(caller_of(request).tenant, id)) is None:
            fix = "upload it again; uploads expire after an hour"
            raise Refused("there is no such file", status=404, code="not_found", fix=fix)
        return await file_of(request, staged.path, staged.size, staged.name.rpartition(".")[0], to, base)

    async def file_of(
        request: HttpRequest, source: Path, size: int, stem: str, to: Layout | None, base: str
    ) -> Response:
        """Return a response that sends a file, and that deletes temporary files at the end.

        `base`: the adapter's base, from the client or the library.
        """
        principal, catalog = caller_of(request), service_of(request).catalog
        if to == "gguf":
            service_of(request).need_base()
            if base != catalog.base:
                fix = f"base={catalog.base}, if it fits; otherwise veneer adapter convert --to {to} --base BASE"
                raise invalid(f"{to} depends on the base, and this server has {catalog.base}", "base", fix)
            base = catalog.sources.base.name  # the base's location, because the name can be only a part of it
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="veneer-"))
        try:
            path = await run_work(principal, 2 * size, lambda: _one_file(source, folder, stem, to, base))
            head, disposition = {"x-content-type-options": "nosniff"}, f'attachment; filename="{path.name}"'
            clean = partial(shutil.rmtree, folder, True)
            return file_response(path.open("rb"), path.stat().st_size, disposition, headers=head, after=clean)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, True)
            raise

    return router


# -- shared with the Studio --------------------------------------------------------------------------------------------


def add_staged(
    library: Library,
    tenancy: Tenancy,
    quotas: Quotas,
    principal: Principal,
    staged: StagedAdapter,
    name: str,
    *,
    tags: Sequence[str] = (),
    alias: str = "",
) -> Added:
    """Add an uploaded file to the library under a name in the principal's namespace. Blocking.

    Raises Refused (403; 400 if a quota is exceeded) and the errors of `Library.add`.
    """
    _need_namespace(principal, name)
    if principal.tenant:
        quotas.check_stored(principal.tenant, disk=(library.size_of_prefix(f"{principal.tenant}/"), staged.size))
    added = library.add(staged.path, name, tags=tags, source="upload")
    if alias:
        added.version = library.alias(added.version.reference, alias)
    if principal.tenant:
        tenancy.grant_namespace(principal.tenant)
    audit_added(tenancy, principal, added.version)
    return added


def audit_added(tenancy: Tenancy, principal: Principal, version: Version) -> None:
    """Write the audit entry of a version that was added to the library. Blocking."""
    after = {"digest": version.digest, "aliases": version.aliases}
    tenancy.log_change(principal.actor, "adapter.add", version.reference, None, after)


def change_adapter(
    library: Library, tenancy: Tenancy, principal: Principal, reference: str, change: AdapterChange
) -> Version:
    """Change the aliases and tags of a version. Blocking.

    Raises Refused (404, 403; 400 if an alias to remove does not point to this version) and the library's
    errors.
    """
    current = _changeable_version(library, principal, reference)
    if missing := sorted(set(change.remove_aliases) - set(current.aliases)):
        raise invalid(f"no alias {missing[0]!r} points to {current.reference}", "remove_aliases")
    for alias in change.remove_aliases:
        library.remove(f"{current.name}@{alias}")
    if change.remove_tags:
        library.untag(current.reference, *change.remove_tags)
    if change.add_tags:
        library.tag(current.reference, *change.add_tags)
    for alias in change.add_aliases:
        library.alias(current.reference, alias)
    after = library.find(current.reference)
    old, new = ({"aliases": v.aliases, "tags": v.tags} for v in (current, after))
    tenancy.log_change(principal.actor, "adapter.change", after.reference, old, new)
    return after


def remove_adapter(
    library: Library, tenancy: Tenancy, principal: Principal, reference: str, *, with_aliases: bool = False
) -> list[str]:
    """Remove a name with all its versions, one version, or an alias. Blocking.

    Returns the removed references. Raises Refused (404, 403; 400 if an alias points to a version to remove).
    """
    _changeable_version(library, principal, reference)
    try:
        removed = library.remove(reference, with_aliases=with_aliases)
    except NotInLibrary:
        raise
    except AdapterError as error:
        raise invalid(error.what, "with_aliases", "move the aliases first, or set with_aliases=true") from None
    tenancy.log_change(principal.actor, "adapter.remove", reference, removed, None)
    return removed


def staged_report(staged: StagedAdapter) -> dict[str, Any]:
    """Return a shortened report of `adapters.inspect.inspect` on an uploaded file. Blocking.

    Raises AdapterError for a file that is not an adapter.
    """
    from veneer.adapters.inspect import inspect

    report: dict[str, Any] = _bounded({**inspect(str(staged.path)), "adapter": staged.name})
    return report


# -- permissions -------------------------------------------------------------------------------------------------------


def _need_namespace(principal: Principal, name: str) -> None:
    """Raise Refused (403) for a name outside the principal's namespace."""
    if not principal.can_change(name):
        fix = f"{principal.tenant}/NAME" if principal.tenant else None
        message = f"{quoted(name)} is outside your namespace"
        raise Refused(message, status=403, code="forbidden", param="name", fix=fix)


def _visible_version(library: Library, principal: Principal, reference: str) -> Version:
    """Return the version if the principal can see it.

    Raises Refused (404). For an operator, the error suggests the nearest name."""
    try:
        version = library.find(reference)
    except AdapterError as error:
        raise _missing(reference, error.fix if principal.can("operate") else None) from None
    if not principal.can_see(reference, version.reference):
        raise _missing(reference)
    return version


def _missing(reference: str, fix: str | None = None) -> Refused:
    return Refused(f"there is no adapter {quoted(reference)}", status=404, code="not_found", param="reference", fix=fix)


def _changeable_version(library: Library, principal: Principal, reference: str) -> Version:
    """Return the version if the principal can change it. Raises Refused (404, 403)."""
    version = _visible_version(library, principal, reference)
    if not principal.can_change(version.name):
        raise Refused(f"{version.reference} is outside your namespace", status=403, code="forbidden", param="reference")
    return version


def _unusable(error: AdapterError) -> Refused:
    """Return the error of an unusable adapter file, without its path on the server."""
    unsafe = isinstance(error, UnsafeFileError)  # the advice of this error is meant for users on their own machine
    lines = (error.what if unsafe else message_of(error)).splitlines()
    text = "\n".join([*lines[:_LINES], *(["…"] if len(lines) > _LINES else [])])
    return Refused(text, status=422, code="adapter_unusable")


_KNOWN: KnownErrors = {
    NotInLibrary: lambda error: Refused(error.what, status=404, code="not_found"),
    UploadTooLarge: lambda error: Refused(error.what, status=413, code="too_large"),
    ConfigError: lambda error: invalid(error.what, None, error.fix),
    AdapterError: _unusable,
}
_FILENAME_ERRORS: KnownErrors = {ConfigError: lambda error: invalid(error.what, "filename", error.fix)}


async def _read(do: Callable[[], T]) -> T:
    """Run `do`, which reads the library, in a thread."""
    return await in_thread("the library", do, known_errors=_KNOWN)


# -- responses ---------------------------------------------------------------------------------------------------------


def base_for(base: str, principal: Principal) -> str:
    """Return an adapter's base as a principal can see it.

    Only operators see the folder of a base on this server."""
    return base if principal.can("operate") or not os.path.isabs(base) else os.path.basename(base.rstrip("/"))


def facet_of_bases(counts: Mapping[str, int], principal: Principal) -> dict[str, int]:
    """Return the library's number of adapters per base, with bases named as in `base_for`."""
    merged: Counter[str] = Counter()
    for base, count in counts.items():
        merged[base_for(base, principal)] += count
    return dict(merged.most_common())


def _adapter_json(v: Version, principal: Principal) -> dict[str, Any]:
    gain, base = gain_of(v.card), base_for(v.base, principal)
    fields = {
        "id": v.reference,
        "object": "adapter",
        "name": v.name,
        "version": v.version,
        "aliases": v.aliases,
        "base": base,
        "base_fingerprint": v.fingerprint,
        "kind": v.kind,
        "rank": v.rank,
        "format": v.format,
        "digest": v.digest,
        "bytes": v.size,
        "added": v.added,
        "created": v.created,
        "licence": v.licence,
        "tags": v.tags,
        "trigger_words": v.trigger_words,
        "health": v.health,
        "sample": card_sample(v.card),
        "prompt": card_prompt(v.card),
        "gain": gain and {"before": gain.before, "after": gain.after, "share": gain.share},
        "preview": f"/v1/adapter_previews/{v.reference}" if card_picture(v.card) else None,
    }
    return {**fields, "card": {**v.card, "base": base}, "source": v.source} if principal.can_change(v.name) else fields


def _bounded(value: Any) -> Any:
    """Return a report for JSON: NaN and infinity become null, and lists are shortened."""
    if isinstance(value, dict):
        return {key: _bounded(each) for key, each in value.items()}
    if isinstance(value, list):
        more = [f"… and {len(value) - _ITEMS} more"] if len(value) > _ITEMS else []
        return [*map(_bounded, value[:_ITEMS]), *more]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_file(source: Path, folder: Path, stem: str, to: Layout | None, base: str) -> Path:
    """Return the file to download, converted to `to` if given. A folder becomes a zip file."""
    if to is not None:
        from veneer.adapters.convert import convert_adapter

        converted = folder / f"{stem}-{to}{layout_ending(to)}"
        convert_adapter(source, converted, to, base=base or None)
        source = converted
    if source.is_file():
        return source
    packed = folder / f"{stem}{f'-{to}' if to else ''}.zip"
    with zipfile.ZipFile(packed, "w") as out:
        for each in sorted(p for p in source.iterdir() if p.is_file()):
            out.write(each, f"{packed.stem}/{each.name}")
    return packed
