"""Generate pictures from an image base with diffusers' pipelines.

    rows (prompt, seed, plan of mixes) -> prompts encoded under their mixes -> one batch through the denoiser
                                       -> the mixes change between steps -> pictures

A row's noise comes from its own generator on the CPU, so the noise does not depend on the batch or the
device. Changing the mix is one assignment on the attachment; no weight of the base is changed, created or
compiled. Mixes refer to adapters by the names under which they are attached; no adapter files are read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

from veneer.core.adapter import NamedMix, mix_text
from veneer.errors import BaseError, ConfigError, counted
from veneer.models.image.base import aspect_problem, pipeline
from veneer.models.image.predict import embed_prompts
from veneer.models.image.schedulers import make_scheduler
from veneer.ops.cpu.sharing import forwards

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.core.attach import Attachment
    from veneer.models.image.base import ImageBase, PipelineKind
    from veneer.models.image.predict import Conditioning

SEEDS = 2**64
"""Number of seeds. Valid seeds are 0 … SEEDS - 1, the range of torch's generators."""


@dataclass(frozen=True)
class MixPlan:
    """The mixes that act on one picture.

    `text`: the mix that encodes the prompt. `phases`: (fraction of the steps, mix); step i of n uses the
    phase with the largest fraction ≤ i/n. The first fraction is 0."""

    text: NamedMix = ()
    phases: tuple[tuple[float, NamedMix], ...] = ((0.0, ()),)

    def at(self, share: float) -> NamedMix:
        return next(mix for begin, mix in reversed(self.phases) if begin <= share)


