"""Generate images from requests, each with an infotext and a record.

    with ImagePipeline(base) as pipeline:
        request = ImageRequest("a fox", seed=5, uses=(parse_use("brand:0.8"),))
        generate(pipeline, [request], Options(steps=20))[0].save("fox.png")

Each request can have its own prompt, seed and mix. Requests are generated in batches. This module uses files
and models, but does not depend on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer import __version__
from veneer.errors import ConfigError, DataError, counted
from veneer.files.atomic import atomic_write
from veneer.formats.strengths import check_roles
from veneer.imaging.adapters import AdapterSource, ImagePipeline, Use, idle_ranges
from veneer.imaging.controls import CANNY, ControlSpec, control_model_of, control_picture, flattened, hashed_picture
from veneer.imaging.infotext import SAMPLERS, Infotext, png_bytes, render_infotext
from veneer.models.fingerprint import file_sha256
from veneer.models.image.base import aspect_problem, size_in_units
from veneer.models.image.generate import (
    Control,
    GeneratedPicture,
    ImageRow,
    MixPlan,
    PictureSettings,
    check_numbers,
    check_seed,
    default_settings,
    fitted_picture,
    generate_images,
)
from veneer.models.image.schedulers import scheduler_name

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.models.image.base import ImageBase


MOST_COUNT = 100_000
"""Maximum number of images per prompt in one call."""


@dataclass(frozen=True)
class ImageRequest:
    """A request for one image."""

    prompt: str
    negative: str = ""
    seed: int = 0
    uses: tuple[Use, ...] = ()

    def __post_init__(self) -> None:
        for label, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
                raise ConfigError(f"the {label} is {text!r}", fix="text without lone surrogates")
        check_seed(self.seed)
        check_roles(self.uses)


@dataclass(frozen=True)
class Options:
    """Options shared by all requests; see models.image.generate.PictureSettings.

    None means the base's default. image, mask, references: files or images. The default size has the base's
    default area and the aspect ratio of the first picture given: `image`, a control, or a reference."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    true_guidance: float = 1.0
    scheduler: str | None = None
    batch_size: int = 4
    image: str | Path | Image | None = None
    mask: str | Path | Image | None = None
    denoise: float | None = None
    controls: tuple[ControlSpec, ...] = ()
    references: Sequence[str | Path | Image] = ()

    def __post_init__(self) -> None:
        check_numbers(self)


RECORDED = ("width", "height", "steps", "guidance", "true_guidance", "scheduler", "denoise")
"""The options that a record stores under `settings`."""


@dataclass
class RecordedPicture:
    """An image, its infotext and its record.

    cut: the part of the prompt that the text encoders do not read."""

    image: Image
    infotext: Infotext
    record: dict[str, Any] = field(repr=False)
    cut: str = ""

    @property
    def text(self) -> str:
        return render_infotext(self.infotext)

    def png(self) -> bytes:
        return png_bytes(self.image, self.text, self.record)

    def save(self, path: str | Path) -> Path:
        """Write the image as PNG, atomically, and return the path."""
        atomic_write(path, [self.png()])
        return Path(path)


def image_requests(
    prompts: Sequence[str], uses: Sequence[Use], negative: str = "", seed: int | Sequence[int] = 0, count: int = 1
) -> list[ImageRequest]:
    """Return `count` requests per prompt, with the seeds seed, seed + 1, …

    seed: one seed for all prompts, or one seed per prompt.

    Raises ConfigError if a seed is not an integer, if the number of seeds differs from the number of prompts,
    or if `count` is not from 1 to MOST_COUNT."""
    if not 1 <= count <= MOST_COUNT:
        raise ConfigError(f"count is {count:,}", fix=f"at least 1, at most {MOST_COUNT:,}")
    try:
        seeds = [*map(index, seed)] if isinstance(seed, Iterable) else [index(seed)] * len(prompts)
    except TypeError:
        raise ConfigError(f"seed {seed!r}", fix="a whole number, or one per prompt") from None
    if len(seeds) != len(prompts):
        counts = f"{counted(len(prompts), 'prompt')} with {counted(len(seeds), 'seed')}"
        raise ConfigError(f"{counts}: give one seed per prompt, or one seed for all prompts")
    return [
        ImageRequest(prompt, negative, first + i, tuple(uses))
        for prompt, first in zip(prompts, seeds, strict=True)
        for i in range(count)
    ]


