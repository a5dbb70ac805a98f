"""What a request for pictures says: its body, as JSON or a form, and the pictures in it, to what the engine draws.

    fields_of(request)  ->  ImageAsked, EditAsked  ->  planned(…): a PictureRequest for each picture

Nothing that is asked for is left out in silence: what is not known, or cannot be done here, is refused with the reason.
A picture's size is read from its header before it is decoded, and no address is ever fetched.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from veneer.errors import VeneerError, nearest
from veneer.imaging.controls import ControlSpec, control_picture, decoded, flattened
from veneer.imaging.make import size_for
from veneer.models.image.generate import SEEDS, Control, PictureSettings, default_settings, fitted_picture
from veneer.serve.http.bodies import read_body, read_json
from veneer.serve.http.errors import invalid
from veneer.serve.http.fields import FIRST, Strict, at_most
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import PictureRequest
from veneer.serve.request import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.models.image.base import ImageBase
    from veneer.serve.access import Caller, Served

__all__ = ["EditAsked", "ImageAsked", "Planned", "asked_of", "fields_of", "planned"]

FORMATS = ("PNG", "JPEG", "WEBP")
_STEPS = {"low": 0.5, "high": 2.0, "hd": 2.0}
"""Quality -> its share of the base's own number of steps."""


# -- bodies ------------------------------------------------------------------------------------------------------------


class Part(Strict):
    adapter: str = Field(min_length=1, max_length=512)
    strength: float = Field(1.0, ge=-10_000, le=10_000)


class Lora(Strict):
    """vLLM-Omni's way to name an adapter. It never is a path here."""

    name: str = Field(min_length=1, max_length=512)
    scale: float = Field(1.0, ge=-10_000, le=10_000)


Data = bytes | str
"""A picture: an uploaded file's bytes; in JSON base64 or a data: URL."""


class Reference(Strict):
    image_url: str


class ControlAsked(Strict):
    """`begin`, `end`: shares of the steps in which it acts."""

    type: str = Field(max_length=64)
    image: Data
    strength: float = Field(1.0, ge=-100, le=100)
    begin: float = Field(0.0, ge=0, lt=1)
    end: float = Field(1.0, gt=0, le=1)


def _json(value: Any) -> Any:
    """A form has lists and objects as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return read_json(value.encode())
        except (Refused, ValueError):
            raise ValueError("this is not JSON") from None
    return value


def _listed(value: Any) -> Any:
    value = _json(value)
    return [value] if isinstance(value, dict | bytes | str) else value


def _parts(value: Any) -> Any:
    """[{"adapter", "strength"}], ["name:0.8"] or {"name": 0.8}, as a list of parts."""
    value = _json(value)
    if isinstance(value, dict) and "adapter" not in value:
        return [{"adapter": name, "strength": strength} for name, strength in value.items()]
    return [_part(item) if isinstance(item, str) else item for item in _listed(value) or []]


def _part(text: str) -> dict[str, Any]:
    name, colon, strength = text.rpartition(":")
    try:
        return {"adapter": name, "strength": float(strength)} if colon and name else {"adapter": text}
    except ValueError:
        return {"adapter": text}


class ImageAsked(Strict):
    prompt: str = Field(min_length=1, max_length=32_000)
    model: str = Field("", max_length=512)
    n: int = Field(1, ge=1)
    size: str | None = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = "auto"
    background: Literal["auto", "opaque", "transparent"] = "auto"
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png", "jpeg", "jpg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    negative_prompt: str = Field("", max_length=32_000)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=1000)
    true_cfg_scale: float | None = Field(None, ge=1, le=1000)
    scheduler: str | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    lora: Annotated[list[Lora] | None, at_most(64), BeforeValidator(_listed)] = None
    mix: Annotated[list[Part] | None, at_most(64), BeforeValidator(_parts)] = None
    control: Annotated[list[ControlAsked], at_most(4), BeforeValidator(_listed)] = Field(default_factory=list)

    @property
    def kind(self) -> str:
        """The file's format."""
        return "jpeg" if self.output_format == "jpg" else self.output_format


