"""Preflight of an image run: data, trained modules, and loss settings.

The checks of the data are in `checks`, and the checks that apply to all kinds of runs are in
`train.preflight`. No check changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.core.targets import resolve_targets
from veneer.errors import ConfigError, TargetError, counted, gigabytes, quoted
from veneer.models.image.base import aspect_problem
from veneer.models.image.generate import ImageRow, check_rows
from veneer.train.image.augmentation import PicturePlan
from veneer.train.image.batches import PlannedRow
from veneer.train.image.checks import check_held_out
from veneer.train.image.decode import UnreadablePicture, decode_picture, read_bytes
from veneer.train.image.encode import Encoders
from veneer.train.image.pictures import PictureSummary, TrainingPicture
from veneer.train.image.samples import sample_settings
from veneer.train.loop import LazySteps
from veneer.train.preflight import (
    Finding,
    Report,
    RunSubject,
    check_devices,
    check_output,
    learning_rate,
    precision,
    share,
    trainable_parameters,
)

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig


@dataclass(frozen=True)
class ImageData:
    """The data of a run.

    training: training images, including class images
    plan: rows of the training images in one epoch
    encoders: encodes the batches
    scored: rows of the held-out images, which evaluations score
    missing_class_pictures: number of class images to generate
    tags: folder -> tag -> number of captions per epoch with the tag"""

    training: list[TrainingPicture]
    held_out: list[TrainingPicture]
    summary: PictureSummary
    plan: PicturePlan
    encoders: Encoders
    steps: LazySteps
    scored: list[PlannedRow]
    missing_class_pictures: int = 0
    tags: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(kw_only=True)
class ImageSubject(RunSubject):
    """An image run to check."""

    base: ImageBase
    config: ImageTrainConfig
    data: ImageData


def adapter_components(base: ImageBase, config: ImageTrainConfig) -> dict[str, tuple[nn.Module, LoraSpec]]:
    """Return component -> (its module, spec of the adapter to create on the module).

    The denoiser is first, followed by the configured text encoders. Raises TargetError for a text encoder
    that the base does not have, or that the file format does not support."""
    spec = config.adapter.spec()
    denoiser = base.row.denoiser
    whole = replace(spec, targets=config.adapter.denoiser_targets())
    part = replace(spec, targets=config.adapter.text_targets, exclude=(), layers=None)
    part = replace(part, rank_pattern={}, alpha_pattern={})
    out = {denoiser: (base.model.get_submodule(denoiser), whole)}
    for name in config.adapter.text_encoders:
        if name not in base.row.encoders or not hasattr(base.model, name):
            having = ", ".join(n for n in base.row.encoders if hasattr(base.model, n)) or "none"
            message = f"{base.row.label} has no text encoder {name!r} that can have an adapter"
            raise TargetError(message, where="adapter.text_encoders", fix=f"it has: {having}")
        out[name] = (base.model.get_submodule(name), part)
    return out


def image_preflight(
    base: ImageBase,
    config: ImageTrainConfig,
    data: ImageData,
    *,
    data_findings: Iterable[Finding] = (),
    cut: Mapping[str, Mapping[str, str]],
    **options: Any,
) -> Report:
    """Check a run before anything is attached or encoded; see `inspect_run`.

    data_findings: findings about the data. cut: kind of text (captions, sample prompts, class prompt) -> text
    that is too long -> the part of the text that the base does not read."""
    instances = sum(not row.picture.is_class for row in data.plan.rows)
    rows = config.batching.rows
    subject = ImageSubject(
        base=base,
        config=config,
        data=data,
        steps_per_epoch=-(-instances // rows),
        largest_micro=config.batching.micro_rows or min(rows, instances) * (2 if config.data.class_prompt else 1),
        unit="picture",
        **options,
    )
    report = Report(numbers=subject.numbers)
    report.add(*data_findings, *(check_held_out(data.training, data.held_out) if data.held_out else ()))
    for check in _CHECKS:
        report.add(*check(subject))
    report.add(*_prompts(cut))
    if data.missing_class_pictures:
        missing = counted(data.missing_class_pictures, "class picture")
        text = f"{missing} missing: the base generates them from `{config.data.class_prompt}`"
        report.add(Finding("ok", "class pictures", text))
    return report


def _targets(s: ImageSubject) -> Iterator[Finding]:
    """Report the number of target modules in each component."""
    pairs, total = 0, sum(p.numel() for p in s.base.model.parameters())
    targets_of: dict[str, int] = {}
    name = s.base.row.denoiser
    try:
        for name, (module, spec) in adapter_components(s.base, s.config).items():
            targets = resolve_targets(module, spec)
            pairs += trainable_parameters(module, targets, spec)[0]
            targets_of[name] = len(targets)
    except TargetError as error:
        key = "adapter.targets" if name == s.base.row.denoiser else "adapter.text_targets"
        yield Finding("stop", "targets", f"{error.what} ({error.where or key})", error.fix or "")
        return
    s.numbers.update(base_parameters=total, trainable=pairs)
    named = ", ".join(f"{counted(count, 'module')} of the {name}" for name, count in targets_of.items())
    size = gigabytes(4 * pairs if s.config.output.dtype == "float32" else 2 * pairs)
    yield Finding("ok", "targets", f"{named}; trainable: {share(pairs, total)} parameters, a file of about {size}")


def _output_outside_data(s: ImageSubject) -> Iterator[Finding]:
    """Report an output folder that is inside an image folder.

    The next run, or a resumed run, would train on the sheets and samples in such a folder."""
    config = s.config
    out = Path(config.output.directory).expanduser().resolve()
    for folder in filter(None, (*config.data.folders, config.data.validation, config.data.class_folder)):
        if out.is_relative_to(Path(folder).expanduser().resolve()):
            text = f"{config.output.directory} is in the picture folder {folder}: samples would be trained on"
            yield Finding("stop", "output", text, "set output.directory to a folder outside the picture folder")


def _loss(s: ImageSubject) -> Iterator[Finding]:
    """Report loss settings that do not apply to the base's prediction type."""
    loss, flow = s.config.loss, s.base.prediction == "flow"
    label = f"{s.base.name} predicts {'a flow' if flow else 'noise' if s.base.prediction == 'epsilon' else 'v'}"
    for_noise: dict[str, Any] = {"snr_gamma": loss.snr_gamma, "noise_offset": loss.noise_offset}
    for_flow = {"timesteps": loss.timesteps == "logit-normal", "shift": loss.shift not in ("auto", 1.0)}
    wrong = [f"loss.{key}" for key, is_set in (for_noise if flow else for_flow).items() if is_set]
    guidance = [f"loss.{key}" for key in ("guidance", "keep_guidance") if getattr(loss, key) not in (None, 1.0)]
    if wrong:
        only = f"{'is' if len(wrong) == 1 else 'are'} only for {'noise (epsilon, v)' if flow else 'flow'}"
        yield Finding("stop", "loss", f"{label}: {' and '.join(wrong)} {only}", "leave it out")
    elif guidance and not s.base.denoiser.config.get("guidance_embeds"):
        text = f"{s.base.name} does not take guidance as an input, so {' and '.join(guidance)} would have no effect"
        yield Finding("stop", "loss", text, "leave it out")
    elif len(guidance) == 2 and (loss.keep_guidance or 0.0) > loss.guidance:
        text = f"loss.keep_guidance {loss.keep_guidance:g} is above loss.guidance {loss.guidance:g}"
        yield Finding("stop", "loss", text, "leave loss.guidance out")
    else:
        weights = f", min-SNR {loss.snr_gamma:g}" if loss.snr_gamma else ""
        yield Finding("ok", "loss", f"{label}: mean squared error{weights}")


