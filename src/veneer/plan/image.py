"""Counts of an image base and its training step, from the shapes of the denoiser.

    counts = image_counts(config, height=1024, width=1024, rank=16)      parameters, pairs, kept values, operations
    image_memory(counts, load, device)                                   bytes by part

SD1.5's and SDXL's UNets, FLUX.1, FLUX.2, Qwen-Image, SD3 and Z-Image, from the fields of their
config.json. A block keeps the outputs of its matrices, times a coefficient of its family, and the inputs
of the matrices with a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.errors import ConfigError, counted, nearest, quoted
from veneer.models.config import PLANNED_DENOISERS
from veneer.models.image.families import EDITING, PLANNED_FAMILIES, Editing
from veneer.plan.memory import Counts, Memory, RunLoad, dtype_bytes, run_memory
from veneer.plan.pairs import PAIRS, PairForm
from veneer.plan.tables import Device
from veneer.plan.time import Work, run_work

_ATTENTION = {
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    "to_out",
}  # fmt: skip
_FEED_FORWARD = {"net.0.proj", "net.2", "proj_mlp", "proj_out", "linear_in", "linear_out", "w1", "w2", "w3"}
_CONV, _ALL_LINEAR = "conv", "all-linear"
_TARGET_ENDINGS = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION | _FEED_FORWARD,
    "attention+ff+conv": _ATTENTION | _FEED_FORWARD | {_CONV},
    _ALL_LINEAR: {_ALL_LINEAR},
}
"""Values of `adapter.targets` -> endings of module names; "conv" is all 3 × 3 convolutions."""
_KEPT = {"flux": 1.35, "flux2": 1.29, "qwen-image": 1.33, "sd3": 1.8, "sdxl": 1.15, "z-image": 2.9}
"""Values kept for a family's linear layers, relative to their outputs: inputs of norms, q and k before and
after rotation, and inputs of activation functions; SD3 and Z-Image keep q and k in float32 too. Fitted
to what autograd keeps for small denoisers of each family with pairs on attention
(tests/plan/test_image.py)."""


@dataclass(frozen=True)
class ImageLoad(RunLoad):
    """Images in a micro-batch, and how they are trained.

    targets: a key of _TARGET_ENDINGS.
    blocks: number of the denoiser's blocks.
    before: source images per image (editing), of the image's size.
    form: the adapter's form, of `rank`."""

    pictures: int = 1
    height: int = 1024
    width: int = 1024
    targets: str = field(default="attention", kw_only=True)
    blocks: int = field(default=0, kw_only=True)
    before: int = field(default=0, kw_only=True)
    form: PairForm = field(default=PAIRS, kw_only=True)


@dataclass
class ImageCounts(Counts):
    """The counts of one image.

    encoders: parameters of text encoders and VAE.
    buffers: values in the base's dtype that are not parameters but take memory."""

    encoders: int = 0
    buffers: int = 0


@dataclass
class _Walk:
    """Counts a denoiser's matrices in the order of its forward pass.

    pictures: images whose tokens are processed together: the trained image and its source images.
    share: the family's coefficient in `_KEPT`."""

    counts: ImageCounts
    targets: set[str]
    rank: int
    form: PairForm
    pictures: int
    share: float

    def small(self, parameters: int) -> None:
        """Count parameters of norms and tables."""
        self.counts.parameters += parameters

    def linear(self, name: str, n: float, a: int, b: int, *, bias: bool = True, new: bool = True) -> None:
        """Count n tokens through a matrix (b, a).

        new: whether no other count includes its input, which is kept if the matrix has a pair."""
        c = self.counts
        c.parameters += a * b + (b if bias else 0)
        c.matrices += a * b
        c.rows += b
        c.largest = max(c.largest, a * b)
        c.forward += 2 * n * a * b
        c.backward += 2 * n * a * b
        c.kept += self.share * n * b
        if name in self.targets or _ALL_LINEAR in self.targets:
            c.kept += n * (self._pair(n, (b, a)) + (a if new else 0))

    def conv(self, n: float, a: int, b: int, side: int = 3, *, kept: int = 2) -> None:
        """Count a convolution with n output positions.

        kept: how often its input is kept: by the convolution, and by the norm before it."""
        c = self.counts
        c.parameters += a * b * side * side + b
        # a pair's convolutions run in float32 on copies of their inputs
        if side > 1 and _CONV in self.targets:
            c.kept += 2 * n * (a + self._pair(n, (b, a, side, side)))
        c.forward += 2 * n * a * b * side * side
        c.backward += 2 * n * a * b * side * side
        c.kept += kept * n * a

    def _pair(self, n: float, shape: tuple[int, ...]) -> int:
        """Count the pair on a weight; return the values per token that it keeps."""
        c, costs = self.counts, self.form.beside(shape, self.rank)
        c.trainable += costs.parameters
        c.forward += costs.forward * n
        c.backward += (costs.operations - costs.forward) * n
        c.made += costs.made
        return costs.rank

    def attend(self, n: float, m: float, width: int) -> None:
        """Count attention of n queries over m keys; `width`: of all heads together."""
        self.counts.forward += 4 * n * m * width
        self.counts.backward += 8 * n * m * width

    @contextmanager
    def block(self, inputs: float) -> Iterator[None]:
        """Count everything inside as one block.

        inputs: values of this block that recomputation keeps."""
        c = self.counts
        kept, parameters = c.kept, c.parameters
        yield
        c.block = max(c.block, c.kept - kept)
        c.blocks.append(c.parameters - parameters)
        c.inputs += inputs


