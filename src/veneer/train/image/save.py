"""The end of a run on pictures: the adapter in its layout, the proof that the file is the adapter, and the report."""

from __future__ import annotations

import base64
import datetime
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment
from veneer.errors import AdapterError
from veneer.formats import convert
from veneer.formats.card import CARD_FILE, README_FILE, card_bytes, readme_bytes
from veneer.formats.metadata import training_metadata
from veneer.formats.read import read
from veneer.models.image.predict import Conditioning, predict
from veneer.train.checkpoint import write_atomically
from veneer.train.events import Resolved
from veneer.train.findings import Finding
from veneer.train.report.log import duration
from veneer.train.report.page import Page, write_page
from veneer.train.running import NAME
from veneer.train.save import base_facts, known_files, loss_cards, report_records, size_cards, today

if TYPE_CHECKING:
    from veneer.formats.convert import Written
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.image.preflight import ImageData
    from veneer.train.image.task import ImageResult
    from veneer.train.preflight import Report

__all__ = ["output_of", "prove", "save_image_adapter", "with_layout", "write_image_report"]

_RELOADED = "reloaded"


def output_of(config: ImageTrainConfig) -> Path:
    """The file, or for peft the folder, that the adapter is written to."""
    folder = Path(config.output.directory)
    if config.output.layout == "peft":
        return folder
    return folder / f"{config.output.name or folder.resolve().name}.safetensors"


def with_layout(report: Report, adapter: Adapter, base: ImageBase, config: ImageTrainConfig) -> Report:
    """The report, with a stop where the layout cannot hold what will be trained: said now, not after hours."""
    layout = config.output.layout
    try:
        convert.encode(adapter, layout, family=_family(base))
    except AdapterError as error:
        fix = "another output.layout (kohya holds most), or another kind of adapter"
        report.findings.insert(0, Finding("stop", "layout", error.what, fix))
    return report


def save_image_adapter(
    adapter: Adapter, base: ImageBase, config: ImageTrainConfig, data: ImageData, facts: dict[str, Any], picture: str
) -> Written:
    """Writes the adapter in the configured layout with everything that readers of such files look for, and the card.

    `facts`: what became of the run (steps, times), for sd-scripts' keys. `picture`: the thumbnail, a data address."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    output = config.output
    said = {"title": output.title, "author": output.author, "description": output.description, "thumbnail": picture}
    if base.prediction in ("epsilon", "v"):
        said["prediction_type"] = base.prediction
    words = [config.data.trigger] if config.data.trigger else []
    extra = {k: v for k, v in said.items() if v} | {"tag_frequency": _tags(data)}
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
        adapter, path, output.layout, family=_family(base), metadata=training_metadata(facts),
        dtype=None if output.dtype == "float32" else output.dtype,
    )  # fmt: skip
    if output.layout != "peft":
        write_atomically(path.parent / CARD_FILE, card_bytes(card, digest=written.digest, files=written.files))
        readme = readme_bytes(adapter, digest=written.digest, base_name=base.name, name=path.stem)
        write_atomically(path.parent / README_FILE, readme)
    return written


def _family(base: ImageBase) -> str | None:
    """The name in formats.topology. SD3's two sizes are one family of bases and two of files: modules tell."""
    return None if base.family == "sd3" else base.family


def _tags(data: ImageData) -> dict[str, dict[str, int]]:
    """sd-scripts' ss_tag_frequency: folder -> tag -> in how many captions of an epoch."""
    out: dict[str, Counter[str]] = {}
    for picture in data.own:
        folder, times = picture.path.parent.name, f"{picture.repeats}_"
        folder = folder if folder.startswith(times) else times + folder  # kohya's folders have it in their names
        tags = dict.fromkeys(t.strip() for t in picture.caption.split(",") if t.strip())
        out.setdefault(folder, Counter()).update(list(tags))
    return {folder: dict(counts.most_common()) for folder, counts in out.items()}


