"""The base's encoders with caches, and the loss of its denoiser on a batch.

    encoders.batch(rows)        rows of one shape -> ImageBatch, with latents from the cache or newly encoded
    encoders.text(captions)     -> Conditioning, from the cache, or from text encoders with trained adapters
    ImageLoss(…)(batch)         Σ over rows of weight · min-SNR weight · mean squared error
    ImageLoss(…).score(…)       mean squared error on held-out images, at fixed noise and times

This module uses the base's functions (models.image.predict). It has no training loop, and its only files are
the caches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.models.image.base import text_length
from veneer.models.image.predict import (
    Conditioning,
    alphas_cumprod,
    embed_prompts,
    encode_pictures,
    predict,
    reference_size,
)
from veneer.ops.device_transfer import in_float64, sent
from veneer.train.devices import ALONE, Devices
from veneer.train.image.augmentation import View, crop_original, source_view
from veneer.train.image.batches import ImageBatch, PlannedRow, rows_by_shape
from veneer.train.image.cache import LatentCache, TextCache
from veneer.train.image.loss import (
    Times,
    flux_shift,
    generator,
    min_snr_weight,
    noised,
    quantile_times,
    row_losses,
    sample_noise,
)
from veneer.train.image.pictures import TrainingPicture
from veneer.train.loop import EvalResult

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig


_References = tuple[tuple[TrainingPicture, View], ...]
"""Source images of an edited image, each with its view."""


class Encoders:
    """Latents and text conditioning of one base.

    live: whether the text encoders have trained adapters, so that prompts must be encoded each time."""

    def __init__(self, base: ImageBase, config: ImageTrainConfig, folder: Path | None) -> None:
        self.base, self.config = base, config
        self.live = bool(config.adapter.text_encoders)
        # For an empty prompt, SDXL's pipelines use zeros instead of the encoding, unless configured otherwise.
        self.zeros = base.row.time_ids and bool(base.settings.get("force_zeros_for_empty_prompt", True))
        fingerprint = f"{base.fingerprint}|{str(base.dtype).removeprefix('torch.')}"
        self.latents = LatentCache(folder and folder / "latents", fingerprint=fingerprint)
        # Quantized text encoders give different embeddings, and the base's fingerprint does not include the
        # tokenizer.
        text_identity = f"{fingerprint}|{base.quantized}|{text_length(base)}|{_tokenizers(base)}"
        self.texts = TextCache(folder and folder / "texts", fingerprint=text_identity)

    def batch(self, rows: Sequence[PlannedRow]) -> ImageBatch:
        """Return the batch of the given rows, which must have one shape."""
        sources = [self._source_latents(row) for row in rows]
        return ImageBatch.stack(rows, [self._latents(row) for row in rows], sources)

    def text(self, captions: Sequence[str], rows: Sequence[PlannedRow] = ()) -> Conditioning:
        """Return the denoiser's conditioning on these captions, on the base's device.

        An empty (dropped) caption gets the conditioning that the pipeline uses when there is no negative
        prompt. Caption dropout trains this unconditional case.

        rows: the row of each caption, for a base that encodes source images together with captions."""
        if self.live:
            text = embed_prompts(self.base, captions)
        else:
            references: list[_References] = [self._prompt_references(row) for row in rows] or [()] * len(captions)
            each = [self._text(caption, pictures) for caption, pictures in zip(captions, references, strict=True)]
            text = Conditioning.cat(each).to(self.base.device)
        return _zeroed(text, [not caption for caption in captions]) if self.zeros and "" in captions else text

    def fill(self, rows: Iterable[PlannedRow]) -> tuple[int, int]:
        """Compute all cache entries for these rows, and return the numbers of (views, captions)."""
        views: dict[tuple[str, View], PlannedRow] = {}
        captions: dict[tuple[str | View, ...], PlannedRow] = {}
        for row in rows:
            views.setdefault((row.picture.key, row.view), row)
            references = (row.picture.key, row.view) if self.base.reads_references else ()
            captions.setdefault((row.caption, *references), row)
        for row in views.values():
            self._latents(row)
            self._source_latents(row)
        if not self.live:
            for row in captions.values():
                self._text(row.caption, self._prompt_references(row))
        return len(views), len(captions)

    def _latents(self, row: PlannedRow) -> tuple[Tensor, Tensor | None, Tensor]:
        entry = self.latents.get(row.picture, row.view, self.config.data, partial(encode_pictures, self.base))
        return entry.latents.float(), entry.mask, entry.sizes

    def _sources(self, row: PlannedRow) -> _References:
        """Return a row's source images, with views in the sizes that the base requires."""
        size = partial(reference_size, self.base)
        return tuple((b, source_view(row.view, b, self.base.unit, size)) for b in row.picture.sources)

    def _prompt_references(self, row: PlannedRow) -> _References:
        """Return the images that are encoded together with the row's caption."""
        return self._sources(row) if self.base.reads_references else ()

    def _source_latents(self, row: PlannedRow) -> list[Tensor]:
        data, latents, encode = self.config.data, self.latents, partial(encode_pictures, self.base)
        return [latents.get(b, view, data, encode).latents.float() for b, view in self._sources(row)]

    def _text(self, caption: str, references: _References = ()) -> Conditioning:
        data = self.config.data

        def encode(prompt: str) -> dict[str, Tensor]:
            with torch.no_grad():
                text = embed_prompts(self.base, [prompt], [[crop_original(b, view, data) for b, view in references]])
            tensors = {"embeds": text.embeds, "pooled": text.pooled, "mask": text.mask}
            return {name: t for name, t in tensors.items() if t is not None}

        entry = self.texts.get(caption, encode, references, data)
        return Conditioning(entry["embeds"], entry.get("pooled"), entry.get("mask"))


