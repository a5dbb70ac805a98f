"""OpenAI's images surface, with vLLM-Omni's fields and veneer's mixes and controls: `router(engine, catalog, tenancy)`.

    POST /v1/images/generations      a picture of a prompt                    JSON, or a form where controls are files
    POST /v1/images/edits            a picture from another one, with a mask  a form, or JSON

With `stream`, events: `image_generation.progress` at each step, `.partial_image`, and `.completed` for each picture
(`image_edit.…` for edits). A client that leaves cancels what it asked for. See docs/reference/serving-images.md.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from veneer.formats.infotext import encoded, png_bytes
from veneer.serve.access import BEHIND, SHADOWS, Caller, Catalog, Served, Tenancy
from veneer.serve.http.errors import Json, answer_error, as_refused, error_body, invalid, problem_of
from veneer.serve.http.house import House, ShadowAnswer, client_key
from veneer.serve.http.metrics import Meter
from veneer.serve.http.running import ClientLeft, unless_left
from veneer.serve.http.sse import EventStream
from veneer.serve.http.surfaces.images_asked import EditAsked, ImageAsked, Planned, asked_of, fields_of, planned
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import Drawn, PictureEvent, PictureRequest, Preview, Step
from veneer.serve.request import Refused, Usage

__all__ = ["router"]

Told = tuple[int, PictureEvent]

_QUALITY = {"auto": "medium", "standard": "medium", "hd": "high"}


def router(
    engine: PictureEngine,
    catalog: Catalog,
    tenancy: Tenancy,
    *,
    max_body: int = 64 << 20,
    max_pixels: int = 1 << 24,
    max_n: int = 10,
    stall: float = 60.0,
) -> APIRouter:
    """The two routes. `max_pixels`: of a picture that is sent; `stall`: seconds a client may leave a stream unread.
    Who asks is what the application has found out (`veneer.caller` in the scope), else asked of `tenancy`."""
    surface = _Surface(engine, catalog, tenancy, max_body, max_pixels, max_n, stall)
    made = APIRouter(tags=["OpenAI"])

    @made.post("/v1/images/generations", summary="Draw pictures of a prompt.")
    async def generations(request: Request) -> Response:
        return await surface.answer(request, ImageAsked, "image_generation")

    @made.post("/v1/images/edits", summary="Draw pictures from another one, where its mask is open or all over.")
    async def edits(request: Request) -> Response:
        return await surface.answer(request, EditAsked, "image_edit")

    return made


class _Surface:
    def __init__(
        self, engine: PictureEngine, catalog: Catalog, tenancy: Tenancy, max_body: int, max_pixels: int, max_n: int,
        stall: float,
    ) -> None:  # fmt: skip
        self.engine, self.catalog, self.tenancy = engine, catalog, tenancy
        self.max_body, self.max_pixels, self.max_n, self.stall = max_body, max_pixels, max_n, stall

    async def answer(self, request: Request, kind: type[ImageAsked], event: str) -> Response:
        try:
            caller = request.scope.get("veneer.caller") or await self.tenancy.caller(client_key(request))
            asked = asked_of(kind, await fields_of(request, self.max_body), self.max_n)
            caller = replace(caller, user=asked.user or asked.safety_identifier or caller.user)
            served, labels = _named(self.catalog, asked, caller)
            plan = await asyncio.to_thread(planned, self.engine, asked, caller, served, labels, self.max_pixels)
            house = getattr(request.app.state, "house", None)
            number = request.scope.get("veneer.id") or plan.requests[0].id
            events = self._run(plan, caller, served, number, house)
            if not asked.stream:
                return Json(await unless_left(request, self._collected(events, asked, plan)))
            first = await unless_left(request, _next(events))
            return EventStream(_lines(first, events, asked, plan, event), events, _told, self.stall)
        except ClientLeft:
            return Response(status_code=499)
        except Exception as error:
            return answer_error(as_refused(error), "OpenAI")

    async def _run(
        self, plan: Planned, caller: Caller, served: Served, number: str, house: House | None
    ) -> AsyncGenerator[Told, None]:
        """The engine's events, under the caller's limits; what was drawn is billed however it ends, in part too. Once
        the first picture is there, a route's shadow draws it as well."""
        metrics = None if house is None else house.metrics
        label = self.catalog.base if not served.mix else "mix" if len(served.mix) > 1 else served.target
        places = self.engine.places(plan.requests[0].settings)
        usages = [Usage(0, 0, 0) for _ in plan.requests]
        admitted = self.tenancy.admitted(
            caller, served, request=number, prompt_tokens=plan.text_tokens, max_tokens=places * len(usages)
        )  # fmt: skip
        async with admitted as bill:
            meters = [Meter(metrics, label, caller.tenant) for _ in usages] if metrics is not None else []
            reasons = ["abort"] * len(usages)
            billed = False
            try:
                async with aclosing(self.engine.events(plan.requests)) as events:
                    async for i, event in events:
                        if isinstance(event, Step):
                            usages[i] = replace(usages[i], completion=round(places * event.done / event.of))
                            if meters:
                                meters[i].started()
                        elif isinstance(event, Drawn):
                            usages[i], reasons[i] = event.usage, "stop"
                            if i == 0 and house is not None and served.shadow is not None:
                                self._shadow(house, plan.requests[0], caller, served, number, event)
                            if reasons.count("stop") == len(reasons):  # before the last picture goes out
                                billed = True
                                await bill.used(_total(plan, usages))
                        yield i, event
            except Exception:
                reasons = ["error" if reason == "abort" else reason for reason in reasons]
                raise
            finally:
                for meter, reason, usage in zip(meters, reasons, usages, strict=False):
                    meter.end(reason, usage)
                if not billed:
                    bill.used(_total(plan, usages))

    def _shadow(
        self, house: House, request: PictureRequest, caller: Caller, served: Served, number: str, sent: Drawn
    ) -> None:
        """Starts the shadow's picture behind the request."""
        assert served.shadow is not None
        name, mix = served.shadow[0], () if isinstance(served.shadow[1], Refused) else served.shadow[1]
        labels = {digest: name for digest, _ in mix} if len(mix) == 1 else {}
        own: dict[str, Any] = {"tenant": BEHIND, "weight": SHADOWS.weight}
        behind = replace(request, mix=mix, labels=labels, previews=0, id=f"{request.id}-shadow", **own)
        most = self.engine.places(request.settings)

        async def follow() -> None:
            drawn, error = None, ""
            try:
                async with house.shadow_bill(served, request=behind.id, prompt=sent.usage.prompt, most=most) as bill:
                    try:
                        async with aclosing(self.engine.events([behind])) as events:
                            async for _, event in events:
                                drawn = event if isinstance(event, Drawn) else drawn
                    finally:
                        await bill.used(Usage(0, 0, 0) if drawn is None else drawn.usage)
            except Exception as problem:  # a shadow never disturbs what it follows
                drawn, error = None, problem_of(problem)
            one, other, apart = await asyncio.to_thread(_compared, sent, drawn)
            own = Usage(0, 0, 0) if drawn is None else drawn.usage
            house.shadowed(
                ShadowAnswer(
                    number, caller.tenant, served.name, name, served.target, one, other, sent.usage, own, error, apart
                )
            )

        house.follow(follow)

    async def _collected(self, events: AsyncGenerator[Told, None], asked: ImageAsked, plan: Planned) -> dict[str, Any]:
        found: dict[int, Drawn] = {}
        async with aclosing(events):
            async for i, event in events:
                if isinstance(event, Drawn):
                    found[i] = event
        data = []
        for i, request in enumerate(plan.requests):
            file = await asyncio.to_thread(_file, found[i], asked)
            one: dict[str, Any] = {"seed": request.seed}
            if asked.response_format == "url":
                one["url"] = f"data:image/{asked.kind};base64,{file}"
            else:
                one["b64_json"] = file
            data.append(one | _notes(plan, found[i]))
        return _about(asked, plan) | {
            "created": int(time.time()),
            "data": data,
            "usage": _usage(plan, sum(drawn.usage.completion for drawn in found.values())),
        }