def prove(
    attachment: Attachment, path: Path, base: ImageBase, text: Conditioning, latents: Tensor, sizes: Tensor,
    config: ImageTrainConfig,
) -> str:  # fmt: skip
    """Reads the file again, attaches what is in it, and compares its prediction with that of the trained adapter.

    `latents`: (1, c, h, w), with `text` and `sizes` of the same picture. Returns the finding as a sentence; raises
    AdapterError when the predictions differ by more than the rounding of the saved dtype."""
    again = read(path).adapter
    if config.output.layout == "peft":
        again = _under(again, base.row.denoiser)
    attachment.add(_RELOADED, again, trainable=True)  # on the same path through the layers as the trained one
    try:
        trained, reloaded = (_predicted(attachment, n, base, text, latents, sizes) for n in (NAME, _RELOADED))
    finally:
        attachment.remove(_RELOADED)
    said = f"saved to {path}, read back and compared"
    if torch.equal(trained, reloaded):
        return f"{said}: predictions equal bit for bit"
    gap = float((trained.float() - reloaded.float()).abs().max() / trained.float().abs().max().clamp_min(1e-12))
    saved = getattr(torch, config.output.dtype)
    # One rounding of the file's and of the base's dtype, through a few layers.
    allowed = 64 * max(torch.finfo(saved).eps, torch.finfo(base.dtype).eps)
    if gap <= allowed:
        return f"{said}: predictions equal but for rounding ({gap:.1e} of the largest)"
    raise AdapterError(
        f"the saved adapter does not predict what the trained one does (they differ by {gap:.1e} of the largest)",
        where=str(path),
        fix="do not use this file; the last checkpoint holds the trained state. This is a bug: please report it",
    )


def _under(adapter: Adapter, component: str) -> Adapter:
    """A denoiser's own names, under its component's; canonical names stay as they are."""
    start = f"{component}."
    pairs = {n if n.startswith(start) else start + n: p for n, p in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)


@torch.no_grad()
def _predicted(
    attachment: Attachment, name: str, base: ImageBase, text: Conditioning, latents: Tensor, sizes: Tensor
) -> Tensor:
    time = torch.tensor([0.5 if base.prediction == "flow" else 500])
    with attachment.using(name):
        return predict(base, latents.to(base.device), time, text, sizes=sizes if base.family == "sdxl" else None)


def write_image_report(
    folder: Path, result: ImageResult, settings: Resolved, base: ImageBase, config: ImageTrainConfig, seconds: float
) -> str:
    """`report.html` beside the adapter, made from the run's log, its result and its sheets; returns its path."""
    path = folder / "report.html"
    numbers = result.preflight.get("numbers", {})
    records = report_records(folder)
    page = Page(
        title=folder.resolve().name, subtitle=f"A LoRA adapter for {base.name}, {today()}", records=records,
        cards=_cards(result, numbers, seconds), settings=settings.settings, sources=settings.sources,
        checks=result.preflight, facts=_facts(result, base), usage=_usage(result, base, config),
        files=_files(folder, Path(result.adapter)), unit="pictures", loss="Loss, mean squared error",
        sheets=_sheets(folder, records),
    )  # fmt: skip
    write_page(path, page)
    return str(path)


def _sheets(folder: Path, records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the model sees, then every sheet that the log tells of, as addresses inside the page."""
    found = [("What the model sees", folder / "pictures.png")]
    found += [
        ("The base, before training" if r["step"] == 0 else f"After step {r['step']}", folder / r["path"])
        for r in records
        if r.get("event") == "sampled"
    ]
    return [(title, _address(path)) for title, path in dict(found).items() if path.is_file()]


def _address(path: Path) -> str:
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image.thumbnail((1600, 1600))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cards(result: ImageResult, numbers: dict[str, Any], seconds: float) -> list[tuple[str, str, str]]:
    speed = f"{result.pictures_per_second:,.3g} pictures/s"
    return [
        *loss_cards(result),
        ("Steps", f"{result.steps:,}", result.stopped),
        ("Speed", speed, f"{result.pictures:,} pictures in {duration(seconds)}"),
        *size_cards(result, numbers, _weights(Path(result.adapter)).stat().st_size),
    ]


def _weights(path: Path) -> Path:
    return path if path.is_file() else path / "adapter_model.safetensors"


def _facts(result: ImageResult, base: ImageBase) -> list[tuple[str, str]]:
    return [
        ("adapter", result.adapter),
        ("digest", result.digest),
        *(("hash", f"{kind}: {value}") for kind, value in result.hashes.items()),
        *base_facts(base),
    ]


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


def _files(folder: Path, adapter: Path) -> list[tuple[str, str, str]]:
    known = {
        adapter.name: "the weights, with their metadata",
        "pictures.png": "what the model saw of each picture",
        "log.jsonl": "everything that happened, one JSON object a line",
    }
    return known_files(folder, known)