@dataclass(frozen=True)
class ImageRow:
    """One picture to generate.

    `image`, `mask`, `controls` and `references` override the settings. `controls` has one picture for each
    control in the settings."""

    prompt: str
    negative: str = ""
    seed: int = 0
    plan: MixPlan = MixPlan()
    image: Image | None = field(default=None, compare=False, repr=False)
    mask: Image | None = field(default=None, compare=False, repr=False)
    controls: tuple[Image, ...] = field(default=(), compare=False, repr=False)
    references: tuple[Image, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(frozen=True)
class Control:
    """A ControlNet of the base's family, and its control picture.

    The picture has the output size. `begin`, `end`: the ControlNet acts between these fractions of the
    steps."""

    model: Any
    picture: Image
    weight: float = 1.0
    begin: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class PictureSettings:
    """Settings shared by all rows. None: the base's default (`default_settings`).

    `guidance`: classifier-free guidance, or the distilled guidance input for FLUX. `true_guidance`:
    classifier-free guidance for a base with distilled guidance; negative prompts act only if it is above 1.
    `image`: the picture to start from instead of noise; `denoise`: the fraction of the steps to run, in (0,
    1]. `mask`: white areas are generated, black areas keep the picture. `references`: pictures that an edit
    base changes according to the prompt, or that FLUX.2 uses as references."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    true_guidance: float = 1.0
    scheduler: str | None = None
    batch_size: int = 4
    image: Image | None = None
    mask: Image | None = None
    denoise: float = 1.0
    controls: tuple[Control, ...] = ()
    references: tuple[Image, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self)


def check_seed(seed: int) -> None:
    """Raise ConfigError if the seed is not an integer in 0 … SEEDS - 1."""
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise ConfigError(f"seed {seed!r}", fix=f"an integer from 0 to {SEEDS - 1}; equal seeds give equal pictures")


_MOST_PIXELS = 1 << 27
"""Maximum number of pixels of a picture.

With more pixels, bases fail, sometimes only after minutes or after using all memory."""


def check_numbers(settings: Any) -> None:
    """Raise ConfigError if a numeric setting is invalid for every base.

    `settings`: PictureSettings or an object with the same fields. None is always valid."""
    for name, most in (("steps", 10_000), ("batch_size", math.inf), ("width", 1 << 16), ("height", 1 << 16)):
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, Integral) and 1 <= int(value) <= most):
            fix = f"an integer, at least 1{f', at most {most:,}' if math.isfinite(most) else ''}"
            raise ConfigError(f"{name} is {value!r}", fix=fix)
    if (settings.width or 1) * (settings.height or 1) > _MOST_PIXELS:
        size = f"{settings.width}×{settings.height}"
        raise ConfigError(f"{size} exceeds the maximum picture size", fix=f"at most {_MOST_PIXELS:,} pixels")
    for name, valid, expected in (
        ("guidance", lambda number: 0 <= number < math.inf, "a number of at least 0"),
        ("true_guidance", lambda number: 1 <= number < math.inf, "a number of at least 1"),
        ("denoise", lambda number: 0 < number <= 1, "a number above 0 and at most 1, such as 0.6"),
    ):
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, Real) and valid(value)):
            raise ConfigError(f"{name} is {value!r}", fix=expected)
    if settings.mask is not None and settings.image is None:
        raise ConfigError("a mask needs the picture it belongs to", fix="give image too (--image in.png)")


@dataclass
class GeneratedPicture:
    """A generated picture, and how it was generated.

    `cut`, `negative_cut`: the ends of the prompts that exceeded the text encoders' limits, "" if nothing was
    cut. `batch`, `index`: the rows of the batch and the picture's position in the batch; generating the same
    batch again gives a bit-identical picture. `steps`: the number of steps run, which differs from the
    requested number with `denoise` or with a scheduler that takes two passes per step."""

    image: Image
    row: ImageRow
    cut: str = ""
    negative_cut: str = ""
    batch: tuple[ImageRow, ...] = field(default=(), repr=False)
    index: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Moment:
    """The state of a batch at the end of a step.

    `start`: index of the batch's first row in the call. `done`, `of`: numbers of finished steps and of all
    steps."""

    rows: tuple[ImageRow, ...]
    start: int
    done: int
    of: int


def default_settings(base: ImageBase) -> tuple[int, float]:
    """Return the default (steps, guidance).

    The default for few-step bases is (4, 0). Other bases have 28 (flow) or 30 steps, and the default guidance
    of the family's diffusers pipeline."""
    if base.few_steps:
        return 4, 0.0
    call = inspect.signature(type(pipeline(base)).__call__).parameters
    return 28 if base.prediction == "flow" else 30, float(call[base.row.guidance].default)


def fitted_picture(picture: Image, width: int, height: int, label: str) -> tuple[Image, str]:
    """Return the picture resized to (width, height), and a message if it was resized.

    Raises ConfigError if the aspect ratios differ by more than 1/15; smaller differences can come from
    rounding the sides of a small picture to whole units. Pictures are never cropped."""
    from PIL.Image import Resampling

    if picture.size == (width, height):
        return picture, ""
    have, want = picture.width / picture.height, width / height
    if abs(have / want - 1) > 1 / 15:
        raise ConfigError(
            f"the {label} is {picture.width}×{picture.height}, the pictures {width}×{height}: another aspect ratio",
            fix=f"crop it, or set width and height to its size (--size {picture.width}x{picture.height})",
        )
    message = f"the {label} was resized from {picture.width}×{picture.height} to {width}×{height}"
    return picture.resize((width, height), Resampling.LANCZOS), message


def generate_images(
    base: ImageBase,
    rows: Sequence[ImageRow],
    settings: PictureSettings | None = None,
    *,
    attachment: Attachment | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_picture: Callable[[int, GeneratedPicture], None] | None = None,
    watch: Callable[[Moment], None] | None = None,
) -> list[GeneratedPicture]:
    """Generate a picture for each row, in order.

    The selection of `attachment` is restored at the end.

    `on_step(done, of)`: called with the progress over all batches. `on_picture(i, picture)`: called as soon
    as a picture is finished. `watch`: called at the end of each step; if `watch` raises an exception, the
    call ends. Raises ConfigError for settings that conflict with each other or with the base, BaseError for a
    picture with NaN or infinite values."""
    settings = settings or PictureSettings()
    rows = check_rows(base, rows, settings, attachment)
    run = _Run(base, rows[0], settings, attachment, on_step, watch)
    size = 1 if run.single else settings.batch_size
    batches = _batches(rows, size, attachment)
    run.batches = len(batches)
    selection = attachment.selection if attachment is not None else None
    out: list[GeneratedPicture] = []
    try:
        with torch.no_grad():
            for batch in batches:
                run.start = len(out)
                for picture in run.batch(batch):
                    out.append(picture)
                    if on_picture is not None:
                        on_picture(len(out) - 1, picture)
    finally:
        if attachment is not None and selection is not None:
            attachment.selection = selection
    return out


_SHARED_MODULES = ("transformer.all_x_embedder.", "transformer.cap_embedder.")
"""Z-Image modules that process the concatenated tokens of all rows.

In these modules, rows cannot have different mixes."""


def _batches(rows: Sequence[ImageRow], size: int, attachment: Attachment | None) -> list[tuple[ImageRow, ...]]:
    """Split rows into batches of consecutive rows, at most `size` rows each.

    All rows of a batch have references of the same sizes, because pipelines resize every row's references to
    the sizes of the first row's references. If an adapter changes a module in `_SHARED_MODULES`, all rows of
    a batch have the same plan."""
    adapters = attachment.adapters.values() if attachment is not None else ()
    names = (name for adapter in adapters for name in (*adapter.pairs, *adapter.deltas))
    one_plan = any(name.startswith(_SHARED_MODULES) for name in names)

    def batch_key(row: ImageRow) -> tuple[object, ...]:
        return row.plan if one_plan else None, [picture.size for picture in row.references]

    groups = [list(group) for _, group in groupby(rows, key=batch_key)]
    return [tuple(group[start : start + size]) for group in groups for start in range(0, len(group), size)]


class _Run:
    """The batches of one call: pipeline, scheduler and resolved settings."""

    def __init__(
        self,
        base: ImageBase,
        first_row: ImageRow,
        settings: PictureSettings,
        attachment: Attachment | None = None,
        on_step: Callable[[int, int], None] | None = None,
        watch: Callable[[Moment], None] | None = None,
    ) -> None:
        self.base, self.settings, self.attachment = base, settings, attachment
        self.on_step, self.watch = on_step, watch
        kind: PipelineKind = "text" if first_row.image is None else "image" if first_row.mask is None else "inpaint"
        kind = "edit" if first_row.references else kind
        # A pipeline that takes several references applies all of them to every row of a batch.
        self.single = kind == "edit" and base.references > 1
        self.pipe: Any = pipeline(base, kind, [c.model for c in settings.controls])
        self.pipe.set_progress_bar_config(disable=True)
        self.accepts = inspect.signature(type(self.pipe).__call__).parameters
        self.batches, self.done, self.start = 1, 0, 0
        steps, guidance = default_settings(base)
        self.steps = steps if settings.steps is None else settings.steps
        self.guidance = guidance if settings.guidance is None else settings.guidance
        self.doubled, self.scales = self._guidance()

    def _guidance(self) -> tuple[bool, dict[str, float]]:
        """Return whether negative prompts have an effect, and the guidance arguments."""
        guidance, true = self.guidance, self.settings.true_guidance
        if (argument := self.base.row.guidance) == "true_cfg_scale":
            return guidance > 1, {argument: guidance}
        if self.base.row.true_guidance and true > 1:
            if "true_cfg_scale" not in self.accepts:
                fix = "remove true guidance and negative prompts"
                raise ConfigError(f"{type(self.pipe).__name__} has no true guidance", fix=fix)
            return True, {"guidance_scale": guidance, "true_cfg_scale": true}
        distilled = self.base.row.true_guidance or getattr(self.pipe.config, "is_distilled", False)
        free = guidance > self.base.row.unguided and not distilled
        return free and "negative_prompt_embeds" in self.accepts, {"guidance_scale": guidance}

    def check_negatives(self, rows: Sequence[ImageRow]) -> None:
        if self.doubled or not any(row.negative for row in rows):
            return
        if self.base.row.true_guidance:
            fix = "true_guidance above 1 (--true-guidance 3; over HTTP true_cfg_scale), which takes twice the time"
        elif "negative_prompt_embeds" in self.accepts and not self.base.few_steps:
            fix = f"set guidance above {self.base.row.unguided:g}; it is now {self.guidance:g}"
        else:
            fix = "remove it: this base does not use negative prompts"
        raise ConfigError(f"a negative prompt has no effect on {self.base.short_name} with these settings", fix=fix)

    def batch(self, rows: tuple[ImageRow, ...]) -> list[GeneratedPicture]:
        settings, base = self.settings, self.base
        arguments: dict[str, Any] = {"num_inference_steps": self.steps, "output_type": "np", **self.scales}
        self.select([row.plan.text for row in rows])
        references_of_rows = [row.references for row in rows]
        positive = embed_prompts(base, [row.prompt for row in rows], references_of_rows)
        arguments |= self.embeds(positive, "")
        negative_cut = [""] * len(rows)
        if self.doubled:
            negative = embed_prompts(base, [row.negative for row in rows], references_of_rows)
            negative_cut = negative.cut
            arguments |= self.embeds(self.zero_empty_negatives(negative, rows), "negative_")
        size = {"width": settings.width or base.size, "height": settings.height or base.size}
        if images := [row.image.convert("RGB") for row in rows if row.image is not None]:
            arguments |= {"image": images, "strength": settings.denoise}
        if masks := [row.mask.convert("L") for row in rows if row.mask is not None]:
            arguments["mask_image"] = masks
        if references := [picture.convert("RGB") for row in rows for picture in row.references]:
            arguments |= {"image": references, **self.no_resize_arguments(size["width"] * size["height"])}
        arguments |= {key: value for key, value in size.items() if key in self.accepts}
        arguments |= self.control_arguments(rows)
        self.pipe.scheduler = make_scheduler(base, settings.scheduler)
        self.select([row.plan.at(0.0) for row in rows])
        generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
        try:
            with forwards(base.denoiser):
                at_end = self.at_end_of_step(rows)
                images = self.pipe(**arguments, generator=generators, callback_on_step_end=at_end).images
        except (ValueError, OverflowError) as error:
            message = " ".join(str(error).split())[:300]
            where = base.short_name
            raise ConfigError(f"{type(self.pipe).__name__} refuses these settings: {message}", where=where) from error
        return [
            GeneratedPicture(
                self.to_picture(array, row), row, positive.cut[i], negative_cut[i], rows, i, self.pipe.num_timesteps
            )
            for i, (array, row) in enumerate(zip(images, rows, strict=True))
        ]

    def embeds(self, text: Conditioning, prefix: str) -> dict[str, Any]:
        all_of = text.embeds.shape[:2]  # Without a mask, Qwen-Image's pipeline logs a warning.
        arguments = {
            f"{prefix}prompt_embeds": text.unpadded() if self.base.row.takes_lists else text.embeds,
            f"{prefix}pooled_prompt_embeds": text.pooled,
            f"{prefix}prompt_embeds_mask": text.mask if text.mask is not None else text.embeds.new_ones(all_of).long(),
        }
        return {key: value for key, value in arguments.items() if value is not None and key in self.accepts}

    def no_resize_arguments(self, area: int) -> dict[str, Any]:
        """Return the arguments that prevent a pipeline from resizing its inputs.

        Kontext would resize to about one megapixel."""
        return {k: v for k, v in {"max_area": area, "_auto_resize": False}.items() if k in self.accepts}

    def zero_empty_negatives(self, text: Conditioning, rows: Sequence[ImageRow]) -> Conditioning:
        """Set the embeddings of empty negative prompts to zero, as in SDXL's training.

        The text encoders return nonzero embeddings for an empty text."""
        if getattr(self.pipe.config, "force_zeros_for_empty_prompt", False):
            for i, row in enumerate(rows):
                if not row.negative:
                    text.embeds[i] = 0
                    if text.pooled is not None:
                        text.pooled[i] = 0
        return text

    def control_arguments(self, rows: Sequence[ImageRow]) -> dict[str, Any]:
        controls = self.settings.controls
        if not controls:
            return {}
        several = len(controls) > 1

        def each(values: list[Any]) -> Any:
            return values if several else values[0]

        # Pass a control picture that all rows share as a single picture: with several ControlNets, the
        # pipelines do not accept lists of pictures.
        pictures = [
            _to_tensor([row.controls[i] for row in rows]) if any(row.controls for row in rows) else control.picture
            for i, control in enumerate(controls)
        ]
        return {
            "control_image" if "control_image" in self.accepts else "image": each(pictures),
            "controlnet_conditioning_scale": each([float(c.weight) for c in controls]),
            "control_guidance_start": each([c.begin for c in controls]),
            "control_guidance_end": each([c.end for c in controls]),
        }

    def select(self, mixes: list[NamedMix]) -> None:
        if self.attachment is None:
            return
        if all(mix == mixes[0] for mix in mixes):
            self.attachment.use(*mixes[0])
        else:
            self.attachment.use_rows(mixes)

    def at_end_of_step(self, rows: tuple[ImageRow, ...]) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
        mixes = [row.plan.at(0.0) for row in rows]

        def callback(pipe: Any, i: int, _t: Any, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal mixes
            steps = pipe.num_timesteps
            next_mixes = [row.plan.at((i + 1) / steps) for row in rows]
            if next_mixes != mixes and i + 1 < steps:
                self.select(next_mixes)
                mixes = next_mixes
            self.done += 1
            if self.on_step is not None:
                self.on_step(self.done, steps * self.batches)
            if self.watch is not None:
                self.watch(Moment(rows, self.start, i + 1, steps))
            return arguments

        return callback

    def to_picture(self, array: Any, row: ImageRow) -> Image:
        """Convert an (h, w, 3) array with values in 0..1 to a picture.

        Black areas of the mask keep the pixels of the original picture. Raises BaseError for NaN or infinite
        values."""
        import numpy as np
        from PIL import Image as pil

        if not np.isfinite(array).all():
            dtype = str(self.base.dtype).removeprefix("torch.")
            mixes = dict.fromkeys([row.plan.text, *(mix for _, mix in row.plan.phases)])
            mixes_text = ", then ".join(mix_text(mix) for mix in mixes if mix)
            message = (
                f"the picture for seed {row.seed} has NaN or infinite values{mixes_text and f' under {mixes_text}'}: "
            )
            message += f"{self.base.short_name} overflowed in {dtype}"
            fix = ("" if dtype == "float32" else "use --dtype float32, or ") + "lower strengths or guidance"
            raise BaseError(message, fix=fix)
        image = pil.fromarray((array * 255).round().astype("uint8"))
        if row.image is None or row.mask is None:
            return image
        return pil.composite(image, row.image.convert("RGB"), row.mask.convert("L"))


def _to_tensor(pictures: Sequence[Image]) -> torch.Tensor:
    """Convert pictures of the same size to a tensor (n, 3, h, w) with values in 0..1.

    The conversion matches diffusers' image processors."""
    import numpy as np

    arrays = [np.array(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2))


def check_rows(
    base: ImageBase, rows: Sequence[ImageRow], settings: PictureSettings, attachment: Attachment | None = None
) -> list[ImageRow]:
    """Return the rows, with missing pictures filled in from the settings.

    Raises ConfigError for conflicts, as in `generate_images`."""
    image, mask, references = settings.image, settings.mask, settings.references
    rows = [
        replace(row, image=row.image or image, mask=row.mask or mask, references=row.references or references)
        for row in rows
    ]
    _check(base, rows, settings, attachment)
    make_scheduler(base, settings.scheduler)
    _Run(base, rows[0], settings).check_negatives(rows)
    return rows


def _check(base: ImageBase, rows: Sequence[ImageRow], settings: PictureSettings, attachment: Attachment | None) -> None:
    if not rows:
        raise ConfigError("there is no picture to generate", fix="give a prompt")
    if attachment is None and any(row.plan != MixPlan() for row in rows):
        raise ConfigError("rows have mixes, but there is no attachment", fix="give the attachment")
    width, height = settings.width or base.size, settings.height or base.size
    for name, value in (("width", width), ("height", height)):
        if value < base.unit or value % base.unit:
            low = max(base.unit, value // base.unit * base.unit)
            message = f"the {name} is {value}, but {base.short_name} requires multiples of {base.unit}"
            raise ConfigError(message, fix=f"{low} or {low + base.unit}")
    steps = default_settings(base)[0] if settings.steps is None else settings.steps
    if steps * settings.denoise < 1:
        least = math.ceil(1 / settings.denoise)
        fix = f"{counted(least, 'step')}, or denoise {math.ceil(1000 / steps) / 1000:g}"
        raise ConfigError(f"denoise {settings.denoise:g} runs none of {counted(steps, 'step')}", fix=fix)
    if settings.denoise < 1 and any(row.image is None for row in rows):
        message = "denoise below 1 needs a picture to start from"
        raise ConfigError(message, fix="give image too (--image in.png)")
    if any(row.mask is not None and row.image is None for row in rows):
        raise ConfigError("a mask needs the picture it belongs to", fix="give image too (--image in.png)")
    if len({(row.image is None, row.mask is None, len(row.controls), len(row.references)) for row in rows}) > 1:
        raise ConfigError("some rows have a picture, a mask, controls or references, and others do not")
    _check_references(base, rows, settings)
    if rows[0].controls and len(rows[0].controls) != len(settings.controls):
        pictures = counted(len(rows[0].controls), "picture")
        raise ConfigError(f"{counted(len(settings.controls), 'control')}, but each row has {pictures} for them")
    inputs: list[tuple[str, Image | None]] = [("control picture", control.picture) for control in settings.controls]
    for row in rows:
        inputs += [("picture", row.image), ("mask", row.mask), *(("control picture", p) for p in row.controls)]
    for label, picture in inputs:
        if picture is not None and picture.size != (width, height):
            message = f"the {label} is {picture.width}×{picture.height}, the pictures are {width}×{height}"
            raise ConfigError(message, fix="resize it (models.image.generate.fitted_picture)")
    if base.few_steps and settings.guidance:
        raise ConfigError(f"{base.short_name} is distilled and takes no guidance", fix="guidance 0, or none")
    if settings.true_guidance > 1 and not base.row.true_guidance:
        raise ConfigError(f"{base.short_name} has no distilled guidance, so true guidance does not apply")


def _check_references(base: ImageBase, rows: Sequence[ImageRow], settings: PictureSettings) -> None:
    count = len(rows[0].references)
    if not count:
        return
    if not base.references:
        fix = "use FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit; to start from a picture, set image (--image)"
        raise ConfigError(f"{base.short_name} does not edit, and takes no reference pictures", fix=fix)
    if count > base.references:
        limit = counted(base.references, "reference picture")
        fix = "leave some out, or paste several into one"
        raise ConfigError(f"{base.short_name} takes at most {limit}, but {count} are set", fix=fix)
    if settings.controls or rows[0].image is not None:
        conflicting = "controls" if settings.controls else "a picture to start from"
        raise ConfigError(f"references and {conflicting} cannot be combined", fix="remove one of them")
    for picture in (picture for row in rows for picture in row.references):
        if why := aspect_problem(*picture.size):
            raise ConfigError(f"a reference picture has {why}", fix="crop it")
        if base.reads_references:
            continue
        least = base.editing.least
        if picture.width % base.unit or picture.height % base.unit or min(picture.size) < least:
            message = (
                f"a reference picture is {picture.width}×{picture.height}, but {base.short_name} requires sides in "
            )
            message += f"multiples of {base.unit}" + (f", at least {least}" if least else "")
            raise ConfigError(message, fix="resize it")
