"""An image base and a training step on pictures, counted by walking its denoiser as its forward pass does.

    counts = image_counts(config, height=1024, width=1024, rank=16)      parameters, pairs, kept values, operations
    image_memory(counts, load, device)                                   bytes by part

SD1.5's and SDXL's UNets, FLUX.1, FLUX.2, Qwen-Image, SD3 and Z-Image, from the fields of their config.json. What is
kept for the backward pass is what the functions of ops save on the CPU, and torch's on CUDA; nothing is kept before the
first pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import ConfigError, counted, nearest, quoted
from veneer.models.config import PLANNED_DENOISERS
from veneer.models.image.families import EDITING, PLANNED_FAMILIES, Editing
from veneer.plan.memory import CPU_PROCESS, CPU_ROUNDING, CUDA_CONTEXT, CUDA_ROUNDING, Memory, dtype_bytes
from veneer.plan.pairs import PAIRS, PairCosts, PairForm
from veneer.plan.tables import Device
from veneer.plan.time import Work

_ATTENTION = {
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    "to_out",
}  # fmt: skip
_FEED_FORWARD = {"net.0.proj", "net.2", "proj_mlp", "proj_out", "linear_in", "linear_out", "w1", "w2", "w3"}
_WORKING = 2.0
"""What a block's backward pass makes on its way, over what the block kept: measured on bases of 8 million parameters,
where q and k in float32 and the gradients of a feed-forward's halves come to that."""
_DIFFUSERS_BYTES = 45_000_000
"""Resident memory of diffusers, on top of the process that a calibration with text finds."""
_CONV, _ALL_LINEAR = "conv", "all-linear"
_TARGET_ENDINGS = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION | _FEED_FORWARD,
    "attention+ff+conv": _ATTENTION | _FEED_FORWARD | {_CONV},
    _ALL_LINEAR: {_ALL_LINEAR},
}
"""The words of `adapter.targets`, by the ends of the modules' names; "conv" for all 3 × 3 convolutions."""


@dataclass(frozen=True)
class ImageLoad:
    """Pictures in a micro-batch, and how they are trained. `targets`: a key of TARGET_ENDINGS. `offload`: how many of
    the denoiser's `blocks`, counted from the last, stay in CPU memory until needed. `stays`: text encoders and VAE stay
    in memory. `bare`: forwards of the base alone per step, besides the trained forward. `before`: source images per
    picture (editing), of the picture's size. `form`: the adapter's form, of `rank`."""

    pictures: int = 1
    height: int = 1024
    width: int = 1024
    micros: int = 1
    rank: int = 16
    dtype: str = "bfloat16"
    quantise: str | None = None
    checkpointing: bool = False
    offload: int = 0
    blocks: int = 0
    targets: str = "attention"
    stays: bool = False
    bare: float = 0
    before: int = 0
    form: PairForm = PAIRS


