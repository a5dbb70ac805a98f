"""Routes of vLLM, SGLang, AIBrix and Dynamo that load and unload adapters, or tokenize.

The source of an adapter is a library reference, or a path in an allowed folder. AIBrix and Dynamo send a URI:
file://PATH or a library reference. Facts from aibrix pkg/controller/modeladapter/lora_client.go and
python/aibrix/aibrix/app.py, and dynamo docs/features/lora/README.md and components/src/dynamo/vllm/lora_handler.py.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import AliasChoices, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from veneer.errors import VeneerError
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, Body, BodyRoute, Objects, Strict, at_most
from veneer.serve.http.errors import Json, in_thread, log, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.service import admission_of, caller_of, service_of
from veneer.serve.http.text_bodies import Ids, Message, template_variables
from veneer.serve.request import Refused, invalid
from veneer.serve.transient import is_transient

vllm_routes = APIRouter(tags=["vLLM"], route_class=BodyRoute, dependencies=[needs("infer")])
sglang_routes = APIRouter(tags=["SGLang"], route_class=BodyRoute, dependencies=[needs("operate")])

aibrix_routes = APIRouter(tags=["AIBrix"], route_class=BodyRoute, dependencies=[needs("operate")])
dynamo_routes = APIRouter(tags=["Dynamo"], route_class=BodyRoute, dependencies=[needs("operate")])


# -- adapters ----------------------------------------------------------------------------------------------------------


class Load(Body):
    """AIBrix's `credentials_secret` names a Secret of the cluster; veneer ignores it and uses its own credentials."""

    ignored: ClassVar = frozenset({"base_model_name", "credentials_secret", "additional_config"})
    refused: ClassVar = {"is_3d_lora_weight": False, "pinned": False, "credentials": None}
    lora_name: str = Field(default="", max_length=512)
    lora_path: str = Field(default="", max_length=4096, validation_alias=AliasChoices("lora_path", "artifact_url"))
    load_inplace: bool = False


class Unload(Body):
    ignored: ClassVar = frozenset({"lora_int_id", "cleanup_local"})
    lora_name: str = Field(default="", max_length=512)


class Source(Strict):
    uri: str = Field(min_length=1, max_length=4096)


class LoadSource(Body):
    lora_name: str = Field(min_length=1, max_length=512)
    source: Source


@vllm_routes.post(
    "/v1/load_lora_adapter", dependencies=[needs("operate")], summary="Serve an adapter from the library under a name."
)
async def load(request: HttpRequest, body: Load) -> Response:
    await _load(request, body.lora_name, body.lora_path, replace=body.load_inplace)
    text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse(text, headers=body.headers)


@vllm_routes.post(
    "/v1/unload_lora_adapter",
    dependencies=[needs("operate")],
    summary="Stop serving a name; running requests finish unchanged.",
)
async def unload(request: HttpRequest, body: Unload) -> Response:
    await _unload(request, body.lora_name)
    text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
    return PlainTextResponse(text, headers=body.headers)


@sglang_routes.post("/load_lora_adapter", summary="Load an adapter, as SGLang does.")
async def load_sglang(request: HttpRequest, body: Load) -> Response:
    await _load(request, body.lora_name, body.lora_path, replace=body.load_inplace)
    return _loaded(request)


@sglang_routes.post("/unload_lora_adapter", summary="Unload an adapter, as SGLang does.")
async def unload_sglang(request: HttpRequest, body: Unload) -> Response:
    await _unload(request, body.lora_name)
    return _loaded(request)


@aibrix_routes.post("/v1/lora_adapter/load", summary="Load an adapter, as AIBrix's runtime does.")
async def load_artifact(request: HttpRequest, body: Load) -> Response:
    await _load(request, body.lora_name, body.lora_path, replace=body.load_inplace)
    return _changed(body.lora_name, "loaded", body.headers)


@aibrix_routes.post("/v1/lora_adapter/unload", summary="Unload an adapter, as AIBrix's runtime does.")
async def unload_artifact(request: HttpRequest, body: Unload) -> Response:
    await _unload(request, body.lora_name)
    return _changed(body.lora_name, "unloaded", body.headers)


@dynamo_routes.get("/v1/loras", summary="List the loaded adapters, as Dynamo does.")
async def list_loras(request: HttpRequest) -> Response:
    loras = {name: _lora_id(name) for name in service_of(request).catalog.loaded_names()}
    return Json({"status": "success", "loras": loras, "count": len(loras)})


@dynamo_routes.post("/v1/loras", summary="Load an adapter, as Dynamo does; a loaded name is not an error.")
async def load_lora(request: HttpRequest, body: LoadSource) -> Response:
    try:
        await _load(request, body.lora_name, body.source.uri)
    except Refused as error:
        if error.code != "adapter_exists":
            raise
        return _changed(body.lora_name, "already loaded", body.headers)
    return _changed(body.lora_name, "loaded", body.headers)


