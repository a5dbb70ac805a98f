"""The image training configuration and its presets.

A configuration with `data.pictures` or `slider` is an image configuration. Sections shared with text are the
same classes. The other sections are below, with the reason for each default. `docs/reference/image-config.md`
is generated from this file. This module does not depend on files, overrides, models or torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from veneer.models.image.families import TARGET_WORDS
from veneer.train.config.section import Section, setting
from veneer.train.config.text import (
    BaseSection,
    CheckpointSection,
    OptimizerSection,
    OutputSection,
    PairsSection,
    ReportSection,
    ScheduleSection,
    file_names,
    reference,
)

_Side = Annotated[int, Field(ge=8)]
_NAMED = {"white": "#ffffff", "black": "#000000", "grey": "#808080"}


class ImageBaseSection(BaseSection):
    """The base model. `base: NAME` is short for `base: {name: NAME}`."""

    name: str = setting(
        ..., "built-in name (catalogue-sdxl, catalogue-flux), hub id, diffusers folder or .safetensors checkpoint"
    )
    quantize: Literal["nf4", "int8"] | None = setting(
        None, "quantize the denoiser and large text encoders to 4 or 8 bits", "full precision"
    )


class ImageDataSection(Section):
    """Images, captions, crops, and held-out images."""

    pictures: str | tuple[str, ...] = setting(
        (), "folders of pictures with captions, metadata.jsonl, or kohya's `N_words` folders; none for a slider"
    )
    validation: str | None = setting(None, "folder of held-out pictures")
    prompt: str | None = setting(None, "default caption")
    caption_column: str | None = setting(
        None, "caption column of metadata", "the first of text, caption, prompt, instruction"
    )
    trigger: str | None = setting(None, "word that activates the adapter: replaces `[trigger]`, or precedes captions")
    class_folder: str | None = setting(None, "class (regularization) pictures, trained without the trigger")
    class_prompt: str | None = setting(None, "default caption of class pictures")
    class_weight: float = setting(1.0, "loss weight of class pictures", "as in DreamBooth", ge=0)
    caption_dropout: float = setting(
        0.0,
        "share of captions replaced by an empty one, chosen anew each epoch",
        "0.1 also trains classifier-free guidance",
        ge=0,
        le=1,
    )
    shuffle_tags: bool = setting(False, "shuffle comma-separated tags each epoch")
    keep_tags: int | None = setting(
        None, "number of leading tags that are not shuffled", "1 with a trigger, otherwise 0", ge=0
    )
    resolution: _Side | Annotated[tuple[_Side, ...], Field(min_length=1)] | None = setting(
        None, "side of a square of the same area; with a list, each picture is trained at each resolution", "the base's"
    )
    buckets: bool = setting(True, "keep aspect ratios; false: squares", "crops least")
    bucket_step: int | None = setting(
        None,
        "bucket sides are multiples of this",
        "64 for a resolution of 512 or more, otherwise the base's unit",
        gt=0,
    )
    bucket_ratio: float = setting(2.0, "maximum aspect ratio", "bases were trained on few longer pictures", ge=1, le=8)
    small: Literal["keep", "upscale", "drop"] = setting(
        "keep",
        "pictures smaller than their bucket: put in a bucket of their own size, enlarge, or leave out",
        "enlarging teaches blur",
    )
    crop: Literal["center", "random"] = setting("center", "crop position")
    flip: bool = setting(False, "mirror pictures in half of the epochs", "faces and lettering are asymmetric")
    masks: str = setting(
        "auto", "loss masks: auto (NAME.mask.png or a `masks` folder), off, alpha, or a folder", "used if present"
    )
    mask_floor: float = setting(
        0.0, "loss weight of a mask's black areas; white areas have weight 1", "not trained", ge=0, le=1
    )
    before: str | tuple[str, ...] = setting(
        "auto",
        "source images of edits: auto (NAME.before.png, a `before` folder), off, or folders (one per reference)",
        "used if present",
    )
    background: str = setting("#ffffff", "color behind transparent pixels: #rrggbb, white, black or grey")
    broken: Literal["refuse", "drop"] = setting("refuse", "unreadable files: stop, or leave out")
    most_megapixels: float = setting(120.0, "larger pictures are refused before decoding", "limits memory", gt=0)
    cache: str | None = setting(None, "folder of latents and embeddings", "`cache` in the output folder")
    split: int | float | None = setting(
        None,
        "held-out pictures: a number, or a share; 0 for none",
        "without `validation`, a tenth of 20 or more pictures, at most 50",
        ge=0,
    )
    class_count: int = setting(
        0, "number of class pictures; the base generates missing ones from `class_prompt`", "none", ge=0
    )

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.pictures,) if isinstance(self.pictures, str) else self.pictures

    @property
    def source_folders(self) -> tuple[str, ...]:
        """Return the folders in `before`; () for auto and off."""
        return () if self.before in ("auto", "off") else (self.before,) if isinstance(self.before, str) else self.before

    @property
    def colour(self) -> tuple[int, int, int]:
        """Return the background color as (red, green, blue), 0 to 255."""
        text = _NAMED.get(self.background, self.background)
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)

    def resolutions(self, size: int) -> tuple[int, ...]:
        """Return the resolutions, as sides of squares in pixels, in ascending order.

        size: the base's default side, used if no resolution is set."""
        sides = (size,) if self.resolution is None else self.resolution
        return tuple(sorted({sides} if isinstance(sides, int) else set(sides)))

    def step(self, unit: int, size: int) -> int:
        """Return the bucket step in pixels.

        unit: image sides must be multiples of `unit`. size: the base's default side."""
        if self.bucket_step is not None:
            return self.bucket_step
        return max(unit, 64 // unit * unit) if min(self.resolutions(size)) >= 512 else unit

    @pydantic.field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        if value not in _NAMED and not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            raise ValueError("a color is #rrggbb, white, black or grey")
        return value

    @pydantic.field_validator("trigger")
    @classmethod
    def _is_a_word(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value != value.strip() or "," in value):
            raise ValueError("a trigger is one or more words without commas")
        return value

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> ImageDataSection:
        if self.class_prompt is not None and self.trigger and self.trigger.lower() in self.class_prompt.lower():
            raise ValueError("class_prompt contains the trigger, but class pictures are trained without the trigger")
        if self.masks not in ("auto", "off", "alpha") and len(self.folders) > 1:
            raise ValueError(
                "a folder of masks requires a single folder of pictures; for several folders, use masks: auto"
            )
        if not self.before or not all(self.before):
            raise ValueError("before is empty: name one or more folders, or leave the key out")
        if self.source_folders and len(self.folders) > 1:
            raise ValueError(
                "folders in before require a single folder of pictures; for several folders, use before: auto"
            )
        return self


class ImageAdapterSection(PairsSection):
    """The trained adapter of the denoiser and text encoders."""

    alpha: float = setting(
        16.0, "scale is alpha / rank", "scale 1, as in the examples of diffusers and ai-toolkit", gt=0
    )
    targets: str | tuple[str, ...] = setting(
        "attention+ff",
        "denoiser modules: attention, attention+ff, attention+ff+conv, all-linear, names, .suffixes, globs, re:REGEX",
        "whole transformer blocks",
    )
    text_encoders: tuple[str, ...] = setting(
        (), "text encoders to adapt, such as [text_encoder, text_encoder_2]", "styles need none"
    )
    text_targets: str | tuple[str, ...] = setting("all-linear", "modules of these text encoders")

    def denoiser_targets(self) -> tuple[str, ...]:
        """Return the patterns that `targets` selects."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return tuple(TARGET_WORDS.get(t, t) for t in targets)


class LossSection(Section):
    """Squared error of the base's prediction (epsilon, v or flow)."""

    snr_gamma: float | None = setting(None, "min-SNR weights (arXiv 2303.09556), epsilon and v; the paper uses 5", gt=0)
    noise_offset: float = setting(
        0.0, "per-channel noise offset, epsilon and v; 0.03 to 0.1, more for a colored background", ge=0
    )
    timesteps: Literal["auto", "uniform", "logit-normal"] = setting(
        "auto", "sampling of timesteps", "flow: logit-normal; epsilon and v: uniform"
    )
    shift: PositiveFloat | Literal["auto", "resolution"] = setting(
        "auto",
        "flow: timestep shift, s·u / (1 + (s − 1)·u); resolution: FLUX's exp(μ)",
        "the base's fixed shift (SD3 3, Z-Image 6), otherwise 1",
    )
    guidance: float = setting(
        1.0, "guidance input of a distilled base (FLUX.1 dev)", "sd-scripts' and diffusers' advice", ge=0
    )
    keep_guidance: float | None = setting(
        None,
        "distilled base: preserve the effect of this guidance value; trains at the larger of this value and `guidance`",
        "off, because it adds two forward passes per step",
        gt=1,
    )


class ImageBatchingSection(Section):
    """Size of a step (one optimizer update) and of a micro-batch (rows in memory at once)."""

    rows: int = setting(4, "pictures per step", "1 to 8 for tens of pictures", gt=0)
    micro_rows: int | None = setting(None, "maximum pictures of a micro-batch; does not change the result", gt=0)


class ImageOptimizerSection(OptimizerSection):
    """The optimizer and its learning rate."""

    learning_rate: float = setting(
        1e-4, "peak learning rate of the denoiser", "diffusers', sd-scripts' and ai-toolkit's examples", gt=0
    )
    text_learning_rate: float = setting(2e-5, "peak learning rate of text encoders", "they overfit first", gt=0)


class ImageScheduleSection(ScheduleSection):
    """Learning rate schedule and length of the run."""

    epochs: int | None = setting(None, "epochs", gt=0)
    steps: int | None = setting(None, "optimizer steps, instead of epochs", "1000 without `epochs`", gt=0)


class ImageEvaluationSection(Section):
    """Scoring of held-out images. Every evaluation uses the same noise and timesteps."""

    every: PositiveInt | Literal["epoch"] = setting(100, "steps between evaluations, or `epoch`")
    patience: int | None = setting(None, "stop after this many evaluations without improvement", "never", gt=0)
    rows: int | None = setting(None, "maximum held-out pictures to score", "all", gt=0)
    times: int = setting(4, "timesteps at which each picture is scored", gt=0)
    at_start: bool = setting(True, "score the base before step one, as the baseline")
    keep: Literal["best", "last"] = setting(
        "best",
        "save the adapter with the lowest held-out loss, or the last; a style keeps improving after the lowest",
    )


class SamplesSection(Section):
    """Sample sheets for the report: each prompt with each seed."""

    every: PositiveInt | Literal["epoch"] | None = setting(
        None, "steps between sheets, or `epoch`", "at the end, if there are prompts"
    )
    prompts: tuple[str, ...] = setting((), "prompts, with the trigger")
    before: tuple[str | tuple[str, ...], ...] = setting(
        (),
        "for edit bases: the source image, or a list of them, for each prompt; a single entry applies to all prompts",
    )
    negative: str = setting("", "negative prompt")
    seeds: tuple[int, ...] = setting((0,), "one picture per prompt and seed")
    steps: int = setting(20, "sampling steps", gt=0)
    guidance: float | None = setting(None, "guidance scale", "the pipeline's", ge=0)
    size: int | None = setting(None, "side in pixels", "the base's", gt=0)

    @property
    def starts(self) -> tuple[tuple[str, ...], ...]:
        """Return the files of `before` for each prompt."""
        each = tuple((paths,) if isinstance(paths, str) else paths for paths in self.before)
        return each * len(self.prompts) if len(each) == 1 else each or ((),) * len(self.prompts)


class EmaSection(Section):
    """Exponential moving average of the adapter, used for scores and the saved file."""

    decay: float | None = setting(None, "decay of the average per step, such as 0.99", "off", gt=0, lt=1)


class ImageMemorySection(Section):
    """Memory limits and trade-offs."""

    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto", "recompute activations: less memory, a fifth to a third slower", "off if measured activations fit"
    )
    limit_gb: float | None = setting(None, "memory limit in GB", "free memory", gt=0)
    free_encoders: bool = setting(True, "drop text encoders and VAE after caching", "half of SDXL's and FLUX's memory")
    offload_blocks: int = setting(
        0, "number of transformer blocks whose frozen weights stay in CPU memory (GPU only)", ge=0
    )


