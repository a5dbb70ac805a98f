"""What a training configuration for pictures holds, and the presets. A configuration with `data.pictures`, or
with `slider`, is one.

The sections that text has too are the same classes; what differs is below, with the reason for each default.
`docs/reference/image-config.md` is made from this file. Does not know files, overrides, models or torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import pydantic

from veneer.train.config.section import Section, setting
from veneer.train.config.text import (
    BaseSection,
    CheckpointSection,
    OptimizerSection,
    OutputSection,
    PairsSection,
    ReportSection,
    ScheduleSection,
    file_name,
    reference,
)

_NAMED = {"white": "#ffffff", "black": "#000000", "grey": "#808080"}
_BLOCK = r"re:.*(transformer_blocks|layers|\w+_refiner)\.\d+\."
_ATTENTION = r"attn\w*|attention"
_FEED_FORWARD = rf"({_ATTENTION}|ff\w*|feed_forward|img_mlp|txt_mlp|proj_mlp|proj_out)(\..*)?"
_CONV = r".*(resnets\.\d+\.conv\d|samplers\.0\.conv|\bconv_in|\bconv_out)"
TARGET_WORDS: dict[str, str] = {
    "attention": rf"{_BLOCK}({_ATTENTION})\..*",
    "attention+ff": _BLOCK + _FEED_FORWARD,
    "attention+ff+conv": f"{_BLOCK}{_FEED_FORWARD}|{_CONV}",
}
"""Words for `adapter.targets` -> what they select in a denoiser of any family: inside the transformer blocks of a UNet,
of FLUX, SD3, Qwen-Image and Z-Image (its refiners too), the attention's projections, with them the feed-forward's, and
with these the 3 × 3 convolutions of a UNet (LoCon, arXiv 2309.14859)."""


class ImageBaseSection(BaseSection):
    """Which model is trained on. `base: NAME` is short for `base: {name: NAME}`."""

    name: str = setting(
        ..., "built-in name (catalogue-sdxl, catalogue-flux), hub id, diffusers directory or .safetensors checkpoint"
    )
    quantise: Literal["nf4", "int8"] | None = setting(
        None, "hold the frozen denoiser and large text encoders in 4 or 8 bits", "only where memory is short"
    )


class ImageDataSection(Section):
    """Which pictures are learned, what is said of each, how they are cut, and which are held out."""

    pictures: str | tuple[str, ...] = setting(
        (),
        "folders of pictures, with captions beside them, a metadata.jsonl, or kohya's `N_words` folders; a slider "
        "alone has none",
    )
    validation: str | None = setting(None, "a folder of pictures that are never trained on, read the same way")
    prompt: str | None = setting(None, "the caption of every picture that has none of its own")
    caption_column: str | None = setting(
        None, "metadata's column of captions", "the first of text, caption, prompt, instruction that is there"
    )
    trigger: str | None = setting(
        None, "a word for what is learned: replaces `[trigger]` in captions, and is put before captions without it"
    )
    class_folder: str | None = setting(None, "class (regularisation) pictures, learned beside the others; no trigger")
    class_prompt: str | None = setting(None, "the caption of every class picture that has none of its own")
    class_weight: float = setting(1.0, "the class pictures' loss is multiplied by this", "DreamBooth's value", ge=0)
    caption_dropout: float = setting(
        0.0,
        "share of the rows whose caption is left empty, drawn anew each epoch",
        "0.1 trains guidance as well",
        ge=0,
        le=1,
    )
    shuffle_tags: bool = setting(False, "shuffle the caption's comma-separated tags, anew each epoch")
    keep_tags: int | None = setting(
        None, "number of leading tags that stay in place when shuffling", "1 with a trigger, else 0", ge=0
    )
    resolution: int | tuple[int, ...] | None = setting(
        None, "side in pixels of a square of the same area; several: each picture is learned at each", "the base's size"
    )
    buckets: bool = setting(
        True, "keep each picture's aspect ratio as nearly as the step allows; false: squares", "cuts off least"
    )
    bucket_step: int | None = setting(
        None, "bucket sides are multiples of this many pixels", "64 from 512 pixels on, the base's unit below"
    )
    bucket_ratio: float = setting(
        2.0, "longest side over shortest, at most", "bases have seen few pictures beyond it", ge=1, le=8
    )
    small: Literal["keep", "upscale", "drop"] = setting(
        "keep",
        "pictures smaller than their bucket: a bucket of their own size, enlarged, or left out",
        "enlarging teaches blur",
    )
    crop: Literal["center", "random"] = setting(
        "center", "which part of a picture is kept where it is larger than its bucket"
    )
    crops: int = setting(
        4, "number of random crops of a picture; each epoch uses one of them", "limits the size of the cache", gt=0
    )
    flip: bool = setting(
        False, "mirror a picture in half of the epochs", "faces, writing and products are not symmetric"
    )
    masks: str = setting(
        "auto",
        "where loss masks are: auto (NAME.mask.png beside, and a `masks` folder), off, alpha, or a folder",
        "used where there are any, and reported",
    )
    mask_floor: float = setting(
        0.0, "weight of what a mask leaves out; white is always 1", "it is not learned", ge=0, le=1
    )
    before: str | tuple[str, ...] = setting(
        "auto",
        "where the pictures are that an edit starts from: auto (NAME.before.png beside, a `before` folder, metadata's "
        "`before`), off, or a folder of the same names; several folders: several references",
        "an edit base learns from pairs, and captions are instructions; used where there are any, and reported",
    )
    before_kind: Literal["picture", "canny", "depth", "pose"] = setting(
        "picture", "what they are; each is looked at, and one of another kind stops the run", "any picture"
    )
    background: str = setting(
        "#ffffff", "colour behind transparent pixels: #rrggbb, white, black or grey", "as on paper"
    )
    animated: Literal["refuse", "first"] = setting("refuse", "animated files: stop, or use their first frame")
    broken: Literal["refuse", "drop"] = setting(
        "refuse",
        "files that cannot be read: stop, or leave them out, counted",
        "nothing is dropped without being asked for",
    )
    most_megapixels: float = setting(
        120.0,
        "larger pictures are refused before they are decoded",
        "a small file can unpack to more than the memory",
        gt=0,
    )
    cache: str | None = setting(
        None, "folder for latents and text embeddings; nothing: `cache` in the output folder", "made once, used by all"
    )
    split: int | float | None = setting(
        None,
        "pictures (whole number) or share (0 to 1) held out; 0 for none",
        "a tenth from 20 pictures on, at most 50, when no `validation` is given; none below, where each one counts",
        ge=0,
    )
    class_count: int = setting(
        0, "class pictures wanted; missing ones are drawn by the base from `class_prompt`", "none", ge=0
    )
    class_steps: int = setting(20, "sampling steps of class pictures that are drawn", gt=0)

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.pictures,) if isinstance(self.pictures, str) else self.pictures

    @property
    def before_folders(self) -> tuple[str, ...]:
        """The folders that `before` names; none with auto and off."""
        return () if self.before in ("auto", "off") else (self.before,) if isinstance(self.before, str) else self.before

    @property
    def colour(self) -> tuple[int, int, int]:
        """The background as (red, green, blue), 0 to 255."""
        text = _NAMED.get(self.background, self.background)
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)

    def resolutions(self, size: int) -> tuple[int, ...]:
        """Sides from small to large; `size` is the base's, used when none is set."""
        sides = (size,) if self.resolution is None else self.resolution
        return tuple(sorted({sides} if isinstance(sides, int) else set(sides)))

    def step(self, unit: int, size: int) -> int:
        """Bucket step for a base whose sides are multiples of `unit` and whose default side is `size`."""
        if self.bucket_step is not None:
            return self.bucket_step
        return max(unit, 64 // unit * unit) if min(self.resolutions(size)) >= 512 else unit

    @pydantic.field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        if value not in _NAMED and not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            raise ValueError("a colour is #rrggbb, white, black or grey")
        return value

    @pydantic.field_validator("resolution")
    @classmethod
    def _is_positive(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        sides = () if value is None else (value,) if isinstance(value, int) else value
        if any(side < 8 for side in sides) or value == ():
            raise ValueError("a resolution is at least 8 pixels")
        return value

    @pydantic.field_validator("trigger")
    @classmethod
    def _is_a_word(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value != value.strip() or "," in value):
            raise ValueError("a trigger is one or more words without commas")
        return value

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> ImageDataSection:
        if self.class_prompt is not None and self.trigger and self.trigger.lower() in self.class_prompt.lower():
            raise ValueError("class_prompt holds the trigger: class pictures keep the class as it was without it")
        if self.masks not in ("auto", "off", "alpha") and len(self.folders) > 1:
            raise ValueError("a folder of masks goes with one folder of pictures; masks: auto looks in each")
        if not self.before or not all(self.before):
            raise ValueError("before is empty: name the folder, or the folders, or leave it out")
        if self.before_folders and len(self.folders) > 1:
            raise ValueError("folders of before pictures go with one folder of pictures; before: auto looks in each")
        if self.bucket_step is not None and self.bucket_step < 1:
            raise ValueError("bucket_step is at least 1")
        return self


class ImageAdapterSection(PairsSection):
    """What is trained: which modules of the denoiser, and of the text encoders, get a pair, and how it starts."""

    alpha: float = setting(
        16.0, "scale is alpha / rank", "scale 1 at rank 16, as diffusers' and ai-toolkit's examples", gt=0
    )
    targets: str | tuple[str, ...] = setting(
        "attention+ff",
        "of the denoiser: attention, attention+ff, attention+ff+conv, all-linear, or names, .suffixes, globs, re:REGEX",
        "the transformer blocks whole; what lies outside them sets time and size",
    )
    text_encoders: tuple[str, ...] = setting(
        (),
        "text encoders that get pairs as well, as [text_encoder, text_encoder_2]",
        "style needs none, and without them every prompt is encoded once",
    )
    text_targets: str | tuple[str, ...] = setting("all-linear", "modules of those text encoders")

    def denoiser_targets(self) -> tuple[str, ...]:
        """The patterns that `targets` stands for."""
        listed = (self.targets,) if isinstance(self.targets, str) else self.targets
        return tuple(TARGET_WORDS.get(t, t) for t in listed)


class LossSection(Section):
    """What is minimised: the squared error of the base's own prediction (epsilon, v or flow), and how it is drawn."""

    snr_gamma: float | None = setting(
        None, "weights of min-SNR (arXiv 2303.09556), epsilon and v only; the paper's value is 5", gt=0
    )
    noise_offset: float = setting(
        0.0,
        "noise that moves whole channels, epsilon and v only; 0.03 to 0.1, more for a look with a ground of its own",
        ge=0,
    )
    pyramid_iterations: int = setting(0, "levels of multi-resolution noise, epsilon and v only; 6 to 10", ge=0)
    pyramid_discount: float = setting(0.3, "strength of each coarser level over the one before", ge=0, lt=1)
    timesteps: Literal["auto", "uniform", "logit-normal"] = setting(
        "auto", "how times are drawn", "flow: logit-normal, as SD3 and FLUX were trained; epsilon and v: uniform"
    )
    logit_mean: float = setting(0.0, "logit-normal: mean before the sigmoid; above 0 draws more noise")
    logit_std: float = setting(1.0, "logit-normal: spread before the sigmoid", gt=0)
    shift: float | Literal["auto", "resolution"] = setting(
        "auto",
        "flow: moves times towards noise, s·u / (1 + (s − 1)·u); resolution: FLUX's exp(μ) of the picture's size",
        "as diffusers' scripts: the fixed shift of the base's scheduler (SD3 3, Z-Image 6), 1 where it goes by size",
    )
    guidance: float = setting(
        1.0,
        "guidance value that a distilled base (FLUX.1 dev) is given while training",
        "sd-scripts' and diffusers' advice",
        ge=0,
    )
    keep_guidance: float | None = setting(
        None,
        "of a distilled base: keep what this guidance adds to the base's prediction; told is the larger of the two",
        "two more forward passes a step. What pictures are made with keeps all; less, beside `guidance`, a part of it",
        gt=1,
    )


class ImageBatchingSection(Section):
    """How pictures become steps (one optimizer update each) and micro-batches (what is in memory at once)."""

    rows: int = setting(4, "pictures in a step", "the useful range is 1 to 8 for tens of pictures", gt=0)
    micro_rows: int | None = setting(
        None, "most pictures in a micro-batch, which has one shape; changes memory and speed, never the result", gt=0
    )


class ImageOptimizerSection(OptimizerSection):
    """How weights move."""

    learning_rate: float = setting(
        1e-4, "peak learning rate of the denoiser's pairs", "diffusers', sd-scripts' and ai-toolkit's examples", gt=0
    )
    text_learning_rate: float = setting(
        2e-5, "peak learning rate of the text encoders' pairs", "they over-fit first: a fifth of the denoiser's", gt=0
    )


class ImageScheduleSection(ScheduleSection):
    """How the learning rate changes and when the run ends."""

    epochs: int | None = setting(None, "times over the pictures", gt=0)
    steps: int | None = setting(None, "optimizer steps, instead of epochs; 1000 when neither is given", gt=0)


class ImageEvaluationSection(Section):
    """When the held-out pictures are scored: at noise and times that are the same in every run."""

    every: int | Literal["epoch"] = setting(100, "steps between evaluations, or `epoch`")
    patience: int | None = setting(
        None, "stop after this many evaluations without a better loss; nothing means never", gt=0
    )
    rows: int | None = setting(None, "score at most this many held-out pictures; nothing means all", gt=0)
    times: int = setting(4, "times at which each picture is scored, in the middle of equal parts of the range", gt=0)
    at_start: bool = setting(True, "score the base before step one", "the number every later one is compared with")
    keep: Literal["best", "last"] = setting(
        "best", "save the adapter of the lowest held-out loss, or the last one; a look grows after that loss has turned"
    )


class SamplesSection(Section):
    """Pictures drawn while training, a sheet of prompts by seeds, shown in the report."""

    every: int | Literal["epoch"] | None = setting(
        None, "steps between sheets, or `epoch`; nothing means only at the end, when there are prompts", gt=0
    )
    prompts: tuple[str, ...] = setting((), "prompts to draw; with the trigger word where it is wanted")
    before: tuple[str | tuple[str, ...], ...] = setting(
        (),
        "of an edit base: the picture that each prompt edits, or a list of those it is shown; one: of all prompts. "
        "Shown beside what was drawn",
    )
    negative: str = setting("", "negative prompt")
    seeds: tuple[int, ...] = setting((0,), "a picture of each prompt for each seed")
    steps: int = setting(20, "sampling steps", gt=0)
    guidance: float | None = setting(None, "guidance scale; nothing means the pipeline's own", ge=0)
    size: int | None = setting(None, "side in pixels; nothing means the base's own", gt=0)

    @property
    def starts(self) -> tuple[tuple[str, ...], ...]:
        """The files of `before`, those of each prompt."""
        each = tuple((one,) if isinstance(one, str) else one for one in self.before)
        return each * len(self.prompts) if len(each) == 1 else each or ((),) * len(self.prompts)


class EmaSection(Section):
    """A moving average of the adapter, which is what is scored and saved when it is on."""

    decay: float | None = setting(
        None, "share of the average kept at each step, as 0.99; nothing means off", gt=0, lt=1
    )


class ImageMemorySection(Section):
    """How much memory may be used, and what is traded for it."""

    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        "recompute activations in the backward pass: less memory, a fifth to a third slower",
        "off when one picture's activations, measured, fit",
    )
    limit_gb: float | None = setting(None, "memory this run may use, in GB; nothing means what is free", gt=0)
    free_encoders: bool = setting(
        True, "drop text encoders and VAE once everything is cached", "half of SDXL's and FLUX's memory"
    )
    offload_blocks: int = setting(
        0, "transformer blocks whose frozen weights stay on the CPU and come for their turn (GPU only)", ge=0
    )


class ImageOutputSection(OutputSection):
    """Where the run writes and in which layout. `output: DIR` is short for `output: {directory: DIR}`."""

    layout: Literal["diffusers", "kohya", "peft"] = setting(
        "diffusers", "one .safetensors file for pipelines or for UIs, or a PEFT folder of the denoiser alone"
    )
    name: str | None = setting(None, "the file's name, without .safetensors; nothing means the folder's")
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "precision of the saved tensors", "the file then is what was trained, bit for bit"
    )
    title: str = setting("", "title in the file's metadata; nothing means its name")
    author: str = setting("", "author in the file's metadata")
    description: str = setting("", "description in the file's metadata")
    licence: str = setting("", "licence in the file's metadata, as an SPDX id")


