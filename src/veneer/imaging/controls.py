"""Control images: ControlNet, image, weight, and Canny edge detection.

canny=sketch.png:0.7             edges of sketch.png, detected by OpenCV's Canny, with the base's canny ControlNet
edges=edges.png:0.7              the unchanged image (white edges on black), with the same ControlNet
depth=d.png:0.7                  the unchanged image (near is light), with the base's depth ControlNet
pose@runs/pose=p.png:0.5         the unchanged image, with a ControlNet that is given by name or folder
canny=sketch.png:0.7@0-0.5       only in the first half of the steps
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import ConfigError, DataError, MissingExtraError
from veneer.files.pictures import open_image, upright
from veneer.models.builtin import PACKAGED
from veneer.models.image.generate import fitted_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.models.image.base import ImageBase

_FORM = re.compile(
    r"(?P<kind>[a-z0-9_-]+)(?:@(?P<model>[^=]+))?=(?P<path>.+?)"
    r"(?::(?P<weight>[^:@/\\]+))?(?:@(?P<begin>[0-9.]+)-(?P<end>[0-9.]+))?"
)
_EXAMPLE = "KIND[@MODEL]=PICTURE[:weight][@FROM-TO], as in canny=sketch.png:0.7"
CONTROL_KINDS = {"canny": "canny", "edges": "canny", "depth": "depth"}
"""Kind of control image -> the kind that the ControlNet was trained on."""
CANNY = (100, 200)
"""Gradient thresholds: values below the first are not edges, and values above the second are edges."""


@dataclass(frozen=True)
class ControlSpec:
    """A control image with its ControlNet and weight.

    model: a ControlNet's name or folder; "" selects the base's own ControlNet for a kind in CONTROL_KINDS."""

    kind: str
    path: str
    weight: float = 1.0
    model: str = ""
    begin: float = 0.0
    end: float = 1.0


def parse_control(spec: str | ControlSpec) -> ControlSpec:
    """Parse a control: KIND[@MODEL]=PICTURE[:weight][@FROM-TO].

    Raises ConfigError for any other text."""
    if isinstance(spec, ControlSpec):
        return spec
    if (parsed := _FORM.fullmatch(spec)) is None:
        raise ConfigError(f"{spec!r} is not a control image", fix=_EXAMPLE)
    if re.search(r"\.\w+[:@]", parsed["path"]) and not Path(parsed["path"]).exists():
        raise ConfigError(f"{spec!r}: expected a weight or a range of steps after the picture", fix=_EXAMPLE)
    try:
        weight = float(parsed["weight"] or 1)
        begin, end = float(parsed["begin"] or 0), float(parsed["end"] or 1)
    except ValueError:
        weight = begin = end = math.nan
    if not math.isfinite(weight) or not 0 <= begin < end <= 1:
        raise ConfigError(f"{spec!r} has a weight or a range of steps that is not valid", fix=_EXAMPLE)
    if parsed["kind"] not in CONTROL_KINDS and not parsed["model"]:
        fix = f"name it, as in {parsed['kind']}@FOLDER={parsed['path']}; {', '.join(CONTROL_KINDS)} need no name"
        raise ConfigError(f"control {parsed['kind']!r} needs a ControlNet", fix=fix)
    return ControlSpec(parsed["kind"], parsed["path"], weight, parsed["model"] or "", begin, end)


def control_model_of(base: ImageBase, spec: ControlSpec) -> str:
    """Return the name of the ControlNet to load.

    If `spec` has no model, this is the known ControlNet for the base and the kind. Raises ConfigError if no
    ControlNet is known."""
    if spec.model:
        return spec.model
    kind = CONTROL_KINDS[spec.kind]
    if not base.row.control:
        fix = "leave controls out" + ("; it takes reference pictures (--reference)" if base.references else "")
        raise ConfigError(f"diffusers has no ControlNet for {base.row.label}", where=base.name, fix=fix)
    packaged = PACKAGED.get(base.name, base.row).controlnets
    if kind not in packaged:
        raise ConfigError(f"no {kind} ControlNet is known for {base.short_name}", fix=f"name one: {spec.kind}@NAME=…")
    return packaged[kind]


def _one_frame(picture: Image, where: str) -> Image:
    """Return the image, turned upright.

    Raises DataError for an animation, because it is unclear which frame to use."""
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # an MPO is a photo with a preview
    if frames > 1:
        fix = "save one frame as a picture"
        raise DataError(f"this picture has {frames} frames", where=where, fix=fix)
    return upright(picture)


def hashed_picture(path: str | Path, paper: str = "white") -> tuple[Image, str]:
    """Return the image, upright and opaque, and the sha256 of its file.

    Raises the errors of `open_image`."""
    with open_image(path) as (opened, data):
        return flattened(_one_frame(opened, str(path)), paper), hashlib.sha256(data).hexdigest()


def decoded(data: bytes, where: str, *, formats: Sequence[str] | None = None, max_pixels: int | None = None) -> Image:
    """Return the image in these bytes, upright. Raise DataError for invalid bytes.

    max_pixels: checked against the header before decoding, because a small file can declare a huge image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=None if formats is None else tuple(formats)) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                message = f"this picture is {opened.width}×{opened.height}"
                raise DataError(message, where=where, fix=f"at most {max_pixels} pixels")
            picture = _one_frame(opened, where)
    except UnidentifiedImageError as error:
        accepted = f", or not in one of the formats {', '.join(formats)}" if formats else ""
        raise DataError(f"this is not a picture{accepted}: cannot identify image file", where=where) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"this picture has more pixels than veneer opens: {2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
        fix = "make it smaller" if max_pixels is None else f"at most {max_pixels} pixels"
        raise DataError(message, where=where, fix=fix) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"this is not a picture: {error}", where=where) from error
    return picture


