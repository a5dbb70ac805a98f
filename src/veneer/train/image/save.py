"""The output of a picture run: result, adapter, verification, report."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
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
from veneer.train.image.samples import jpeg_address
from veneer.train.preflight import Finding
from veneer.train.report.log import duration
from veneer.train.run import NAME
from veneer.train.save import Outcome, ReportParts, base_facts, prove, run_records

if TYPE_CHECKING:
    from veneer.formats.convert import WriteReport
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.image.batches import ImageBatch


@dataclass
class ImageResult(Outcome):
    """The result of a picture run.

    `loss`, `validation`: mean squared error. `hashes`: of the file, as in A1111 and CivitAI. `samples`: the
    sheets. `sheet`: the contact sheet."""

    pictures: int = 0
    pictures_per_second: float = 0.0
    hashes: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    sheet: str = ""


def output_of(config: ImageTrainConfig) -> Path:
    """Return the adapter's file, or its folder for peft."""
    folder = Path(config.output.directory)
    if config.output.layout == "peft":
        return folder
    return folder / f"{config.output.name or folder.resolve().name}.safetensors"


def layout_findings(adapter: Adapter, base: ImageBase, config: ImageTrainConfig) -> Iterator[Finding]:
    """Yield a stop if the layout cannot hold the adapter, before training."""
    try:
        convert.encode(adapter, config.output.layout, family=base.family)
    except AdapterError as error:
        fix = "another output.layout (kohya holds most), or another kind of adapter"
        yield Finding("stop", "layout", error.what, fix)


def save_image_adapter(
    adapter: Adapter,
    base: ImageBase,
    config: ImageTrainConfig,
    facts: dict[str, Any],
    picture: str,
    tags: dict[str, dict[str, int]],
) -> WriteReport:
    """Write the adapter in the configured layout with full metadata and the card.

    `facts`: results of the run (steps, times) for sd-scripts' keys. `picture`: the thumbnail, a data URL.
    `tags`: the result of `tag_frequency`."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    output = config.output
    said = {"title": output.title, "author": output.author, "description": output.description, "thumbnail": picture}
    if base.prediction in ("epsilon", "v"):
        said["prediction_type"] = base.prediction
    words = [config.data.trigger] if config.data.trigger else []
    extra = {k: v for k, v in said.items() if v} | {"tag_frequency": tags}
    card = replace(
        adapter.card,
        created=created,
        trigger_words=words,
        licence=output.licence,
        extra={**adapter.card.extra, **extra},
    )
    adapter = replace(adapter, card=card)
    path = output_of(config)
    written = convert.write(
        adapter,
        path,
        output.layout,
        family=base.family,
        metadata=training_metadata(facts),
        dtype=None if output.dtype == "float32" else output.dtype,
    )
    if output.layout != "peft":
        write_atomically(path.parent / CARD_FILE, card_bytes(card, digest=written.digest, files=written.files))
        readme = readme_bytes(adapter, digest=written.digest, base_name=base.name, name=path.stem)
        write_atomically(path.parent / README_FILE, readme)
    return written


def prove_image_adapter(
    attachment: Attachment, base: ImageBase, config: ImageTrainConfig, text: Conditioning, batch: ImageBatch
) -> str:
    """Read the file again and compare its prediction with the trained adapter's.

    Uses a batch of one picture and the `text` of its caption; see `train.save.prove`."""
    path = output_of(config)
    again = read(path, base=base.model).adapter
    if config.output.layout == "peft":
        again = _under(again, base.row.denoiser)
    time = torch.tensor([0.5 if base.prediction == "flow" else 500])
    latents, given = batch.latents.to(base.device), batch.sizes if base.row.time_ids else None
    # The rounding of the file's and of the base's dtype, through a few layers.
    rounding = 64 * max(torch.finfo(getattr(torch, config.output.dtype)).eps, torch.finfo(base.dtype).eps)
    return prove(
        attachment,
        NAME,
        again,
        lambda: predict(base, latents, time, text, sizes=given, references=batch.before),
        path=path,
        what="predictions",
        rounding=rounding,
    )


def _under(adapter: Adapter, component: str) -> Adapter:
    """Prefix a denoiser's own names with its component; canonical names stay."""
    start = f"{component}."
    return adapter.renamed(lambda name: name if name.startswith(start) else start + name)


def image_report(
    result: ImageResult, folder: Path, base: ImageBase, config: ImageTrainConfig, seconds: float
) -> ReportParts:
    """Return the picture-specific parts of the report.

    `seconds`: duration of the steps."""
    adapter = Path(result.adapter)
    speed = f"{result.pictures_per_second:,.3g} pictures/s"
    return ReportParts(
        base=base.name,
        weights=adapter if adapter.is_file() else adapter / "adapter_model.safetensors",
        cards=[
            ("Steps", f"{result.steps:,}", result.stopped),
            ("Speed", speed, f"{counted(result.pictures, 'picture')} in {duration(seconds)}"),
        ],
        facts=[*(("hash", f"{kind}: {value}") for kind, value in result.hashes.items()), *base_facts(base)],
        usage=_usage(result, base, config),
        files={adapter.name: "the weights, with their metadata", "pictures.png": "what the model saw of each picture"},
        unit="pictures",
        loss="Loss, mean squared error",
        sheets=_sheets(folder),
    )


def _sheets(folder: Path) -> list[tuple[str, str]]:
    """Return the contact sheet and all sample sheets in the log, as data URLs."""
    found = [("What the model sees", folder / "pictures.png")]
    found += [
        ("The base, before training" if r["step"] == 0 else f"After step {r['step']}", folder / r["path"])
        for r in run_records(folder)
        if r.get("event") == "sampled"
    ]
    return [(title, _address(path)) for title, path in dict(found).items() if path.is_file()]


def _address(path: Path) -> str:
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image.thumbnail((1600, 1600))
    return jpeg_address(picture_bytes(image, "JPEG", quality=85))


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
        usage.append(
            ("In A1111, Forge or ComfyUI", f"copy {file.name} into models/Lora; in prompts <lora:{file.stem}:0.8>")
        )
    return usage
