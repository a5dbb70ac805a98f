"""A generated picture's metadata: A1111's infotext and veneer's record, in a PNG.

    a fox in the snow <lora:brand:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 1024x1024, Model hash: 1a2b3c4d5e,
    Model: sdxl, Lora hashes: "brand: 0123456789ab", Version: veneer 0.1.0                       (one line in the file)

The infotext is in the chunk `parameters`, which A1111, Forge, ComfyUI's loaders and CivitAI read; the record
is JSON in the chunk `veneer`, for facts that the infotext cannot express. A value with a comma, a colon or a
line break is quoted as JSON. Source of the rules: stable-diffusion-webui, modules/infotext_utils.py. Uses
text and PNG chunks only.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import DataError
from veneer.files.pictures import opened_picture

if TYPE_CHECKING:
    from PIL import Image

_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_TAG = re.compile(r"<(?:lora|lyco):([^:>]+)((?::[^>:]*)*)>")
_NEGATIVE = "Negative prompt:"
_USER_COMMENT = 0x9286

SAMPLERS: dict[str, tuple[str, str]] = {
    "euler": ("Euler", "Automatic"), "euler-karras": ("Euler", "Karras"), "euler-a": ("Euler a", "Automatic"),
    "heun": ("Heun", "Automatic"), "dpm2": ("DPM2", "Automatic"), "dpm2-a": ("DPM2 a", "Automatic"),
    "lms": ("LMS", "Automatic"), "dpm++2m": ("DPM++ 2M", "Automatic"), "dpm++2m-karras": ("DPM++ 2M", "Karras"),
    "dpm++2m-sde": ("DPM++ 2M SDE", "Automatic"), "dpm++2m-sde-karras": ("DPM++ 2M SDE", "Karras"),
    "dpm++2s": ("DPM++ 2S", "Automatic"), "ddim": ("DDIM", "DDIM"), "ddpm": ("DDPM", "Automatic"),
    "pndm": ("PLMS", "Automatic"), "unipc": ("UniPC", "Automatic"), "unipc-karras": ("UniPC", "Karras"),
    "deis": ("DEIS", "Automatic"), "lcm": ("LCM", "Automatic"), "flow-euler": ("Euler", "Simple"),
    "flow-heun": ("Heun", "Simple"), "flow-dpm++2m": ("DPM++ 2M", "Simple"), "flow-unipc": ("UniPC", "Simple"),
}  # fmt: skip
"""Our scheduler -> A1111's "Sampler" and "Schedule type"."""