def _pairs(s: ImageSubject) -> Iterator[Finding]:
    """Report source images that are missing although the base needs them, or that the base cannot use."""
    base, config, data = s.base, s.config, s.data
    sources, folder = data.summary.sources, ", ".join(config.data.folders)
    if sources > base.references:
        text = f"{folder} has {counted(sources, 'source image')} for each picture, and {base.name} "
        text += f"takes {base.references} at most" if base.references else "does not edit pictures"
        fix = "train on FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit, or on captions only with data.before: off"
        yield Finding("stop", "pairs", text, fix)
    elif base.only_edits and not sources:
        text = f"{base.name} edits pictures, and {folder} has captions only, without source images"
        fix = "give each picture a source image (NAME.before.png, or data.before: FOLDER), or train on another base"
        yield Finding("stop", "pairs", text, fix)
    elif sources and config.data.class_count:
        fix = "use data.class_folder with pairs"
        yield Finding("stop", "pairs", "generated class pictures have no source images", fix)
    if mismatched := [p.name for p in data.held_out if len(p.sources) != sources]:
        text = f"held-out pictures must have as many source images as the training pictures ({sources}): "
        fix = "add source images (NAME.before.png, or before/NAME.png), or set data.before: off"
        yield Finding("stop", "held out", text + mismatched[0], fix)