class EditAsked(ImageAsked):
    """`image`, or OpenAI's JSON form of it, `images`. `denoise`: how far from it, the share of the steps taken."""

    image: Annotated[list[Data], FIRST, at_most(64), BeforeValidator(_listed)] = Field(default_factory=list)
    images: Annotated[list[Reference], FIRST, at_most(64)] = Field(default_factory=list)
    mask: Annotated[Data | Reference | None, BeforeValidator(_json)] = None
    denoise: float | None = Field(None, gt=0, le=1)


def asked_of(kind: type[ImageAsked], fields: dict[str, Any], most: int) -> ImageAsked:
    """The body, checked by itself; null is what is not there. Raises Refused that names everything wrong with it."""
    try:
        asked = kind.model_validate({key: value for key, value in fields.items() if value is not None})
    except ValidationError as error:
        raise _told(kind, error) from error
    if asked.n > most:
        raise invalid(f"n is {asked.n}", "n", f"at most {most}")
    if asked.background == "transparent":
        raise invalid("pictures are opaque here", "background", "leave it out, or auto or opaque")
    if asked.moderation == "auto":
        raise invalid("nothing is moderated here", "moderation", "leave it out, or low")
    if asked.output_compression not in (None, 100) and asked.kind == "png":
        raise invalid("a PNG is never compressed with loss", "output_compression", "output_format jpeg or webp")
    if asked.partial_images and not asked.stream:
        raise invalid("partial images come in a stream", "partial_images", "stream true")
    return asked