Config = Mapping[str, Any]


def kind_of(config: Config) -> str:
    """Return the family of a denoiser's config: veneer's name, else diffusers' class."""
    named = str(config.get("_class_name"))
    return str(config.get("model_type") or PLANNED_DENOISERS.get(named, named))


def is_denoiser(config: Config) -> bool:
    """Return whether this is the config of a denoiser that can be planned."""
    return kind_of(config) in IMAGE_FAMILIES


def _editing(config: Config) -> list[Editing]:
    """Return how models with this denoiser edit, by whether they take guidance."""
    ways = [EDITING[name] for name in PLANNED_FAMILIES[kind_of(config)].editors]
    return [way for way in ways if way.guided == bool(config.get("guidance_embeds"))]


def most_before(config: Config) -> int:
    """Return the most source images per image that can be planned for this config."""
    return max((way.references for way in _editing(config)), default=0) if is_denoiser(config) else 0


def encoded_pixels(config: Config, load: ImageLoad) -> int:
    """Return the pixels of the largest image encoded to latents.

    A reference image can have its own size, independent of the trained size."""
    before = [way.encoded for way in _editing(config)] if load.before else []
    return max([load.height * load.width, *before])


def image_counts(
    config: Config,
    *,
    height: int = 1024,
    width: int = 1024,
    rank: int = 16,
    targets: str = "attention",
    text_tokens: int | None = None,
    before: int = 0,
    form: PairForm = PAIRS,
) -> ImageCounts:
    """Return the counts of one image, with `before` source images that it edits.

    config: the denoiser's, with a `model_type` of IMAGE_FAMILIES or diffusers' class.

    Raises ConfigError for an unknown denoiser, for unknown targets, and for edits that cannot be planned."""
    kind = kind_of(config)
    if kind not in IMAGE_FAMILIES:
        what = f"veneer plan does not know the denoiser {quoted(kind)}"
        raise ConfigError(what, fix=f"it knows {', '.join(sorted(IMAGE_FAMILIES))}")
    if targets not in _TARGET_ENDINGS:
        near = nearest(targets, _TARGET_ENDINGS) or sorted(_TARGET_ENDINGS)
        raise ConfigError(f"veneer plan does not know the targets {targets!r}", fix=f"use {', '.join(near)}")
    if before > (most := most_before(config)):
        takes = f"takes at most {counted(most, 'picture')} before each" if most else "edits no pictures"
        fix = "leave some out, or plan for FLUX.2, which takes most"
        fix = fix if most else "leave them out, or plan for FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit"
        raise ConfigError(f"this base {takes}, and the plan is of {before}", where=f"{kind}'s config", fix=fix)
    c = ImageCounts(encoders=sum((config.get("encoders") or {}).values()) + int(config.get("vae") or 0))
    walk = _Walk(c, _TARGET_ENDINGS[targets], rank, form, 1 + before, _KEPT[kind])
    text = text_tokens or int(config.get("text_tokens") or sum(PLANNED_FAMILIES[kind].readers.values()))
    try:
        IMAGE_FAMILIES[kind](walk, {k: v for k, v in config.items() if v is not None}, height, width, text)
    except KeyError as error:
        raise ConfigError(
            f"the config of this {kind} denoiser has no {error.args[0]!r}",
            fix="give the whole config.json; of U-Nets those of SD1.5 and SDXL can be planned",
        ) from None
    return c