class SliderSection(Section):
    """A slider: a direction between two prompts, learned without pictures; the adapter's strength moves along it.

    Of `data` only `resolution` and `cache` are used then."""

    positive: str | None = setting(None, "what a strength of 1 moves towards, as: a very old person")
    negative: str | None = setting(None, "what a strength of -1 moves towards, as: a very young person")
    target: str = setting("", "the neutral prompt that is moved, as: a person", "whatever is drawn without a prompt")
    preserve: tuple[str, ...] = setting(
        (), "what the direction should not bring along: each is added to both prompts in turn, as [man, woman]"
    )
    guidance: float = setting(
        3.0,
        "how many times the difference of the two predictions a strength of 1 goes",
        "ai-toolkit's; the paper's code has 4",
        gt=0,
    )
    scenes: int = setting(
        24,
        "pictures that the base draws first, of the three prompts in turn: where the direction is learned",
        "8 of each",
        gt=0,
    )
    strengths: tuple[float, ...] = setting((-2.0, -1.0, 0.0, 1.0, 2.0), "columns of the sample sheets")

    @property
    def wanted(self) -> bool:
        """Whether the run is of a slider."""
        return self.positive is not None or self.negative is not None


class ImageTrainConfig(Section):
    """All of it. `base.name`, `data.pictures` (or a slider's two prompts) and `output.directory` must be given."""

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
        None, "settings for a kind of adapter, with their evidence; keys that are given win"
    )
    seed: int = setting(0, "fixes initialisation, order, noise, times and dropout", ge=0)

    @property
    def epochs(self) -> int | None:
        """Times over the pictures, or None when a number of steps decides."""
        return None if self.schedule.steps is not None else self.schedule.epochs

    @property
    def steps(self) -> int | None:
        """Optimizer steps, or None when `schedule.epochs` decides."""
        return None if self.epochs is not None else self.schedule.steps or 1000

    def recipe(self) -> dict[str, Any]:
        """What a card records: everything but where the run writes, with paths reduced to file names."""
        recipe = self.model_dump(mode="json", exclude={"output", "report"}) | {"adapter": self.adapter.recorded()}
        recipe["data"] = {k: _file_names(v) for k, v in recipe["data"].items()}
        recipe["samples"]["before"] = _file_names(recipe["samples"]["before"])
        recipe["base"]["name"] = file_name(recipe["base"]["name"])
        if not self.slider.wanted:
            del recipe["slider"]
        return recipe


