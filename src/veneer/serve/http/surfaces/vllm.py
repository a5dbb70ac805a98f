"""vLLM's and SGLang's routes besides OpenAI's: loading and unloading adapters, tokens, version.

The catalog checks the source that a client names: a library reference, or a path in an allowed folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from veneer.errors import VeneerError
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, Body, BodyRoute, Neutral, Objects, at_most
from veneer.serve.http.errors import Json, in_thread, json_bytes, log, message_of
from veneer.serve.http.guard import needs
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.sampling import Ids
from veneer.serve.http.service import admission_of, caller_of, service_of
from veneer.serve.http.surfaces.openai import Message
from veneer.serve.request import Refused, invalid
from veneer.serve.transient import is_outage

vllm_routes = APIRouter(tags=["vLLM"], route_class=BodyRoute, dependencies=[needs("infer")])
sglang_routes = APIRouter(tags=["SGLang"], route_class=BodyRoute, dependencies=[needs("operate")])


# -- adapters ----------------------------------------------------------------------------------------------------------


class Load(Body):
    ignored: ClassVar[frozenset[str]] = frozenset({"base_model_name"})
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        "is_3d_lora_weight": ((False,), "the layout of experts is read from the file")
    }
    lora_name: str = Field(default="", max_length=512)
    lora_path: str = Field(default="", max_length=4096)
    load_inplace: bool = False
    pinned: bool = False


class Unload(Body):
    ignored: ClassVar[frozenset[str]] = frozenset({"lora_int_id"})
    lora_name: str = Field(default="", max_length=512)


@vllm_routes.post(
    "/v1/load_lora_adapter",
    dependencies=[needs("operate")],
    summary="Serve an adapter from the library under a name.",
)
async def load(request: HttpRequest, body: Load) -> Response:
    try:
        await _load(request, body, "Both 'lora_name' and 'lora_path' must be provided.")
    except Refused as error:
        if error.code != "adapter_exists" or error.where:  # else vLLM's own message applies
            raise
        what = f"The lora adapter '{body.lora_name}' has already been loaded. "
        what += "If you want to load the adapter in place, set 'load_inplace' to True."
        raise Refused(what, status=400, code="adapter_exists", param="lora_name") from error
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


@sglang_routes.post("/load_lora_adapter", summary="The same in SGLang's words.")
async def load_sglang(request: HttpRequest, body: Load) -> Response:
    await _load(request, body, "both lora_name and lora_path are needed")
    return _loaded(request)


@sglang_routes.post("/unload_lora_adapter", summary="The same in SGLang's words.")
async def unload_sglang(request: HttpRequest, body: Unload) -> Response:
    await _unload(request, body, invalid("lora_name is needed"))
    return _loaded(request)


async def _load(request: HttpRequest, body: Load, missing: str) -> None:
    if not body.lora_name or not body.lora_path:
        raise invalid(missing)
    service, name = service_of(request), body.lora_name

    def load() -> None:
        card = service.catalog.load(name, body.lora_path, replace=body.load_inplace, pinned=body.pinned)
        after = {"digest": card.digest, "root": card.root}
        service.tenancy.note("operator", "adapter.load", name, None, after)

    await in_thread("the server", load, known={VeneerError: _unusable})


def _unusable(error: VeneerError) -> Refused | None:
    """The error for an adapter that failed to load, without its path on the server."""
    if is_outage(error):
        return None
    log.warning("an adapter was not loaded: %s", error)
    return Refused(message_of(error), status=422, code="adapter_unusable", param="lora_path")


async def _unload(request: HttpRequest, body: Unload, missing: Refused) -> None:
    if not body.lora_name:
        raise missing
    service, name = service_of(request), body.lora_name
    await asyncio.to_thread(service.catalog.unload, name)
    await asyncio.to_thread(service.tenancy.note, "operator", "adapter.unload", name, None, None)
    service.mixes.default.pop(name, None)


def _loaded(request: HttpRequest) -> Response:
    loaded = {card.id: card.root for card in service_of(request).mixes.adapters(caller_of(request))}
    return Json({"success": True, "error_message": None, "loaded_adapters": loaded})


# -- tokens ------------------------------------------------------------------------------------------------------------


class Tokenize(Body):
    """Tokenizes a text or a conversation.

    vLLM's `prompt` or `messages`, or TGI's `inputs`; the response has that surface's format.
    """

    prompt: str | None = None
    messages: Annotated[list[Message], FAIL_FAST, at_most(ITEMS)] | None = Field(default=None, min_length=1)
    inputs: str | None = None
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


@vllm_routes.post("/tokenize", summary="Text or a conversation as tokens.")
async def tokenize(request: HttpRequest, body: Tokenize) -> Response:
    service, prompts = service_of(request), service_of(request).prompts
    ways = [key for key in ("prompt", "messages", "inputs") if getattr(body, key) is not None]
    if len(ways) != 1:
        raise invalid("one of prompt, messages and inputs is needed", ways[0] if ways else "prompt")
    service.mixes.choose(caller_of(request), model=body.model)  # an unknown model is an error here too
    place = admission_of(request)
    place.take("answers", 1)
    if body.messages is not None:
        variables = dict(body.chat_template_kwargs or {})
        variables["add_generation_prompt"] = body.add_generation_prompt and not body.continue_final_message
        if body.continue_final_message:
            variables["continue_final_message"] = True
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        ids = await prompts.of_messages(messages, body.tools, place, **variables)
        return _json(await prompts.work(len(ids), lambda: json_bytes(_counted(prompts, ids, body)), place))
    text = body.inputs or body.prompt or ""
    prompts.measure(len(text), ways[0])

    def written() -> bytes:
        if body.inputs is not None:
            return json_bytes(_spans(prompts, text, body.add_special_tokens))
        return json_bytes(_counted(prompts, prompts.encode(text, special=body.add_special_tokens), body))

    return _json(await prompts.work(len(text), written, place))


def _json(written: bytes) -> Response:
    return Response(written, media_type="application/json")


def _counted(prompts: Prompts, ids: Sequence[int], body: Tokenize) -> dict[str, Any]:
    texts = [prompts.piece(i)[0] for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": prompts.context, "tokens": ids, "token_strs": texts}


@vllm_routes.post("/detokenize", summary="Tokens as text.")
async def detokenize(request: HttpRequest, body: Detokenize) -> Response:
    service = service_of(request)
    service.mixes.choose(caller_of(request), model=body.model)
    place = admission_of(request)
    place.take("answers", 1)
    text = await service.prompts.decode(service.prompts.of_ids(body.tokens, "tokens"), place=place)
    return Json({"prompt": text})


def _spans(prompts: Prompts, text: str, special: bool) -> list[dict[str, Any]]:
    """TGI's tokens, each with the characters that it covers."""
    found = prompts.spans(text, special=special)
    return [{"id": i, "text": text[start:stop], "start": start, "stop": stop} for i, start, stop in found]