@dataclass(frozen=True)
class Infotext:
    """A parsed infotext.

    `fields`: the values of the last line by name, in order, unquoted ("Size" stays "512x768")."""

    prompt: str = ""
    negative: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height), or None if unknown."""
        found = re.fullmatch(r"(\d+)x(\d+)", self.fields.get("Size", ""))
        return (int(found[1]), int(found[2])) if found else None


def quote(value: object) -> str:
    """Quote a value like A1111: as JSON if it has a comma, a colon or a line break.

    A value in double quotes is quoted too, since parsing would remove its quotes."""
    text = str(value)
    if not any(c in text for c in ",:\n") and not (text[:1] == '"' == text[-1:]):
        return text
    return json.dumps(text, ensure_ascii=False)


def unquote(text: str) -> str:
    """Undo `quote`; text that is not a JSON string is returned unchanged."""
    if len(text) < 2 or not text[0] == text[-1] == '"':
        return text
    try:
        return str(json.loads(text))
    except (ValueError, RecursionError):
        return text


def parse_infotext(text: str) -> Infotext:
    """Parse an infotext of A1111, Forge or `render_infotext`.

    The last line is parameters if it has three or more. The negative prompt starts at a line that begins with
    "Negative prompt:"."""
    *lines, last = text.strip().split("\n")
    if len(_PARAMETER.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt: list[str] = []
    negative: list[str] = []
    here = prompt
    for line in lines:
        line = line.strip()
        if line.startswith(_NEGATIVE):
            here, line = negative, line.removeprefix(_NEGATIVE).strip()
        here.append(line)
    fields = {name: unquote(value.strip()) for name, value in _PARAMETER.findall(last)}
    return Infotext("\n".join(prompt).strip(), "\n".join(negative).strip(), fields)


def render_infotext(info: Infotext) -> str:
    """Return the text of an infotext.

    Text that the format cannot hold (a prompt with a line "Negative prompt:") is only exact in veneer's
    record."""
    lines = [info.prompt] if info.prompt else []
    if info.negative:
        lines.append(f"{_NEGATIVE} {info.negative}")
    lines.append(", ".join(f"{name}: {quote(value)}" for name, value in info.fields.items()))
    return "\n".join(lines)


def lora_tags(prompt: str) -> tuple[str, list[tuple[str, float, float]]]:
    """Split the `<lora:NAME:…>` tags off a prompt.

    Returns (prompt without tags, [(name, text encoder's strength, denoiser's strength)]). `:0.8` sets both,
    `:0.5:1` each, `te=` and `unet=` by name. Raises DataError for a strength that is not a number."""
    found: list[tuple[str, float, float]] = []
    for match in _TAG.finditer(prompt):
        values: dict[str, float] = {}
        position = 0
        for part in match[2].split(":")[1:]:
            key, equals, number = part.partition("=")
            if not equals:
                key, number, position = ("te", "unet", "dyn")[min(position, 2)], part, position + 1
            try:
                values[key.strip()] = float(number)
            except ValueError:
                raise DataError(f"{match[0]!r} has a strength that is no number: {number!r}") from None
        text = values.get("te", 1.0)
        found.append((match[1].strip(), text, values.get("unet", text)))
    return re.sub(r"\s*" + _TAG.pattern, "", prompt).strip(), found


def lora_hashes(fields: Mapping[str, str]) -> dict[str, str]:
    """Return adapter name -> hash from "Lora hashes" (`name: hash, name: hash`)."""
    pairs = (part.rpartition(":") for part in fields.get("Lora hashes", "").split(","))
    return {name.strip(): digest.strip() for name, colon, digest in pairs if colon}


def sampler_of(fields: Mapping[str, str], flow: bool = False) -> str | None:
    """Return veneer's scheduler for an A1111 sampler, or None if unknown.

    Reads "Sampler" and "Schedule type". Older texts join the two ("DPM++ 2M Karras"). `flow`: for a flow
    matching base."""
    name, kind = fields.get("Sampler", ""), fields.get("Schedule type", "Automatic")
    if name.endswith(" Karras"):
        name, kind = name.removesuffix(" Karras"), "Karras"
    fits = [ours for ours, (sampler, _) in SAMPLERS.items() if sampler == name and ours.startswith("flow-") == flow]
    exact = [ours for ours in fits if SAMPLERS[ours][1] == kind]
    if exact or kind == "Karras":
        return exact[0] if exact else None
    return fits[0] if fits else None


# -- pictures ----------------------------------------------------------------------------------------------------------


def png_bytes(picture: Image.Image, text: str, record: Mapping[str, Any] | None = None) -> bytes:
    """Return the picture as PNG with its infotext and, in chunk `veneer`, the record.

    Equal arguments give equal bytes."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", text)  # text outside latin-1 becomes an iTXt chunk, as in A1111
    if record is not None:
        chunks.add_text("veneer", json.dumps(record, ensure_ascii=True, sort_keys=True))
    out = io.BytesIO()
    picture.save(out, "PNG", pnginfo=chunks)
    return out.getvalue()


def encoded(picture: Image.Image, text: str, record: Mapping[str, Any], kind: str, quality: int = 95) -> bytes:
    """Encode the picture as `png`, `jpeg` or `webp`.

    `quality` (0 to 100): for jpeg and webp, which store the infotext like A1111, in Exif's comment, and no
    record."""
    from PIL import Image

    if kind == "png":
        return png_bytes(picture, text, record)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    out = io.BytesIO()
    picture.save(out, kind.upper(), quality=quality, exif=exif)
    return out.getvalue()


def read_picture(path: str | Path) -> tuple[Infotext | None, dict[str, Any] | None]:
    """Return a picture's infotext and record; None for what is missing.

    Infotext: a PNG's `parameters`, or the Exif comment of a JPEG or WebP. Raises DataError for a file that is
    not a picture, or a record that is not JSON."""
    with opened_picture(path) as (picture, _):
        held = {key: value for key, value in picture.info.items() if isinstance(value, str)}
        comment = picture.getexif().get_ifd(0x8769).get(_USER_COMMENT)
    text = held.get("parameters") or _comment_text(comment)
    if (raw := held.get("veneer")) is None:
        return (parse_infotext(text) if text else None), None
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the picture's veneer record is not JSON: {error}", where=str(path)) from error
    if not isinstance(record, dict):
        raise DataError("the picture's veneer record is not a JSON object", where=str(path))
    return (parse_infotext(text) if text else None), record


def _comment_text(comment: object) -> str:
    """Decode an Exif UserComment.

    Eight bytes name the encoding; UNICODE is UTF-16 in either order."""
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else ""
    code, body = comment[:8], comment[8:]
    if code.startswith(b"UNICODE"):
        big = body.decode("utf-16-be", "replace")
        little = body.decode("utf-16-le", "replace")
        return min(big, little, key=lambda t: sum(c > "\u2000" for c in t)).strip("\0")
    if code.startswith(b"ASCII") or not code.strip(b"\0"):
        return body.decode("utf-8", "replace").strip("\0")
    return comment.decode("utf-8", "replace").strip("\0")