def _file_names(value: Any) -> Any:
    if isinstance(value, list):
        return [_file_names(v) for v in value]
    return file_name(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Preset:
    """Settings for one kind of image adapter, which fill what the user leaves open.

    `settings`: `section.key` -> (value, its evidence; where that is a convention and no measurement, it says so)."""

    meaning: str
    settings: Mapping[str, tuple[Any, str]]


_RATE = (1e-4, "the rate of diffusers', sd-scripts' and ai-toolkit's own examples (convention)")
_PAIRED = "scale 1: alpha equal to the rank, as the same examples (convention)"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "style": Preset(
            "a look: tens of pictures of different things, captions that name the things and not the look",
            {
                "adapter.rank": (
                    16,
                    "rank 16 took over the look of 50 drawings on a FLUX base (project's measurement)",
                ),
                "adapter.alpha": (16.0, _PAIRED),
                "adapter.targets": (
                    "attention+ff",
                    "InstantStyle and B-LoRA (arXiv 2403.14572) find style in the transformer blocks",
                ),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (8, "a look is what different pictures share: one step should see several"),
                "schedule.steps": (
                    1500,
                    "20 to 50 pictures at batch 8; ai-toolkit's range is 500 to 4000 (convention)",
                ),
                "data.caption_dropout": (
                    0.1,
                    "classifier-free guidance needs the empty prompt (arXiv 2207.12598: 10-20%)",
                ),
                "data.flip": (True, "a look is the same in the mirror; twice the pictures"),
                "ema.decay": (0.99, "ai-toolkit's value (convention); the average of the last 100 steps"),
            },
        ),
        "subject": Preset(
            "one character, person or animal: 5 to 20 pictures, with a trigger word and a class prompt",
            {
                "adapter.rank": (16, "diffusers' DreamBooth guides use 4 to 32 (convention)"),
                "adapter.alpha": (16.0, _PAIRED),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (2, "few pictures: more steps rather than larger ones"),
                "schedule.steps": (800, "DreamBooth (arXiv 2208.12242): about 1000 steps; its guides: 800 for faces"),
                "data.class_count": (100, "DreamBooth's prior preservation; diffusers' default is 100 class pictures"),
                "data.class_weight": (1.0, "DreamBooth's λ = 1 (arXiv 2208.12242)"),
                "data.flip": (False, "faces and marks are not symmetric"),
                "ema.decay": (0.99, "ai-toolkit's value (convention); few pictures make single steps noisy"),
            },
        ),
        "product": Preset(
            "one object whose shape, colours and writing must stay: 10 to 30 pictures, best with loss masks",
            {
                "adapter.rank": (32, "detail such as writing needs more directions than a look (convention)"),
                "adapter.alpha": (32.0, _PAIRED),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (2, "few pictures: more steps rather than larger ones"),
                "schedule.steps": (1500, "as subject, longer for the finer detail (convention)"),
                "data.masks": ("auto", "with a mask the background is not learned (kohya, OneTrainer: masked loss)"),
                "data.flip": (False, "writing in the mirror is wrong"),
                "data.crop": ("center", "an object cut off at random teaches cut-off objects"),
                "ema.decay": (0.99, "ai-toolkit's value (convention); few pictures make single steps noisy"),
            },
        ),
    }
)


def image_reference() -> str:
    """docs/reference/image-config.md; a test compares them."""
    command = "python -m veneer.train.config.image > docs/reference/image-config.md"
    return reference(ImageTrainConfig, command, "Configuration for pictures") + _preset_tables()


def _preset_tables() -> str:
    out = ["", "### The presets", ""]
    for name, preset in PRESETS.items():
        out += [f"**{name}**: {preset.meaning}", "", "| key | value | evidence |", "| --- | --- | --- |"]
        out += [f"| `{key}` | `{_yaml(value)}` | {because} |" for key, (value, because) in preset.settings.items()]
        out.append("")
    return "\n".join(out)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(image_reference(), end="")
