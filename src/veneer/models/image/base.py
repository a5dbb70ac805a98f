"""Load an image base: its diffusers components, pipelines, and loading decisions.

    base = load_image("catalogue-flux")          a built-in base
    base = load_image("org/name")                a hub id
    base = load_image("./sdxl")                  a diffusers directory with model_index.json
    base = load_image("sdxl.safetensors", config="./sdxl")      original weights in one file

The components are loaded once. All pipelines share them, and so does `base.model`, the module tree that
adapters attach to. Module names in the tree are canonical (`unet.…`, `transformer.…`,
`text_encoder.text_model.…`) and do not depend on the transformers version. Weights are frozen. Device and
dtype are chosen as in `models.text`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from veneer.errors import BaseError, ConfigError
from veneer.models.builtin import BUILTIN, PACKAGED
from veneer.models.device import limit_threads
from veneer.models.image.families import EDITING, FAMILIES, Editing, ImageFamily, topology_name
from veneer.models.image.files import LoadedParts, control_of, read_directory, read_single_file, require_diffusers
from veneer.models.loading import errors_only, uncollected
from veneer.models.patching import widen_products
from veneer.models.sources import find_base, short_name
from veneer.ops.quantized import Quantized

PipelineKind = Literal["text", "image", "inpaint", "edit"]
_ControlNet = nn.Module
"""A diffusers ControlNet for a U-Net, Flux, SD3 or QwenImage."""


@dataclass
class ImageBase:
    """A frozen image model.

    `family`: the family's name in formats.topology; `row`: the family's row in families.py. `model`: the
    module tree that adapters attach to, with canonical names. `parts`: the diffusers components by name,
    shared by `model` and every pipeline. `prediction`: what the denoiser predicts. `size`: default width and
    height of a picture in pixels. `notes`: messages to the user about loading, one sentence each.
    `quantized`: the format of the denoiser's quantized weights, or None."""

    name: str
    family: str
    model: nn.Module = field(repr=False)
    parts: dict[str, Any] = field(repr=False)
    directory: Path
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    dtype_reason: str
    prediction: Literal["epsilon", "v", "flow"]
    size: int
    pipelines: dict[str, str] = field(default_factory=dict, repr=False)
    """Kind -> pipeline class.

    Classes named in the directory's index override the family's classes."""
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    """Pipeline arguments from the directory's index."""
    notes: tuple[str, ...] = ()
    quantized: str | None = None
    _scale: int = field(default=8, repr=False)
    _pipelines: dict[str, Any] = field(default_factory=dict, repr=False)
    _released: set[str] = field(default_factory=set, repr=False)

    @property
    def row(self) -> ImageFamily:
        return FAMILIES[self.family.removesuffix("-large")]

    @property
    def short_name(self) -> str:
        return short_name(self.name)

    @property
    def denoiser(self) -> Any:
        """The denoiser: a U-Net or a transformer."""
        return self.parts[self.row.denoiser]

    @property
    def few_steps(self) -> bool:
        """Whether the base is distilled to generate in few steps without guidance.

        True for FLUX.1 schnell and for a distilled FLUX.2 klein."""
        schnell = self.row.schnell is not None and not self.denoiser.config.guidance_embeds
        return schnell or bool(self.settings.get("is_distilled"))

    @property
    def editing(self) -> Editing:
        """How the base edits pictures. `references` is 0 for a base that cannot edit."""
        return EDITING[self.pipelines["edit"]] if "edit" in self.pipelines else Editing(0)

    @property
    def references(self) -> int:
        """Maximum number of reference pictures; 0 for a base that cannot edit."""
        return self.editing.references

    @property
    def only_edits(self) -> bool:
        """Whether the base can only edit, like FLUX.1 Kontext and Qwen-Image-Edit.

        False for FLUX.2, which also generates from prompts."""
        return "edit" in self.pipelines and "edit" not in self.row.pipelines

    @property
    def reads_references(self) -> bool:
        """Whether prompts are encoded together with references (Qwen-Image-Edit)."""
        return self.editing.read > 0

    @property
    def vae_scale(self) -> int:
        """Width and height of one latent in pixels."""
        return self._scale

    @property
    def unit(self) -> int:
        """The width and height of a picture must be multiples of this number of pixels."""
        return self._scale * self.row.patch

    def part(self, name: str) -> Any:
        """Return the component with this name. Raises BaseError if the base lacks it."""
        part = self.parts.get(name)
        if part is None:
            freed = name in self._released
            message = (
                f"the {name} of {self.name} was released to free memory" if freed else f"{self.name} has no {name}"
            )
            raise BaseError(message, where=str(self.directory), fix="load the base again" if freed else None)
        return part


class Components(nn.Module):
    """The module tree that adapters attach to.

    Its children are the components, with canonical names."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            canonical = type(part).__name__ != "CLIPTextModel" or hasattr(part, "text_model")
            self.add_module(name, part if canonical else _TextModelLevel(part))


class _TextModelLevel(nn.Module):
    """Adds the level `text_model`, which module names in CLIP adapter files contain.

    transformers 5 removed this level from CLIPTextModel."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model