@dataclass
class ImageCounts:
    """The counts of one picture. `matrices`: parameters that a quantised base holds in 4 bits. `kept`: values of the
    base's dtype kept for the backward pass, `kept32`: bytes of float32 beside them; `inputs`: values that recomputing
    keeps; `block`: values of the largest block. `products`, `attention`, `low_rank`: operations, forward and backward.
    `encoders`: parameters of text encoders and VAE. `text`: tokens of a caption. `buffers`: values that are no
    parameters and stand in memory as they do. `made`: float32 values computed from an adapter's parts, besides its
    pictures. `pictures`: pictures whose tokens are processed together: the trained picture and its source images.
    `blocks`: parameters of each block that memory.offload_blocks can move."""

    targets: frozenset[str]
    rank: int
    parameters: int = 0
    matrices: int = 0
    largest: int = 0
    trainable: int = 0
    kept: float = 0.0
    kept32: float = 0.0
    inputs: float = 0.0
    block: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    low_rank: float = 0.0
    encoders: int = 0
    text: int = 0
    pictures: int = 1
    buffers: int = 0
    made: int = 0
    form: PairForm = PAIRS
    blocks: list[int] = field(default_factory=list)
    _learned: bool = field(default=False, repr=False)
    _before: float = field(default=0.0, repr=False)
    _counted: int = field(default=0, repr=False)

    def keep(self, values: float) -> None:
        if self._learned:
            self.kept += values

    def modulated(self, values: float) -> None:
        """What is scaled and gated by numbers that learn is kept for their gradient."""
        if _ALL_LINEAR in self.targets:
            self.keep(values)

    def small(self, parameters: int) -> None:
        self.parameters += parameters

    def linear(self, name: str, n: float, a: int, b: int, *, bias: bool = True, new: bool = True) -> None:
        """n tokens through a matrix (b, a). `new`: whether its input, kept where it has a pair, is kept by no other."""
        self.parameters += a * b + (b if bias else 0)
        self.matrices += a * b
        self.largest = max(self.largest, a * b)
        pair = name in self.targets or _ALL_LINEAR in self.targets
        self.products += (4 if self._learned else 2) * n * a * b
        if pair:
            self._learned = True
            costs = self._pair(n, (b, a))
            self.keep(n * costs.rank + (n * a if new else 0))

    def conv(self, n: float, a: int, b: int, side: int = 3, *, new: bool = True, dead: int = 0) -> None:
        """n places of output. torch keeps a convolution's input though its frozen weight needs no gradient. `dead`:
        channels of a whose gradient nobody wants; then ops.conv.live_conv runs, which keeps nothing."""
        self.parameters += a * b * side * side + b
        if side > 1 and _CONV in self.targets:
            self._learned = True
            costs = self._pair(n, (b, a, side, side))
            self.kept32 += 4 * n * (a + costs.rank)  # a pair's convolutions are in float32, their inputs copies
        back = a - dead if self._learned else 0
        self.products += 2 * n * (a + back) * b * side * side
        if new and not dead:
            self.keep(n * a)

    def _pair(self, n: float, shape: tuple[int, ...]) -> PairCosts:
        costs = self.form.beside(shape, self.rank)
        self.trainable += costs.parameters
        self.low_rank += costs.operations * n
        self.made += costs.made
        return costs

    def attend(self, n: float, m: float, width: int, heads: int) -> None:
        """n queries over m keys, of heads that are `width` wide together."""
        self.attention += (12 if self._learned else 4) * n * m * width
        if self._learned:
            self.kept32 += 4 * n * heads  # log Σ exp

    @property
    def learned(self) -> bool:
        """Whether a pair stands before this point of the walk."""
        return self._learned

    def starts_block(self) -> None:
        self._before, self._counted = self.kept, self.parameters

    def ends_block(self, entry: float) -> None:
        """`entry`: values that recomputing keeps of this block."""
        self.block = max(self.block, self.kept - self._before)
        self.blocks.append(self.parameters - self._counted)
        if self._learned:
            self.inputs += entry


Config = Mapping[str, Any]


def kind_of(config: Config) -> str:
    """The family of a denoiser's config: veneer's name, or diffusers' class if there is none."""
    named = str(config.get("_class_name"))
    return str(config.get("model_type") or PLANNED_DENOISERS.get(named, named))


def is_denoiser(config: Config) -> bool:
    """Whether this is the config of a denoiser that can be planned."""
    return kind_of(config) in IMAGE_FAMILIES


def _editing(config: Config) -> list[Editing]:
    """How models with this denoiser edit: those that take guidance as it does."""
    ways = [EDITING[name] for name in PLANNED_FAMILIES[kind_of(config)].editors]
    return [way for way in ways if way.guided == bool(config.get("guidance_embeds"))]


def most_before(config: Config) -> int:
    """The most pictures before those that are learned with which the config of a denoiser can be planned."""
    return max((way.references for way in _editing(config)), default=0) if is_denoiser(config) else 0