# -- transformers ------------------------------------------------------------------------------------------------------


def _places(config: Config, height: int, width: int, patch: int) -> int:
    """Return the patches of a latent.

    config.vae_scale: pixels per latent position, by default 8."""
    step = int(config.get("vae_scale", 8)) * patch
    return (height // step) * (width // step)


def _qkv(walk: _Walk, tokens: float, d: int, first: str = "to_q", *, bias: bool = True) -> None:
    walk.linear(first, tokens, d, d, bias=bias)
    for name in (first.replace("q", "k", 1), first.replace("q", "v", 1)):
        walk.linear(name, tokens, d, d, bias=bias, new=False)


def _embedders(walk: _Walk, d: int, *inputs: int, bias: bool = True) -> None:
    """Count two matrices per embedder: time, guidance, pooled text."""
    for own in inputs:
        walk.linear("embedder", 1, own, d, bias=bias)
        walk.linear("embedder", 1, d, d, bias=bias)


def _flux(walk: _Walk, config: Config, height: int, width: int, text: int) -> None:
    dim = config["attention_head_dim"]
    d, channels = config["num_attention_heads"] * dim, config["in_channels"]
    places = _places(config, height, width, 2) * walk.pictures
    n = text + places
    walk.linear("x_embedder", places, channels, d)
    walk.linear("context_embedder", text, config["joint_attention_dim"], d)
    _embedders(walk, d, 256, config["pooled_projection_dim"], *([256] if config.get("guidance_embeds") else []))
    for _ in range(config["num_layers"]):
        _two_streams(walk, places, text, d, dim)
    for _ in range(config["num_single_layers"]):
        with walk.block(n * d):
            walk.linear("norm.linear", 1, d, 3 * d)
            _qkv(walk, n, d)
            walk.small(2 * dim)
            walk.linear("proj_mlp", n, d, 4 * d, new=False)
            walk.linear("proj_out", n, 5 * d, d)
            walk.attend(n, n, d)
    walk.linear("norm_out.linear", 1, d, 2 * d)
    walk.linear("final", places, d, channels)


def _two_streams(walk: _Walk, places: int, text: int, d: int, dim: int) -> None:
    """Count a block of FLUX.1 or Qwen-Image.

    Image and text each have projections and a feed-forward; attention runs over both."""
    with walk.block((places + text) * d):
        for tokens, q, last in ((places, "to_q", "to_out.0"), (text, "add_q_proj", "to_add_out")):
            walk.linear("modulation", 1, d, 6 * d)
            _qkv(walk, tokens, d, q)
            walk.small(2 * dim)
            walk.linear(last, tokens, d, d)
            walk.linear("net.0.proj", tokens, d, 4 * d)
            walk.linear("net.2", tokens, 4 * d, d)
        walk.attend(places + text, places + text, d)


def _flux2(walk: _Walk, config: Config, height: int, width: int, text: int) -> None:
    dim = config["attention_head_dim"]
    d, channels = config["num_attention_heads"] * dim, config["in_channels"]
    wide = int(config.get("mlp_ratio", 3.0) * d)
    places = _places(config, height, width, 2) * walk.pictures
    n, time = text + places, config.get("timestep_guidance_channels", 256)
    walk.linear("x_embedder", places, channels, d, bias=False)
    walk.linear("context_embedder", text, config["joint_attention_dim"], d, bias=False)
    _embedders(walk, d, *[time] * (2 if config.get("guidance_embeds") else 1), bias=False)
    for times in (6, 6, 3):
        walk.linear("modulation", 1, d, times * d, bias=False)
    for _ in range(config["num_layers"]):
        with walk.block(n * d):
            for tokens, q, last in ((places, "to_q", "to_out.0"), (text, "add_q_proj", "to_add_out")):
                _qkv(walk, tokens, d, q, bias=False)
                walk.small(2 * dim)
                walk.linear(last, tokens, d, d, bias=False)
                walk.linear("linear_in", tokens, d, 2 * wide, bias=False)
                walk.linear("linear_out", tokens, wide, d, bias=False, new=False)
            walk.attend(n, n, d)
    for _ in range(config["num_single_layers"]):
        with walk.block(n * d):
            walk.linear("to_qkv_mlp_proj", n, d, 3 * d + 2 * wide, bias=False)
            walk.small(2 * dim)
            walk.linear("to_out", n, d + wide, d, bias=False)
            walk.attend(n, n, d)
    walk.linear("norm_out.linear", 1, d, 2 * d, bias=False)
    walk.linear("final", places, d, channels, bias=False)


def _qwen_image(walk: _Walk, config: Config, height: int, width: int, text: int) -> None:
    dim, patch, before = config["attention_head_dim"], int(config.get("patch_size", 2)), walk.pictures - 1
    d = config["num_attention_heads"] * dim
    # Source images have about a megapixel each, whatever size is generated; Qwen2.5-VL reads them too,
    # in tokens of 28 × 28.
    places = _places(config, height, width, patch) + before * _places(config, 1024, 1024, patch)
    text += before * (1024 // 28) ** 2
    walk.linear("img_in", places, config["in_channels"], d)
    walk.small(config["joint_attention_dim"])
    walk.linear("txt_in", text, config["joint_attention_dim"], d)
    _embedders(walk, d, 256)
    for _ in range(config["num_layers"]):
        _two_streams(walk, places, text, d, dim)
    walk.linear("norm_out.linear", 1, d, 2 * d)
    walk.linear("final", places, d, patch * patch * (config.get("out_channels") or config["in_channels"]))


def _sd3(walk: _Walk, config: Config, height: int, width: int, text: int) -> None:
    dim, patch, count = config["attention_head_dim"], int(config.get("patch_size", 2)), config["num_layers"]
    d = config["num_attention_heads"] * dim
    places, dual = _places(config, height, width, patch), set(config.get("dual_attention_layers") or ())
    norms = 2 * dim if config.get("qk_norm") else 0
    walk.small(patch * patch * config["in_channels"] * d + d)
    # a tenth of the total for SD3 medium
    walk.counts.buffers = d * int(config.get("pos_embed_max_size") or 0) ** 2
    walk.linear("context_embedder", text, config["joint_attention_dim"], d)
    _embedders(walk, d, 256, config["pooled_projection_dim"])
    for i in range(count):
        last = i == count - 1
        with walk.block((places + text) * d):
            walk.linear("norm1.linear", 1, d, (9 if i in dual else 6) * d)
            walk.linear("norm1_context.linear", 1, d, (2 if last else 6) * d)
            for tokens, q, out in ((places, "to_q", "to_out.0"), (text, "add_q_proj", "to_add_out")):
                _qkv(walk, tokens, d, q)
                walk.small(norms)
                if not last or q == "to_q":
                    walk.linear(out, tokens, d, d)
            walk.attend(places + text, places + text, d)
            if i in dual:
                _qkv(walk, places, d)
                walk.small(norms)
                walk.attend(places, places, d)
                walk.linear("to_out.0", places, d, d)
            for tokens in (places,) if last else (places, text):
                walk.linear("net.0.proj", tokens, d, 4 * d)
                walk.linear("net.2", tokens, 4 * d, d)
    walk.linear("norm_out.linear", 1, d, 2 * d)
    walk.linear("final", places, d, patch * patch * (config.get("out_channels") or config["in_channels"]))


def _z_image(walk: _Walk, config: Config, height: int, width: int, text: int) -> None:
    d, channels = config["dim"], config["in_channels"]
    wide, time, refiners = int(d / 3 * 8), min(d, 256), config.get("n_refiner_layers", 2)
    # images and texts are padded to multiples of 32 tokens
    places, words = (-(-n // 32) * 32 for n in (_places(config, height, width, 2), text))
    walk.linear("x_embedder", places, 4 * channels, d)
    walk.small(config["cap_feat_dim"] + 2 * d)
    walk.linear("cap_embedder", words, config["cap_feat_dim"], d)
    walk.linear("embedder", 1, 256, 1024)
    walk.linear("embedder", 1, 1024, time)
    stages = ((places, refiners, True), (words, refiners, False), (places + words, config["n_layers"], True))
    for tokens, blocks, modulated in stages:
        for _ in range(blocks):
            with walk.block(tokens * d):
                walk.small(4 * d + 2 * (d // config["n_heads"]))
                if modulated:
                    walk.linear("adaLN_modulation", 1, time, 4 * d)
                _qkv(walk, tokens, d, bias=False)
                walk.attend(tokens, tokens, d)
                walk.linear("to_out.0", tokens, d, d, bias=False)
                walk.linear("w1", tokens, d, wide, bias=False)
                walk.linear("w3", tokens, d, wide, bias=False, new=False)
                walk.linear("w2", tokens, wide, d, bias=False)
    walk.linear("norm_out", 1, time, d)
    walk.linear("final", places, d, 4 * channels)


# -- U-Nets: SD1.5 and SDXL --------------------------------------------------------------------------------------------


def _unet(walk: _Walk, config: Config, height: int, width: int, text: int) -> None:
    widths = list(config["block_out_channels"])
    depth = _levels(config.get("transformer_layers_per_block", 1), widths)
    cross, per, channels = config["cross_attention_dim"], config["layers_per_block"], config["in_channels"]
    first, last = widths[0], len(widths) - 1
    time = 4 * first
    place = [_places(config, height, width, 1 << i) for i in range(len(widths))]
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    walk.conv(place[0], channels, first)
    pooled = config.get("projection_class_embeddings_input_dim")
    for inputs in (first, *([pooled] if pooled else [])):
        walk.linear("embedder", 1, inputs, time)
        walk.linear("embedder", 1, time, time)
    # SD1.5's projections around a transformer are 1 × 1 convolutions
    flat = "transformer_layers_per_block" in config

    def transformer(level: int) -> None:
        _transformer(walk, place[level], widths[level], cross, depth[level], text, flat)

    skips, at = [first], first
    for i, out in enumerate(widths):
        for _ in range(per):
            _resnet(walk, place[i], at, out, time)
            at = out
            if attends[i]:
                transformer(i)
            skips.append(out)
        if i < last:
            walk.conv(place[i + 1], out, out, kept=4)  # of the four times as many positions before it
            skips.append(out)
    _resnet(walk, place[last], at, at, time)
    transformer(last)
    _resnet(walk, place[last], at, at, time)
    for i in reversed(range(len(widths))):
        out = widths[i]
        for _ in range(per + 1):
            _resnet(walk, place[i], at + skips.pop(), out, time)
            at = out
            if attends[i]:
                transformer(i)
        if i > 0:
            walk.conv(place[i - 1], out, out, kept=1)
    walk.small(2 * first)
    walk.conv(place[0], first, channels)


def _levels(value: Any, widths: list[int]) -> list[int]:
    """Return one value per level; a config can have one value for all."""
    return list(value) if isinstance(value, list | tuple) else [value] * len(widths)


def _resnet(walk: _Walk, n: int, a: int, b: int, time: int) -> None:
    """Count norm-silu, convolution, norm-silu, convolution; each keeps its input."""
    with walk.block(n * a):
        walk.small(2 * a + 2 * b)
        walk.conv(n, a, b)
        walk.linear("time_emb_proj", 1, time, b)
        walk.conv(n, b, b)
        if a != b:
            walk.conv(n, a, b, 1, kept=0)


def _transformer(walk: _Walk, n: int, d: int, cross: int, depth: int, text: int, flat: bool) -> None:
    def around(name: str) -> None:
        if flat:
            walk.linear(name, n, d, d)
        else:
            walk.conv(n, d, d, 1)

    walk.small(2 * d)
    around("proj_in")
    for _ in range(depth):
        with walk.block(n * d):
            walk.small(6 * d)
            _qkv(walk, n, d, bias=False)
            walk.attend(n, n, d)
            walk.linear("to_out.0", n, d, d, new=False)
            walk.linear("to_q", n, d, d, bias=False)
            walk.linear("to_k", text, cross, d, bias=False, new=False)
            walk.linear("to_v", text, cross, d, bias=False, new=False)
            walk.attend(n, text, d)
            walk.linear("to_out.0", n, d, d, new=False)
            walk.linear("net.0.proj", n, d, 8 * d)
            walk.linear("net.2", n, 4 * d, d)
    around("proj_out_of_transformer")


IMAGE_FAMILIES: dict[str, Callable[[_Walk, Config, int, int, int], None]] = {
    "flux": _flux,
    "flux2": _flux2,
    "qwen-image": _qwen_image,
    "sd3": _sd3,
    "sdxl": _unet,
    "z-image": _z_image,
}


# -- memory and time ---------------------------------------------------------------------------------------------------


def image_memory(counts: ImageCounts, load: ImageLoad, device: Device) -> Memory:
    """Return bytes by part, for training on cached latents and texts."""
    found = run_memory(counts, load, device, "image", units=load.pictures)
    return replace(found, weights=found.weights + counts.buffers * dtype_bytes(load.dtype))


def image_work(counts: ImageCounts, load: ImageLoad, device: Device) -> Work:
    """Return operations and bytes of a micro-batch, forward and backward."""
    return run_work(counts, load, device, load.pictures)