@uncollected()
def load_image(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: Literal["nf4", "int8"] | None = None,
    config: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> ImageBase:
    """Find and load an image base in eval mode, with all weights frozen.

    `quantize`: nf4 (4 bits) or int8, the format for the linear weights of the denoiser and of large text
    encoders. `config`: for a single file, the diffusers directory with model_index.json and the configs.
    Raises BaseError (not found, incomplete, unknown family, weights that do not match the configs),
    ConfigError (an unknown dtype, device or quantization), ResourceError (not enough memory),
    MissingExtraError."""
    require_diffusers()
    if quantize not in (None, "nf4", "int8"):
        raise ConfigError(f"{quantize!r} is not a known quantization", fix="nf4 or int8")
    if name in BUILTIN:
        raise BaseError(f"{name} is a text base", fix=f"an image base: {', '.join(PACKAGED)}, a directory, a hub id, …")
    path = find_base(name, say=say)
    limit_threads()
    if path.is_file():
        read = read_single_file(path, config, dtype, device, quantize)
    elif config is not None:
        raise ConfigError("config is only for a single-file base; a directory contains its own", where=str(path))
    else:
        read = read_directory(path, dtype, device, quantize)
    return _base(name, path, read, quantize)


def _base(name: str, path: Path, read: LoadedParts, quantize: str | None) -> ImageBase:
    row = read.family
    for part in read.parts.values():
        if isinstance(part, nn.Module):
            part.eval()
            part.requires_grad_(False)
            widen_products(part)
    trainable = {n: read.parts[n] for n in (row.denoiser, *row.encoders) if read.parts.get(n) is not None}
    vae, denoiser = read.parts["vae"], read.parts[row.denoiser]
    scale = vae_scale(vae)
    return ImageBase(
        name=name,
        family=topology_name(row, denoiser.config),
        model=Components(trainable).eval(),
        parts=read.parts,
        directory=path,
        fingerprint=read.fingerprint,
        dtype=read.dtype,
        device=read.device,
        dtype_reason=read.dtype_reason,
        prediction=prediction_of(row, read.parts["scheduler"], path),
        size=default_size(denoiser, vae, scale),
        pipelines={**row.pipelines, **read.pipelines},
        settings=read.settings,
        notes=tuple(read.notes),
        quantized=quantize or next((p.stored.kind for p in denoiser.parameters() if isinstance(p, Quantized)), None),
        _scale=scale,
    )


def vae_scale(vae: Any) -> int:
    """Return the width and height of one latent in pixels."""
    if hasattr(vae, "temperal_downsample"):  # Qwen-Image's spelling
        return int(2 ** len(vae.temperal_downsample))
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def default_size(denoiser: Any, vae: Any, scale: int) -> int:
    """Return the default width and height of a picture in pixels.

    The value comes from the denoiser's config (U-Nets, SD3) or from the VAE's config (FLUX), and is 1024 if
    neither config has one."""
    sample_size = denoiser.config.get("sample_size")
    if sample_size:
        return int(sample_size if isinstance(sample_size, int) else sample_size[0]) * scale
    return int(vae.config.get("sample_size") or 1024)


_LONGEST = 8


def aspect_problem(width: int, height: int) -> str:
    """Return why a reference picture is too narrow, or "".

    FLUX.2's pipelines allow aspect ratios up to 8 to 1, Qwen2.5-VL up to 200 to 1. Without a limit, a picture
    one pixel wide would be scaled to millions of pixels, because each side is rounded up to whole units."""
    if max(width, height) <= _LONGEST * min(width, height):
        return ""
    return f"{width}×{height} pixels; one side can be at most {_LONGEST} times as long as the other"


def size_in_units(unit: int, side: int, ratio: float) -> tuple[int, int]:
    """Return (width, height) in multiples of `unit`, with about side² pixels.

    width / height is as close to `ratio` as possible."""

    def units(length: float) -> int:
        return max(unit, round(length / unit) * unit)

    long = max(ratio, 1 / ratio)
    nearest_units = units(side / long**0.5)
    # Of the candidates for the short side, choose the one whose aspect ratio is closest to `ratio`.
    candidates = (nearest_units, nearest_units + unit, max(unit, nearest_units - unit))
    short = min(candidates, key=lambda s: abs(units(s * long) / s / long - 1))
    return (units(short * ratio), short) if ratio >= 1 else (short, units(short / ratio))


def prediction_of(row: ImageFamily, scheduler: Any, path: Path) -> Literal["epsilon", "v", "flow"]:
    """Return what the denoiser predicts, according to its family and the scheduler.

    Raises BaseError for an unknown prediction type."""
    if row.flow:
        return "flow"
    stated = scheduler.config.get("prediction_type", "epsilon")
    if stated not in ("epsilon", "v_prediction"):
        message = f"the scheduler says prediction_type {stated!r}; only epsilon and v_prediction are supported"
        raise BaseError(message, where=str(path / "scheduler"))
    return "v" if stated == "v_prediction" else "epsilon"


# -- pipelines -------------------------------------------------------------------------------------------------------


def pipeline(base: ImageBase, kind: PipelineKind = "text", controls: Sequence[_ControlNet] = ()) -> Any:
    """Return diffusers' pipeline of this kind, built from the base's components.

    Pipelines without ControlNets are cached by kind. No weights are copied: an adapter attached to
    `base.model` acts in every pipeline. Pipelines share one scheduler; set `pipe.scheduler` to use another.
    Raises BaseError if diffusers has no such pipeline for the family, or if a component was released."""
    import diffusers

    if kind in base._pipelines and not controls:
        return base._pipelines[kind]
    table = base.row.controlled if controls else base.pipelines
    if kind not in table:
        task = {"text": "text-to-image", "image": "image-to-image", "inpaint": "inpainting", "edit": "editing"}[kind]
        having = ", ".join(table) or "none"
        message = f"diffusers has no {task} pipeline for {base.row.label}" + (" with a ControlNet" if controls else "")
        raise BaseError(
            message, where=base.name, fix=f"available kinds{' with a ControlNet' if controls else ''}: {having}"
        )
    for name in sorted(base._released):
        base.part(name)  # raises BaseError
    with errors_only():  # Without torchvision, the import logs a warning.
        cls = getattr(diffusers, table[kind])
    parts: dict[str, Any] = dict(base.parts)
    for control in controls:
        if type(control).__name__ != base.row.control:
            raise BaseError(f"{type(control).__name__} is not a ControlNet for {base.row.label}", where=base.name)
    if controls:
        parts["controlnet"] = controls[0] if len(controls) == 1 else _multi_control(controls)
    with errors_only():
        pipe = cls(**_accepted_arguments(cls, {**parts, **base.settings, **base.row.settings}))
    pipe.set_progress_bar_config(disable=True)
    if not controls:
        base._pipelines[kind] = pipe
    return pipe


def _accepted_arguments(cls: type, available: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the class accepts, with None for missing components."""
    import inspect

    empty = inspect.Parameter.empty
    parameters = inspect.signature(cls).parameters
    missing = {n: None for n, p in parameters.items() if p.default is empty and n not in available}
    return missing | {n: v for n, v in available.items() if n in parameters}


def _multi_control(controls: Sequence[_ControlNet]) -> Any:
    """Combine ControlNets in diffusers' Multi class, which sums their residuals."""
    from diffusers.models import controlnets

    class_name = type(controls[0]).__name__
    return getattr(controlnets, class_name.replace("ControlNetModel", "MultiControlNetModel"))(list(controls))


def load_control(name: str | Path, base: ImageBase) -> _ControlNet:
    """Load a ControlNet by built-in name, directory or hub id.

    The ControlNet is frozen and has the base's dtype and device. Raises BaseError if the ControlNet is for
    another family (which the error names), or if its sizes differ from the base's."""
    return control_of(str(name), base.row, base.parts[base.row.denoiser], base.dtype, base.device)


def text_length(base: ImageBase) -> int:
    """Return the maximum number of prompt tokens that the denoiser attends to.

    A tokenizer can have a lower limit than the family."""
    return _limit(base, next(iter(base.row.readers)))


def text_settings(base: ImageBase) -> dict[str, int]:
    """Return the prompt length argument for pipelines and `encode_prompt`."""
    return {} if base.row.denoiser == "unet" else {"max_sequence_length": text_length(base)}


def _limit(base: ImageBase, name: str) -> int:
    length = base.row.readers[name]
    if base.few_steps and base.row.schnell is not None:
        length = base.row.schnell
    return int(min(length, getattr(base.parts.get(name), "model_max_length", None) or length))


def readers(base: ImageBase) -> list[tuple[Any, int]]:
    """Return the tokenizers whose tokens the denoiser attends to, with token limits."""
    out = []
    for name in base.row.readers:
        encoder = name.replace("tokenizer", "text_encoder")
        if base.parts.get(name) is not None and (base.parts.get(encoder) is not None or encoder in base._released):
            out.append((base.parts[name], _limit(base, name)))  # T5 is optional in SD3
    return out


def release(base: ImageBase, *names: str) -> None:
    """Delete text encoders or the VAE, and free their memory.

    Call this after their outputs are cached. Later use of a released component raises BaseError. Raises
    ConfigError for the denoiser and for a component that the base does not have."""
    for name in names:
        if name == base.row.denoiser or not isinstance(base.parts.get(name), nn.Module):
            releasable = [n for n, p in base.parts.items() if isinstance(p, nn.Module) and n != base.row.denoiser]
            raise ConfigError(f"{name!r} cannot be released from {base.name}", fix=f"one of {', '.join(releasable)}")
    for name in names:
        base.parts[name] = None
        if hasattr(base.model, name):
            delattr(base.model, name)
        base._released.add(name)
    base._pipelines.clear()
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
