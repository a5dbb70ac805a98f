"""Sliders: adapters with a strength that moves between two prompts, trained without images.

    the base draws scenes of the three prompts → noise at random times → at strength ±1 the adapter's target is

        target(x_t, t, ±1) = ε(x_t, t, c) ± η·(ε(x_t, t, c₊) − ε(x_t, t, c₋))                  ε: the base's prediction

c is `slider.target`, and η is `slider.guidance`. c₊ and c₋ are the positive and negative prompts, each
followed by one entry p of `preserve`, chosen at random for each row. With one p, the target is the paper's
(Concept Sliders, arXiv 2311.12092, equation 8). With several, the squared error is minimal at the mean over
p, while the paper uses the sum. The paper trains one sign. Here, both signs see the same scene, noise and
time, so that terms that are even in the strength cancel, and a negative strength has the opposite effect. For
flow families, ε is the velocity, in which the same guidance is linear. A distilled base is evaluated with the
guidance used for generation.

The run is an image run (train.image.task) with the scenes as its images. This module has all parts that are
specific to sliders, except their settings (`SliderSection`, train.config.checks).
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
from veneer.errors import BaseError, counted
from veneer.models.image.generate import ImageRow, default_settings
from veneer.models.image.predict import predict
from veneer.ops.device_transfer import sent
from veneer.train.image.batches import ImageBatch
from veneer.train.image.encode import ImageLoss
from veneer.train.image.loss import generator, noised, row_losses
from veneer.train.image.preflight import ImageData, adapter_components
from veneer.train.image.samples import generate_missing
from veneer.train.image.task import ImageKind, ImageRun, image_prompts, read_image_data
from veneer.train.loop import LazySteps, Micro, Step
from veneer.train.preflight import CACHE, Finding
from veneer.train.run import NAME, Run

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig, SliderSection


def slider_config(config: ImageTrainConfig) -> ImageTrainConfig:
    """Return the configuration as an image configuration.

    The scenes are the training images, and none is held out. The slider's target is their caption and the
    default sample prompt."""
    slider, data = config.slider, config.data
    cache = Path(data.cache) if data.cache else Path(config.output.directory) / CACHE
    prompts = slider.model_dump(mode="json", include={"positive", "negative", "target", "preserve"})
    inputs = [config.base.name, prompts, data.resolution, config.samples.guidance, config.seed]
    scenes = cache / "scenes" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    updates = {"pictures": str(scenes), "prompt": slider.target, "split": 0}
    samples = config.samples
    if not samples.prompts and slider.target:
        samples = samples.model_copy(update={"prompts": (slider.target,)})
    return config.model_copy(update={"data": data.model_copy(update=updates), "samples": samples})


def _read(image: ImageRun) -> ImageData:
    """Return the scenes, after generating missing ones.

    Their captions are not used as tags."""
    config = _with_scenes(image.base, image.config, image.run)
    data = read_image_data(replace(image, config=config))
    return replace(data, steps=_with_both_signs(data.steps), tags={})


def _findings(image: ImageRun, data: ImageData) -> Iterator[Finding]:
    slider = image.config.slider
    preserved = f", and is not to bring {', '.join(slider.preserve)} along" if slider.preserve else ""
    text = f"slider: strength moves `{slider.target}` from `{slider.negative}` to `{slider.positive}`{preserved}"
    yield Finding("ok", "slider", f"{text}; {counted(slider.scenes, 'scene')} of the base's own, no pictures")


def _same_prompts(image: ImageRun, data: ImageData) -> Iterator[Finding]:
    """Report a stop if different prompts have equal encodings.

    The encodings are cached for the steps."""
    slider, encoders = image.config.slider, data.encoders
    encoders.text([slider.target])
    for plus, minus in _directions(slider):
        ends = [encoders.text([prompt]) for prompt in (plus, minus)]
        if ends[0].embeds.shape == ends[1].embeds.shape and torch.equal(ends[0].embeds, ends[1].embeds):
            text = f"`{plus}` and `{minus}` are the same to this base: there is no direction between them"
            fix = "use other words: the model might not know these, or truncate the prompt before them"
            yield Finding("stop", "slider", text, fix)


SLIDER = ImageKind(
    read=_read,
    texts=lambda image, data: {
        **image_prompts(image, data),
        "slider prompts": [end for pair in _directions(image.config.slider) for end in pair],
    },
    findings=_findings,
    last_findings=_same_prompts,
    loss=lambda image, data, attachment: SliderLoss(
        image.base, image.config, data.encoders, adapter_off=attachment.using, attachment=attachment
    ),
    strengths=lambda config: config.slider.strengths,
)
"""A slider: scenes generated by the base, trained at both signs of the strength.