def _tokenizers(base: ImageBase) -> str:
    """Return a digest of the base's tokenizers, prompt template and processor."""
    h = hashlib.sha256()
    for name, part in sorted(base.parts.items()):
        if name.startswith(("tokenizer", "processor")) and part is not None:
            if pictures := getattr(part, "pictures", None):  # Qwen-Image-Edit's processor
                h.update(pictures.to_json_string().encode())
            tokenizer = getattr(part, "tokenizer", part)  # for FLUX.2, the part is a processor
            backend = getattr(tokenizer, "backend_tokenizer", None)
            content = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
            for state in ("truncation", "padding"):  # these settings depend on the last call of the tokenizer
                content.pop(state, None)
            h.update(f"{name}|{tokenizer.model_max_length}|{tokenizer.chat_template}|{json.dumps(content)}".encode())
    return h.hexdigest()


def _zeroed(text: Conditioning, empty: Sequence[bool]) -> Conditioning:
    """Set the conditioning of the rows that are `empty` to zero, so they get no gradient."""
    mask = torch.tensor(empty, device=text.embeds.device)
    pooled = None if text.pooled is None else text.pooled.masked_fill(mask[:, None], 0)
    return replace(text, embeds=text.embeds.masked_fill(mask[:, None, None], 0), pooled=pooled)


def time_distribution(base: ImageBase, config: ImageTrainConfig) -> Times:
    """Return the distribution of timesteps of the run.

    `auto` is logit-normal for flow models and uniform for others. The default shift is the scheduler's
    constant shift. With shift=resolution, the shift depends on the number of tokens, as in FLUX, with the
    parameters of the scheduler."""
    loss = config.loss
    distribution = loss.timesteps
    if distribution == "auto":
        distribution = "logit-normal" if base.prediction == "flow" else "uniform"
    shift: float | Callable[[int], float] = 1.0
    scheduler = base.parts["scheduler"].config
    if loss.shift == "resolution":
        shift = flux_shift(
            int(scheduler.get("base_image_seq_len", 256)),
            int(scheduler.get("max_image_seq_len", 4096)),
            float(scheduler.get("base_shift", 0.5)),
            float(scheduler.get("max_shift", 1.15)),
        )
    elif loss.shift == "auto":
        fixed = base.prediction == "flow" and not scheduler.get("use_dynamic_shifting")
        shift = float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0) if fixed else 1.0
    else:
        shift = loss.shift
    steps = 1000 if base.prediction == "flow" else len(alphas_cumprod(base))
    patch = 1 if base.row.patched else base.row.patch
    return Times(distribution, shift, steps, patch * patch)


