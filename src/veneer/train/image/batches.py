"""Choose the images of each step, and build the tensors of each micro-batch.

    step         `rows` images of a seeded shuffle, plus as many class images if the data has class images
    micro-batch  part of a step: at most `micro_rows` images of one shape

A step can have images of several shapes. Its loss is a sum over images, so the micro-batch size changes
memory and speed, never the result. The plan is a pure function of seed and epoch, so a resumed run has the
same plan, and the cache entries to compute are known before the first step. With class images, the loss of a
step is DreamBooth's (arXiv 2208.12242),

    mean over the step's own images + Σ weight · loss of a class image / number of the step's own images

This module does not depend on models or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from veneer.ops.device_transfer import sent
from veneer.train.config.image import ImageDataSection, ImageTrainConfig
from veneer.train.image.augmentation import PictureRow, View, crop_view, sample_row, shapes_of
from veneer.train.image.pictures import TrainingPicture
from veneer.train.loop import LazySteps, Micro, Step


@dataclass(frozen=True)
class PlannedRow:
    """An image in a step, with its view, caption, loss weight and random key."""

    picture: TrainingPicture
    view: View
    caption: str
    weight: float
    key: tuple[int | str, ...]


@dataclass
class ImageBatch:
    """The tensors of a micro-batch.

    latents: (n, c, h, w); masks: (n, 1, h, w) or None; sizes: (n, 6) time ids; weights: (n,); rows: the
    planned rows; sources: for editing, one (n, c, h, w) tensor of latents for each source image of a row."""

    latents: Tensor
    masks: Tensor | None
    sizes: Tensor
    weights: Tensor
    rows: Sequence[PlannedRow]
    sources: Sequence[Tensor] = ()

    @staticmethod
    def stack(
        rows: Sequence[PlannedRow],
        latents: Sequence[tuple[Tensor, Tensor | None, Tensor]],
        sources: Sequence[Sequence[Tensor]] = (),
    ) -> ImageBatch:
        """Build a batch from rows of the same shape.

        latents: (latents, mask, time ids) of each row. sources: latents of the source images of each row. If
        a row has no mask, its whole image counts in the loss."""
        stacked, sizes = torch.stack([x for x, _, _ in latents]), torch.stack([sizes for _, _, sizes in latents])
        masks, all_masks = [mask for _, mask, _ in latents], None
        if any(mask is not None for mask in masks):
            ones = torch.ones(1, *stacked.shape[-2:])
            all_masks = torch.stack([ones if mask is None else mask for mask in masks])
        weights = torch.tensor([row.weight for row in rows])
        source_latents = [torch.stack(each) for each in zip(*sources, strict=True)]
        return ImageBatch(stacked, all_masks, sizes, weights, rows, source_latents)

    def sent(self, device: torch.device) -> ImageBatch:
        """Return the batch with all latents and masks copied asynchronously to a device."""
        masks = None if self.masks is None else sent(self.masks, device)
        sources = [sent(x, device) for x in self.sources]
        return replace(self, latents=sent(self.latents, device), masks=masks, sources=sources)


def plan_image_steps(
    rows: Sequence[PictureRow],
    config: ImageTrainConfig,
    make_batch: Callable[[Sequence[PlannedRow]], ImageBatch],
    devices: int = 1,
) -> LazySteps:
    """Return all steps of the run in order, planned one epoch at a time.

    A step with enough images has at least one micro-batch per device.

    rows: the rows of one epoch. make_batch: builds the batch from rows of one shape; called when the batch is
    needed."""
    instance_rows = [row for row in rows if not row.picture.is_class]
    classes = [row for row in rows if row.picture.is_class]
    size = config.batching.rows
    parts = -(-len(instance_rows) // size)

    def of_epoch(epoch: int) -> list[Step]:
        order = _shuffled(instance_rows, config.seed, epoch)
        class_rows = _cycle_class_pictures(classes, config.seed, epoch * len(instance_rows))
        steps = []
        for i in range(parts):
            instances = order[i * size : (i + 1) * size]
            step_rows = [*instances, *islice(class_rows, len(instances))]
            planned = _sample_rows(step_rows, len(instances), config, epoch, epoch * parts + i + 1)
            steps.append(Step(tuple(_micros(planned, config, make_batch, devices)), epoch + (i + 1) / parts))
        return steps

    return LazySteps(of_epoch, epochs=config.epochs, steps=config.steps)


def planned_rows(steps: Iterable[Step]) -> Iterator[PlannedRow]:
    """Yield every row of these steps, in sampling order."""
    for step in steps:
        yield from sorted((row for micro in step.micros for row in micro.items), key=lambda row: row.key)


def _sample_rows(
    rows: Sequence[PictureRow], instances: int, config: ImageTrainConfig, epoch: int, step: int
) -> list[PlannedRow]:
    """Return the rows of one step with their views and captions.

    The training loop divides the loss by the number of all images, but DreamBooth divides by the number of
    instance images. The weights are scaled to correct for this."""
    factor = len(rows) / instances
    out = []
    for slot, row in enumerate(rows):
        view, caption = sample_row(row, config.data, seed=config.seed, epoch=epoch)
        key = (config.seed, step, slot)
        out.append(PlannedRow(row.picture, view, caption, row.picture.weight * factor, key))
    return out


def _cycle_class_pictures(classes: Sequence[PictureRow], seed: int, start: int) -> Iterator[PictureRow]:
    """Yield class images endlessly, in a new shuffled order in each cycle.

    The first `start` images are skipped. Without class images, nothing is yielded."""
    if not classes:
        return iter(())
    first, skipped = divmod(start, len(classes))
    return islice((row for cycle in count(first) for row in _shuffled(classes, seed, -1 - cycle)), skipped, None)


def _micros(
    rows: Sequence[PlannedRow],
    config: ImageTrainConfig,
    make_batch: Callable[[Sequence[PlannedRow]], ImageBatch],
    pieces: int,
) -> list[Micro]:
    """Group rows of one shape into micro-batches, largest shape first.

    With this order, a step that does not fit in memory fails at its first micro-batch."""
    limit = min(config.batching.micro_rows or len(rows), -(-len(rows) // pieces))

    def largest_first(part: Sequence[PlannedRow]) -> tuple[Any, ...]:
        return -part[0].view.height * part[0].view.width, shapes_of(part[0].picture, part[0].view)

    out = []
    for part in sorted(rows_by_shape(rows, limit), key=largest_first):
        names = tuple(row.picture.name for row in part)
        pixels = len(part) * part[0].view.height * part[0].view.width
        make = partial(make_batch, part)
        out.append(Micro(len(part), len(part), names, make, "pictures", pixels, items=tuple(part)))
    return out


def rows_by_shape(rows: Sequence[PlannedRow], most: int) -> list[Sequence[PlannedRow]]:
    """Return groups of at most `most` rows of one shape, in the order of the shapes' first rows."""
    shapes: dict[tuple[tuple[int, int], ...], list[PlannedRow]] = {}
    for row in rows:
        shapes.setdefault(shapes_of(row.picture, row.view), []).append(row)
    return [group[i : i + most] for group in shapes.values() for i in range(0, len(group), most)]


def validation_rows(rows: Sequence[PictureRow], settings: ImageDataSection, limit: int | None) -> list[PlannedRow]:
    """Return each held-out image once per bucket, center-cropped, not mirrored, with its own caption.

    Nothing is random, and the random keys do not depend on the run, so curves of different runs can be
    compared."""
    once = {(row.picture.key, row.bucket): row for row in rows if row.repeat == 0}
    return [
        PlannedRow(row.picture, crop_view(row.picture.size, row.bucket), row.picture.caption, 1.0, (row.picture.key,))
        for row in list(once.values())[:limit]
    ]


def _shuffled(rows: Sequence[PictureRow], seed: int, epoch: int) -> list[PictureRow]:
    """Return the rows ordered by a hash of seed, epoch and row.

    The order does not depend on library versions or on the order of the files."""

    def order(row: PictureRow) -> bytes:
        text = f"{seed}|{epoch}|{row.picture.key}|{row.bucket}|{row.repeat}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    return sorted(rows, key=order)