def flattened(picture: Image, paper: str = "white") -> Image:
    """Return the image in 8-bit RGB or gray, with `paper` behind transparent parts."""
    from PIL import Image

    if picture.mode.startswith("I"):  # Pillow would clip 16-bit gray to 255.
        import numpy as np

        return Image.fromarray((np.asarray(picture).astype("float64") / 257).round().clip(0, 255).astype("uint8"))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        over = Image.new("RGBA", picture.size, paper)
        over.alpha_composite(picture.convert("RGBA"))
        return over.convert("RGB")
    return picture if picture.mode in ("RGB", "L") else picture.convert("RGB")


def canny(picture: Image, low: int = CANNY[0], high: int = CANNY[1]) -> Image:
    """Return white edges on black, from OpenCV's Canny on RGB.

    Raises MissingExtraError without OpenCV."""
    try:
        import cv2
    except ImportError:
        fix = "pip install opencv-python-headless, or pass a picture of the edges: edges=FILE"
        raise MissingExtraError("edge detection requires OpenCV", fix=fix) from None
    import numpy as np
    from PIL import Image

    return Image.fromarray(cv2.Canny(np.asarray(picture.convert("RGB")), low, high)).convert("RGB")


def control_picture(spec: ControlSpec, picture: Image, width: int, height: int) -> tuple[Image, list[str]]:
    """Return the ControlNet's input image, and notes on changes to the image.

    Edges are detected after resizing, so that they are one pixel wide."""
    fitted, note = fitted_picture(picture.convert("RGB"), width, height, f"control picture {spec.path}")
    notes = [note] if note else []
    if spec.kind != "canny":
        return fitted, [*notes, f"control picture {spec.path}: used unchanged ({spec.kind})"]
    edges = canny(fitted)
    share = sum(edges.convert("L").histogram()[128:]) / (width * height)
    notes.append(f"control picture {spec.path}: edges detected ({share:.1%} of the pixels)")
    if not share:
        raise DataError("no edges were found in the control picture", where=spec.path, fix="increase the contrast")
    return edges, notes