@dynamo_routes.delete("/v1/loras/{lora_name:path}", summary="Unload an adapter, as Dynamo does.")
async def unload_lora(request: HttpRequest, lora_name: str) -> Response:
    await _unload(request, lora_name)
    return _changed(lora_name, "unloaded", {})


def _changed(name: str, change: str, headers: dict[str, str]) -> Response:
    text = f"LoRA adapter '{name}' {change}" + (" successfully" if change != "already loaded" else "")
    body = {"status": "success", "message": text, "lora_name": name, "lora_id": _lora_id(name)}
    return Json(body, headers=headers)


def _lora_id(name: str) -> int:
    """Return a positive number of 31 bits that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:4], "big") >> 1 or 1


def _source_of(uri: str) -> str:
    """Return the library reference or the path that a URI stands for. Raises Refused."""
    scheme, found, rest = uri.partition("://")
    if not found:
        return uri
    if scheme == "file" and rest.startswith("/"):
        return rest
    wrong = "file:// needs an absolute path on this server" if scheme == "file" else f"{scheme}:// cannot be read"
    fix = "add the adapter to the library (veneer library pull, veneer library add) and send its reference"
    raise invalid(f"{wrong}: adapters are loaded from the library, or from file:// in an allowed folder", "uri", fix)


async def _load(request: HttpRequest, name: str, source: str, *, replace: bool = False) -> None:
    if not name or not source:
        raise invalid("Both 'lora_name' and 'lora_path' must be provided.")
    service, source = service_of(request), _source_of(source)

    def load() -> None:
        card = service.catalog.load(name, source, replace=replace)
        after = {"digest": card.digest, "root": card.root}
        service.tenancy.log_change("operator", "adapter.load", name, None, after)

    await in_thread("the server", load, known_errors={VeneerError: _unusable})


def _unusable(error: VeneerError) -> Refused | None:
    """Return the error to send to the client for an adapter that failed to load.

    The error omits the adapter's path on the server. Returns None for a transient error.
    """
    if is_transient(error):
        return None
    log.warning("an adapter could not be loaded: %s", error)
    return Refused(message_of(error), status=422, code="adapter_unusable", param="lora_path")


async def _unload(request: HttpRequest, name: str) -> None:
    if not name:
        raise invalid("'lora_name' must be provided.", "lora_name")
    service = service_of(request)
    await asyncio.to_thread(service.catalog.unload, name)
    await asyncio.to_thread(service.tenancy.log_change, "operator", "adapter.unload", name, None, None)


def _loaded(request: HttpRequest) -> Response:
    cards = service_of(request).catalog.models(caller_of(request))
    loaded = {card.id: card.root for card in cards if card.parent is not None}
    return Json({"success": True, "error_message": None, "loaded_adapters": loaded})


# -- tokens ------------------------------------------------------------------------------------------------------------


class Tokenize(Body):
    """A text (`prompt`) or a conversation (`messages`) to tokenize."""

    prompt: str | None = None
    messages: Annotated[list[Message], FAIL_FAST, at_most(ITEMS)] | None = Field(default=None, min_length=1)
    model: str = Field(default="", max_length=512)
    add_special_tokens: bool = True
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Annotated[Objects, at_most(128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Detokenize(Body):
    tokens: Ids
    model: str = Field(default="", max_length=512)


@vllm_routes.post("/tokenize", summary="Tokenize a text or a conversation.")
async def tokenize(request: HttpRequest, body: Tokenize) -> Response:
    service, prompts = service_of(request), service_of(request).prompts
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either prompt or messages", "prompt")
    service.choose(caller_of(request), model=body.model)  # raises for an unknown model
    admitted = admission_of(request)
    admitted.reserve("answers", 1)
    if body.messages is not None:
        variables = template_variables(
            body.chat_template_kwargs, body.add_generation_prompt, body.continue_final_message
        )
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        ids = await prompts.of_messages(messages, admitted, body.tools, **variables)
    else:
        (ids,) = await prompts.of_parts([body.prompt or ""], admitted, special=body.add_special_tokens)

    def answer() -> Response:
        texts = [prompts.piece(i)[0] for i in ids] if body.return_token_strs else None
        return Json({"count": len(ids), "max_model_len": prompts.context, "tokens": ids, "token_strs": texts})

    return await admitted.work(len(ids), answer)


@vllm_routes.post("/detokenize", summary="Convert tokens to text.")
async def detokenize(request: HttpRequest, body: Detokenize) -> Response:
    service = service_of(request)
    service.choose(caller_of(request), model=body.model)
    admitted = admission_of(request)
    admitted.reserve("answers", 1)
    text = await service.prompts.decode(service.prompts.of_ids(body.tokens, "tokens"), admitted)
    return Json({"prompt": text})
