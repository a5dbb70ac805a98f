"""Open image files with clear errors, and encode images, with Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import DataError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def open_image(path: str | Path) -> Iterator[tuple[Image, bytes]]:
    """Yield the decoded image and the bytes of its file.

    Raises DataError if the file is not a valid image, and for decoding errors raised inside the
    with-block. If the file does not exist, the error suggests the nearest name."""
    from PIL import Image, UnidentifiedImageError

    location = Path(path).expanduser()
    try:
        data = location.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            yield picture, data
    except FileNotFoundError:
        similar = (
            nearest(location.name, [p.name for p in location.parent.iterdir()], 1) if location.parent.is_dir() else []
        )
        fix = f"did you mean {location.with_name(similar[0])}?" if similar else None
        raise DataError("there is no such picture", where=str(path), fix=fix) from None
    except IsADirectoryError:
        raise DataError("this is a folder, not a picture", where=str(path)) from None
    except Image.DecompressionBombError:
        problem = f"this picture has more pixels than veneer opens: {2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
        raise DataError(problem, where=str(path), fix="make it smaller") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        message = "it is in no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"this is not a picture: {message}", where=str(path)) from error


def upright(picture: Image) -> Image:
    """Return the image rotated according to its EXIF data; invalid EXIF data is ignored.

    Raises Pillow's errors if the pixels cannot be decoded."""
    from PIL import ImageOps

    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # struct.error, KeyError, …: Pillow cannot write back some EXIF data that it can read
        return picture


def picture_bytes(picture: Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image encoded in memory.

    options: options of Pillow's writer."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()
