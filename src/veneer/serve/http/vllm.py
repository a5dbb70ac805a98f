"""vLLM's and SGLang's routes beside OpenAI's: loading and unloading adapters while the server runs, tokens, version.

A source that a client names is the catalog's to judge: a library reference, or a path where the operator allowed one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from veneer import __version__
from veneer.serve.http.errors import Json, invalid
from veneer.serve.http.fields import Body, Neutral, TokenId
from veneer.serve.http.house import House, caller_of, house_of, load_adapter, need_admin
from veneer.serve.http.openai_bodies import Message
from veneer.serve.request import Refused

__all__ = ["router", "sglang"]

router = APIRouter(tags=["vLLM"])
sglang = APIRouter(tags=["SGLang"])


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


@router.post("/v1/load_lora_adapter", summary="Make an adapter of the library servable under a name.")
async def load(request: HttpRequest, body: Load) -> Response:
    need_admin(request)
    if not body.lora_name or not body.lora_path:
        raise invalid("Both 'lora_name' and 'lora_path' must be provided.")
    try:
        await load_adapter(
            house_of(request), body.lora_name, body.lora_path, replace=body.load_inplace, pinned=body.pinned
        )
    except Refused as error:
        if error.code != "adapter_exists":
            raise
        what = f"The lora adapter '{body.lora_name}' has already been loaded. "
        what += "If you want to load the adapter in place, set 'load_inplace' to True."
        raise Refused(what, status=400, code="adapter_exists", param="lora_name") from error
    text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse(text, headers=body.headers)


@router.post("/v1/unload_lora_adapter", summary="Forget a name; running requests end as they began.")
async def unload(request: HttpRequest, body: Unload) -> Response:
    need_admin(request)
    if not body.lora_name:
        raise invalid("'lora_name' must be provided.", "lora_name")
    await _forget(house_of(request), body.lora_name)
    text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
    return PlainTextResponse(text, headers=body.headers)


@sglang.post("/load_lora_adapter", summary="The same in SGLang's words.")
async def load_sglang(request: HttpRequest, body: Load) -> Response:
    need_admin(request)
    if not body.lora_name or not body.lora_path:
        raise invalid("both lora_name and lora_path are needed")
    house = house_of(request)
    await load_adapter(house, body.lora_name, body.lora_path, replace=body.load_inplace, pinned=body.pinned)
    return _loaded(request, house)


@sglang.post("/unload_lora_adapter", summary="The same in SGLang's words.")
async def unload_sglang(request: HttpRequest, body: Unload) -> Response:
    need_admin(request)
    if not body.lora_name:
        raise invalid("lora_name is needed")
    house = house_of(request)
    await _forget(house, body.lora_name)
    return _loaded(request, house)


async def _forget(house: House, name: str) -> None:
    await asyncio.to_thread(house.catalog.unload, name)
    await asyncio.to_thread(house.on_change, "adapter.unload", name, None)
    for scales in (house.loras.scales, house.default):
        scales.pop(name, None)


def _loaded(request: HttpRequest, house: House) -> Response:
    loaded = {card.id: card.root for card in house.adapters(caller_of(request))}
    return Json({"success": True, "error_message": None, "loaded_adapters": loaded})


# -- tokens ------------------------------------------------------------------------------------------------------------


class Tokenize(Body):
    """vLLM's `prompt` or `messages`, llama.cpp's `content`, or TGI's `inputs`: the answer has that surface's form."""

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    content: str | None = None
    inputs: str | None = None
    model: str = Field(default="", max_length=512)
    add_special_tokens: bool = True
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Detokenize(Body):
    tokens: list[TokenId] = Field(max_length=1 << 20)
    model: str = Field(default="", max_length=512)


@router.post("/tokenize", summary="Text or a conversation as tokens.")
async def tokenize(request: HttpRequest, body: Tokenize) -> Response:
    house, prompts = house_of(request), house_of(request).prompts
    ways = [key for key in ("prompt", "messages", "content", "inputs") if getattr(body, key) is not None]
    if len(ways) != 1:
        raise invalid("one of prompt, messages, content and inputs is needed", ways[0] if ways else "prompt")
    house.choose(caller_of(request), model=body.model)  # a model that is not there is an error here too
    if body.content is not None:
        ids = await prompts.of_text(body.content, special=body.add_special)
        if not body.with_pieces:
            return Json({"tokens": ids})
        return Json({"tokens": [{"id": i, "piece": _piece(*prompts.piece(i))} for i in ids]})
    if body.inputs is not None:
        return Json(await _spans(house, body.inputs, body.add_special_tokens))
    if body.messages is not None:
        variables = dict(body.chat_template_kwargs or {})
        variables["add_generation_prompt"] = body.add_generation_prompt and not body.continue_final_message
        if body.continue_final_message:
            variables["continue_final_message"] = True
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        ids = await prompts.of_messages(messages, body.tools, **variables)
    else:
        ids = await prompts.of_text(body.prompt or "", special=body.add_special_tokens)
    texts = [prompts.piece(i)[0] for i in ids] if body.return_token_strs else None
    return Json({"count": len(ids), "max_model_len": prompts.context, "tokens": ids, "token_strs": texts})


@router.post("/detokenize", summary="Tokens as text, under vLLM's key and llama.cpp's.")
async def detokenize(request: HttpRequest, body: Detokenize) -> Response:
    house = house_of(request)
    house.choose(caller_of(request), model=body.model)
    text = await house.prompts.decode(house.prompts.of_ids(body.tokens, "tokens"))
    return Json({"prompt": text, "content": text})


def _piece(text: str, raw: tuple[int, ...]) -> str | list[int]:
    """llama.cpp's pieces: text, or bytes where they are no text by themselves."""
    return list(raw) if "�" in text else text


async def _spans(house: House, text: str, special: bool) -> list[dict[str, Any]]:
    """TGI's tokens: each with the characters of the text that it covers."""
    found = await house.prompts.spans(text, special=special)
    return [{"id": i, "text": text[start:stop], "start": start, "stop": stop} for i, start, stop in found]


@router.get("/version", summary="veneer's version.")
async def version() -> Response:
    return Json({"version": __version__})