def _total(plan: Planned, usages: list[Usage]) -> Usage:
    return Usage(
        plan.text_tokens if any(usage.completion for usage in usages) else 0,
        0,
        sum(usage.completion for usage in usages),
        max(usage.queued for usage in usages),
        decode=max(usage.decode for usage in usages),
    )


# -- what is said ------------------------------------------------------------------------------------------------------


def _named(catalog: Catalog, asked: ImageAsked, caller: Caller) -> tuple[Served, dict[str, str]]:
    """What acts, and what the client calls each adapter. An empty `mix` or `lora` is the base."""
    ways = {
        "mix": None if asked.mix is None else [(part.adapter, part.strength) for part in asked.mix],
        "lora": None if asked.lora is None else [(part.name, part.scale) for part in asked.lora],
    }
    given = [(way, parts) for way, parts in ways.items() if parts is not None]
    if not given:
        served = catalog.resolve(asked.model, caller)
        return served, {digest: served.target for digest, _ in served.mix} if len(served.mix) == 1 else {}
    if len(given) > 1:
        raise invalid("mix and lora both name adapters", "lora", "leave one out")
    (way, parts) = given[0]
    if catalog.resolve(asked.model, caller).mix:
        raise invalid(f"model and {way} both name adapters", way, f"model {catalog.base!r}, or none, beside {way}")
    served = catalog.resolve_mix(parts, caller) if parts else catalog.resolve("", caller)
    labels = {digest: name for name, _ in parts for digest, _ in catalog.resolve(name, caller).mix}
    return served, labels


