"""Image requests: the bodies of the image routes, and how they reach the engine.

    ImageBody, EditBody      the fields of docs/reference/serving-images.md, each validated separately
    PictureMixPart           an adapter with its factors by block and step
    ask_pictures             a body -> DrawingPlan (PictureRequests) and the engine's events

Requests come from an HTTP client or a Studio view, and run under the principal's limits and bill. No field is
silently ignored: unsupported values are rejected with the reason. An image's size is read from its header
before the image is decoded, and URLs are never fetched.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from veneer.errors import ConfigError, VeneerError, quoted
from veneer.formats.strengths import Strength, check_roles, parse_strength, split_factors
from veneer.imaging.adapters import role_note
from veneer.imaging.controls import ControlSpec, control_picture, decoded, flattened
from veneer.imaging.generate import fit_reference, size_for
from veneer.models.image.base import aspect_problem
from veneer.models.image.generate import SEEDS, Control, PictureSettings, default_settings, fitted_picture
from veneer.serve.access import ResolvedModel
from veneer.serve.http.bodies import FAIL_FAST, MixPart, Strict, at_most, body_error, read_body, read_json
from veneer.serve.http.guard import media_type
from veneer.serve.http.metrics import Meter
from veneer.serve.http.service import Service, service_of
from veneer.serve.http.telemetry import current, settle
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import FinishedPicture, PictureEvent, PictureRequest, PictureStep
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage, invalid

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.models.image.base import ImageBase

IndexedPicture = tuple[int, PictureEvent]
"""(index of the image within the request, event)."""

FORMATS = ("PNG", "JPEG", "WEBP")
_STEPS = {"low": 0.5, "high": 2.0, "hd": 2.0}
"""Quality -> factor applied to the base's default number of steps."""


# -- bodies ------------------------------------------------------------------------------------------------------------


