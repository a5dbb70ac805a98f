"""The bodies of the images surface: JSON or a form, as one model.

    ImageBody, EditBody      the fields of docs/reference/serving-images.md, each validated alone
    PictureMixPart           an adapter with its factors by block and step

Independent of the base: whether a block or scheduler exists is checked later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from veneer.errors import ConfigError
from veneer.formats.strengths import Strength, parse_strength, split_factors, split_strength
from veneer.models.image.generate import SEEDS
from veneer.serve.http.bodies import FAIL_FAST, MixPart, Strict, at_most, body_error, read_body, read_json
from veneer.serve.http.guard import media_type
from veneer.serve.http.service import service_of
from veneer.serve.request import Refused, invalid


def _json(value: Any) -> Any:
    """Parse JSON text, which forms use for lists and objects."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return read_json(value.encode())
        except (Refused, ValueError):
            raise ValueError("this is not JSON") from None
    return value


def _listed(value: Any) -> Any:
    value = _json(value)
    return [value] if isinstance(value, dict | bytes | str) else value


def _mix(value: Any) -> Any:
    """Parse the parts of a mix: objects, or texts such as "name:0.8@FACTORS".

    A form can also contain a single part, or JSON text.
    """
    listed = _listed(value)
    return [_part(item) if isinstance(item, str) else item for item in listed] if isinstance(listed, list) else listed


def _part(text: str) -> dict[str, Any]:
    """Parse a part in the syntax of `veneer image --adapter`.

    Never read as a local path.
    """
    head, factors = split_factors(text)
    try:
        name, strength = split_strength(head)
        own = parse_strength(factors) if factors else Strength()
    except ConfigError as error:
        raise PydanticCustomError("strength", "{text}", {"text": f"{error.what}: {error.fix}"}) from error
    given: dict[str, Any] = {"strength": strength, "blocks": dict(own.blocks)}
    given |= {"steps": [[*at] for at in own.steps], "campaign": own.campaign}
    return {"adapter": name} | {key: value for key, value in given.items() if value not in (None, {}, [], "")}


_Factor = Annotated[float, Field(ge=-10_000, le=10_000, strict=True)]
_Block = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^(\*|[\w.-]+)$")]
_Range = Annotated[list[_Factor], Field(min_length=2, max_length=3)]


class PictureMixPart(MixPart):
    """An adapter, and how its strength varies within the image.

    The same settings as after an `@` in `veneer image`. `blocks`: block -> factor, the last match for a
    module counts. `steps`: [from, to] or [from, to, factor], fractions of the steps; outside them the
    adapter is inactive. `campaign`: its role in a stack, instead of both.
    """

    blocks: Annotated[dict[_Block, _Factor] | None, at_most(64), BeforeValidator(_json)] = None
    steps: Annotated[Annotated[list[_Range], FAIL_FAST] | None, at_most(64), BeforeValidator(_json)] = None
    campaign: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @property
    def factors(self) -> Strength:
        """The factors, at strength 1. Raises ConfigError for conflicting factors."""
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
"""An image: an uploaded file's bytes; in JSON, base64 or a data: URL."""


class ImageReference(Strict):
    image_url: str


class ControlBody(Strict):
    """A control image. `begin`, `end`: fractions of the steps in which it is active."""

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
    mix: Annotated[Annotated[list[PictureMixPart], FAIL_FAST] | None, BeforeValidator(_mix), at_most(64)] = None
    control: Annotated[list[ControlBody], at_most(4), BeforeValidator(_listed)] = Field(default_factory=list)

    @property
    def kind(self) -> str:
        """The file's format."""
        return "jpeg" if self.output_format == "jpg" else self.output_format


class EditBody(ImageBody):
    """A request to edit images.

    `image`, or OpenAI's JSON form `images`; `pictures` has both, `mask_data` the mask in either form.
    `denoise`: how far to move from the image, the fraction of steps taken. `input_fidelity`: OpenAI's effort
    to preserve the input; an editing base always uses all of it.
    """

    image: Annotated[list[Data], FAIL_FAST, at_most(64), BeforeValidator(_listed)] = Field(default_factory=list)
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
    """The validated body; null counts as absent.

    Raises Refused that names every error.
    """
    try:
        asked = kind.model_validate({key: value for key, value in fields.items() if value is not None})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        known = [*kind.model_fields, *PictureMixPart.model_fields, *ControlBody.model_fields]
        raise body_error([{**p, "loc": ("body", *p["loc"])} for p in problems], known) from error
    if asked.n > most:
        raise invalid(f"n is {asked.n}", "n", f"at most {most}")
    if asked.output_compression not in (None, 100) and asked.kind == "png":
        raise invalid("a PNG is never compressed with loss", "output_compression", "output_format jpeg or webp")
    return asked


async def image_fields(request: HttpRequest) -> dict[str, Any]:
    """The fields of a JSON body or a form; uploads are bytes. Raises Refused."""
    if media_type(request.headers) != "multipart/form-data":
        found = await read_body(request)
        if not isinstance(found, dict):
            raise invalid("the body is not a JSON object")
        return found
    most = service_of(request).settings.max_body
    try:
        async with request.form(max_files=32, max_fields=200, max_part_size=most) as form:
            items = [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
    except HTTPException as error:
        raise invalid(f"the form cannot be read: {error.detail}") from error
    return _merged(items)


def _merged(items: Sequence[tuple[str, Data]]) -> dict[str, Any]:
    """A form's fields as in JSON: `image`, `image[]` and `mix[]` are lists."""
    out: dict[str, Any] = {}
    for key, value in items:
        name = re.sub(r"\[\d*\]$", "", key)
        if name != key or name == "image":
            out.setdefault(name, []).append(value)
        elif name in out:
            raise invalid(f"{name} is given twice", name)
        else:
            out[name] = value
    return out


def described_body(kind: type[ImageBody]) -> dict[str, Any]:
    """A route's body for /openapi.json.

    FastAPI cannot describe a body that is JSON or a form.
    """
    schema = kind.model_json_schema()
    defined = schema.pop("$defs", {})

    def whole(part: Any) -> Any:
        if isinstance(part, dict):
            named = str(part.get("$ref", "")).rpartition("/")[2]
            return whole(defined[named]) if named else {key: whole(value) for key, value in part.items()}
        return [whole(value) for value in part] if isinstance(part, list) else part

    content = {"schema": whole(schema)}
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": dict.fromkeys(kinds, content)}}