class ImageOutputSection(OutputSection):
    """The output folder and file layout. `output: DIR` is short for `output: {directory: DIR}`."""

    layout: Literal["diffusers", "kohya", "peft"] = setting(
        "diffusers", ".safetensors for pipelines or UIs, or a PEFT folder (denoiser only)"
    )
    name: str | None = setting(None, "file name without .safetensors", "the folder's")
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "precision of saved tensors", "saves the trained adapter exactly"
    )
    licence: str = setting("", "metadata license, an SPDX id")


class SliderSection(Section):
    """A slider: a direction between two prompts, trained without images.

    The adapter's strength moves images along the direction. Of the `data` section, only `resolution` and
    `cache` apply."""

    positive: str | None = setting(None, "prompt of strength 1, for example: a very old person")
    negative: str | None = setting(None, "prompt of strength -1, for example: a very young person")
    target: str = setting("", "neutral prompt, for example: a person", "unconditional")
    preserve: tuple[str, ...] = setting(
        (), "concepts to preserve, each added in turn to both prompts, such as [man, woman]"
    )
    guidance: float = setting(
        3.0, "multiple of the prompts' difference at strength 1", "ai-toolkit's value; the paper's code uses 4", gt=0
    )
    scenes: int = setting(24, "pictures that the base generates for training", "8 per prompt", gt=0)
    strengths: tuple[float, ...] = setting((-2.0, -1.0, 0.0, 1.0, 2.0), "columns of sample sheets")

    @property
    def enabled(self) -> bool:
        """Return whether the run trains a slider."""
        return self.positive is not None or self.negative is not None


