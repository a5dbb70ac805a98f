"""Counts of an image training step, from one forward pass on the meta device.

    counts = image_counts(config, ImageLoad(1, 1024, 1024, rank=16))   parameters, pairs, saved values, operations

diffusers builds the denoiser on the meta device, and a forward pass records the input shapes of its matrices
and attentions. The number of values that a block saves is estimated as the number of output values of its
matrices, times a coefficient of the model family, plus the input values of the matrices with a LoRA pair.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from veneer.errors import ConfigError, counted, quoted
from veneer.models.config import PLANNED_DENOISERS
from veneer.models.image.families import EDITING, PLANNED_FAMILIES, TARGET_WORDS, Editing, denoiser_family
from veneer.models.loading import build_errors
from veneer.plan.memory import Counts, RunLoad
from veneer.plan.shape import PAIRS, PairForm

_KEPT = {"flux": 1.35, "flux2": 1.29, "qwen-image": 1.33, "sd3": 1.8, "sdxl": 0.95, "z-image": 2.9}
"""Values saved for a family's linear layers, per value of their outputs.

The values are inputs of norms, q and k before and after rotation, and inputs of activation functions. SD3 and
Z-Image also save q and k in float32. The numbers are fitted to what autograd saves for a small denoiser of
each family with LoRA pairs on its attention layers (tests/plan/test_image.py)."""


@dataclass(frozen=True)
class ImageLoad(RunLoad):
    """The images in a micro-batch, and how they are trained.

    targets: words of TARGET_WORDS, or patterns.
    text_tokens: tokens per prompt; None for the base's maximum.
    before: number of source images per image, for editing. Each has the size of the image.
    form: form of the adapter's pairs.
    blocks: number of blocks in the denoiser."""

    pictures: int = 1
    height: int = 1024
    width: int = 1024
    targets: str | tuple[str, ...] = field(default="attention", kw_only=True)
    text_tokens: int | None = field(default=None, kw_only=True)
    before: int = field(default=0, kw_only=True)
    form: PairForm = field(default=PAIRS, kw_only=True)
    blocks: int = field(default=0, kw_only=True)

    @property
    def size(self) -> int:
        return self.pictures


@dataclass(frozen=True)
class _Weight:
    """A matrix or convolution of a denoiser.

    adapted: whether an adapter targets it.
    shape: (out, in) or (out, in, k, k).
    positions: number of output positions.
    inputs: number of input values.
    new: whether no earlier module reads the same input.
    trained: whether an adapted module precedes it, so that its input needs a gradient.
    block: index of the block, or None outside the blocks."""

    adapted: bool
    shape: tuple[int, ...]
    positions: int
    inputs: int
    new: bool
    trained: bool
    block: int | None


@dataclass
class _Forward:
    """Records of one forward pass of `model` on one image.

    attention: operations of all attentions.
    norms: values that group norms receive, by block.
    blocks: parameters of each block.
    entering: values that blocks receive."""

    model: Any
    weights: list[_Weight] = field(default_factory=list)
    attention: float = 0.0
    norms: dict[int | None, int] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    entering: int = 0


Config = Mapping[str, Any]


def kind_of(config: Config) -> str:
    """Return veneer's name for a denoiser's family, or else its diffusers class name."""
    named = str(config.get("_class_name"))
    return str(config.get("model_type") or PLANNED_DENOISERS.get(named, named))


def is_denoiser(config: Config) -> bool:
    """Return whether `veneer plan` supports the denoiser of this config."""
    return kind_of(config) in PLANNED_FAMILIES


def _editing(config: Config) -> list[Editing]:
    """Return the editing modes of models that use this denoiser.

    Only modes that agree with the config on guidance embeddings are included."""
    modes = [EDITING[name] for name in PLANNED_FAMILIES[kind_of(config)].editors]
    return [mode for mode in modes if mode.guided == bool(config.get("guidance_embeds"))]


def image_counts(config: Config, load: ImageLoad) -> Counts:
    """Return the counts of a micro-batch.

    config: the denoiser's config, with a `model_type` of PLANNED_FAMILIES or a diffusers class.

    Raises ConfigError for an unknown denoiser, for values that diffusers rejects, and for more source images
    than the model supports; TargetError for targets that match nothing."""
    kind = kind_of(config)
    if kind not in PLANNED_FAMILIES:
        message = f"veneer plan does not know the denoiser {quoted(kind)}"
        raise ConfigError(message, fix=f"it knows {', '.join(sorted(PLANNED_FAMILIES))}")
    most = max((mode.references for mode in _editing(config)), default=0)
    if load.before > most:
        takes = f"takes at most {counted(most, 'picture')} per edit" if most else "edits no pictures"
        fix = "leave some out, or plan for FLUX.2, which takes the most"
        fix = fix if most else "leave them out, or plan for FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit"
        raise ConfigError(f"this base {takes}, but the plan has {load.before}", where=f"{kind}'s config", fix=fix)
    text = load.text_tokens or int(config.get("text_tokens") or sum(PLANNED_FAMILIES[kind].readers.values()))
    fields = json.dumps(dict(config), sort_keys=True, default=str)
    targets = (load.targets,) if isinstance(load.targets, str) else load.targets
    per_picture = _image_counts(fields, (load.height, load.width, text, load.before), targets, load.rank, load.form)
    n = load.pictures
    return replace(
        per_picture,
        saved=n * per_picture.saved,
        inputs=n * per_picture.inputs,
        block=n * per_picture.block,
        adapted=n * per_picture.adapted,
        forward=n * per_picture.forward,
        backward=n * per_picture.backward,
        attention=n * per_picture.attention,
    )


@functools.lru_cache(maxsize=256)
def _image_counts(
    fields: str, image: tuple[int, int, int, int], target_words: tuple[str, ...], rank: int, form: PairForm
) -> Counts:
    """Return the counts of one image.

    image: (height, width, text tokens, source images)."""
    forward, share = _forward(fields, *image, target_words), _KEPT[kind_of(json.loads(fields))]
    parameters = sum(p.numel() for p in forward.model.parameters())
    counts = Counts(
        kind="image",
        parameters=parameters,
        buffers=sum(t.numel() for t in forward.model.state_dict().values()) - parameters,
        blocks=forward.blocks,
        inputs=float(forward.entering),
        forward=forward.attention,
        backward=2 * forward.attention,
        attention=forward.attention,
        # diffusers calls elementwise operations between products, in proportion to the saved values per product
        calls=share * sum(weight.new * (1 + weight.trained) for weight in forward.weights) / 2,
    )
    saved = {block: float(values) for block, values in forward.norms.items()}
    for weight in forward.weights:
        elements, positions = math.prod(weight.shape), weight.positions
        counts.forward += 2.0 * positions * elements
        counts.backward += 2.0 * positions * elements * weight.trained
        if linear := len(weight.shape) == 2:
            counts.matrices += elements
            counts.rows += weight.shape[0]
            counts.largest = max(counts.largest, elements)
        values = share * positions * weight.shape[0] if linear else weight.new * weight.inputs
        if weight.adapted:
            pair = form.costs(weight.shape, rank)
            counts.trainable += pair.parameters
            counts.forward += positions * pair.forward
            counts.backward += positions * (pair.operations - pair.forward)
            counts.delta_values += pair.delta_values
            counts.adapted += positions * weight.shape[0] + weight.new * weight.inputs
            if linear:
                values += positions * pair.rank + weight.new * weight.inputs
            else:  # an adapter's convolutions A and B run in float32, on copies of their inputs
                values += 2 * positions * (weight.shape[1] + pair.rank)
        saved[weight.block] = saved.get(weight.block, 0.0) + values
    counts.saved = sum(saved.values())
    counts.block = max((values for block, values in saved.items() if block is not None), default=0.0)
    return counts


@functools.lru_cache(maxsize=16)
def _forward(fields: str, height: int, width: int, text: int, before: int, target_words: tuple[str, ...]) -> _Forward:
    """Record a forward pass of a denoiser on one image, on the meta device."""
    config = json.loads(fields)
    kind = kind_of(config)
    fix = "provide the full config.json; the only U-Nets that can be planned are SD1.5's and SDXL's"
    with build_errors("diffusers cannot build and call a denoiser", where=f"{kind}'s config", fix=fix):
        return _record_forward(config, kind, target_words, height, width, text, before)


def _record_forward(
    config: Config, kind: str, target_words: tuple[str, ...], height: int, width: int, text: int, before: int
) -> _Forward:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    from veneer.core.adapter import LoraSpec
    from veneer.core.targets import resolve_targets
    from veneer.models.image.files import meta_denoiser
    from veneer.models.image.memory import blocks_of
    from veneer.models.image.predict import Conditioning, predict
    from veneer.models.loading import loading

    classname = PLANNED_FAMILIES[kind].classname
    model = meta_denoiser(classname, config).requires_grad_(False)
    spec = LoraSpec(targets=tuple(TARGET_WORDS.get(word, word) for word in target_words))
    targets = {id(model.get_submodule(target.module_name)) for target in resolve_targets(model, spec)}
    fields = model.config
    row = denoiser_family(classname, fields) or PLANNED_FAMILIES[kind]
    step = int(config.get("vae_scale", 8)) * (2 if row.patched else 1)
    channels = fields["in_channels"] // (4 if row.packed else 1)
    text_width = fields.get("joint_attention_dim") or fields.get("cross_attention_dim") or fields["cap_feat_dim"]
    pooled = fields.get("pooled_projection_dim")
    if row.time_ids:
        pooled = fields["projection_class_embeddings_input_dim"] - 6 * fields["addition_time_embed_dim"]
    sides = [(height, width)] * (1 + before)
    mode = next((mode for mode in _editing(config) if mode.references >= before > 0), None)
    if mode is not None and mode.encoded:
        # Source images have this size, whatever the size of the images that the run trains on. The text encoder
        # reads each source image as tokens of 28 × 28 pixels.
        sides[1:] = [(math.isqrt(mode.encoded),) * 2] * before
        text += before * (math.isqrt(mode.read) // 28) ** 2

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    blocks = blocks_of(model)
    forward = _Forward(model, blocks=[sum(p.numel() for p in block.parameters()) for block in blocks])
    block_of = {id(module): i for i, block in enumerate(blocks) for module in block.modules()}
    read, entered = dict[int, Tensor](), dict[int, Tensor]()

    def is_new(tensor: Tensor, visited: dict[int, Tensor]) -> bool:
        return id(tensor) not in visited and visited.setdefault(id(tensor), tensor) is tensor

    def on_weight(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight = inputs[0], module.weight
        new, block = is_new(x, read), block_of.get(id(module))
        if isinstance(module, nn.GroupNorm):
            forward.norms[block] = forward.norms.get(block, 0) + new * x.numel()
            return
        adapted, shape, positions = id(module) in targets, tuple(weight.shape), output.numel() // weight.shape[0]
        forward.weights.append(_Weight(adapted, shape, positions, x.numel(), new, x.requires_grad, block))
        output.requires_grad_(adapted or output.requires_grad)

    def on_block(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        forward.entering += sum(x.numel() for x in tensors if x.ndim > 2 and is_new(x, entered))

    class Attention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            arguments = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
            if func is functional.scaled_dot_product_attention:
                forward.attention += 4.0 * arguments["query"].numel() * arguments["key"].shape[-2]
            return func(*args, **(kwargs or {}))

    for block in blocks:
        block.register_forward_pre_hook(on_block, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
            module.register_forward_hook(on_weight)
    base: Any = SimpleNamespace(denoiser=model, dtype=torch.float32, row=row, short_name=kind)
    mask = None if row.mask is None else torch.ones(1, text)
    prompt = Conditioning(meta(1, text, text_width), None if pooled is None else meta(1, pooled), mask)
    latents, *references = [meta(1, channels, h // step, w // step) for h, w in sides]
    sizes = meta(1, 6) if row.time_ids else None
    with torch.enable_grad(), loading(), Attention():
        predict(base, latents, meta(1), prompt, sizes=sizes, references=references)
    return forward