def encoded_pixels(config: Config, load: ImageLoad) -> int:
    """Of the largest picture whose latents are made: a reference may have a size of its own, whatever is learned."""
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
    """The counts of one picture, and of `before` others that it is an edit of. config: the denoiser's, with a
    `model_type` of IMAGE_FAMILIES or diffusers' class.

    Raises ConfigError for an unknown denoiser, for unknown targets, and for edits where they are not planned."""
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
    c = ImageCounts(frozenset(_TARGET_ENDINGS[targets]), rank, pictures=1 + before, form=form)
    c.encoders = sum((config.get("encoders") or {}).values()) + int(config.get("vae") or 0)
    c.text = text_tokens or int(config.get("text_tokens") or sum(PLANNED_FAMILIES[kind].readers.values()))
    try:
        IMAGE_FAMILIES[kind](c, {k: v for k, v in config.items() if v is not None}, height, width, c.text)
    except KeyError as error:
        raise ConfigError(
            f"the config of this {kind} denoiser has no {error.args[0]!r}",
            fix="give the whole config.json; of U-Nets those of SD1.5 and SDXL can be planned",
        ) from None
    return c


# -- FLUX --------------------------------------------------------------------------------------------------------------


def _flux(counts: ImageCounts, config: Config, height: int, width: int, text: int) -> None:
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    d, channels = heads * dim, config["in_channels"]
    places = _places(config, height, width, 2) * counts.pictures
    n = text + places
    counts.linear("x_embedder", places, channels, d)
    counts.linear("context_embedder", text, config["joint_attention_dim"], d)
    for inputs in (256, config["pooled_projection_dim"], *([256] if config.get("guidance_embeds") else [])):
        counts.linear("embedder", 1, inputs, d)
        counts.linear("embedder", 1, d, d)
    for _ in range(config["num_layers"]):
        _two_streams(counts, places, text, d, heads)
    for _ in range(config["num_single_layers"]):
        counts.starts_block()
        counts.linear("norm.linear", 1, d, 3 * d)
        _qkv(counts, n, d, "to_q")
        counts.small(2 * dim)
        counts.linear("proj_mlp", n, d, 4 * d, new=False)
        counts.keep(n * (d + 4 * d))  # the layer norm's input, gelu's input
        counts.linear("proj_out", n, 5 * d, d)
        counts.modulated(n * 2 * d)
        _joint(counts, n, d, heads)
        counts.ends_block(n * d)
    counts.linear("norm_out.linear", 1, d, 2 * d)
    counts.linear("final", places, d, channels)
    counts.keep(places * d)