def generate(
    pipeline: ImagePipeline,
    requests: Sequence[ImageRequest],
    options: Options | None = None,
    *,
    on_step: Callable[[int, int], None] | None = None,
    on_picture: Callable[[int, RecordedPicture], None] | None = None,
) -> list[RecordedPicture]:
    """Generate an image for each request, in order.

    Calls `pipeline.say` with notes about inputs that were resized or truncated, or that have no effect. Calls
    `on_picture(i, picture)` as soon as an image is finished, so that finished images survive if the call is
    interrupted. Raises ConfigError, DataError, AdapterError and MismatchError before the first step."""
    base, options = pipeline.base, options or Options()
    resolved = {uses: pipeline.resolve_roles(uses) for uses in dict.fromkeys(request.uses for request in requests)}
    # Records store the blocks and steps that a role stands for, not the role's name.
    requests = [replace(request, uses=resolved[request.uses]) for request in requests]
    plans: dict[tuple[Use, ...], MixPlan] = {}
    for request in requests:
        if request.uses not in plans:
            plans[request.uses] = pipeline.plan(request.uses)
        if "<lora:" in request.prompt:
            pipeline.say("note: <lora:…> in a prompt is read as plain text; adapters are given separately")
    settings, inputs = _prepare_inputs(pipeline, options)
    rows = [ImageRow(request.prompt, request.negative, request.seed, plans[request.uses]) for request in requests]
    shared = shared_record(base, settings) | inputs
    out: list[RecordedPicture] = []
    reported: set[tuple[tuple[Use, ...], int]] = set()

    def finish(i: int, picture: GeneratedPicture) -> None:
        for note in unread_notes(picture):
            pipeline.say(f"note: {note}")
        if (requests[i].uses, picture.steps) not in reported:
            reported.add((requests[i].uses, picture.steps))
            for note in idle_ranges(requests[i].uses, picture.steps):
                pipeline.say(f"note: {note}")
        start = i - picture.index
        batch = requests[start : start + len(picture.batch)]
        out.append(recorded_picture(base, pipeline.sources, picture, batch, picture.index, shared))
        if on_picture is not None:
            on_picture(i, out[-1])

    generate_images(base, rows, settings, attachment=pipeline.attachment, on_step=on_step, on_picture=finish)
    return out


_SHOWN_UNREAD = 200


def unread_notes(picture: GeneratedPicture) -> list[str]:
    """Return a note for each prompt that was cut off, quoting the part that was not read."""
    cuts = (("prompt", picture.cut), ("negative prompt", picture.negative_cut))
    return [
        f"the text encoder does not read the end of the {label}: …{cut[:_SHOWN_UNREAD]}"
        + (f"… ({len(cut):,} characters)" if len(cut) > _SHOWN_UNREAD else "")
        for label, cut in cuts
        if cut
    ]


# -- inputs ------------------------------------------------------------------------------------------------------------


def _prepare_inputs(pipeline: ImagePipeline, options: Options) -> tuple[PictureSettings, dict[str, Any]]:
    """Load the input images; return the settings and the images' records.

    The images are resized to the size of the output; a reference can keep its own aspect ratio."""
    base = pipeline.base
    image, image_from = _open_picture(options.image)
    mask, mask_from = _open_picture(options.mask, paper="black")
    if mask is not None and not mask.convert("L").getbbox():
        where = mask_from["path"] if mask_from else None
        message = "the mask is all black, so nothing would be repainted"
        raise DataError(message, where=where, fix="use white for the areas to repaint")
    opened = [(spec, *hashed_picture(spec.path)) for spec in options.controls]
    references = [(picture, record) for picture, record in map(_open_picture, options.references) if picture and record]
    guides = [image, *(picture for _, picture, _ in opened), *(picture for picture, _ in references)]
    guide = next(filter(None, guides), None)
    width, height = size_for(base, options.width, options.height, guide)

    def report_note(fitted: tuple[Image, str]) -> Image:
        if fitted[1]:
            pipeline.say(f"note: {fitted[1]}")
        return fitted[0]

    image = image and report_note(fitted_picture(image, width, height, "picture"))
    mask = mask and report_note(fitted_picture(mask, width, height, "mask"))
    controls, control_records = [], []
    for spec, picture, sha in opened:
        name = control_model_of(base, spec)
        model = pipeline.control(name)
        control_image, notes = control_picture(spec, picture, width, height)
        for note in notes:
            pipeline.say(note)
        controls.append(Control(model, control_image, spec.weight, spec.begin, spec.end))
        record = {"kind": spec.kind, "model": name, "path": spec.path, "sha256": sha, "weight": spec.weight}
        control_records.append(record | {"begin": spec.begin, "end": spec.end})
    denoise = options.denoise if options.denoise is not None else 1.0 if image is None else 0.6
    steps, guidance = default_settings(base)
    settings = PictureSettings(
        width=width,
        height=height,
        steps=steps if options.steps is None else options.steps,
        guidance=guidance if options.guidance is None else options.guidance,
        true_guidance=options.true_guidance,
        scheduler=options.scheduler,
        batch_size=options.batch_size,
        image=image,
        mask=mask,
        denoise=denoise,
        controls=tuple(controls),
        references=tuple(report_note(fit_reference(base, picture, width, height)) for picture, _ in references),
    )
    if base.only_edits and not references and image is None:
        usual = "an edit base usually needs a picture to edit (--reference photo.png)"
        pipeline.say(f"note: {base.short_name} is an edit base, but got only a prompt; {usual}")
    inputs = {"image": image_from, "mask": mask_from, "controls": control_records}
    return settings, inputs | ({"references": [record for _, record in references]} if references else {})