class ImageTrainConfig(Section):
    """The image training configuration.

    `base.name`, `data.pictures` (or a slider's two prompts) and `output.directory` are required."""

    base: ImageBaseSection
    data: ImageDataSection
    output: ImageOutputSection
    adapter: ImageAdapterSection = ImageAdapterSection()
    loss: LossSection = LossSection()
    batching: ImageBatchingSection = ImageBatchingSection()
    optimizer: ImageOptimizerSection = ImageOptimizerSection()
    schedule: ImageScheduleSection = ImageScheduleSection()
    evaluation: ImageEvaluationSection = ImageEvaluationSection()
    samples: SamplesSection = SamplesSection()
    ema: EmaSection = EmaSection()
    checkpoint: CheckpointSection = CheckpointSection()
    memory: ImageMemorySection = ImageMemorySection()
    slider: SliderSection = SliderSection()
    report: ReportSection = ReportSection()
    preset: Literal["style", "subject", "product"] | None = setting(
        None, "settings for a kind of adapter; keys that you set take precedence"
    )
    seed: int = setting(0, "seed of initialization, order, noise, timesteps and dropout", ge=0)

    @property
    def epochs(self) -> int | None:
        """Return the number of epochs, or None if the number of steps is set."""
        return None if self.schedule.steps is not None else self.schedule.epochs

    @property
    def steps(self) -> int | None:
        """Return the number of optimizer steps, or None if `schedule.epochs` is set."""
        return None if self.epochs is not None else self.schedule.steps or 1000

    def recipe(self) -> dict[str, Any]:
        """Return the settings for a card, without the output and report sections.

        Paths are reduced to file names."""
        recipe = self.model_dump(mode="json", exclude={"output", "report"}) | {"adapter": self.adapter.recipe_values()}
        recipe["data"] = {k: file_names(v) for k, v in recipe["data"].items()}
        recipe["samples"]["before"] = file_names(recipe["samples"]["before"])
        recipe["base"]["name"] = file_names(recipe["base"]["name"])
        if not self.slider.enabled:
            del recipe["slider"]
        return recipe