def _compared(sent: Drawn, other: Drawn | None) -> tuple[str, str, float]:
    """The digests of both pictures' pixels ("" of one that is not there), and their mean difference, 0 … 1."""
    one, two = (None if drawn is None else np.asarray(drawn.made.image.convert("RGB")) for drawn in (sent, other))
    digests = ["" if pixels is None else hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in (one, two)]
    apart = 1.0 if one is None or two is None else float(np.abs(one.astype(float) - two).mean() / 255)
    return digests[0], digests[1], apart


def _file(drawn: Drawn, asked: ImageAsked) -> str:
    made = drawn.made
    quality = 95 if asked.output_compression is None else asked.output_compression
    return base64.b64encode(encoded(made.image, made.text, made.record, asked.kind, quality)).decode()


def _about(asked: ImageAsked, plan: Planned) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": asked.kind,
        "quality": _QUALITY.get(asked.quality, asked.quality),
        "size": f"{plan.width}x{plan.height}",
    }


def _usage(plan: Planned, output: int) -> dict[str, Any]:
    text, image = plan.text_tokens, plan.image_tokens
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": output,
        "total_tokens": text + image + output,
    }


def _notes(plan: Planned, drawn: Drawn) -> dict[str, Any]:
    notes = [*plan.notes, *drawn.notes]
    return {"notes": notes} if notes else {}


async def _lines(
    first: Told, rest: AsyncGenerator[Told, None], asked: ImageAsked, plan: Planned, event: str
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. What fails after the first is an event too (`_told`); its status was sent long ago."""
    created = int(time.time())

    async def line(i: int, told: PictureEvent) -> bytes | None:
        if isinstance(told, Step):
            return _sse({"type": f"{event}.progress", "index": i, "step": told.done, "steps": told.of})
        common = {"index": i, "created_at": created, **_about(asked, plan)}
        if isinstance(told, Preview):
            file = await asyncio.to_thread(_preview, told, asked)
            own = {"type": f"{event}.partial_image", "b64_json": file, "partial_image_index": told.index}
            return _sse(own | common)
        if isinstance(told, Drawn):
            file = await asyncio.to_thread(_file, told, asked)
            own = {"type": f"{event}.completed", "b64_json": file, "seed": plan.requests[i].seed}
            return _sse(own | common | {"usage": _usage(plan, told.usage.completion)} | _notes(plan, told))
        return None

    if (made := await line(*first)) is not None:
        yield made
    async for told in rest:
        if (made := await line(*told)) is not None:
            yield made


def _told(error: Exception) -> bytes:
    return _sse({"type": "error"} | error_body(as_refused(error), "OpenAI")[1])


def _preview(preview: Preview, asked: ImageAsked) -> str:
    if asked.kind == "png":
        return base64.b64encode(png_bytes(preview.image, "")).decode()
    return base64.b64encode(encoded(preview.image, "", {}, asked.kind, 80)).decode()


def _sse(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


# -- who asks, and whether they are still there ------------------------------------------------------------------------


async def _next(events: AsyncGenerator[Told, None]) -> Told:
    return await anext(events)