def _json(value: Any) -> Any:
    """Parse a list or object given as JSON text, as in forms; return other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return read_json(value.encode())
        except (Refused, ValueError):
            raise ValueError("this is not JSON") from None
    return value


def _as_list(value: Any) -> Any:
    value = _json(value)
    return [value] if isinstance(value, dict | bytes | str) else value


_Factor = Annotated[float, Field(ge=-10_000, le=10_000, strict=True)]
_Block = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^(\*|[\w.-]+)$")]
_Range = Annotated[list[_Factor], Field(min_length=2, max_length=3)]


class PictureMixPart(MixPart):
    """An adapter, and how its strength varies within the image.

    The settings are the same as after an `@` in `veneer image`. `blocks`: block -> factor; if several match a
    module, the last one applies. `steps`: [from, to] or [from, to, factor], as fractions of the steps; the
    adapter is inactive outside these ranges. `campaign`: the adapter's role in a stack, instead of `blocks`
    and `steps`.
    """

    blocks: Annotated[dict[_Block, _Factor] | None, at_most(64), BeforeValidator(_json)] = None
    steps: Annotated[Annotated[list[_Range], FAIL_FAST] | None, at_most(64), BeforeValidator(_json)] = None
    campaign: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @classmethod
    def fields_of(cls, text: str) -> dict[str, Any]:
        """Return the fields of a text in the syntax of `veneer image --adapter`.

        The name is never read as a local path.
        """
        head, factors = split_factors(text)
        parsed = parse_strength(factors) if factors else Strength()
        settings = {"blocks": dict(parsed.blocks), "steps": [[*at] for at in parsed.steps], "campaign": parsed.campaign}
        return super().fields_of(head) | {key: value for key, value in settings.items() if value}

    @property
    def factors(self) -> Strength:
        """Return the factors, with a strength of 1. Raises ConfigError for factors that conflict."""
        ranges = [(at[0], at[1], at[2] if len(at) > 2 else 1.0) for at in self.steps or []]
        return Strength(1.0, tuple((self.blocks or {}).items()), tuple(ranges), self.campaign or "")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        try:
            replace(self.factors, strength=self.strength)
        except ConfigError as error:
            raise PydanticCustomError("factors", "{text}", {"text": f"{error.what}: {error.fix}"}) from error
        return self


Data = bytes | str
"""An image: the bytes of an uploaded file or, in a JSON body, a base64 text or a data: URL."""


class ImageReference(Strict):
    image_url: str


class ControlBody(Strict):
    """A control image, active from `begin` to `end` (fractions of the steps)."""

    type: str = Field(max_length=64)
    image: Data
    strength: float = Field(1.0, ge=-100, le=100)
    begin: float = Field(0.0, ge=0, lt=1)
    end: float = Field(1.0, gt=0, le=1)


class ImageBody(Strict):
    prompt: str = Field(min_length=1, max_length=32_000)
    model: str = Field("", max_length=512)
    n: int = Field(1, ge=1)
    size: str | None = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["low"] | None = None
    output_format: Literal["png", "jpeg", "jpg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: Literal[0] = 0
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    negative_prompt: str = Field("", max_length=32_000)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=1000)
    true_cfg_scale: float | None = Field(None, ge=1, le=1000)
    scheduler: str | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    mix: Annotated[Annotated[list[PictureMixPart], FAIL_FAST] | None, BeforeValidator(_as_list), at_most(64)] = None
    control: Annotated[list[ControlBody], at_most(4), BeforeValidator(_as_list)] = Field(default_factory=list)

    @property
    def kind(self) -> str:
        """Return the image format: png, jpeg or webp."""
        return "jpeg" if self.output_format == "jpg" else self.output_format


class EditBody(ImageBody):
    """A request to edit images.

    `image`, or `images` in OpenAI's JSON form: the input images; `pictures` returns both. `mask_data`: the
    mask in either form. `denoise`: fraction of the steps that change the image. `input_fidelity`: OpenAI's
    setting for how closely to preserve the input; an editing base always uses the full input.
    """

    image: Annotated[list[Data], FAIL_FAST, at_most(64), BeforeValidator(_as_list)] = Field(default_factory=list)
    images: Annotated[list[ImageReference], FAIL_FAST, at_most(64)] = Field(default_factory=list)
    mask: Annotated[Data | ImageReference | None, BeforeValidator(_json)] = None
    denoise: float | None = Field(None, gt=0, le=1)
    input_fidelity: Literal["low", "high"] | None = None

    @property
    def pictures(self) -> list[Data]:
        return [*self.image, *(reference.image_url for reference in self.images)]

    @property
    def mask_data(self) -> Data | None:
        return self.mask.image_url if isinstance(self.mask, ImageReference) else self.mask


def checked_image_body(kind: type[ImageBody], fields: dict[str, Any], most: int) -> ImageBody:
    """Return the validated body; null fields count as absent. Raises Refused with all errors."""
    try:
        body = kind.model_validate({key: value for key, value in fields.items() if value is not None})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        names = [*kind.model_fields, *PictureMixPart.model_fields, *ControlBody.model_fields]
        raise body_error([{**p, "loc": ("body", *p["loc"])} for p in problems], names) from error
    if body.n > most:
        raise invalid(f"n is {body.n}", "n", f"at most {most}")
    if body.output_compression not in (None, 100) and body.kind == "png":
        raise invalid("PNG compression is lossless", "output_compression", "output_format jpeg or webp")
    return body


async def image_fields(request: HttpRequest) -> dict[str, Any]:
    """Return the fields of a JSON body or a form; uploaded files are bytes. Raises Refused."""
    if media_type(request.headers) != "multipart/form-data":
        content = await read_body(request)
        if not isinstance(content, dict):
            raise invalid("the body is not a JSON object")
        return content
    most = service_of(request).settings.max_body
    try:
        async with request.form(max_files=32, max_fields=200, max_part_size=most) as form:
            items = [(key, await v.read() if isinstance(v, UploadFile) else v) for key, v in form.multi_items()]
    except HTTPException as error:
        raise invalid(f"the form cannot be read: {error.detail}") from error
    out: dict[str, Any] = {}
    for key, value in items:  # keys such as `image`, `image[]` and `mix[]` are lists
        name = re.sub(r"\[\d*\]$", "", key)
        if name != key or name == "image":
            out.setdefault(name, []).append(value)
        elif name in out:
            raise invalid(f"{name} occurs twice", name)
        else:
            out[name] = value
    return out


def described_body(kind: type[ImageBody]) -> dict[str, Any]:
    """Return the description of a route's body for /openapi.json.

    FastAPI cannot describe a body that is either JSON or a form."""
    schema = kind.model_json_schema()
    defined = schema.pop("$defs", {})

    def inlined(part: Any) -> Any:
        if isinstance(part, dict):
            named = str(part.get("$ref", "")).rpartition("/")[2]
            return inlined(defined[named]) if named else {key: inlined(value) for key, value in part.items()}
        return [inlined(value) for value in part] if isinstance(part, list) else part

    content = {"schema": inlined(schema)}
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": dict.fromkeys(kinds, content)}}


# -- running -----------------------------------------------------------------------------------------------------------


async def ask_pictures(
    service: Service, principal: Principal, body: ImageBody, number: str, *, trial: bool = False
) -> tuple[DrawingPlan, AsyncGenerator[IndexedPicture, None]]:
    """Plan an image request; return the plan and an iterator of its events.

    Work starts with the first event that is awaited, and closing the iterator cancels it. `number`: the
    request's id. `trial`: see `ResolvedModel`. Raises Refused.
    """
    if service.engine.makes != "pictures":
        raise invalid("this server has a text base", fix="use /v1/chat/completions")
    model, labels, factors = _select(service, body, principal)
    if trial:
        model = model.as_trial()
    engine, most = cast(PictureEngine, service.engine), service.settings.max_pixels
    plan = await asyncio.to_thread(_planned, engine, body, principal, model, labels, factors, most)
    return plan, _run(service, engine, plan, principal, model, number)


def _select(
    service: Service, body: ImageBody, principal: Principal
) -> tuple[ResolvedModel, dict[str, str], dict[str, Strength]]:
    """Return the mix, the client's name for each adapter, and each adapter's factors or role."""
    parts = body.mix
    if parts is None:
        model = service.choose(principal, model=body.model)
        return model, {digest: model.target for digest, _ in model.mix}, {}
    try:
        check_roles((part.adapter, part.factors) for part in parts)
    except VeneerError as error:
        raise invalid(error.what, "mix", error.fix) from error
    mix = [(part.adapter, part.strength) for part in parts]
    model = service.choose(principal, model=body.model, mix=mix)
    factors: dict[str, Strength] = {}
    for part, digest in zip(parts, model.digests, strict=True):
        if digest and factors.setdefault(digest, part.factors) != part.factors:
            message = f"{quoted(part.adapter)} is named twice with different blocks, steps or roles"
            raise invalid(message, "mix", "name it once")
    labels = {digest: part.adapter for part, digest in zip(parts, model.digests, strict=True)}
    return model, labels, {digest: factor for digest, factor in factors.items() if factor != Strength()}


async def _run(
    service: Service, engine: PictureEngine, plan: DrawingPlan, principal: Principal, model: ResolvedModel, number: str
) -> AsyncGenerator[IndexedPicture, None]:
    """Yield the engine's events, under the principal's limits.

    Completed work is billed, however the request ends. Image requests have no shadow, because shadows compare
    only texts.
    """
    positions = engine.positions(plan.requests[0].settings)
    usages, trail = [Usage(0, 0, 0) for _ in plan.requests], current.get()
    admitted = service.tenancy.admitted(
        principal, model, request=number, prompt_tokens=plan.text_tokens, max_tokens=positions * len(usages)
    )
    async with admitted as bill:
        named = (model.label, model.router_name, model.mix)
        meters = [Meter(service.metrics, *named, tenant=principal.tenant, tokens=False) for _ in usages]
        reasons = ["abort"] * len(usages)
        billed = False
        try:
            async with aclosing(engine.events(plan.requests)) as events:
                async for i, event in events:
                    if isinstance(event, PictureStep):
                        usages[i] = replace(usages[i], completion=round(positions * event.done / event.total))
                        meters[i].started()
                    elif isinstance(event, FinishedPicture):
                        usages[i], reasons[i] = event.usage, "stop"
                        if reasons.count("stop") == len(reasons):  # bill before the last image is sent
                            billed = True
                            await settle(trail, model.name, _total(plan, usages), bill)
                    yield i, event
        except Exception:
            reasons = ["error" if reason == "abort" else reason for reason in reasons]
            raise
        finally:
            for meter, reason, usage in zip(meters, reasons, usages, strict=True):
                meter.end(reason, usage)
            if not billed:
                if trail is not None:
                    trail.used(model.name, _total(plan, usages))
                bill.used(_total(plan, usages))


def _total(plan: DrawingPlan, usages: list[Usage]) -> Usage:
    return Usage(
        plan.text_tokens if any(usage.completion for usage in usages) else 0,
        0,
        sum(usage.completion for usage in usages),
        max(usage.queued for usage in usages),
        decode=max(usage.decode for usage in usages),
    )


# -- planning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawingPlan:
    """The engine requests for a body, and notes for the response."""

    requests: tuple[PictureRequest, ...]
    notes: tuple[str, ...]
    width: int
    height: int
    text_tokens: int
    image_tokens: int
    """Number of latent positions of the input images."""


def _planned(
    engine: PictureEngine,
    body: ImageBody,
    principal: Principal,
    model: ResolvedModel,
    labels: dict[str, str],
    factors: dict[str, Strength],
    most: int,
) -> DrawingPlan:
    """Return the plan of a body: decode, fit and check its images. Blocking.

    `most`: maximum pixels of an upload. Raises Refused."""
    base = engine.base
    notes: list[str] = []
    for part, digest in zip(body.mix or (), model.digests, strict=False):
        if not digest and part.factors != Strength():
            label = "role" if part.campaign else "blocks and steps"
            notes.append(f"{part.adapter} is the base: its {label} {'has' if part.campaign else 'have'} no effect")
    resolved = {digest: engine.in_campaign(factor) for digest, factor in factors.items()}
    notes += [role_note(labels[d], factor, resolved[d]) for d, factor in factors.items() if factor.campaign]
    if "<lora:" in body.prompt:
        notes.append("<lora:…> in a prompt is plain text; name adapters in mix")
    edit = body if isinstance(body, EditBody) else None
    image, mask, sources = _edited(base, edit, most) if edit else (None, None, [])
    sent = [flattened(_opened(each.image, "control", f"the {each.type} picture", most)) for each in body.control]
    if base.only_edits and not sources and image is None:
        notes.append(
            "this base edits images, but without an image it generates from the prompt; send images to /v1/images/edits"
        )
    if body.size in (None, "auto"):
        width, height = size_for(base, None, None, image or next(iter([*sent, *sources]), None))
    else:
        width, height = map(int, body.size.split("x"))
    if width * height > engine.max_pixels:
        raise invalid(f"{width}×{height}: at most {engine.max_pixels} pixels", "size")
    inputs: dict[str, Any] = {
        "image": _record(edit.pictures[0]) if edit and image else None,
        "mask": _record(edit.mask_data) if edit and edit.mask_data is not None else None,
    }
    denoise = 1.0
    if edit and image is not None:
        denoise = edit.denoise or (0.6 if mask is None else 1.0)
    image, mask = _fitted(image, width, height, "image", notes), _fitted(mask, width, height, "mask", notes)
    controls, inputs["controls"] = _controls(engine, body.control, sent, width, height, notes)
    if edit and sources:
        inputs["references"] = [_record(picture) for picture in edit.pictures]
    fitted = [fit_reference(base, picture, width, height) for picture in sources]
    notes += [note for _, note in fitted if note]
    settings = PictureSettings(
        width,
        height,
        *_numbers(base, body),
        scheduler=body.scheduler,
        controls=controls,
        references=tuple(reference for reference, _ in fitted),
        image=image,
        mask=mask,
        denoise=denoise,
    )
    first = PictureRequest(
        body.prompt,
        settings,
        body.negative_prompt,
        mix=model.mix,
        factors=resolved,
        labels=labels,
        inputs=inputs,
        tenant=principal.tenant,
        weight=principal.weight,
    )
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    requests = tuple(replace(first, seed=(seed + i) % SEEDS, id=f"{first.id}-{i}") for i in range(body.n))
    texts = [text for text in (body.prompt, body.negative_prompt) if text]
    positions = engine.positions(settings) * ((image is not None) + len(controls))
    positions += sum(engine.positions(replace(settings, width=r.width, height=r.height)) for r, _ in fitted)
    return DrawingPlan(requests, tuple(notes), width, height, engine.tokens(*texts), positions)


def _numbers(base: ImageBase, body: ImageBody) -> tuple[int, float, float]:
    """Return steps, guidance scale and true guidance scale.

    For Qwen-Image, `guidance_scale` means what other families call true guidance."""
    steps, guidance = default_settings(base)
    taken = body.num_inference_steps or max(1, round(steps * _STEPS.get(body.quality, 1.0)))
    scale, true = body.guidance_scale, body.true_cfg_scale
    if base.row.guidance == "true_cfg_scale":
        if scale is not None and true is not None:
            raise invalid(
                "for this base, true_cfg_scale and guidance_scale mean the same", "true_cfg_scale", "leave one out"
            )
        scale, true = true if scale is None else scale, None
    return taken, guidance if scale is None else scale, 1.0 if true is None else true


def _edited(base: ImageBase, body: EditBody, most: int) -> tuple[Image | None, Image | None, list[Image]]:
    """Return the start image, its grayscale mask, and the source images for an editing base.

    White areas of the mask are regenerated. For an editing base without a mask, all images are sources, and
    there is no start image.
    """
    images, mask, label = body.pictures, body.mask_data, base.row.label
    several = bool(base.references) and mask is None
    if not images:
        raise invalid("there is no image to edit", "image", "send one")
    if base.references and mask is not None and (base.only_edits or "inpaint" not in base.pipelines):
        fix = "leave it out, and describe the change in the prompt"
        raise invalid(f"{label} edits the whole image and accepts no mask", "mask", fix)
    if several and body.denoise is not None:
        fix = "leave it out; use adapter strengths"
        raise invalid(f"{label} edits from noise and always runs all steps", "denoise", fix)
    if several and body.control:
        raise invalid("edits and controls cannot be combined", "control", "leave one out")
    if several and len(images) > base.references:
        fix = "send fewer, or combine images into one"
        raise invalid(f"{len(images)} images: {label} accepts at most {base.references}", "image", fix)
    if body.input_fidelity == "high" and not several:
        hint = "denoise sets how close the result stays to the image"
        message = f"input_fidelity high needs reference images of an editing base; here {hint}"
        raise invalid(message, "input_fidelity", "leave it out; use a smaller denoise")
    if len(images) > 1 and not several:
        further = "; further images can be controls" if base.row.control else ", or leave the mask out"
        raise invalid(f"{len(images)} images", "image", f"send one{further}")
    opened = [flattened(_opened(item, "image", "the image", most)) for item in images]
    if several:
        for picture in opened:
            if why := aspect_problem(*picture.size):
                raise invalid(f"the image has {why}", "image", "crop it")
        return None, None, opened
    if mask is None:
        return opened[0], None, []
    opening = _opening(_opened(mask, "mask", "the mask", most))
    if not opening.getbbox():
        raise invalid("the mask selects nothing", "mask", "make the area to change transparent")
    return opened[0], opening, []


def _opened(data: Data, param: str, label: str, most: int) -> Image:
    """Return a decoded upload. Raises Refused if it has more than `most` pixels."""
    content = _bytes(data, param)
    try:
        return decoded(content, label, formats=FORMATS, max_pixels=most)
    except VeneerError as error:
        raise invalid(f"{label}: {error.what}", param, error.fix) from error


def _fitted(picture: Image | None, width: int, height: int, label: str, notes: list[str]) -> Image | None:
    if picture is None:
        return None
    try:
        result, note = fitted_picture(picture, width, height, label)
    except VeneerError as error:
        raise invalid(error.what, label, f"crop it, or use size {picture.width}x{picture.height}") from error
    notes += [note] if note else []
    return result


def _controls(
    engine: PictureEngine, bodies: list[ControlBody], sent: list[Image], width: int, height: int, notes: list[str]
) -> tuple[tuple[Control, ...], list[dict[str, Any]]]:
    """Return (the engine's controls, their entries in the image's record)."""
    controls, records = [], []
    for control, picture in zip(bodies, sent, strict=True):
        name, model = engine.control(control.type)
        if control.begin >= control.end:
            raise invalid(f"a control's begin ({control.begin:g}) must be below its end ({control.end:g})", "control")
        try:
            image, found = control_picture(ControlSpec(control.type, "(sent)"), picture, width, height)
        except VeneerError as error:
            raise invalid(error.what, "control", error.fix) from error
        notes += found
        controls.append(Control(model, image, control.strength, control.begin, control.end))
        entry: dict[str, Any] = {"kind": control.type, "model": name, **_record(control.image)}
        records.append(entry | {"weight": control.strength, "begin": control.begin, "end": control.end})
    return tuple(controls), records


def _record(data: Data) -> dict[str, str]:
    return {"path": "", "sha256": hashlib.sha256(_bytes(data, "image")).hexdigest()}


def _opening(mask: Image) -> Image:
    """Return the area to regenerate, as a grayscale image in which this area is white.

    This is the mask's transparent area, as in OpenAI's API, or its white area if nothing is transparent."""
    from PIL import ImageChops

    if mask.mode in ("RGBA", "LA", "PA") or "transparency" in mask.info:
        return ImageChops.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def _bytes(data: Data, param: str) -> bytes:
    if isinstance(data, bytes):
        return data
    if re.match(r"(?i)https?://", data):
        raise invalid("URLs are not fetched", param, "send the image as base64 or a data: URL")
    head, comma, rest = data.partition(",")
    try:
        return base64.b64decode(rest if comma and head.startswith("data:") else data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param} is not base64: {error}", param) from error