_ASPECT_TOLERANCE = 1 / 15
"""Maximum relative difference between two aspect ratios that count as equal.

`size_for` can cause this difference, because it rounds to whole units."""


def fit_reference(base: ImageBase, picture: Image, width: int, height: int) -> tuple[Image, str]:
    """Return a reference resized for the base, and a note ("" if not resized).

    A reference with the aspect ratio of the generated images gets their size, as in training on editing
    pairs. Any other reference keeps its aspect ratio. Qwen-Image-Edit's pipelines resize references
    themselves.
    Raises ConfigError for an extreme aspect ratio."""
    from PIL.Image import Resampling

    if why := aspect_problem(*picture.size):
        raise ConfigError(f"a reference picture has {why}", fix="crop it")
    if base.reads_references:
        return picture, ""
    if abs(picture.width / picture.height * height / width - 1) > _ASPECT_TOLERANCE:
        size = size_for(base, None, None, picture)
        old, new = (f"{width}×{height}" for width, height in (picture.size, size))
        note = f"the reference picture was resized from {old} to {new}"
        return (picture, "") if old == new else (picture.resize(size, Resampling.LANCZOS), note)
    return fitted_picture(picture, width, height, "reference picture")


def _open_picture(
    source: str | Path | Image | None, paper: str = "white"
) -> tuple[Image | None, dict[str, str] | None]:
    """Return an opened image and its record; `paper` fills transparent parts.

    For a mask, `paper` is black, so that transparent parts are not repainted."""
    if source is None:
        return None, None
    if isinstance(source, str | Path):
        picture, sha = hashed_picture(source, paper)
        return picture, {"path": str(source), "sha256": sha}
    return flattened(source, paper), {"path": "", "sha256": ""}


def size_for(base: ImageBase, width: int | None, height: int | None, guide: Image | None) -> tuple[int, int]:
    """Return the (width, height) of the generated images.

    If neither is given, the size has the guide's aspect ratio and the base's default area."""
    if width and height:
        return width, height
    if guide is None:
        return width or base.size, height or base.size

    def in_units(side: float) -> int:
        return max(base.unit, round(side / base.unit) * base.unit)

    ratio = guide.width / guide.height
    if width or height:
        return width or in_units((height or 0) * ratio), height or in_units((width or 0) / ratio)
    whole_units = guide.width % base.unit == 0 == guide.height % base.unit
    if whole_units and base.size**2 / 4 <= guide.width * guide.height <= base.size**2:
        return guide.size  # a much smaller guide does not set the size: bases generate small images badly
    return size_in_units(base.unit, base.size, ratio)


# -- outputs -----------------------------------------------------------------------------------------------------------


def shared_record(base: ImageBase, settings: PictureSettings) -> dict[str, Any]:
    """Return the part of a record that all images of a call share."""
    return {
        "version": 1,
        "made_by": library_versions(),
        "base": {
            "name": base.name,
            "family": base.family,
            "fingerprint": base.fingerprint,
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": base.device.type,
        },
        "settings": {key: getattr(settings, key) for key in RECORDED}
        | {"scheduler": settings.scheduler or scheduler_name(base)}
        | {"denoise": settings.denoise if settings.image is not None else None},
    }


