"""Decode an image file to upright 8-bit sRGB, and record the conversions.

    opened = decode_picture(data, settings)    opened.colour: RGB; opened.alpha: L or None; opened.notes

    EXIF orientation   rotated upright, so that width and height are the same as in an image viewer
    embedded profile   converted to sRGB (littleCMS, the profile's own intent); an unreadable profile is noted
    CMYK, gray, palette, YCbCr, Lab, 16 bit, 1 bit     converted to 8-bit RGB
    transparency       composited on `settings.background`; the alpha channel is kept

A file is refused, with a reason, if it is not an image, is animated, truncated, empty or a Git LFS pointer,
has floating-point pixels, or has too many pixels (read from the header, before decoding). This module does
not depend on captions, buckets or tensors.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import MissingExtraError
from veneer.train.config.image import ImageDataSection

try:
    from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise MissingExtraError("pictures need Pillow", where=str(error), extra="image") from None

Image.init()
_DECODERS = tuple(f for f in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF") if f in Image.OPEN)
"""Allowed decoders.

Other decoders are excluded: EPS starts Ghostscript, and PSD and ICO files contain several images."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_ORIENTATION = 274
_SRGB = ImageCms.createProfile("sRGB")
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class UnreadablePicture(Exception):
    """Raised for a file that cannot be used, with the reason as its message.

    Callers collect these errors into one DataError, or count them."""


@dataclass(frozen=True)
class DecodedPicture:
    """A decoded image.

    colour: RGB, composited on the background
    alpha: an L image if any pixel is transparent, else None
    size: (width, height), upright
    notes: the conversions, for the report"""

    colour: Image.Image
    alpha: Image.Image | None
    notes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.colour.size


def read_bytes(path: Path) -> tuple[bytes, str]:
    """Return the file's bytes and their sha256.

    Raises UnreadablePicture if the file is missing, empty or a Git LFS pointer."""
    try:
        if path.exists() and not path.is_file():
            raise UnreadablePicture("is not a file" if not path.is_dir() else "is a folder")
        data = path.read_bytes()
    except OSError as error:
        raise UnreadablePicture(f"cannot be read: {error.strerror or error}") from None
    if not data:
        raise UnreadablePicture("an empty file")
    if data.startswith(b"version https://git-lfs"):
        raise UnreadablePicture("a Git LFS pointer, not the picture: run `git lfs pull`")
    return data, hashlib.sha256(data).hexdigest()


def decode_picture(data: bytes, settings: ImageDataSection) -> DecodedPicture:
    """Decode the bytes of a file. Raise UnreadablePicture with the reason."""
    notes: list[str] = []
    image = _decoded(data, settings, notes)
    image, alpha = _split_alpha(image)
    colour = _to_srgb(image, notes)
    if alpha is not None:
        notes.append("transparent pixels on " + settings.background)
        colour = Image.composite(colour, Image.new("RGB", colour.size, settings.colour), alpha)
    return DecodedPicture(colour, alpha, tuple(notes))


def mask_of(data: bytes, settings: ImageDataSection) -> Image.Image:
    """Return a mask file as an upright L image, in which the areas to train on are white.

    If the file has transparency, its alpha channel is the mask. Color profiles are not applied, because the
    values are weights. Raises UnreadablePicture with the reason."""
    image, alpha = _split_alpha(_decoded(data, settings, []))
    return _eight_bit(image, []).convert("L") if alpha is None else alpha


