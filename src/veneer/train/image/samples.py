"""Images that a run generates: sample sheets, missing class images, and a thumbnail.

All functions use models.image.generate, like `veneer image`, so a sheet shows what the adapter will produce.
The training state (random generators, selected adapters, mode of the layers) is restored.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.core.layers import Layer
from veneer.errors import DataError
from veneer.files.atomic import atomic_write
from veneer.files.pictures import picture_bytes
from veneer.imaging.sheet import sheet
from veneer.models.image.base import size_in_units
from veneer.models.image.generate import ImageRow, MixPlan, PictureSettings, generate_images
from veneer.models.image.predict import reference_size
from veneer.train import checkpoint
from veneer.train.image.augmentation import View, crop_resized, crop_view
from veneer.train.image.decode import UnreadablePicture, decode_picture, read_bytes
from veneer.train.run import NAME

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.core.attach import Attachment
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig


@contextmanager
def training_layers(base: ImageBase, on: bool) -> Iterator[None]:
    """Set the training mode of the adapter's layers, which controls their dropout.

    The base's own modules are not changed, because their dropout was meant for training the base."""
    layers = [m for m in base.model.modules() if isinstance(m, Layer)]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = on
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


def generate_samples(
    base: ImageBase, attachment: Attachment, config: ImageTrainConfig, strengths: Sequence[float] = ()
) -> list[list[Image]]:
    """Return images generated with the trained adapter: a row per prompt, a column per seed.

    With `strengths`, there is a row per prompt and seed, and a column per strength."""
    samples = config.samples
    plans = [MixPlan(mix, ((0.0, mix),)) for s in strengths or (1.0,) for mix in [((NAME, s),) if s else ()]]
    sources = _source_images(base, config)
    rows = [
        ImageRow(prompt, samples.negative, seed, plan, references=references)
        for prompt, references in zip(samples.prompts, sources, strict=True)
        for seed in samples.seeds
        for plan in plans
    ]
    return generate_rows(base, attachment, config, rows, len(strengths) or len(samples.seeds), samples.steps)


def _source_images(base: ImageBase, config: ImageTrainConfig) -> list[tuple[Image, ...]]:
    """Return the source images of each sample prompt.

    A single source image is cropped like a training image. Several source images are not cropped, and each
    keeps its own proportions. Raises DataError."""
    samples = config.samples
    side = samples.size or base.size

    def source(path: str, single: bool) -> Image:
        try:
            picture = decode_picture(read_bytes(Path(path))[0], config.data).colour
        except UnreadablePicture as error:
            message = f"this picture cannot be edited: {error}"
            raise DataError(message, where=path, fix="correct samples.before") from None
        shape = (side, side) if single else size_in_units(base.unit, side, picture.width / picture.height)
        size = reference_size(base, *shape)
        return crop_resized(picture, crop_view(picture.size, size) if single else View(*size, picture.size, size))

    return [tuple(source(path, len(paths) == 1) for path in paths) for paths in samples.starts]


def sample_settings(config: ImageTrainConfig, steps: int) -> PictureSettings:
    """Return the generation settings of a run's samples. Raise ConfigError if they are invalid."""
    size = config.samples.size
    return PictureSettings(width=size, height=size, steps=steps, guidance=config.samples.guidance)


def generate_rows(
    base: ImageBase,
    attachment: Attachment | None,
    config: ImageTrainConfig,
    rows: Sequence[ImageRow],
    columns: int,
    steps: int,
) -> list[list[Image]]:
    """Generate an image for each row, and return the images in lists of `columns` images."""
    settings = sample_settings(config, steps)
    random_state = checkpoint.rng_state()
    try:
        with training_layers(base, False):
            generated = generate_images(base, rows, settings, attachment=attachment)
    finally:
        checkpoint.rng_restore(random_state)
    images = [picture.image for picture in generated]
    return [images[i : i + columns] for i in range(0, len(images), columns)]


def write_sample_sheet(
    cells: Sequence[Sequence[Image]],
    base: ImageBase,
    config: ImageTrainConfig,
    path: Path,
    title: str,
    strengths: Sequence[float] = (),
) -> None:
    """Write a sheet of the images from `generate_samples`.

    The rows are prompts, and the columns are seeds or strengths. Source images are at the left."""
    samples = config.samples
    rows, columns = list(samples.prompts), [f"seed {seed}" for seed in samples.seeds]
    sources = _source_images(base, config)
    if strengths:
        rows = [f"{prompt}, seed {seed}" for prompt in rows for seed in samples.seeds]
        columns = [f"strength {strength:g}" for strength in strengths]
        sources = [references for references in sources for _ in samples.seeds]
    if any(sources):
        columns = ["before"] * len(sources[0]) + columns
        cells = [[*references, *row] for references, row in zip(sources, cells, strict=True)]
    image = sheet(cells, rows=rows, columns=columns, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, [picture_bytes(image)])


def jpeg_url(data: bytes) -> str:
    """Return a data URL of a JPEG file."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def class_folder(config: ImageTrainConfig, base: ImageBase, cache: Path) -> Path:
    """Return the folder of class images.

    This is the configured folder, or else a cache folder that is named after a hash of the inputs."""
    if config.data.class_folder is not None:
        return Path(config.data.class_folder)
    inputs = [base.fingerprint, config.data.class_prompt, config.samples.steps, config.samples.size, config.seed]
    return cache / "class" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def generate_missing(
    base: ImageBase, config: ImageTrainConfig, rows: Mapping[Path, ImageRow], steps: int, *, at_once: int = 4
) -> None:
    """Generate the image of each row with the base, without adapters, and write it to the row's file.

    The files are written in batches of `at_once`, so an interrupted run loses at most one batch."""
    files = list(rows)
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(files), at_once):
        batch = files[start : start + at_once]
        images = generate_rows(base, None, config, [rows[file] for file in batch], 1, steps)
        for file, cells in zip(batch, images, strict=True):
            atomic_write(file, [picture_bytes(cells[0])])


def generate_class_pictures(base: ImageBase, config: ImageTrainConfig, folder: Path, missing: int) -> None:
    """Add `missing` generated images of `data.class_prompt` to `folder`, each with its own seed."""
    files = ((seed, folder / f"class-{seed:05d}.png") for seed in count())
    new = islice(((seed, file) for seed, file in files if not file.exists()), missing)
    rows = {file: ImageRow(config.data.class_prompt or "", "", seed) for seed, file in new}
    generate_missing(base, config, rows, config.samples.steps)
