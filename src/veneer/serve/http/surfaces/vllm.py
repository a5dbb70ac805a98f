"""More of vLLM's and SGLang's routes: load and unload adapters, tokenize, version.

The source of an adapter is a library reference, or a path in an allowed folder.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from veneer.errors import VeneerError
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, Body, BodyRoute, Objects, at_most
from veneer.serve.http.errors import Json, in_thread, log, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.service import admission_of, caller_of, service_of
from veneer.serve.http.text_bodies import Ids, Message, template_variables
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
    "/v1/load_lora_adapter", dependencies=[needs("operate")], summary="Serve an adapter from the library under a name."
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
    """Return the error to send to the client for an adapter that failed to load.

    The error omits the adapter's path on the server. Returns None for a transient error.
    """
    if is_transient(error):
        return None
    log.warning("an adapter could not be loaded: %s", error)
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
