"""Sliders: an adapter whose strength moves along a direction between two prompts, learned from no pictures.

    the base draws scenes of the three prompts → they are noised at random times → at strength ±1 the adapter is held to

        target(x_t, t, ±1) = ε(x_t, t, c) ± η·(ε(x_t, t, c₊) − ε(x_t, t, c₋))                  ε: the base's prediction

c: `slider.target`, c₊ and c₋: positive and negative, each with one of `preserve` behind it, drawn anew for each row; η:
`slider.guidance`. With one p it is the paper's target (Concept Sliders, arXiv 2311.12092, equation 8); of several the
mean over them is what the squared error is least at, where the paper has their sum. The paper trains one sign; here
both see the same scene, noise and time, so that what is even in the strength cancels and a negative strength is the
opposite. Of flow families ε is the velocity, in which the same guidance is linear. A distilled base is asked at the
guidance that pictures are made with.

The run itself is one on pictures (train.image.task) whose pictures are the scenes, with this loss.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.attach import Attachment
from veneer.core.targets import resolve_targets
from veneer.errors import counted
from veneer.files.atomic import atomic_write
from veneer.files.pictures import picture_bytes
from veneer.models.image.generate import ImageRow, default_settings
from veneer.models.image.predict import predict
from veneer.ops.transfer import sent
from veneer.train.image.batches import ImageBatch
from veneer.train.image.encode import Encoders, ImageLoss
from veneer.train.image.loss import generator, noised, row_losses
from veneer.train.image.preflight import parts_of
from veneer.train.image.samples import draw_rows
from veneer.train.loop import LazySteps, Micro, Step
from veneer.train.preflight import CACHE, Finding
from veneer.train.run import NAME, Run

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig, SliderSection

_AT_ONCE = 4


def slider_config(config: ImageTrainConfig) -> ImageTrainConfig:
    """The configuration as one of pictures: the scenes, none held out, the target as their caption and as the sample
    prompt where there is none."""
    slider, data = config.slider, config.data
    cache = Path(data.cache) if data.cache else Path(config.output.directory) / CACHE
    prompts = slider.model_dump(mode="json", include={"positive", "negative", "target", "preserve"})
    made_of = [config.base.name, prompts, data.resolution, config.samples.guidance, config.seed]
    scenes = cache / "scenes" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    own = {"pictures": str(scenes), "prompt": slider.target, "split": 0}
    samples = config.samples
    if not samples.prompts and slider.target:
        samples = samples.model_copy(update={"prompts": (slider.target,)})
    return config.model_copy(update={"data": data.model_copy(update=own), "samples": samples})


def directions(slider: SliderSection) -> list[tuple[str, str]]:
    """(positive, negative) prompt for each of `preserve`, or the two as they are."""
    ends = slider.positive or "", slider.negative or ""
    return [(_joined(ends[0], p), _joined(ends[1], p)) for p in slider.preserve or ("",)]


def _joined(prompt: str, more: str) -> str:
    return ", ".join(part for part in (prompt, more) if part)


@dataclass
class SignedBatch(ImageBatch):
    """A batch that is learned at strength `sign`."""

    sign: float = 1.0


def signed(steps: LazySteps) -> LazySteps:
    """Each micro-batch twice, at +1 and at −1."""

    def both(step: Step) -> Step:
        return replace(step, micros=tuple(_at(micro, sign) for micro in step.micros for sign in (1.0, -1.0)))

    return steps.mapped(both)


def _at(micro: Micro, sign: float) -> Micro:
    return replace(micro, make=partial(_signed_batch, micro, sign))


def _signed_batch(micro: Micro, sign: float) -> SignedBatch:
    return SignedBatch(**vars(micro.make()), sign=sign)


@dataclass
class SliderLoss(ImageLoss):
    """The error against the base's own prediction, moved along the direction. Selects the adapter at the batch's sign,
    and leaves it so: activations that are recomputed in the backward pass have to see the same."""

    attachment: Attachment = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance is not None:  # a distilled base
            asked = self.config.samples.guidance
            self.guidance = default_settings(self.base)[1] if asked is None else asked
        self._last: tuple[tuple[Any, ...], Tensor] | None = None

    def row_errors(self, batch: ImageBatch, noise: Tensor, times: Tensor) -> Tensor:
        base, slider, sign = self.base, self.config.slider, batch.sign if isinstance(batch, SignedBatch) else 1.0
        latents, device = sent(batch.latents, base.device), base.device
        noisy, _ = noised(latents, sent(noise, device), times, base.prediction, self.alphas)
        at = sent(times, device)
        sizes = sent(batch.sizes, device) if base.row.time_ids else None

        def predicted(prompts: Sequence[str]) -> Tensor:
            text = self.encoders.text(prompts)
            return predict(base, noisy, at, text, sizes=sizes, guidance=self.guidance)

        neutral = [slider.target] * len(batch.rows)
        own, step = self._direction(batch, noisy, at, predicted, neutral)
        self.attachment.use((NAME, sign))
        return row_losses(predicted(neutral), own + sign * slider.guidance * step)

    def _direction(
        self,
        batch: ImageBatch,
        noisy: Tensor,
        at: Tensor,
        predicted: Callable[[Sequence[str]], Tensor],
        neutral: Sequence[str],
    ) -> tuple[Tensor, Tensor]:
        """(ε of the target, ε of positive − ε of negative) of the base alone, in float32; kept for the other sign,
        whose batch comes next."""
        key = tuple(row.key for row in batch.rows)
        if self._last is None or self._last[0] != key:
            pairs = directions(self.config.slider)
            drawn = [pairs[int(torch.randint(len(pairs), (), generator=generator("preserve", *k)))] for k in key]
            with torch.no_grad(), self.attachment.off():
                plus, minus = ([pair[end] for pair in drawn] for end in (0, 1))
                own, more, less = (predicted(prompts).float() for prompts in (neutral, plus, minus))
            self._last = key, torch.stack([own, more - less])
        own, step = self._last[1]
        return own, step


def with_scenes(base: ImageBase, config: ImageTrainConfig, run: Run) -> ImageTrainConfig:
    """The configuration with the folder of its scenes, those drawn that were missing; on a dry run a single one, in a
    folder for temporary files."""
    for module, spec in parts_of(base, config).values():
        resolve_targets(module, spec)  # nothing is drawn for targets that do not exist
    folder, count = Path(config.data.folders[0]), config.slider.scenes
    if run.dry_run:
        folder, count = Path(tempfile.mkdtemp(prefix="veneer-")), 1
    began = time.perf_counter()
    drawn = _draw_scenes(base, config, folder, count) if run.devices.first else 0
    run.devices.gather(None)
    if drawn:
        run.note(f"the base drew {counted(drawn, 'scene')} into {folder} in {time.perf_counter() - began:.0f} s")
    return config.model_copy(update={"data": config.data.model_copy(update={"pictures": str(folder)})})


def same_ends(config: ImageTrainConfig, encoders: Encoders) -> Iterator[Finding]:
    """Prompts that read differently and are the same to the base; what is asked here is kept for the steps."""
    encoders.text([config.slider.target])
    for plus, minus in directions(config.slider):
        ends = [encoders.text([prompt]) for prompt in (plus, minus)]
        if ends[0].embeds.shape == ends[1].embeds.shape and torch.equal(ends[0].embeds, ends[1].embeds):
            text = f"`{plus}` and `{minus}` are the same to this base: there is no direction between them"
            yield Finding("stop", "slider", text, "other words: it may not know these, or not read so far")


def _draw_scenes(base: ImageBase, config: ImageTrainConfig, folder: Path, count: int) -> int:
    """Draws the first `count` scenes that are not in `folder` yet, each by a seed of its own; how many they were."""
    folder.mkdir(parents=True, exist_ok=True)
    size = config.data.resolution if isinstance(config.data.resolution, int) else base.size
    sized = config.model_copy(update={"samples": config.samples.model_copy(update={"size": size})})
    target, pairs = config.slider.target, directions(config.slider)
    kept = config.slider.preserve or ("",)
    prompts = [p for (plus, minus), k in zip(pairs, kept, strict=True) for p in (_joined(target, k), plus, minus)]
    missing = [i for i in range(count) if not (folder / f"scene-{i:05d}.png").exists()]
    for start in range(0, len(missing), _AT_ONCE):
        these = missing[start : start + _AT_ONCE]
        rows = [ImageRow(prompts[i % len(prompts)], "", config.seed + i) for i in these]
        drawn = draw_rows(base, None, sized, rows, 1, default_settings(base)[0])
        for i, cells in zip(these, drawn, strict=True):
            atomic_write(folder / f"scene-{i:05d}.png", [picture_bytes(cells[0])])
    return len(missing)
