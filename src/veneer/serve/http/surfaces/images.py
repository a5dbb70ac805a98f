"""OpenAI's image routes, with vLLM-Omni's fields and veneer's mixes and controls.

    POST /v1/images/generations   an image from a prompt                JSON, or a form if controls are files
    POST /v1/images/edits         an image from another, with a mask;   a form, or JSON
                                  an editing base follows the prompt and uses one or several images

    a body's fields -> ImageBody, EditBody -> ask_pictures -> the engine's events -> response

No field is silently ignored: unknown or unsupported values are rejected with the reason. An image's size is
read from its header before the image is decoded, and URLs are never fetched. With `stream`, the events are
`image_generation.progress` at each step and `.completed` for each image (`image_edit.…` for edits). If the
client disconnects, its request is cancelled. See docs/reference/serving-images.md.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.imaging.infotext import encoded
from veneer.serve.http.answers import ClientLeft, opened_stream, unless_left
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.errors import Json, as_refused, error_body
from veneer.serve.http.guard import needs
from veneer.serve.http.image_requests import (
    DrawingPlan,
    EditBody,
    ImageBody,
    IndexedPicture,
    ask_pictures,
    checked_image_body,
    described_body,
    image_fields,
)
from veneer.serve.http.service import caller_of, service_of
from veneer.serve.http.sse import EventStream
from veneer.serve.pictures.request import FinishedPicture, PictureStep
from veneer.serve.request import Refused

images_routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute, dependencies=[needs("infer")])

_QUALITY = {"auto": "medium", "standard": "medium", "hd": "high"}

# -- the two routes ----------------------------------------------------------------------------------------------------


@images_routes.post(
    "/v1/images/generations", summary="Generate images from a prompt.", openapi_extra=described_body(ImageBody)
)
async def generations(request: HttpRequest) -> Response:
    return await _answered(request, ImageBody, "image_generation")


@images_routes.post(
    "/v1/images/edits",
    summary="Edit images as a prompt describes, or regenerate an image or its masked area.",
    openapi_extra=described_body(EditBody),
)
async def edits(request: HttpRequest) -> Response:
    return await _answered(request, EditBody, "image_edit")


async def _answered(request: HttpRequest, kind: type[ImageBody], event: str) -> Response:
    try:
        service = service_of(request)
        body = checked_image_body(kind, await image_fields(request), service.settings.max_pictures)
        principal = caller_of(request, body.user or body.safety_identifier)
        plan, events = await ask_pictures(service, principal, body, request.scope["veneer.id"])
        if not body.stream:
            return Json(await unless_left(request, _collected(events, body, plan)))
        lines = _lines(await opened_stream(request, events), body, plan, event)
        return EventStream(lines, events, _error_event, service.settings.stall)
    except (ClientLeft, Refused):
        raise
    except Exception as error:
        raise as_refused(error) from error


async def _collected(
    events: AsyncGenerator[IndexedPicture, None], body: ImageBody, plan: DrawingPlan
) -> dict[str, Any]:
    pictures: dict[int, FinishedPicture] = {}
    async with aclosing(events):
        async for i, event in events:
            if isinstance(event, FinishedPicture):
                pictures[i] = event
    data = []
    for i, request in enumerate(plan.requests):
        file = await asyncio.to_thread(_file, pictures[i], body)
        item: dict[str, Any] = {"seed": request.seed}
        if body.response_format == "url":
            item["url"] = f"data:image/{body.kind};base64,{file}"
        else:
            item["b64_json"] = file
        data.append(item | _notes(plan, pictures[i]))
    return _settings_fields(body, plan) | {
        "created": int(time.time()),
        "data": data,
        "usage": _usage(plan, sum(picture.usage.completion for picture in pictures.values())),
    }


# -- response formats --------------------------------------------------------------------------------------------------


def _file(picture: FinishedPicture, body: ImageBody) -> str:
    result = picture.picture
    quality = 95 if body.output_compression is None else body.output_compression
    return base64.b64encode(encoded(result.image, result.text, result.record, body.kind, quality)).decode()


def _settings_fields(body: ImageBody, plan: DrawingPlan) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": body.kind,
        "quality": _QUALITY.get(body.quality, body.quality),
        "size": f"{plan.width}x{plan.height}",
    }


def _usage(plan: DrawingPlan, output: int) -> dict[str, Any]:
    text, image = plan.text_tokens, plan.image_tokens
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": output,
        "total_tokens": text + image + output,
    }


def _notes(plan: DrawingPlan, picture: FinishedPicture) -> dict[str, Any]:
    notes = [*plan.notes, *picture.notes]
    return {"notes": notes} if notes else {}


async def _lines(
    events: AsyncIterator[IndexedPicture], body: ImageBody, plan: DrawingPlan, event: str
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events.

    After the first event, an error is sent as an event (`_error_event`), because the status has been sent.
    """
    created = int(time.time())
    async for i, item in events:
        if isinstance(item, PictureStep):
            yield _sse({"type": f"{event}.progress", "index": i, "step": item.done, "steps": item.total})
        elif isinstance(item, FinishedPicture):
            file = await asyncio.to_thread(_file, item, body)
            fields = {"type": f"{event}.completed", "b64_json": file, "seed": plan.requests[i].seed, "index": i}
            fields |= {"created_at": created, "usage": _usage(plan, item.usage.completion)}
            yield _sse(fields | _settings_fields(body, plan) | _notes(plan, item))


def _error_event(error: Refused) -> bytes:
    return _sse({"type": "error"} | error_body(error, "OpenAI")[1])


def _sse(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
