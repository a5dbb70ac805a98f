"""The metadata of a picture run in sd-scripts' form, which many readers know."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from veneer.train.image.pictures import TrainingPicture

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.image.encode import ImageLoss
    from veneer.train.image.preflight import ImageData


def training_facts(
    config: ImageTrainConfig,
    base: ImageBase,
    data: ImageData,
    loss: ImageLoss,
    *,
    kept: int,
    recompute: bool,
    seconds: float,
) -> dict[str, Any]:
    """Return the values of the `ss_` keys, without the prefix; None if inapplicable.

    `kept`: the saved step; `seconds`: duration of the steps."""
    now, drawn, steps, ends = time.time(), config.loss, data.steps, data.steps.ends
    buckets = {f"{w}x{h}": count for (w, h), count in data.plan.sizes.items()}
    side = config.data.resolutions(base.size)[-1]
    facts: dict[str, Any] = {
        "training_started_at": now - seconds,
        "training_finished_at": now,
        "learning_rate": config.optimizer.learning_rate,
        "unet_lr": config.optimizer.learning_rate,
        "text_encoder_lr": config.optimizer.text_learning_rate if config.adapter.text_encoders else None,
        "num_train_images": len(data.own),
        "num_reg_images": len(data.learned) - len(data.own),
        "num_validation_images": len(data.held),
        "num_epochs": math.ceil(steps[-1].epoch),
        "num_batches_per_epoch": ends[0] if ends else len(steps),
        "steps": kept,
        "max_train_steps": len(steps),
        "batch_size_per_device": config.batching.rows,
        "total_batch_size": config.batching.rows,
        "resolution": f"({side}, {side})",
        "seed": config.seed,
        "lr_scheduler": config.schedule.name,
        "lr_warmup_steps": config.schedule.warmup,
        "optimizer": config.optimizer.name,
        "max_grad_norm": config.optimizer.clip,
        "network_dropout": config.adapter.dropout or None,
        "gradient_checkpointing": recompute,
        "gradient_accumulation_steps": 1,
        "mixed_precision": str(base.dtype).removeprefix("torch."),
        "cache_latents": True,
        "min_snr_gamma": drawn.snr_gamma,
        "noise_offset": drawn.noise_offset or None,
        "prior_loss_weight": config.data.class_weight,
        "caption_dropout_rate": config.data.caption_dropout,
        "shuffle_caption": config.data.shuffle_tags,
        "flip_aug": config.data.flip,
        "random_crop": config.data.crop == "random",
        "enable_bucket": config.data.buckets,
        "bucket_info": {"buckets": {str(i): {"resolution": r, "count": c} for i, (r, c) in enumerate(buckets.items())}},
        "dataset_dirs": _folders([p for p in data.learned if not p.is_class]),
        "reg_dataset_dirs": _folders([p for p in data.learned if p.is_class]) or None,
    }
    if base.prediction == "flow":
        facts |= {
            "timestep_sampling": loss.times.kind,
            "logit_mean": drawn.logit_mean,
            "logit_std": drawn.logit_std,
            "discrete_flow_shift": "resolution" if callable(loss.times.shift) else loss.times.shift,
            "guidance_scale": loss.guidance,
        }
    return facts


def tag_frequency(pictures: Iterable[TrainingPicture]) -> dict[str, dict[str, int]]:
    """Return sd-scripts' ss_tag_frequency: folder -> tag -> captions per epoch."""
    out: dict[str, Counter[str]] = {}
    for picture in pictures:
        folder, times = picture.path.parent.name, f"{picture.repeats}_"
        folder = folder if folder.startswith(times) else times + folder  # kohya's folders already have it
        tags = dict.fromkeys(t.strip() for t in picture.caption.split(",") if t.strip())
        out.setdefault(folder, Counter()).update(list(tags))
    return {folder: dict(counts.most_common()) for folder, counts in out.items()}


def _folders(pictures: list[TrainingPicture]) -> dict[str, dict[str, int]]:
    """Return sd-scripts' dataset_dirs: folder -> repeats and number of pictures."""
    out: dict[str, dict[str, int]] = {}
    for p in pictures:
        entry = out.setdefault(p.path.parent.name, {"n_repeats": p.repeats, "img_count": 0})
        entry["img_count"] += 1
    return out
