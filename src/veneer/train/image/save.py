"""The output of an image run: result, adapter, verification, report."""

from __future__ import annotations

import datetime
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment
from veneer.errors import AdapterError, counted
from veneer.files.pictures import picture_bytes
from veneer.formats import convert
from veneer.formats.card import CARD_FILE, README_FILE, card_bytes, readme_bytes
from veneer.formats.metadata import training_metadata
from veneer.formats.read import read
from veneer.models.image.predict import Conditioning, predict
from veneer.train.checkpoint import write_atomically
from veneer.train.image.samples import jpeg_url
from veneer.train.preflight import Finding
from veneer.train.report.log import duration
from veneer.train.report.page import Page
from veneer.train.run import NAME
from veneer.train.save import Outcome, base_facts, prove, run_records

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.formats.convert import WriteReport
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.image.batches import ImageBatch
    from veneer.train.image.pictures import TrainingPicture
    from veneer.train.image.preflight import ImageData

_THUMBNAIL = 256


@dataclass
class ImageResult(Outcome):
    """The result of an image run.

    loss, validation: mean squared error. hashes: hashes of the adapter's file, as in A1111 and CivitAI.
    samples: the sample sheets. sheet: the contact sheet."""

    pictures: int = 0
    pictures_per_second: float = 0.0
    hashes: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    sheet: str = ""


def output_path(config: ImageTrainConfig) -> Path:
    """Return the path of the adapter's file, or of its folder if the layout is peft."""
    folder = Path(config.output.directory)
    if config.output.layout == "peft":
        return folder
    return folder / f"{config.output.name or folder.resolve().name}.safetensors"


def layout_findings(adapter: Adapter, base: ImageBase, config: ImageTrainConfig) -> Iterator[Finding]:
    """Yield a finding that stops the run if the file layout does not support the adapter."""
    try:
        convert.encode(adapter, config.output.layout, family=base.family)
    except AdapterError as error:
        fix = "use another output.layout (kohya can hold most adapters), or another kind of adapter"
        yield Finding("stop", "layout", error.what, fix)


def save_image_adapter(
    adapter: Adapter,
    base: ImageBase,
    config: ImageTrainConfig,
    training: dict[str, Any],
    picture: Image | None,
    tags: dict[str, dict[str, int]],
) -> WriteReport:
    """Write the adapter in the configured layout, with all metadata and the adapter card.

    training: the result of `training_facts`, or {}. picture: image for the thumbnail. tags: the result of
    `tag_frequency`."""
    output = config.output
    card_extra: dict[str, Any] = {"tag_frequency": tags}
    if picture is not None:
        small = picture.convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        card_extra["thumbnail"] = jpeg_url(picture_bytes(small, "JPEG", quality=90))
    if base.prediction in ("epsilon", "v"):
        card_extra["prediction_type"] = base.prediction
    card = replace(
        adapter.card,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        trigger_words=[config.data.trigger] if config.data.trigger else [],
        licence=output.licence,
        extra={**adapter.card.extra, **card_extra},
    )
    adapter = replace(adapter, card=card)
    path = output_path(config)
    metadata = training_metadata(training)
    dtype = None if output.dtype == "float32" else output.dtype
    written = convert.write(adapter, path, output.layout, family=base.family, metadata=metadata, dtype=dtype)
    if output.layout != "peft":
        write_atomically(path.parent / CARD_FILE, card_bytes(card, digest=written.digest, files=written.files))
        readme = readme_bytes(adapter, digest=written.digest, base_name=base.name, name=path.stem)
        write_atomically(path.parent / README_FILE, readme)
    return written


def training_facts(
    config: ImageTrainConfig, base: ImageBase, data: ImageData, *, kept_step: int, seconds: float
) -> dict[str, Any]:
    """Return the values of sd-scripts' `ss_` keys, without the prefix; None for keys that do not apply.

    kept_step: the step whose weights are saved. seconds: duration of the steps."""
    now, steps, ends = time.time(), data.steps, data.steps.ends
    instances = [p for p in data.training if not p.is_class]
    classes = [p for p in data.training if p.is_class]
    side = config.data.resolutions(base.size)[-1]
    buckets = [{"resolution": f"{w}x{h}", "count": count} for (w, h), count in data.plan.sizes.items()]
    return {
        "training_started_at": now - seconds,
        "training_finished_at": now,
        "learning_rate": config.optimizer.learning_rate,
        "unet_lr": config.optimizer.learning_rate,
        "text_encoder_lr": config.optimizer.text_learning_rate if config.adapter.text_encoders else None,
        "num_train_images": len(instances),
        "num_reg_images": len(classes),
        "num_validation_images": len(data.held_out),
        "num_epochs": math.ceil(steps[-1].epoch),
        "num_batches_per_epoch": ends[0] if ends else len(steps),
        "steps": kept_step,
        "max_train_steps": len(steps),
        "total_batch_size": config.batching.rows,
        "resolution": f"({side}, {side})",
        "seed": config.seed,
        "lr_scheduler": config.schedule.name,
        "optimizer": config.optimizer.name,
        "mixed_precision": str(base.dtype).removeprefix("torch."),
        "min_snr_gamma": config.loss.snr_gamma,
        "noise_offset": config.loss.noise_offset or None,
        "bucket_info": {"buckets": {str(i): bucket for i, bucket in enumerate(buckets)}},
        "dataset_dirs": _folders(instances),
        "reg_dataset_dirs": _folders(classes) or None,
    }