@dataclass
class ImageLoss:
    """The loss of a run: call it for training; use `score` for held-out images.

    adapter_off: context manager that disables the adapter, for `keep_guidance`."""

    base: ImageBase
    config: ImageTrainConfig
    encoders: Encoders
    adapter_off: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.times, self.noise = time_distribution(self.base, self.config), self.config.loss.noise_offset
        # Keep this tensor on the CPU, where times are sampled. If it were on the device, the host would have to
        # wait for the device.
        self.alphas = None if self.base.prediction == "flow" else alphas_cumprod(self.base).cpu()
        distilled = self.base.denoiser.config.get("guidance_embeds")
        guidance = max(self.config.loss.guidance, self.config.loss.keep_guidance or 0.0)
        self.guidance = guidance if distilled else None

    def __call__(self, batch: ImageBatch) -> Tensor:
        shape = batch.latents.shape[1:]
        keys = [row.key for row in batch.rows]
        noise, times = sample_noise(shape, keys, self.base.prediction, self.times, self.noise)
        losses = self.row_errors(batch, noise, times)
        weights = batch.weights
        gamma = self.config.loss.snr_gamma
        if gamma is not None and self.alphas is not None:
            weights = weights * min_snr_weight(times, self.base.prediction, self.alphas, gamma)
        return (sent(weights, losses.device) * losses).sum()

    def row_errors(self, batch: ImageBatch, noise: Tensor, times: Tensor) -> Tensor:
        """Return the mean squared error of each row, (n,) in float32."""
        base = self.base

        def to_device(t: Tensor) -> Tensor:
            return sent(t, base.device)

        noisy, target = noised(to_device(batch.latents), to_device(noise), times, base.prediction, self.alphas)
        times = to_device(times)
        text = self.encoders.text([row.caption for row in batch.rows], batch.rows)
        sizes = to_device(batch.sizes) if base.row.time_ids else None
        options: dict[str, Any] = {"sizes": sizes, "references": [to_device(x) for x in batch.sources]}
        predicted = predict(base, noisy, times, text, guidance=self.guidance, **options)
        keep = self.config.loss.keep_guidance
        if keep is not None:
            # A target computed from images contains no guidance, but at g > 1, a guidance-distilled base
            # predicts guided outputs. An adapter trained toward the target alone would undo the guidance.
            # Therefore the base's own guidance step is added to the target.
            with torch.no_grad(), self.adapter_off():
                for guidance, sign in ((keep, 1), (1.0, -1)):
                    unadapted = predict(base, noisy, times, text, guidance=guidance, **options)
                    target = target + sign * unadapted.to(target.dtype)
        return row_losses(predicted, target, None if batch.masks is None else to_device(batch.masks))

    @torch.no_grad()
    def score(
        self, rows: Sequence[PlannedRow], stopped: Callable[[], bool] = lambda: False, devices: Devices = ALONE
    ) -> EvalResult | None:
        """Return the mean squared error of held-out rows, or None once `stopped()` is true.

        The range of times is divided into `evaluation.times` equal parts, and each row is scored at the middle
        of each part, without weights. The noise depends only on the image and the time, so runs with different
        losses can be compared. `extra` has the loss at each time. With several `devices`, the result covers
        only the rows assigned to this process."""
        times = quantile_times(self.config.evaluation.times, self.base.prediction, self.times.steps)
        sums = torch.zeros(len(times), dtype=torch.float64)
        groups = rows_by_shape(rows, self.config.batching.micro_rows or self.config.batching.rows)
        share = [groups[index] for index, _ in devices.deal([len(group) for group in groups])]
        count = sum(map(len, share))
        for group in share:
            batch = self.encoders.batch(group)
            for k, time in enumerate(times):
                if stopped():
                    return None
                generators = [generator("validation", *row.key, k) for row in group]
                noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=g) for g in generators])
                sums[k] += float(in_float64(self.row_errors(batch, noise, time.expand(len(group)))).sum())
        losses = {f"loss at {time:g}": s / max(1, count) for time, s in zip(times.tolist(), sums.tolist(), strict=True)}
        return EvalResult(float(sums.mean()), count, count, losses, likelihood=False)
