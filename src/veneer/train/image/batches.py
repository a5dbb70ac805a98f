"""Which pictures make a step, and the tensors of a micro-batch.

    step         `rows` pictures of a seeded shuffle, and as many class pictures where there are some
    micro-batch  part of a step: pictures of one shape, at most `micro_rows` of them

A step may hold pictures of several shapes: its loss is a sum over pictures, so that how it is cut changes memory and
speed, never the result. The plan is a pure function of seed and epoch: a resumed run plans the same, and all that will
be needed of the caches is known before the first step. With class pictures the loss of a step is DreamBooth's (arXiv
2208.12242),
mean over its pictures + Σ weight · class picture's / number of its pictures. Knows neither models nor files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice

import torch
from torch import Tensor

from veneer.ops.device_transfer import sent
from veneer.train.config.image import ImageDataSection, ImageTrainConfig
from veneer.train.image.augmentation import PictureRow, View, draw_row, place, shapes_of
from veneer.train.image.training_picture import TrainingPicture
from veneer.train.loop import LazySteps, Micro, Step
from veneer.train.validation_split import hold_out


@dataclass(frozen=True)
class PlannedRow:
    """A picture in a step: what is seen of it, what is said of it, what its loss counts, and what its draws are of."""

    picture: TrainingPicture
    view: View
    caption: str
    weight: float
    key: tuple[int | str, ...]


@dataclass
class ImageBatch:
    """latents: (n, c, h, w), masks: (n, 1, h, w) or None, sizes: (n, 6) time ids, weights: (n,); rows: the plan's.
    `before`: for each picture that an edit starts from its latents, (n, c, h, w)."""

    latents: Tensor
    masks: Tensor | None
    sizes: Tensor
    weights: Tensor
    rows: Sequence[PlannedRow]
    before: Sequence[Tensor] = ()

    @staticmethod
    def of(
        rows: Sequence[PlannedRow],
        latents: Sequence[tuple[Tensor, Tensor | None, Tensor]],
        before: Sequence[Sequence[Tensor]] = (),
    ) -> ImageBatch:
        """Rows of one shape and, for each, its (latents, mask, time ids), and the latents of what is before it. A row
        without a mask is learned whole."""
        masks = [mask for _, mask, _ in latents]
        joined = None
        if any(mask is not None for mask in masks):
            like = latents[0][0]
            ones = torch.ones(1, *like.shape[-2:])
            joined = torch.stack([ones if mask is None else mask for mask in masks])
        return ImageBatch(
            torch.stack([x for x, _, _ in latents]),
            joined,
            torch.stack([sizes for _, _, sizes in latents]),
            torch.tensor([row.weight for row in rows]),
            rows,
            [torch.stack(each) for each in zip(*before, strict=True)],
        )

    def sent(self, device: torch.device) -> ImageBatch:
        """The same with latents and masks on a device, on their way there."""
        masks = None if self.masks is None else sent(self.masks, device)
        before = [sent(x, device) for x in self.before]
        return replace(self, latents=sent(self.latents, device), masks=masks, before=before)


def split_pictures(
    pictures: Sequence[TrainingPicture], split: int | float | None, seed: int
) -> tuple[list[TrainingPicture], list[TrainingPicture]]:
    """(learned, held out), as `hold_out` chooses them. None: a tenth from 20 pictures on, at most 50; none below. Class
    pictures are never held out."""
    own = [p for p in pictures if not p.is_class]
    default = min(50, len(own) // 10) if len(own) >= 20 else 0
    _, held = hold_out(own, split, seed=seed, default=default, what="pictures", order=_digest)
    chosen = {id(p) for p in held}
    return [p for p in pictures if id(p) not in chosen], held


def plan_image_steps(
    rows: Sequence[PictureRow],
    config: ImageTrainConfig,
    make: Callable[[Sequence[PlannedRow]], ImageBatch],
    devices: int = 1,
) -> LazySteps:
    """All steps of the run in order, planned an epoch at a time.

    `rows`: of one epoch. `make`: rows of one shape -> their batch, called when its turn comes. A step is cut into a
    micro-batch for each of `devices` at least, where it has the pictures."""
    own = [row for row in rows if not row.picture.is_class]
    classes = [row for row in rows if row.picture.is_class]
    size = config.batching.rows
    parts = -(-len(own) // size)

    def of_epoch(epoch: int) -> list[Step]:
        order, beside = _shuffled(own, config.seed, epoch), _endless(classes, config.seed, epoch * len(own))
        steps = []
        for i in range(parts):
            chosen = order[i * size : (i + 1) * size]
            together = [*chosen, *islice(beside, len(chosen))]
            drawn = _drawn(together, len(chosen), config, epoch, epoch * parts + i + 1)
            steps.append(Step(tuple(_micros(drawn, config, make, devices)), epoch + (i + 1) / parts))
        return steps

    return LazySteps(of_epoch, epochs=config.epochs, steps=config.steps)


def planned_rows(steps: Iterable[Step]) -> Iterator[PlannedRow]:
    """Every row of these steps, in the order they were drawn in."""
    for step in steps:
        yield from sorted((row for micro in step.micros for row in micro.items), key=lambda row: row.key)


def _drawn(
    rows: Sequence[PictureRow], instances: int, config: ImageTrainConfig, epoch: int, step: int
) -> list[PlannedRow]:
    """The rows of one step as they are seen. The loop divides by all pictures; DreamBooth's loss by the instances."""
    factor = len(rows) / instances
    out = []
    for slot, row in enumerate(rows):
        view, caption = draw_row(row, config.data, seed=config.seed, epoch=epoch)
        key = (config.seed, step, slot)
        out.append(PlannedRow(row.picture, view, caption, row.picture.weight * factor, key))
    return out