def _told(kind: type[ImageAsked], error: ValidationError) -> Refused:
    told: list[str] = []
    for problem in error.errors()[:5]:
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            inner: dict[str, type[BaseModel]] = {"lora": Lora, "mix": Part, "control": ControlAsked}
            known = inner.get(str(problem["loc"][0]), kind).model_fields
            near = nearest(str(problem["loc"][-1]), known, 1)
            told.append(f"unknown key {where!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        else:
            told.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    first = error.errors()[0]["loc"]
    return invalid("; ".join(dict.fromkeys(told)), str(first[0]) if first else None)


async def fields_of(request: Request, limit: int) -> dict[str, Any]:
    """The body's fields, of at most `limit` bytes in all; uploads are bytes. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    seen = 0

    async def counted() -> Any:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise Refused(f"the body has more than {limit:,} bytes", status=413, code="invalid_request")
        return message

    inner = Request(request.scope, counted)
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        found = await read_body(inner)
        if not isinstance(found, dict):
            raise invalid("the body is no JSON object")
        return found
    try:
        async with inner.form(max_files=32, max_fields=200, max_part_size=limit) as form:
            items = [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
    except HTTPException as error:
        raise invalid(f"the form cannot be read: {error.detail}") from error
    return _unfolded(items)


def _unfolded(items: Sequence[tuple[str, Data]]) -> dict[str, Any]:
    """A form's fields as JSON has them: `image[]` is a list, and clients write a list of objects as
    `mix[][adapter]`, `mix[][strength]`. A control's picture may be the name of an upload."""
    out: dict[str, Any] = {}
    columns: dict[str, dict[str, list[Data]]] = {}
    for key, value in items:
        found = re.fullmatch(r"(\w+)(\[\d*\])?(?:\[(\w+)\])?", key)
        name, listed, inner = found.groups() if found else (key, None, None)
        if inner:
            columns.setdefault(name, {}).setdefault(inner, []).append(value)
        elif listed or name == "image":
            out.setdefault(name, []).append(value)
        elif name in out:
            raise invalid(f"{name} is there twice", name)
        else:
            out[name] = value
    for name, own in columns.items():
        if len({len(values) for values in own.values()}) > 1:
            raise invalid(f"{name}: not every entry has every key", name, f"send {name} as JSON text")
        out[name] = [dict(zip(own, row, strict=True)) for row in zip(*own.values(), strict=True)]
    uploads = {key for key, value in out.items() if isinstance(value, bytes) and key not in ("mask", "image")}
    if uploads:
        try:
            out["control"] = _listed(out.get("control", []))
        except ValueError as error:
            raise invalid(f"control: {error}", "control") from error
        for control in out["control"]:
            if isinstance(control, dict) and control.get("image") in uploads:
                control["image"] = out[control["image"]]
    return {key: value for key, value in out.items() if key not in uploads or not _used(out, value)}


def _used(out: dict[str, Any], value: Any) -> bool:
    return any(isinstance(control, dict) and control.get("image") is value for control in out.get("control", []))


# -- what is drawn -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """The pictures, and what is to be said of their making."""

    requests: tuple[PictureRequest, ...]
    notes: tuple[str, ...]
    width: int
    height: int
    text_tokens: int
    image_tokens: int
    """Places of the latents of the pictures that went in."""


def planned(
    engine: PictureEngine, asked: ImageAsked, caller: Caller, served: Served, labels: dict[str, str], most: int
) -> Planned:
    """Decode, fit and check. `most`: pixels of a picture that is sent. Blocks. Raises Refused."""
    base = engine.base
    notes: list[str] = []
    sent = _Sent(most, notes)
    image, mask = sent.edited(asked) if isinstance(asked, EditAsked) else (None, None)
    held = [(one, flattened(sent.opened(one.image, "control", f"the {one.type} picture"))) for one in asked.control]
    size = None if asked.size in (None, "auto") else tuple(map(int, asked.size.split("x")))
    guide = image or next((picture for _, picture in held), None)
    width, height = size if size is not None else size_for(base, None, None, guide)
    if width * height > engine.max_pixels:
        raise invalid(f"{width}×{height}: at most {engine.max_pixels} pixels are drawn here", "size")
    image, mask = (sent.fitted(picture, width, height, what) for picture, what in ((image, "image"), (mask, "mask")))
    controls, said = sent.controls(engine, held, width, height)
    pictures: dict[str, Any] = {"image": image, "mask": mask, "denoise": _denoise(asked, image, mask)}
    settings = PictureSettings(
        width, height, *_numbers(base, asked), scheduler=asked.scheduler, controls=controls, **pictures
    )
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    edit = asked if isinstance(asked, EditAsked) else None
    first = PictureRequest(
        asked.prompt,
        settings,
        asked.negative_prompt,
        mix=served.mix,
        labels=labels,
        inputs={
            "image": sent.record(edit.image[0]) if edit and edit.image else None,
            "mask": sent.record(edit.mask) if edit and isinstance(edit.mask, bytes | str) else None,
            "controls": said,
        },
        previews=asked.partial_images,
        tenant=caller.tenant,
        weight=caller.weight,
    )
    requests = tuple(replace(first, seed=(seed + i) % SEEDS, id=f"{first.id}-{i}") for i in range(asked.n))
    texts = [text for text in (asked.prompt, asked.negative_prompt) if text]
    places = engine.places(settings) * ((image is not None) + len(controls))
    return Planned(requests, tuple(notes), width, height, engine.tokens(*texts), places)


def _numbers(base: ImageBase, asked: ImageAsked) -> tuple[int, float, float]:
    """Steps, guidance and true guidance. Qwen-Image's own guidance is what others call the true one."""
    steps, guidance = default_settings(base)
    taken = asked.num_inference_steps or max(1, round(steps * _STEPS.get(asked.quality, 1.0)))
    given, true = asked.guidance_scale, asked.true_cfg_scale
    if base.family == "qwen-image":
        if given is not None and true is not None:
            raise invalid("true_cfg_scale is this base's guidance_scale", "true_cfg_scale", "leave one out")
        given, true = true if given is None else given, None
    return taken, guidance if given is None else given, 1.0 if true is None else true


def _denoise(asked: ImageAsked, image: Image | None, mask: Image | None) -> float:
    """What a mask opens is made anew; without one something of the picture stays, as `veneer image` has it."""
    if not isinstance(asked, EditAsked) or image is None:
        return 1.0
    if asked.denoise is not None:
        return asked.denoise
    return 0.6 if mask is None else 1.0


def _public(name: str) -> str:
    """A ControlNet's name without the folders of this machine."""
    return Path(name).name if Path(name).exists() else name


class _Sent:
    """The pictures of one request, decoded."""

    def __init__(self, most: int, notes: list[str]) -> None:
        self.most, self.notes = most, notes

    def edited(self, asked: EditAsked) -> tuple[Image, Image | None]:
        """(the picture, the mask in grey: white is made anew)."""
        asked.image += [reference.image_url for reference in asked.images]
        if isinstance(asked.mask, Reference):
            asked.mask = asked.mask.image_url
        if len(asked.image) != 1:
            what = "there is no image to edit" if not asked.image else f"{len(asked.image)} images"
            raise invalid(what, "image", "send one; further ones can be controls")
        image = flattened(self.opened(asked.image[0], "image", "the image"))
        if asked.mask is None:
            return image, None
        mask = _opening(self.opened(asked.mask, "mask", "the mask"))
        if not mask.getbbox():
            raise invalid("the mask opens nothing: all would be kept", "mask", "make transparent what is to change")
        return image, mask

    def opened(self, data: Data, param: str, what: str) -> Image:
        try:
            return decoded(_bytes(data, param), what, formats=FORMATS, max_pixels=self.most)
        except VeneerError as error:
            if isinstance(error, Refused):
                raise
            raise invalid(f"{what}: {error.what}", param, error.fix) from error

    def fitted(self, picture: Image | None, width: int, height: int, what: str) -> Image | None:
        if picture is None:
            return None
        try:
            made, said = fitted_picture(picture, width, height, what)
        except VeneerError as error:
            raise invalid(error.what, what, f"crop it, or ask for size {picture.width}x{picture.height}") from error
        self.notes += [said] if said else []
        return made

    def controls(
        self, engine: PictureEngine, held: Sequence[tuple[ControlAsked, Image]], width: int, height: int
    ) -> tuple[tuple[Control, ...], list[dict[str, Any]]]:
        """(what the engine gets, what a record says of it)."""
        controls, said = [], []
        for one, picture in held:
            name, model = engine.control(one.type)
            if one.begin >= one.end:
                raise invalid(f"a control from {one.begin:g} to {one.end:g} of the steps", "control")
            try:
                made, told = control_picture(ControlSpec(one.type, "(sent)"), picture, width, height)
            except VeneerError as error:
                raise invalid(error.what, "control", error.fix) from error
            self.notes += told
            controls.append(Control(model, made, one.strength, one.begin, one.end))
            about: dict[str, Any] = {"kind": one.type, "model": _public(name), **self.record(one.image)}
            said.append(about | {"weight": one.strength, "begin": one.begin, "end": one.end})
        return tuple(controls), said

    def record(self, data: Data) -> dict[str, str]:
        return {"path": "", "sha256": hashlib.sha256(_bytes(data, "image")).hexdigest()}


def _opening(mask: Image) -> Image:
    """OpenAI's masks are open where they are transparent; one without transparency where it is white."""
    from PIL import ImageChops

    if mask.mode in ("RGBA", "LA", "PA") or "transparency" in mask.info:
        return ImageChops.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def _bytes(data: Data, param: str) -> bytes:
    if isinstance(data, bytes):
        return data
    if re.match(r"(?i)https?://", data):
        raise invalid("addresses are not fetched", param, "send the picture itself, in base64 or as a data: URL")
    head, comma, rest = data.partition(",")
    try:
        return base64.b64decode(rest if comma and head.startswith("data:") else data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param} is no base64: {error}", param) from error