@dataclass(frozen=True)
class Preset:
    """Settings for one kind of image adapter, used for keys that the user does not set.

    settings: `section.key` -> (value, evidence). The evidence says which values are just conventions."""

    meaning: str
    settings: Mapping[str, tuple[Any, str]]


_RATE = (1e-4, "convention: diffusers, sd-scripts, ai-toolkit")
_PAIRED = "scale 1 (convention)"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "style": Preset(
            "a visual style: tens of different pictures, with captions that do not describe the style",
            {
                "adapter.rank": (16, "measured: 50 drawings on a FLUX base"),
                "adapter.alpha": (16.0, _PAIRED),
                "adapter.targets": ("attention+ff", "style is in transformer blocks (arXiv 2403.14572)"),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (8, "a step sees several pictures"),
                "schedule.steps": (1500, "convention: ai-toolkit, 500 to 4000"),
                "data.caption_dropout": (0.1, "classifier-free guidance (arXiv 2207.12598)"),
                "data.flip": (True, "twice the pictures"),
                "ema.decay": (0.99, "convention: ai-toolkit"),
            },
        ),
        "subject": Preset(
            "one character: 5 to 20 pictures, trigger and class prompt",
            {
                "adapter.rank": (16, "convention: DreamBooth guides, 4 to 32"),
                "adapter.alpha": (16.0, _PAIRED),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (2, "few pictures: smaller steps"),
                "schedule.steps": (800, "DreamBooth (arXiv 2208.12242): 800 to 1000"),
                "data.class_count": (100, "prior preservation; diffusers' default"),
                "data.class_weight": (1.0, "DreamBooth's λ"),
                "data.flip": (False, "faces are asymmetric"),
                "ema.decay": (0.99, "convention: ai-toolkit"),
            },
        ),
        "product": Preset(
            "one object with a fixed shape and lettering: 10 to 30 pictures, with loss masks",
            {
                "adapter.rank": (32, "fine detail needs a higher rank (convention)"),
                "adapter.alpha": (32.0, _PAIRED),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (2, "few pictures: smaller steps"),
                "schedule.steps": (1500, "finer detail (convention)"),
                "data.masks": ("auto", "backgrounds are not trained"),
                "data.flip": (False, "mirrored lettering is wrong"),
                "data.crop": ("center", "random crops cut objects off"),
                "ema.decay": (0.99, "convention: ai-toolkit"),
            },
        ),
    }
)


def image_reference() -> str:
    """Return the text of docs/reference/image-config.md. A test compares the text with the file."""
    command = "python -m veneer.train.config.image > docs/reference/image-config.md"
    out = [reference(ImageTrainConfig, command, "Configuration for pictures"), "### The presets", ""]
    for name, preset in PRESETS.items():
        out += [f"**{name}**: {preset.meaning}", "", "| key | value | evidence |", "| --- | --- | --- |"]
        for key, (value, because) in preset.settings.items():
            text = str(value).lower() if isinstance(value, bool) else value
            out.append(f"| `{key}` | `{text}` | {because} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    print(image_reference(), end="")