def _endless(classes: Sequence[PictureRow], seed: int, start: int) -> Iterator[PictureRow]:
    """The class pictures that stand beside the others: all of them in a shuffled order, again and again, without the
    first `start`; none where there are no class pictures."""
    if not classes:
        return iter(())
    first, skipped = divmod(start, len(classes))
    return islice((row for cycle in count(first) for row in _shuffled(classes, seed, -1 - cycle)), skipped, None)


def _micros(
    rows: Sequence[PlannedRow],
    config: ImageTrainConfig,
    make: Callable[[Sequence[PlannedRow]], ImageBatch],
    pieces: int,
) -> list[Micro]:
    """Rows of one shape together, the largest shape first, so that a step which does not fit fails at once."""
    shapes: dict[tuple[tuple[int, int], ...], list[PlannedRow]] = {}
    for row in rows:
        shapes.setdefault(shapes_of(row.picture, row.view), []).append(row)
    most = min(config.batching.micro_rows or len(rows), -(-len(rows) // pieces))
    out = []
    for ((height, width), *_), group in sorted(shapes.items(), key=lambda s: (-s[0][0][0] * s[0][0][1], s[0])):
        for i in range(0, len(group), most):
            part = tuple(group[i : i + most])
            names = tuple(row.picture.name for row in part)
            out.append(
                Micro(
                    len(part), len(part), names, partial(make, part), "pictures", len(part) * height * width, items=part
                )
            )
    return out


def validation_rows(rows: Sequence[PictureRow], settings: ImageDataSection, most: int | None) -> list[PlannedRow]:
    """Each held-out picture once at each bucket, its middle, unmirrored, with its own caption; nothing of them is drawn
    at random, and their keys do not depend on the run, so that curves of different runs can be compared."""
    once = {(row.picture.key, row.bucket): row for row in rows if row.repeat == 0}
    return [
        PlannedRow(row.picture, place(row.picture.size, row.bucket), row.picture.caption, 1.0, (row.picture.key,))
        for row in list(once.values())[:most]
    ]


def _shuffled(rows: Sequence[PictureRow], seed: int, epoch: int) -> list[PictureRow]:
    """Ordered by a hash of what each row is: the same in every version of every library, and for any order of files."""
    return sorted(rows, key=lambda row: _hash(seed, epoch, row.picture.key, row.bucket, row.repeat))


def _hash(*parts: object) -> bytes:
    return _digest("|".join(map(str, parts)).encode())


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).digest()