def _samples(s: ImageSubject) -> Iterator[Finding]:
    """Report samples that this base cannot generate, so that the run does not fail at its first samples."""
    base, config, samples, sources = s.base, s.config, s.config.samples, s.data.summary.sources
    if sources and samples.prompts and not samples.before:
        fix = "set samples.before to one picture per prompt, or to one picture for all prompts"
        yield Finding("stop", "samples", "sample prompts are instructions, and have no picture to edit", fix)
    if samples.before and not sources:
        text = "samples.before requires training pictures with source images, and these have none"
        yield Finding("stop", "samples", text, "leave it out")
    most = max(map(len, samples.starts), default=0)
    if most > base.references > 0:
        text = f"samples.before has {most} pictures for one prompt, and {base.name} takes {base.references} at most"
        yield Finding("stop", "samples", text, "leave some out")
    for path in dict.fromkeys(path for paths in samples.starts for path in paths):
        try:
            size = decode_picture(read_bytes(Path(path))[0], config.data).size
        except UnreadablePicture as error:
            yield Finding("stop", "samples", f"{path} cannot be edited: {error}", "correct samples.before")
            continue
        why = aspect_problem(*size) if most > 1 else ""  # a single source image is cropped
        if why:
            yield Finding("stop", "samples", f"{path} has {why}", "crop it")
    if samples.prompts:
        try:
            check_rows(base, [ImageRow(samples.prompts[0], samples.negative)], sample_settings(config, samples.steps))
        except ConfigError as error:
            yield Finding("stop", "samples", f"samples cannot be generated: {error.what}", error.fix or "")


def _base(s: ImageSubject) -> Iterator[Finding]:
    """Report a base that is distilled to generate in a few steps, or that cannot be offloaded.

    Training on images undoes the distillation."""
    if s.base.few_steps:
        text = f"{s.base.name} is distilled to few steps, and training undoes the distillation"
        fix = "train on the model that it was distilled from (FLUX.1 dev, FLUX.2 klein-base), "
        fix += "then generate with the adapter on this base"
        yield Finding("warn", "distilled", text, fix)
    on_cpu = s.base.device.type == "cpu"
    if s.config.memory.offload_blocks and (on_cpu or s.base.quantized):
        why = "this run is on the CPU" if on_cpu else f"this base is saved in {s.base.quantized}"
        text = f"memory.offload_blocks moves unquantized weights between CPU and GPU, but {why}"
        yield Finding("stop", "offload", text, "remove memory.offload_blocks")


def _prompts(cut: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Report captions and prompts that the encoders truncate."""
    for kind, long in cut.items():
        if long:
            caption, unread = next(iter(long.items()))
            text = f"{counted(len(long), kind.removesuffix('s'))} longer than the base reads; of "
            text += f"{quoted(caption, 40)}, the part from {quoted(unread, 40)} on is not read "
            text += f"({len(unread):,} characters)"
            yield Finding("warn", kind, text + (f" and {len(long) - 1} more" if len(long) > 1 else ""), "shorten them")


_CHECKS: tuple[Callable[[ImageSubject], Iterator[Finding]], ...] = (_targets, learning_rate, check_devices, precision)
_CHECKS += (_loss, _base, _output_outside_data, check_output, _pairs, _samples)