The configuration is the result of `slider_config`."""


def _directions(slider: SliderSection) -> list[tuple[str, str]]:
    """Return a (positive, negative) prompt for each entry of `preserve`, or the two prompts without one."""
    ends = slider.positive or "", slider.negative or ""
    return [(_joined(ends[0], p), _joined(ends[1], p)) for p in slider.preserve or ("",)]


def _joined(prompt: str, concept: str) -> str:
    return ", ".join(part for part in (prompt, concept) if part)


@dataclass
class SignedBatch(ImageBatch):
    """A batch trained at strength `sign`."""

    sign: float = 1.0


def _with_both_signs(steps: LazySteps) -> LazySteps:
    """Return the steps with each micro-batch twice, at strengths +1 and −1."""

    def both(step: Step) -> Step:
        signs = ((micro, sign) for micro in step.micros for sign in (1.0, -1.0))
        return replace(step, micros=tuple(replace(micro, make=partial(_signed_batch, micro, s)) for micro, s in signs))

    return steps.mapped(both)


def _signed_batch(micro: Micro, sign: float) -> SignedBatch:
    return SignedBatch(**vars(micro.make()), sign=sign)


@dataclass
class SliderLoss(ImageLoss):
    """The error against the base's prediction, moved along the direction.

    The adapter is selected at the batch's sign and remains selected, because activations that are recomputed
    in the backward pass must use the same sign."""

    attachment: Attachment = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance is not None:  # a distilled base
            guidance = self.config.samples.guidance
            self.guidance = default_settings(self.base)[1] if guidance is None else guidance
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
        unadapted, step = self._direction(batch, neutral, predicted)
        self.attachment.use((NAME, sign))
        return row_losses(predicted(neutral), unadapted + sign * slider.guidance * step)

    def _direction(
        self, batch: ImageBatch, neutral: Sequence[str], predicted: Callable[[Sequence[str]], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return (ε of the target, ε of positive − ε of negative), predicted by the base, in float32.

        The result is cached for the other sign, because its batch comes next."""
        key = tuple(row.key for row in batch.rows)
        if self._last is None or self._last[0] != key:
            pairs = _directions(self.config.slider)
            sampled = [pairs[int(torch.randint(len(pairs), (), generator=generator("preserve", *k)))] for k in key]
            with torch.no_grad(), self.attachment.off():
                plus, minus = ([pair[end] for pair in sampled] for end in (0, 1))
                unadapted, positive, negative = (predicted(prompts).float() for prompts in (neutral, plus, minus))
            self._last = key, torch.stack([unadapted, positive - negative])
        unadapted, step = self._last[1]
        return unadapted, step


def _with_scenes(base: ImageBase, config: ImageTrainConfig, run: Run) -> ImageTrainConfig:
    """Return the configuration with the folder of its scenes, after generating missing ones.

    A dry run generates one scene, in a temporary folder."""
    if base.only_edits:
        message = f"{base.name} edits pictures, and a slider needs a base that generates from prompts"
        raise BaseError(message, where="base", fix="train on the base it was made from, as FLUX.1 dev or Qwen-Image")
    for module, spec in adapter_components(base, config).values():
        resolve_targets(module, spec)  # raises for invalid targets before any scene is generated
    folder, count = Path(config.data.folders[0]), config.slider.scenes
    if run.dry_run:
        folder, count = Path(tempfile.mkdtemp(prefix="veneer-")), 1
    began = time.perf_counter()
    generated = _generate_scenes(base, config, folder, count) if run.devices.first else 0
    run.devices.gather(None)
    if generated:
        run.note(f"the base drew {counted(generated, 'scene')} into {folder} in {time.perf_counter() - began:.0f} s")
    return config.model_copy(update={"data": config.data.model_copy(update={"pictures": str(folder)})})


def _generate_scenes(base: ImageBase, config: ImageTrainConfig, folder: Path, count: int) -> int:
    """Generate the missing ones of the first `count` scenes in `folder`, each with its own seed.

    Returns the number of generated scenes."""
    size = config.data.resolution if isinstance(config.data.resolution, int) else base.size
    sized = config.model_copy(update={"samples": config.samples.model_copy(update={"size": size})})
    target, pairs = config.slider.target, _directions(config.slider)
    preserved = config.slider.preserve or ("",)
    prompts = [p for (plus, minus), k in zip(pairs, preserved, strict=True) for p in (_joined(target, k), plus, minus)]
    rows = {
        folder / f"scene-{i:05d}.png": ImageRow(prompts[i % len(prompts)], "", config.seed + i) for i in range(count)
    }
    missing = {file: row for file, row in rows.items() if not file.exists()}
    generate_missing(base, sized, missing, default_settings(base)[0])
    return len(missing)