def _decoded(data: bytes, settings: ImageDataSection, notes: list[str]) -> Image.Image:
    """Return the first frame of an image file, upright and with all pixels loaded."""
    limit = int(settings.most_megapixels * 1e6)
    with warnings.catch_warnings():
        # Pillow warns above 89 megapixels and raises an error above 179. The configured limit is checked before
        # decoding.
        warnings.simplefilter("ignore")
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=_DECODERS)
            width, height = image.size
            if width * height > limit:
                message = f"{width} x {height} pixels, more than data.most_megapixels = {settings.most_megapixels:g}"
                raise UnreadablePicture(message)
            # the other images of an MPO file are previews, or the second view of a stereo pair
            if (frames := 1 if image.format == "MPO" else getattr(image, "n_frames", 1)) > 1:
                raise UnreadablePicture(f"an animation of {frames} frames: save one frame as a picture")
            image.load()
        except Image.DecompressionBombError:
            message = f"more pixels than data.most_megapixels = {settings.most_megapixels:g} allows"
            raise UnreadablePicture(message) from None
        except UnidentifiedImageError:
            raise UnreadablePicture(_describe_unknown(data)) from None
        except UnreadablePicture:
            raise
        except MemoryError:
            raise UnreadablePicture("does not fit into memory") from None
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, …
            raise UnreadablePicture(f"damaged: {str(error).splitlines()[0] if str(error) else error!r}") from None
        try:
            if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
                image = ImageOps.exif_transpose(image)
                notes.append("turned upright (EXIF)")
        except Exception:  # Damaged EXIF data is common and does not affect the pixels.
            notes.append("EXIF that cannot be read")
    return image


def _describe_unknown(data: bytes) -> str:
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "a HEIC picture, which is not supported: save it as JPEG or PNG"
    return f"not a picture that can be read (it begins with {data[:16]!r})"


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return (image without transparency, alpha as L or None if every pixel is opaque)."""
    profile = image.info.get("icc_profile")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif "transparency" in image.info and image.mode not in ("LA", "RGBA", "PA"):
        image = image.convert("RGBA")  # one color or some palette entries are marked as transparent
    elif image.mode == "PA":
        image = image.convert("RGBA")
    if image.mode not in ("LA", "RGBA"):
        return image, None
    alpha = image.getchannel("A")
    opaque = image.getchannel("L") if image.mode == "LA" else Image.merge("RGB", image.split()[:3])
    if profile:
        opaque.info["icc_profile"] = profile
    return opaque, None if alpha.getextrema() == (255, 255) else alpha


def _to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert to 8-bit sRGB.

    Without a profile, gray and RGB images are assumed to be sRGB, and CMYK is converted by Pillow, without
    color management."""
    data = image.info.get("icc_profile")
    image = _eight_bit(image, notes)
    if data:
        try:
            converted = _by_profile(image, data)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append("a color profile that cannot be used; sRGB is assumed")
        else:
            if converted is not None:
                notes.append("color profile converted to sRGB")
                return converted
    elif image.mode == "CMYK":
        notes.append("CMYK without a profile, converted without color management")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert to 8-bit L, RGB or CMYK, for color management and resizing."""
    mode = image.mode
    if mode.startswith("I"):
        import numpy as np

        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise UnreadablePicture("integers outside 0 to 65535: save it with 8 or 16 bits a channel")
        notes.append("reduced from 16 to 8 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if mode == "F":
        message = "floating-point pixels with an unknown white level: save it with 8 or 16 bits a channel"
        raise UnreadablePicture(message)
    if mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if mode == "1" else "RGB")  # modes 1, P, YCbCr, LAB, HSV and RGBX


def _by_profile(image: Image.Image, data: bytes) -> Image.Image | None:
    """Convert an image from its embedded profile to sRGB. Return None if the profile is sRGB.

    A conversion from sRGB to sRGB would change some values by one."""
    profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(data))
    mode = _SPACES.get(profile.profile.xcolor_space)
    if mode is None:
        raise ValueError(profile.profile.xcolor_space)
    if (ImageCms.getProfileDescription(profile) or "").strip().lower().startswith("srgb"):
        return None
    if image.mode != mode:
        if "CMYK" in (image.mode, mode) or mode == "L":  # a gray profile does not define the primaries of a color image
            raise ValueError(f"a {mode} profile in a {image.mode} picture")
        image = image.convert(mode)
    intent: Any = ImageCms.getDefaultIntent(profile)
    return ImageCms.profileToProfile(image, profile, _SRGB, renderingIntent=intent, outputMode="RGB")
