"""vLLM's and SGLang's routes besides OpenAI's: loading and unloading adapters.

The catalog checks the source that a client names: a library reference, or a path in an allowed folder.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from veneer.errors import VeneerError
from veneer.serve.http.bodies import Body, BodyRoute
from veneer.serve.http.errors import Json, in_thread, log, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.service import caller_of, service_of
from veneer.serve.request import Refused, invalid
from veneer.serve.transient import is_transient

vllm_routes = APIRouter(tags=["vLLM"], route_class=BodyRoute, dependencies=[needs("infer")])
sglang_routes = APIRouter(tags=["SGLang"], route_class=BodyRoute, dependencies=[needs("operate")])


# -- adapters ----------------------------------------------------------------------------------------------------------


class Load(Body):
    ignored: ClassVar = frozenset({"base_model_name"})
    refused: ClassVar = {"is_3d_lora_weight": False, "pinned": False}
    lora_name: str = Field(default="", max_length=512)
    lora_path: str = Field(default="", max_length=4096)
    load_inplace: bool = False


class Unload(Body):
    ignored: ClassVar = frozenset({"lora_int_id"})
    lora_name: str = Field(default="", max_length=512)


@vllm_routes.post(
    "/v1/load_lora_adapter",
    dependencies=[needs("operate")],
    summary="Serve an adapter from the library under a name.",
)
async def load(request: HttpRequest, body: Load) -> Response:
    await _load(request, body, "Both 'lora_name' and 'lora_path' must be provided.")
    text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse(text, headers=body.headers)


@vllm_routes.post(
    "/v1/unload_lora_adapter",
    dependencies=[needs("operate")],
    summary="Stop serving a name; running requests finish unchanged.",
)
async def unload(request: HttpRequest, body: Unload) -> Response:
    await _unload(request, body, invalid("'lora_name' must be provided.", "lora_name"))
    text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
    return PlainTextResponse(text, headers=body.headers)


@sglang_routes.post("/load_lora_adapter", summary="Load an adapter, as SGLang does.")
async def load_sglang(request: HttpRequest, body: Load) -> Response:
    await _load(request, body, "both lora_name and lora_path are needed")
    return _loaded(request)


@sglang_routes.post("/unload_lora_adapter", summary="Unload an adapter, as SGLang does.")
async def unload_sglang(request: HttpRequest, body: Unload) -> Response:
    await _unload(request, body, invalid("lora_name is needed"))
    return _loaded(request)


async def _load(request: HttpRequest, body: Load, missing: str) -> None:
    if not body.lora_name or not body.lora_path:
        raise invalid(missing)
    service, name = service_of(request), body.lora_name

    def load() -> None:
        card = service.catalog.load(name, body.lora_path, replace=body.load_inplace)
        after = {"digest": card.digest, "root": card.root}
        service.tenancy.log_change("operator", "adapter.load", name, None, after)

    await in_thread("the server", load, known_errors={VeneerError: _unusable})


def _unusable(error: VeneerError) -> Refused | None:
    """The error for an adapter that failed to load, without its path on the server."""
    if is_transient(error):
        return None
    log.warning("an adapter was not loaded: %s", error)
    return Refused(message_of(error), status=422, code="adapter_unusable", param="lora_path")


async def _unload(request: HttpRequest, body: Unload, missing: Refused) -> None:
    if not body.lora_name:
        raise missing
    service, name = service_of(request), body.lora_name
    await asyncio.to_thread(service.catalog.unload, name)
    await asyncio.to_thread(service.tenancy.log_change, "operator", "adapter.unload", name, None, None)


def _loaded(request: HttpRequest) -> Response:
    cards = service_of(request).catalog.models(caller_of(request))
    loaded = {card.id: card.root for card in cards if card.parent is not None}
    return Json({"success": True, "error_message": None, "loaded_adapters": loaded})