def _two_streams(counts: ImageCounts, places: int, text: int, d: int, heads: int) -> None:
    """A block of FLUX.1 and of Qwen-Image: places and text each with projections and a feed-forward, attention over
    both."""
    counts.starts_block()
    for tokens, q, last in ((places, "to_q", "to_out.0"), (text, "add_q_proj", "to_add_out")):
        counts.linear("modulation", 1, d, 6 * d)
        _qkv(counts, tokens, d, q)
        counts.small(2 * (d // heads))
        counts.linear(last, tokens, d, d)
        counts.keep(tokens * 2 * d)  # inputs of the two layer norms
        counts.linear("net.0.proj", tokens, d, 4 * d)
        counts.keep(tokens * 4 * d)  # gelu's input
        counts.linear("net.2", tokens, 4 * d, d)
        counts.modulated(tokens * 4 * d)  # two norms' outputs, the attention's and the feed-forward's
    _joint(counts, places + text, d, heads)
    counts.ends_block((places + text) * d)


def _places(config: Config, height: int, width: int, patch: int) -> int:
    """Places of a latent in patches; config.vae_scale: pixels of a latent's side, 8 where it is not given."""
    step = int(config.get("vae_scale", 8)) * patch
    return (height // step) * (width // step)


def _qkv(counts: ImageCounts, tokens: float, d: int, first: str, *, bias: bool = True) -> None:
    counts.linear(first, tokens, d, d, bias=bias)
    for name in (first.replace("q", "k", 1), first.replace("q", "v", 1)):
        counts.linear(name, tokens, d, d, bias=bias, new=False)


def _joint(counts: ImageCounts, n: float, d: int, heads: int) -> None:
    """Attention of all tokens with normed and turned q, k: q, k, v as they came, q and k turned, and what came out."""
    counts.attend(n, n, d, heads)
    counts.keep(n * 6 * d)


def _flux2(counts: ImageCounts, config: Config, height: int, width: int, text: int) -> None:
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    d, channels = heads * dim, config["in_channels"]
    wide = int(config.get("mlp_ratio", 3.0) * d)
    places = _places(config, height, width, 2) * counts.pictures
    n = text + places
    counts.linear("x_embedder", places, channels, d, bias=False)
    counts.linear("context_embedder", text, config["joint_attention_dim"], d, bias=False)
    for _ in range(2 if config.get("guidance_embeds") else 1):
        counts.linear("embedder", 1, config.get("timestep_guidance_channels", 256), d, bias=False)
        counts.linear("embedder", 1, d, d, bias=False)
    for width_of in (6, 6, 3):
        counts.linear("modulation", 1, d, width_of * d, bias=False)
    for _ in range(config["num_layers"]):
        counts.starts_block()
        for tokens, q, last in ((places, "to_q", "to_out.0"), (text, "add_q_proj", "to_add_out")):
            _qkv(counts, tokens, d, q, bias=False)
            counts.small(2 * dim)
            counts.linear(last, tokens, d, d, bias=False)
            counts.keep(tokens * 2 * d)
            counts.linear("linear_in", tokens, d, 2 * wide, bias=False)
            counts.keep(tokens * 2 * wide)  # gate and up, whose product is made again
            counts.linear("linear_out", tokens, wide, d, bias=False, new=False)
            counts.modulated(tokens * 4 * d)
        _joint(counts, n, d, heads)
        counts.ends_block(n * d)
    for _ in range(config["num_single_layers"]):
        counts.starts_block()
        counts.linear("to_qkv_mlp_proj", n, d, 3 * d + 2 * wide, bias=False)
        counts.small(2 * dim)
        counts.keep(n * (d + 2 * wide))
        counts.linear("to_out", n, d + wide, d, bias=False)
        counts.modulated(n * 2 * d)
        _joint(counts, n, d, heads)
        counts.ends_block(n * d)
    counts.linear("norm_out.linear", 1, d, 2 * d, bias=False)
    counts.linear("final", places, d, channels, bias=False)
    counts.keep(places * d)


def _qwen_image(counts: ImageCounts, config: Config, height: int, width: int, text: int) -> None:
    heads = config["num_attention_heads"]
    d, patch = heads * config["attention_head_dim"], int(config.get("patch_size", 2))
    before = counts.pictures - 1
    # Each in about a megapixel, whatever is drawn; Qwen2.5-VL reads it too, in tokens of 28 × 28 pixels.
    places = _places(config, height, width, patch) + before * _places(config, 1024, 1024, patch)
    text += before * (1024 // 28) ** 2
    counts.linear("img_in", places, config["in_channels"], d)
    counts.small(config["joint_attention_dim"])
    counts.linear("txt_in", text, config["joint_attention_dim"], d)
    counts.linear("embedder", 1, 256, d)
    counts.linear("embedder", 1, d, d)
    for _ in range(config["num_layers"]):
        _two_streams(counts, places, text, d, heads)
    counts.linear("norm_out.linear", 1, d, 2 * d)
    counts.linear("final", places, d, patch * patch * (config.get("out_channels") or config["in_channels"]))
    counts.keep(places * d)


# -- SD3 and Z-Image, whose attention is as diffusers has it ----------------------------------------------------------


def _sd3(counts: ImageCounts, config: Config, height: int, width: int, text: int) -> None:
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    d, patch = heads * dim, int(config.get("patch_size", 2))
    places, dual = _places(config, height, width, patch), set(config.get("dual_attention_layers") or ())
    norms = 2 * dim if config.get("qk_norm") else 0
    counts.small(patch * patch * config["in_channels"] * d + d)
    counts.buffers = d * int(config.get("pos_embed_max_size") or 0) ** 2  # of medium a tenth of the whole
    counts.linear("context_embedder", text, config["joint_attention_dim"], d)
    for inputs in (256, config["pooled_projection_dim"]):
        counts.linear("embedder", 1, inputs, d)
        counts.linear("embedder", 1, d, d)
    for i in range(config["num_layers"]):
        last = i == config["num_layers"] - 1
        counts.starts_block()
        counts.linear("norm1.linear", 1, d, (9 if i in dual else 6) * d)
        counts.linear("norm1_context.linear", 1, d, (2 if last else 6) * d)
        for tokens, q, out in ((places, "to_q", "to_out.0"), (text, "add_q_proj", "to_add_out")):
            counts.keep(tokens * d)  # the layer norm's input
            _qkv(counts, tokens, d, q)
            counts.small(norms)
            _normed_heads(counts, tokens, d, norms)
            if not last or q == "to_q":
                counts.linear(out, tokens, d, d)
        _attend(counts, places + text, d, heads)
        if i in dual:
            _qkv(counts, places, d, "to_q")
            counts.small(norms)
            _normed_heads(counts, places, d, norms)
            _attend(counts, places, d, heads)
            counts.linear("to_out.0", places, d, d)
        for tokens in (places,) if last else (places, text):
            counts.keep(tokens * d)  # the layer norm's input
            counts.linear("net.0.proj", tokens, d, 4 * d)
            counts.keep(tokens * 4 * d)  # gelu's input
            counts.linear("net.2", tokens, 4 * d, d)
        counts.ends_block((places + text) * d)
    counts.linear("norm_out.linear", 1, d, 2 * d)
    counts.linear("final", places, d, patch * patch * (config.get("out_channels") or config["in_channels"]))
    counts.keep(places * d)


def _normed_heads(counts: ImageCounts, tokens: float, d: int, norms: int) -> None:
    """diffusers' RMS norms of q and k, which keep what they are given, and it again in float32."""
    if norms:
        for _ in "qk":
            _rms_norm(counts, tokens, d)


def _rms_norm(counts: ImageCounts, tokens: float, d: int) -> None:
    counts.keep(tokens * d)
    if counts.learned:
        counts.kept32 += 4 * tokens * d


def _attend(counts: ImageCounts, n: float, d: int, heads: int) -> None:
    """q, k and v together, what comes out, and it again with its heads side by side."""
    counts.attend(n, n, d, heads)
    counts.keep(n * 4 * d)


def _z_image(counts: ImageCounts, config: Config, height: int, width: int, text: int) -> None:
    d, heads, channels = config["dim"], config["n_heads"], config["in_channels"]
    wide, time = int(d / 3 * 8), min(d, 256)
    # pictures and texts are filled up to multiples of 32 tokens
    places, words = (-(-n // 32) * 32 for n in (_places(config, height, width, 2), text))
    counts.linear("x_embedder", places, 4 * channels, d)
    counts.small(config["cap_feat_dim"] + 2 * d)
    counts.linear("cap_embedder", words, config["cap_feat_dim"], d)
    counts.linear("embedder", 1, 256, 1024)
    counts.linear("embedder", 1, 1024, time)
    refiners = config.get("n_refiner_layers", 2)
    for tokens, blocks, modulated in (
        (places, refiners, True),
        (words, refiners, False),
        (places + words, config["n_layers"], True),
    ):
        for _ in range(blocks):
            counts.starts_block()
            counts.small(4 * d + 2 * (d // heads))
            if modulated:
                counts.linear("adaLN_modulation", 1, time, 4 * d)
            _rms_norm(counts, tokens, d)
            _qkv(counts, tokens, d, "to_q", bias=False)
            _normed_heads(counts, tokens, d, 1)
            _attend(counts, tokens, d, heads)
            counts.linear("to_out.0", tokens, d, d, bias=False)
            _rms_norm(counts, tokens, d)
            _rms_norm(counts, tokens, d)
            counts.linear("w1", tokens, d, wide, bias=False)
            counts.linear("w3", tokens, d, wide, bias=False, new=False)
            counts.keep(tokens * 3 * wide)  # what silu is of, silu, and what it is multiplied by
            counts.linear("w2", tokens, wide, d, bias=False)
            _rms_norm(counts, tokens, d)
            counts.ends_block(tokens * d)
    counts.linear("norm_out", 1, time, d)
    counts.linear("final", places, d, 4 * channels)
    counts.keep((places + words) * d)


# -- U-Nets: SD1.5 and SDXL --------------------------------------------------------------------------------------------


def _unet(counts: ImageCounts, config: Config, height: int, width: int, text: int) -> None:
    widths = list(config["block_out_channels"])
    depth = _levels(config.get("transformer_layers_per_block", 1), widths)
    heads = _levels(config["attention_head_dim"], widths)  # the U-Nets' name for the number of heads
    cross, per = config["cross_attention_dim"], config["layers_per_block"]
    first, last = widths[0], len(widths) - 1
    time = 4 * first
    place = [_places(config, height, width, 1 << i) for i in range(len(widths))]
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    counts.conv(place[0], config["in_channels"], first)
    pooled = config.get("projection_class_embeddings_input_dim")
    for inputs in (first, *([pooled] if pooled else [])):
        counts.linear("embedder", 1, inputs, time)
        counts.linear("embedder", 1, time, time)

    flat = "transformer_layers_per_block" in config  # SD1.5's projections around a transformer are 1 × 1 convolutions

    def transformer(level: int) -> None:
        _transformer(counts, place[level], widths[level], cross, heads[level], depth[level], text, flat)

    skips = [(first, counts.learned)]
    at = first
    for i, out in enumerate(widths):
        for _ in range(per):
            _resnet(counts, place[i], at, out, time)
            at = out
            if attends[i]:
                transformer(i)
            skips.append((out, counts.learned))
        if i < last:
            counts.conv(place[i + 1], out, out, new=False)
            counts.keep(place[i] * out)
            skips.append((out, counts.learned))
    _resnet(counts, place[last], at, at, time)
    transformer(last)
    _resnet(counts, place[last], at, at, time)
    for i in reversed(range(len(widths))):
        out = widths[i]
        for _ in range(per + 1):
            skip, learned = skips.pop()
            _resnet(counts, place[i], at + skip, out, time, dead=0 if learned else skip)
            at = out
            if attends[i]:
                transformer(i)
        if i > 0:
            counts.conv(place[i - 1], out, out)
    counts.small(2 * first)
    counts.keep(place[0] * 2 * first)
    counts.conv(place[0], first, config["in_channels"], new=False)


def _levels(value: Any, widths: list[int]) -> list[int]:
    """A value for each level, where a config may have one for all."""
    return list(value) if isinstance(value, list | tuple) else [value] * len(widths)


def _resnet(counts: ImageCounts, n: int, a: int, b: int, time: int, dead: int = 0) -> None:
    """norm-silu, convolution, norm-silu, convolution: each keeps its input. `dead`: as of `conv`, of the a channels."""
    counts.starts_block()
    counts.small(2 * a + 2 * b)
    counts.keep(n * (a + b))
    counts.conv(n, a, b, dead=dead)
    counts.linear("time_emb_proj", 1, time, b)
    counts.conv(n, b, b)
    if a != b:
        counts.conv(n, a, b, 1, new=False, dead=dead)
    counts.ends_block(n * a)


def _transformer(
    counts: ImageCounts, n: int, d: int, cross: int, heads: int, depth: int, text: int, flat: bool
) -> None:
    counts.small(2 * d)
    counts.keep(n * d)
    _around(counts, "proj_in", n, d, flat)
    for _ in range(depth):
        counts.starts_block()
        counts.small(6 * d)
        counts.keep(n * d)
        _qkv(counts, n, d, "to_q", bias=False)
        counts.keep(n * 4 * d)
        counts.attend(n, n, d, heads)
        counts.linear("to_out.0", n, d, d, new=False)
        counts.keep(n * d)
        counts.linear("to_q", n, d, d, bias=False)
        counts.linear("to_k", text, cross, d, bias=False, new=False)
        counts.linear("to_v", text, cross, d, bias=False, new=False)
        counts.keep(n * 2 * d + text * 2 * d)
        counts.attend(n, text, d, heads)
        counts.linear("to_out.0", n, d, d, new=False)
        counts.keep(n * d)
        counts.linear("net.0.proj", n, d, 8 * d)
        counts.keep(n * 8 * d)
        counts.linear("net.2", n, 4 * d, d)
        counts.ends_block(n * d)
    _around(counts, "proj_out_of_transformer", n, d, flat)


def _around(counts: ImageCounts, name: str, n: int, d: int, flat: bool) -> None:
    if flat:
        counts.linear(name, n, d, d)
    else:
        counts.conv(n, d, d, 1)


IMAGE_FAMILIES: dict[str, Callable[[ImageCounts, Config, int, int, int], None]] = {
    "flux": _flux,
    "flux2": _flux2,
    "qwen-image": _qwen_image,
    "sd3": _sd3,
    "sdxl": _unet,
    "z-image": _z_image,
}


# -- memory and time ---------------------------------------------------------------------------------------------------


def image_memory(counts: ImageCounts, load: ImageLoad, device: Device, *, process: int | None = None) -> Memory:
    """Bytes by part, for training on cached latents and texts. As in plan.memory, the peak is where the backward pass
    begins."""
    e = dtype_bytes(load.dtype)
    weights, constants = _weight_bytes_of(counts, load), 0
    if load.quantise in ("nf4", "fp4"):
        constants = round(counts.matrices * (8 / 64 + 32 / (64 * 256)) / 8)
    weights += counts.encoders * e if load.stays else 0
    kept = load.pictures * (e * counts.kept + counts.kept32) + 4 * counts.made
    working = load.pictures * e * _WORKING * counts.block
    if load.checkpointing:
        kept, working = load.pictures * e * counts.inputs, load.pictures * e * (1 + _WORKING) * counts.block
    moving = kept + working
    away = _away(counts, load)
    host = e * sum(away)
    weights += e * max(away, default=0) - host  # the block in use
    gradients = 4 * counts.trainable if load.micros > 1 else max(0.0, 4 * counts.trainable - moving)
    dequantised = counts.largest * e if load.quantise else 0
    cuda = device.kind == "cuda"
    context = CUDA_CONTEXT if cuda else _DIFFUSERS_BYTES + (CPU_PROCESS if process is None else process)
    share = CUDA_ROUNDING if cuda else CPU_ROUNDING
    return Memory(
        round(weights),
        constants,
        4 * counts.trainable,
        round(gradients),
        8 * counts.trainable,
        round(kept),
        0,
        round(working),
        dequantised,
        context,
        round(share * moving),
        host=host,
    )


def _away(counts: ImageCounts, load: ImageLoad) -> list[int]:
    """Return the parameters of each block that stays in CPU memory until needed."""
    return counts.blocks[-load.offload :] if load.offload else []


def _weight_bytes_of(counts: ImageCounts, load: ImageLoad) -> int:
    """The denoiser's weights in memory, without quantisation constants."""
    quantised = counts.matrices if load.quantise else 0
    plain = (counts.parameters - quantised) * dtype_bytes(load.dtype)
    plain += counts.buffers * dtype_bytes(load.dtype)
    return plain + (quantised if load.quantise == "int8" else quantised // 2)


def image_work(counts: ImageCounts, load: ImageLoad, device: Device) -> Work:
    """Operations and bytes of a micro-batch, forward and backward."""
    e, n = dtype_bytes(load.dtype), load.pictures
    forwards = load.bare + bool(load.checkpointing)  # more than one; a forward is half of the products' work
    again, reads = 1 + forwards / 2, 2 + forwards
    moved = 4.0 * n * (e * counts.kept + counts.kept32) + reads * e * counts.parameters
    dequantised = reads * e * counts.matrices if load.quantise else 0
    return Work(
        n * counts.products * again,
        n * counts.attention * (1 + forwards / 3),
        n * counts.low_rank,
        0.0,
        moved,
        dequantised,
        float(reads * e * sum(_away(counts, load))),
    )
