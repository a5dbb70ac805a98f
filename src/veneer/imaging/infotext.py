"""Metadata of a generated image: A1111's infotext and veneer's record, in a PNG.

    a fox in the snow <lora:brand:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 1024x1024, Model hash:
        1a2b3c4d5e,
    Model: sdxl, Lora hashes: "brand: 0123456789ab", Version: veneer 0.1.0

In the file, all fields from "Steps" on are in one line. A value with a comma, a colon or a line break is
quoted as JSON. The infotext is in the chunk `parameters`, which A1111, Forge, ComfyUI's loaders and CivitAI
read. The record is JSON in the chunk `veneer`, and has values that an infotext cannot express. Source of the
rules: stable-diffusion-webui, modules/infotext_utils.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import DataError
from veneer.files.pictures import open_image

if TYPE_CHECKING:
    from PIL import Image

_USER_COMMENT = 0x9286

SAMPLERS: dict[str, tuple[str, str]] = {
    "euler": ("Euler", "Automatic"), "euler-karras": ("Euler", "Karras"), "euler-a": ("Euler a", "Automatic"),
    "heun": ("Heun", "Automatic"), "dpm2": ("DPM2", "Automatic"), "dpm2-a": ("DPM2 a", "Automatic"),
    "dpm++2m": ("DPM++ 2M", "Automatic"), "dpm++2m-karras": ("DPM++ 2M", "Karras"),
    "dpm++2m-sde": ("DPM++ 2M SDE", "Automatic"), "dpm++2m-sde-karras": ("DPM++ 2M SDE", "Karras"),
    "dpm++2s": ("DPM++ 2S", "Automatic"), "ddim": ("DDIM", "DDIM"), "ddpm": ("DDPM", "Automatic"),
    "pndm": ("PLMS", "Automatic"), "unipc": ("UniPC", "Automatic"), "unipc-karras": ("UniPC", "Karras"),
    "deis": ("DEIS", "Automatic"), "lcm": ("LCM", "Automatic"), "flow-euler": ("Euler", "Simple"),
    "flow-heun": ("Heun", "Simple"), "flow-dpm++2m": ("DPM++ 2M", "Simple"), "flow-unipc": ("UniPC", "Simple"),
}  # fmt: skip
"""veneer's scheduler -> A1111's "Sampler" and "Schedule type"."""


@dataclass(frozen=True)
class Infotext:
    """A prompt, a negative prompt, and the fields of the last line.

    fields: name -> unquoted value, in order."""

    prompt: str = ""
    negative: str = ""
    fields: dict[str, str] = field(default_factory=dict)


def quote(value: str) -> str:
    """Quote a value like A1111: as JSON if the value has a comma, a colon or a line break.

    A value that is already in double quotes is quoted again, because parsing removes one pair of quotes."""
    if not any(c in value for c in ",:\n") and not (value[:1] == '"' == value[-1:]):
        return value
    return json.dumps(value, ensure_ascii=False)


def render_infotext(info: Infotext) -> str:
    """Return the text of an infotext.

    An infotext cannot represent some texts, such as a prompt with a line "Negative prompt:"; only veneer's
    record stores them exactly."""
    lines = [info.prompt] if info.prompt else []
    if info.negative:
        lines.append(f"Negative prompt: {info.negative}")
    lines.append(", ".join(f"{name}: {quote(value)}" for name, value in info.fields.items()))
    return "\n".join(lines)


def png_bytes(picture: Image.Image, text: str, record: Mapping[str, Any] | None = None) -> bytes:
    """Return the image as PNG, with its infotext and, in the chunk `veneer`, the record.

    Equal arguments give equal bytes."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", text)  # Like A1111, PngInfo writes text outside latin-1 as an iTXt chunk.
    if record is not None:
        chunks.add_text("veneer", json.dumps(record, ensure_ascii=True, sort_keys=True))
    out = io.BytesIO()
    picture.save(out, "PNG", pnginfo=chunks)
    return out.getvalue()


def encoded(picture: Image.Image, text: str, record: Mapping[str, Any], kind: str, quality: int = 95) -> bytes:
    """Encode the image as `png`, `jpeg` or `webp`.

    In jpeg and webp, the infotext is in Exif's user comment, as in A1111, and there is no record. `quality`
    (0 to 100) applies only to jpeg and webp."""
    from PIL import Image

    if kind == "png":
        return png_bytes(picture, text, record)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    out = io.BytesIO()
    picture.save(out, kind.upper(), quality=quality, exif=exif)
    return out.getvalue()


def read_record(path: str | Path) -> dict[str, Any] | None:
    """Return the record of an image, or None if the image has none.

    Raises DataError for a file that is not an image, and for a record that is not JSON."""
    with open_image(path) as (picture, _):
        text = picture.info.get("veneer")
    if not isinstance(text, str):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the picture's veneer record is not JSON: {error}", where=str(path)) from error
    if not isinstance(record, dict):
        raise DataError("the picture's veneer record is not a JSON object", where=str(path))
    return record