def model_hash(base: ImageBase) -> tuple[str, str]:
    """Return the name and value of the infotext field that identifies the base.

    A checkpoint file has A1111's `Model hash`, which other tools can look up. A directory has no such hash;
    its fingerprint has a different length, and is in a field with a different name."""
    if base.directory.is_file():
        return "Model hash", file_sha256(base.directory)[:10]
    return "Base fingerprint", base.fingerprint.removeprefix("sha256:")[:16]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that determine the last bits of an image."""
    return {"veneer": __version__, **{name: version(name) for name in ("torch", "diffusers")}}


def recorded_picture(
    base: ImageBase,
    sources: Mapping[str, AdapterSource],
    picture: GeneratedPicture,
    batch: Sequence[ImageRequest],
    index: int,
    shared: Mapping[str, Any],
) -> RecordedPicture:
    """Return the image with its infotext and record.

    batch: the requests that were generated together; this image belongs to `batch[index]`.
    sources: the adapters, by the names used in the requests.
    shared: the result of `shared_record`, and the records of the input images (`image`, `mask`, `controls`)."""
    used = [sources[name] for name in sorted({name for request in batch for name, _ in request.uses})]
    record = {
        **shared,
        "adapters": {s.name: {"digest": s.digest, "sha256": s.sha256, "autov3": s.autov3} for s in used},
        "rows": [
            {
                "prompt": request.prompt,
                "negative": request.negative,
                "seed": request.seed,
                "adapters": [[name, str(strength)] for name, strength in request.uses],
            }
            for request in batch
        ],
        "index": index,
    }
    return RecordedPicture(picture.image, _infotext(base, sources, batch[index], record), record, picture.cut)


def _infotext(
    base: ImageBase, sources: Mapping[str, AdapterSource], request: ImageRequest, record: dict[str, Any]
) -> Infotext:
    settings = record["settings"]
    sampler, schedule = SAMPLERS.get(settings["scheduler"], (settings["scheduler"], "Automatic"))
    distilled = base.row.distilled
    fields = {"Steps": settings["steps"], "Sampler": sampler, "Schedule type": schedule}
    fields["CFG scale"] = _short(settings["true_guidance" if distilled else "guidance"])
    if distilled:
        fields["Distilled CFG Scale"] = _short(settings["guidance"])
    fields |= {"Seed": request.seed, "Size": f"{settings['width']}x{settings['height']}"}
    fields |= dict([model_hash(base)]) | {"Model": Path(base.name).name.removesuffix(".safetensors")}
    if settings["denoise"] is not None:
        fields["Denoising strength"] = _short(settings["denoise"])
    for i, control in enumerate(record["controls"]):
        # sd-webui-controlnet's names; its module for an unprocessed image is "none".
        is_canny = control["kind"] == "canny"
        fields[f"ControlNet {i}"] = (
            f"Module: {'canny' if is_canny else 'none'}, Model: {Path(control['model']).name}, "
            f"Weight: {_short(control['weight'])}, "
            + (f"Threshold A: {CANNY[0]}, Threshold B: {CANNY[1]}, " if is_canny else "")
            + f"Guidance Start: {_short(control['begin'])}, Guidance End: {_short(control['end'])}"
        )
    tags: list[str] = []
    hashes: dict[str, str] = {}
    for name, strength in request.uses:
        source = sources[name]
        by = dict(strength.blocks)
        text = strength.strength * by.get("text", 1.0)
        unet_strength = strength.strength * by.get(base.row.denoiser, 1.0)
        both = _short(unet_strength) if text == unet_strength else f"{_short(text)}:{_short(unet_strength)}"
        label = source.label if source.label not in hashes else f"{source.label}-{len(hashes) + 1}"
        tags.append(f" <lora:{label}:{both}>")
        hashes[label] = source.short
    if any(hashes.values()):
        fields["Lora hashes"] = ", ".join(f"{label}: {digest}" for label, digest in hashes.items() if digest)
    fields["Version"] = f"veneer {__version__}"
    texts = {key: str(value) for key, value in fields.items()}
    return Infotext(request.prompt + "".join(tags), request.negative, texts)


def _short(number: float) -> str:
    return repr(float(number)).removesuffix(".0")