def tag_frequency(pictures: Iterable[TrainingPicture]) -> dict[str, dict[str, int]]:
    """Return sd-scripts' ss_tag_frequency: folder -> tag -> number of captions with the tag."""
    out: dict[str, Counter[str]] = {}
    for picture in pictures:
        # The names of kohya's folders already have the prefix.
        folder = f"{picture.repeats}_" + picture.path.parent.name.removeprefix(f"{picture.repeats}_")
        tags = dict.fromkeys(t.strip() for t in picture.caption.split(",") if t.strip())
        out.setdefault(folder, Counter()).update(list(tags))
    return {folder: dict(counts.most_common()) for folder, counts in out.items()}


def _folders(pictures: Sequence[TrainingPicture]) -> dict[str, dict[str, int]]:
    """Return sd-scripts' dataset_dirs: folder -> repeats and number of images."""
    counts = Counter((p.path.parent.name, p.repeats) for p in pictures)
    return {folder: {"n_repeats": repeats, "img_count": count} for (folder, repeats), count in counts.items()}


def prove_image_adapter(
    attachment: Attachment, base: ImageBase, config: ImageTrainConfig, text: Conditioning, batch: ImageBatch
) -> str:
    """Read the saved file and compare its prediction with the trained adapter's prediction.

    The prediction is for a batch of one image and `text`, the encoded caption; see `train.save.prove`."""
    path = output_path(config)
    again = read(path, base=base.model).adapter
    if config.output.layout == "peft":  # the peft layout has the denoiser's own module names
        start = f"{base.row.denoiser}."
        again = again.renamed(lambda name: name if name.startswith(start) else start + name)
    time = torch.tensor([0.5 if base.prediction == "flow" else 500])
    latents, sizes = batch.latents.to(base.device), batch.sizes if base.row.time_ids else None
    # tolerance for rounding to the dtypes of the file and of the base, accumulated over a few layers
    rounding = 64 * max(torch.finfo(getattr(torch, config.output.dtype)).eps, torch.finfo(base.dtype).eps)

    def predicted() -> torch.Tensor:
        return predict(base, latents, time, text, sizes=sizes, references=batch.sources)

    return prove(attachment, NAME, again, predicted, path=path, noun="predictions", rounding=rounding)


def image_report(result: ImageResult, folder: Path, base: ImageBase, config: ImageTrainConfig, seconds: float) -> Page:
    """Return the image-specific parts of the report.

    seconds: duration of the steps."""
    adapter, trained = Path(result.adapter), f"{counted(result.pictures, 'picture')} in {duration(seconds)}"
    speed = ("Speed", f"{result.pictures_per_second:,.3g} pictures/s", trained)
    return Page(
        base=base.name,
        weights=adapter if adapter.is_file() else adapter / "adapter_model.safetensors",
        cards=[("Steps", f"{result.steps:,}", result.stopped), speed],
        details=[*(("hash", f"{kind}: {value}") for kind, value in result.hashes.items()), *base_facts(base)],
        usage=_usage(result, base, config),
        unit="pictures",
        loss="Loss, mean squared error",
        sheets=_sheets(folder),
    )


def _sheets(folder: Path) -> list[tuple[str, str]]:
    """Return (title, data URL) for the contact sheet and for all logged sample sheets."""
    from PIL import Image

    paths = {"The model's view": folder / "pictures.png"}
    for record in run_records(folder):
        if record.get("event") == "sampled":
            title = "The base, before training" if record["step"] == 0 else f"After step {record['step']}"
            paths[title] = folder / record["path"]
    sheets = []
    for title, path in paths.items():
        if path.is_file():
            image = Image.open(path).convert("RGB")
            image.thumbnail((1600, 1600))
            sheets.append((title, jpeg_url(picture_bytes(image, "JPEG", quality=85))))
    return sheets


def _usage(result: ImageResult, base: ImageBase, config: ImageTrainConfig) -> list[tuple[str, str]]:
    prompt = config.samples.prompts[0] if config.samples.prompts else config.data.trigger or "…"
    file = Path(result.adapter)
    usage = [("On the command line", f'veneer image --base {base.name} --adapter {file}:0.8 "{prompt}" -o out.png')]
    if config.output.layout == "diffusers":
        code = (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{base.directory}")\n'
            f'pipe.load_lora_weights("{file.parent}", weight_name="{file.name}")\n'
            f'pipe("{prompt}").images[0].save("out.png")'
        )
        usage.append(("With diffusers", code))
    elif config.output.layout == "kohya":
        text = f"copy {file.name} into models/Lora, and write in the prompt <lora:{file.stem}:0.8>"
        usage.append(("In A1111, Forge or ComfyUI", text))
    return usage
