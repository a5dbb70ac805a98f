"""The image families: the canonical and original names of every module.

| family     | components                                                | original names                            |
| sd15       | unet, text_encoder (CLIP-L)                               | LDM                                       |
| sd2        | unet, text_encoder (OpenCLIP-H)                           | LDM                                       |
| sdxl       | unet, text_encoder (CLIP-L), text_encoder_2 (OpenCLIP-G)  | sgm                                       |
| sd3        | transformer (3 and 3.5 medium), text_encoder, _2, _3 (T5) | joint_blocks                              |
| sd3-large  | transformer (3.5 large), text_encoder, _2, _3 (T5)        | joint_blocks                              |
| flux1      | transformer (dev, schnell), text_encoder, _2 (T5)         | BFL                                       |
| flux2      | transformer (dev; klein has fewer blocks)                 | BFL                                       |
| qwen-image | transformer                                               | same as diffusers' names                  |
| z-image    | transformer                                               | fused qkv                                 |

Canonical name = component + "." + the name in diffusers' or transformers' class. The two sizes of SD3 are two
families, because the last block differs from the other blocks and its number differs by size. Block
counts are those of the official models; widths are not used, so a file of any width is read in the same way.
Sources: diffusers' and transformers' classes and diffusers' checkpoint converters, against which the tests
check every name. If the original model fuses q, k and v but diffusers does not, q, k and v are each a range
of the fused rows. In the last modulation, the original order is (shift, scale); diffusers' order is (scale,
shift). The U-Nets' names follow from a few counts:

    input_blocks.0.0                conv_in
    input_blocks.{3i+j+1}.0 / .1    down_blocks.i.resnets.j / attentions.j        j = 0, 1
    input_blocks.{3i+3}.0.op        down_blocks.i.downsamplers.0.conv
    middle_block.0 / .1 / .2        mid_block.resnets.0 / attentions.0 / resnets.1
    output_blocks.{3i+j}.0 / .1     up_blocks.i.resnets.j / attentions.j          j = 0, 1, 2
    output_blocks.{3i+2}.n.conv     up_blocks.i.upsamplers.0.conv                 n = 2, or 1 without attentions

This module uses only names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

RowRange = tuple[int, int, int]
"""Rows [begin, end) of `total` equal units. For example, q of a fused qkv is (0, 1, 3)."""


class ModuleRow(NamedTuple):
    """A module, its kind, and its original name ("" if equal to the canonical name).

    `part`: the rows of the original module that make up the module; None for all rows. `swap`: the two halves
    of the rows are swapped."""

    module: str
    kind: str = "linear"
    original: str = ""
    part: RowRange | None = None
    swap: bool = False


def _rows(prefix: str, names: str, original: str | None = None) -> Iterator[ModuleRow]:
    """Yield a ModuleRow for each word of `names`.

    A word is NAME or NAME=ORIGINAL, with the prefix "KIND:" for kinds other than linear.

    original: the prefix of the original names; None if they equal the canonical names."""
    for word in names.split():
        kind, _, name = word.rpartition(":")
        name, _, its = name.partition("=")
        yield ModuleRow(f"{prefix}{name}", kind or "linear", "" if original is None else f"{original}{its or name}")


def clip(component: str, layers: int, projection: bool) -> Iterator[ModuleRow]:
    """Yield the modules of CLIP's text model.

    projection: whether the class is CLIPTextModelWithProjection instead of CLIPTextModel.

    The names contain `text_model.`, as in the model's files; transformers 5 removed this part from the class
    CLIPTextModel."""
    top = f"{component}.text_model."
    yield from _rows(f"{top}embeddings.", "embedding:token_embedding embedding:position_embedding")
    for i in range(layers):
        layer = f"{top}encoder.layers.{i}."
        yield from _rows(f"{layer}self_attn.", "k_proj v_proj q_proj out_proj")
        yield from _rows(layer, "norm:layer_norm1 mlp.fc1 mlp.fc2 norm:layer_norm2")
    yield from _rows(top, "norm:final_layer_norm")
    if projection:
        yield ModuleRow(f"{component}.text_projection")


def t5(component: str, layers: int) -> Iterator[ModuleRow]:
    """Yield the modules of transformers' T5EncoderModel with a gated feed-forward (T5 v1.1)."""
    yield from _rows(f"{component}.", "embedding:shared embedding:encoder.embed_tokens")
    for i in range(layers):
        block = f"{component}.encoder.block.{i}.layer."
        yield from _rows(
            f"{block}0.SelfAttention.", "q k v o" + (" embedding:relative_attention_bias" if i == 0 else "")
        )
        yield from _rows(block, "norm:0.layer_norm 1.DenseReluDense.wi_0 1.DenseReluDense.wi_1 1.DenseReluDense.wo")
        yield from _rows(block, "norm:1.layer_norm")
    yield from _rows(f"{component}.", "norm:encoder.final_layer_norm")


_RESNET = (
    "norm:norm1=in_layers.0 conv:conv1=in_layers.2 time_emb_proj=emb_layers.1 norm:norm2=out_layers.0 "
    "conv:conv2=out_layers.3"
)
_BLOCK = (
    "norm:norm1 norm:norm2 norm:norm3 attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_k "
    "attn2.to_v attn2.to_out.0 ff.net.0.proj ff.net.2"
)


def unet(depths: Sequence[int], widths: Sequence[int], proj: str, extra: bool, layers: int = 2) -> Iterator[ModuleRow]:
    """Yield the modules of diffusers' UNet2DConditionModel.

    depths: the number of transformer blocks in each attention, for each level of the down path; 0 for a level
        without attention. The up path mirrors the down path; the middle block uses the last number that is
        not 0.
    widths: the levels' channels, in any unit.
    proj: the kind of proj_in and proj_out.
    extra: whether the model has SDXL's second embedding."""
    levels = len(depths)
    yield from _rows("unet.", "conv:conv_in=input_blocks.0.0", "")
    yield from _rows("unet.time_embedding.", "linear_1=0 linear_2=2", "time_embed.")
    if extra:
        yield from _rows("unet.add_embedding.", "linear_1=0 linear_2=2", "label_emb.0.")
    for i, depth in enumerate(depths):
        block = f"unet.down_blocks.{i}"
        for j in range(layers):
            at = f"input_blocks.{(layers + 1) * i + j + 1}"
            yield from _resnet(f"{block}.resnets.{j}", f"{at}.0", j == 0 and i > 0 and widths[i] != widths[i - 1])
            yield from _attention(f"{block}.attentions.{j}", f"{at}.1", depth, proj)
        if i < levels - 1:
            down = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
            yield ModuleRow(f"{block}.downsamplers.0.conv", "conv", down)
    yield from _resnet("unet.mid_block.resnets.0", "middle_block.0", False)
    yield from _attention("unet.mid_block.attentions.0", "middle_block.1", [d for d in depths if d][-1], proj)
    yield from _resnet("unet.mid_block.resnets.1", "middle_block.2", False)
    for i, depth in enumerate(reversed(depths)):
        block = f"unet.up_blocks.{i}"
        for j in range(layers + 1):
            at = f"output_blocks.{(layers + 1) * i + j}"
            yield from _resnet(f"{block}.resnets.{j}", f"{at}.0", True)
            yield from _attention(f"{block}.attentions.{j}", f"{at}.1", depth, proj)
        if i < levels - 1:
            up = f"output_blocks.{(layers + 1) * i + layers}.{2 if depth else 1}.conv"
            yield ModuleRow(f"{block}.upsamplers.0.conv", "conv", up)
    yield from _rows("unet.", "norm:conv_norm_out=0 conv:conv_out=2", "out.")


def _resnet(name: str, original: str, shortcut: bool) -> Iterator[ModuleRow]:
    yield from _rows(f"{name}.", _RESNET + (" conv:conv_shortcut=skip_connection" if shortcut else ""), f"{original}.")


def _attention(name: str, original: str, depth: int, proj: str) -> Iterator[ModuleRow]:
    """Yield the modules of a Transformer2DModel; inner names equal the original names."""
    if depth:
        yield from _rows(f"{name}.", f"norm:norm {proj}:proj_in {proj}:proj_out", f"{original}.")
    for k in range(depth):
        block = f".transformer_blocks.{k}."
        yield from _rows(name + block, _BLOCK, original + block)


_TOP = "transformer."
_SAMPLE = "to_q to_k to_v"
_CONTEXT = "add_q_proj add_k_proj add_v_proj"


def _fused(names: str, prefix: str, original: str, units: int = 3) -> Iterator[ModuleRow]:
    """Yield a ModuleRow for each name, with one unit of the original module's rows.

    The last name gets all remaining units."""
    each = names.split()
    for i, name in enumerate(each):
        end = units if i == len(each) - 1 else i + 1
        yield ModuleRow(prefix + name, "linear", original, (i, end, units))


def _last() -> Iterator[ModuleRow]:
    yield ModuleRow(f"{_TOP}norm_out.linear", "linear", "final_layer.adaLN_modulation.1", swap=True)
    yield ModuleRow(f"{_TOP}proj_out", "linear", "final_layer.linear")


def sd3(layers: int, dual: Collection[int]) -> Iterator[ModuleRow]:
    """Yield the modules of SD3Transformer2DModel with query and key norms.

    dual: layers with a second attention.

    The last layer reads the text tokens but does not update them."""
    yield from _rows(_TOP, "conv:pos_embed.proj=x_embedder.proj", "")
    for name, its in (("timestep", "t_embedder"), ("text", "y_embedder")):
        yield from _rows(f"{_TOP}time_text_embed.{name}_embedder.", "linear_1=0 linear_2=2", f"{its}.mlp.")
    yield ModuleRow(f"{_TOP}context_embedder")
    for i in range(layers):
        block, last = f"{_TOP}transformer_blocks.{i}.", i == layers - 1
        x, c = f"joint_blocks.{i}.x_block.", f"joint_blocks.{i}.context_block."
        yield ModuleRow(f"{block}norm1.linear", "linear", f"{x}adaLN_modulation.1")
        yield ModuleRow(f"{block}norm1_context.linear", "linear", f"{c}adaLN_modulation.1", swap=last)
        for attn in ("attn.", "attn2.") if i in dual else ("attn.",):
            yield from _fused(_SAMPLE, block + attn, f"{x}{attn}qkv")
            yield from _rows(block + attn, "norm:norm_q=ln_q norm:norm_k=ln_k to_out.0=proj", x + attn)
        yield from _fused(_CONTEXT, f"{block}attn.", f"{c}attn.qkv")
        yield from _rows(f"{block}attn.", "norm:norm_added_q=ln_q norm:norm_added_k=ln_k", f"{c}attn.")
        yield from _rows(f"{block}ff.", "net.0.proj=fc1 net.2=fc2", f"{x}mlp.")
        if not last:
            names = "attn.to_add_out=attn.proj ff_context.net.0.proj=mlp.fc1 ff_context.net.2=mlp.fc2"
            yield from _rows(block, names, c)
    yield from _last()


def _flux_double(i: int, ff: tuple[str, str]) -> Iterator[ModuleRow]:
    block, its = f"{_TOP}transformer_blocks.{i}.", f"double_blocks.{i}."
    for side, names, norm, out, feed in (
        ("img", _SAMPLE, "norm", "to_out.0", "ff"),
        ("txt", _CONTEXT, "norm_added", "to_add_out", "ff_context"),
    ):
        attn, norms = f"{its}{side}_attn.", f"norm:{norm}_q=norm.query_norm norm:{norm}_k=norm.key_norm"
        yield from _fused(names, f"{block}attn.", f"{attn}qkv")
        yield from _rows(f"{block}attn.", f"{norms} {out}=proj", attn)
        yield from _rows(f"{block}{feed}.", f"{ff[0]}=0 {ff[1]}=2", f"{its}{side}_mlp.")


def _flux_embedders(prefix: str, names: tuple[tuple[str, str], ...]) -> Iterator[ModuleRow]:
    yield from _rows(_TOP, "x_embedder=img_in context_embedder=txt_in", "")
    for name, its in names:
        yield from _rows(f"{_TOP}{prefix}.{name}_embedder.", "linear_1=in_layer linear_2=out_layer", f"{its}.")


_FLUX_NORMS = "norm:norm_q=query_norm norm:norm_k=key_norm"


def flux1(double: int, single: int, guidance: bool) -> Iterator[ModuleRow]:
    """Yield the modules of FluxTransformer2DModel: dev with guidance, schnell without.

    In a single-stream block, linear1 consists of q, k, v and the feed-forward layer, which is four times as
    wide as q: 7 units in total."""
    names = (("timestep", "time_in"), ("text", "vector_in"), *([("guidance", "guidance_in")] if guidance else []))
    yield from _flux_embedders("time_text_embed", names)
    for i in range(double):
        block, its = f"{_TOP}transformer_blocks.{i}.", f"double_blocks.{i}."
        yield from _rows(block, "norm1.linear=img_mod.lin norm1_context.linear=txt_mod.lin", its)
        yield from _flux_double(i, ("net.0.proj", "net.2"))
    for i in range(single):
        block, its = f"{_TOP}single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield from _rows(block, "norm.linear=modulation.lin", its)
        yield from _fused("attn.to_q attn.to_k attn.to_v proj_mlp", block, f"{its}linear1", 7)
        yield from _rows(block, "proj_out=linear2", its)
        yield from _rows(f"{block}attn.", _FLUX_NORMS, f"{its}norm.")
    yield from _last()


def flux2(double: int, single: int, guidance: bool) -> Iterator[ModuleRow]:
    """Yield the modules of Flux2Transformer2DModel: dev with guidance, klein without.

    Block counts (double, single): 8 and 48 (dev), 8 and 24 (klein 9B), 5 and 20 (klein 4B). All blocks share
    the modulations. The projections of a single-stream block are fused in diffusers too."""
    names = (("timestep", "time_in"), *([("guidance", "guidance_in")] if guidance else []))
    yield from _flux_embedders("time_guidance_embed", names)
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield from _rows(_TOP, f"{name}.linear={name}.lin", "")
    for i in range(double):
        yield from _flux_double(i, ("linear_in", "linear_out"))
    for i in range(single):
        attn, its = f"{_TOP}single_transformer_blocks.{i}.attn.", f"single_blocks.{i}."
        yield from _rows(attn, "to_qkv_mlp_proj=linear1 to_out=linear2", its)
        yield from _rows(attn, _FLUX_NORMS, f"{its}norm.")
    yield from _last()


def qwen_image(layers: int) -> Iterator[ModuleRow]:
    """Yield the modules of QwenImageTransformer2DModel.

    The original names are diffusers' names."""
    yield from _rows(f"{_TOP}time_text_embed.timestep_embedder.", "linear_1 linear_2")
    yield from _rows(_TOP, "norm:txt_norm")
    for i in range(layers):
        block = f"{_TOP}transformer_blocks.{i}."
        yield from _rows(f"{block}attn.", f"{_SAMPLE} {_CONTEXT} to_out.0 to_add_out")
        yield from _rows(f"{block}attn.", "norm:norm_q norm:norm_k norm:norm_added_q norm:norm_added_k")
        for side in ("img", "txt"):
            yield from _rows(f"{block}{side}_", "mod.1 mlp.net.0.proj mlp.net.2")
    yield from _rows(_TOP, "img_in txt_in norm_out.linear proj_out")


def z_image(layers: int, refiners: int) -> Iterator[ModuleRow]:
    """Yield the modules of ZImageTransformer2DModel with one patch size, 2 by 1.

    The context refiner has no modulation."""
    yield from _rows(_TOP, "all_x_embedder.2-1=x_embedder", "")
    yield from _rows(f"{_TOP}all_final_layer.2-1.", "linear adaLN_modulation.1", "final_layer.")
    yield from _rows(_TOP, "t_embedder.mlp.0 t_embedder.mlp.2 norm:cap_embedder.0 cap_embedder.1")
    for group, count in (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", layers)):
        for i in range(count):
            its = f"{group}.{i}."
            block, attn = _TOP + its, f"{its}attention."
            yield from _fused(_SAMPLE, _TOP + attn, f"{attn}qkv")
            yield from _rows(_TOP + attn, "to_out.0=out norm:norm_q=q_norm norm:norm_k=k_norm", attn)
            yield from _rows(f"{block}feed_forward.", "w1 w2 w3")
            yield from _rows(block, "norm:attention_norm1 norm:attention_norm2 norm:ffn_norm1 norm:ffn_norm2")
            if group != "context_refiner":
                yield ModuleRow(f"{block}adaLN_modulation.0")


def attention_blocks(double: int, single: int, *, joint: bool) -> Iterator[ModuleRow]:
    """Yield attention and feed-forward modules under diffusers' names.

    joint: whether a block has one attention with text projections, instead of attn1 and attn2."""
    for i in range(double):
        block = f"{_TOP}transformer_blocks.{i}."
        for attn in ("attn.",) if joint else ("attn1.", "attn2."):
            yield from _rows(block + attn, f"{_SAMPLE} to_out.0" + (f" {_CONTEXT} to_add_out" if joint else ""))
        for feed in ("ff.", "ff_context.") if joint else ("ff.",):
            yield from _rows(block + feed, "net.0.proj net.2")
    for i in range(single):
        names = "attn.to_q attn.to_k attn.to_v proj_mlp proj_out"
        yield from _rows(f"{_TOP}single_transformer_blocks.{i}.", names)


DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class ModuleTarget:
    """A canonical module that a file's module is assigned to, in whole or in part.

    `part`: rows [begin, end) of `total` equal units of the file's module; None for all rows. `swap`: the two
    halves of the rows are swapped."""

    module: str
    part: RowRange | None = None
    swap: bool = False


@dataclass(frozen=True)
class Family:
    """An image family.

    `modules`: canonical name -> linear, conv, embedding or norm. `originals`: original name of each denoiser
    module, without a prefix -> its targets. `diffusers_named`: sd-scripts and musubi-tuner use diffusers'
    names for the denoiser. `clip`: ComfyUI's name for the first text encoder."""

    name: str
    label: str
    modules: Mapping[str, str]
    originals: Mapping[str, tuple[ModuleTarget, ...]]
    diffusers_named: bool = False
    clip: str = "clip_l"

    @cached_property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.modules))

    @cached_property
    def denoiser(self) -> str:
        return next(c for c in self.components if c in DENOISERS)

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        return tuple(c for c in self.components if c != self.denoiser)

    def kohya_encoder(self, component: str) -> str:
        """Return sd-scripts' prefix of a text encoder's modules.

        sd-scripts always numbers a T5 as the third encoder."""
        if len(self.encoders) == 1:
            return "lora_te_"
        return "lora_te3_" if self._is_t5(component) else f"lora_te{component[13:] or 1}_"

    def comfyui_encoder(self, component: str) -> str:
        """Return ComfyUI's name for a text encoder."""
        if self._is_t5(component):
            return "t5xxl"
        return "clip_g" if component == "text_encoder_2" else self.clip

    def _is_t5(self, component: str) -> bool:
        return f"{component}.shared" in self.modules


def flat(name: str) -> str:
    """Return the name with dots replaced by underscores, as in kohya's keys.

    The original name can only be recovered with a table."""
    return name.replace(".", "_")


@cache
def families() -> Mapping[str, Family]:
    """Return all families by name, more common families first. Cached."""
    l_g_t5 = [*clip("text_encoder", 12, True), *clip("text_encoder_2", 32, True), *t5("text_encoder_3", 24)]
    supported = [
        _family(
            "sd15",
            "Stable Diffusion 1.x",
            unet((1, 1, 1, 0), (1, 2, 4, 4), "conv", False),
            clip("text_encoder", 12, False),
            diffusers_named=True,
        ),
        _family(
            "sdxl",
            "Stable Diffusion XL",
            unet((0, 2, 10), (1, 2, 4), "linear", True),
            clip("text_encoder", 12, False),
            clip("text_encoder_2", 32, True),
        ),
        _family("flux1", "FLUX.1", flux1(19, 38, True), clip("text_encoder", 12, False), t5("text_encoder_2", 24)),
        _family("flux2", "FLUX.2", flux2(8, 48, True)),
        _family("qwen-image", "Qwen-Image", qwen_image(60), diffusers_named=True),
        _family("z-image", "Z-Image", z_image(30, 2), diffusers_named=True),
        _family("sd3", "Stable Diffusion 3 and 3.5 medium", sd3(24, range(13)), l_g_t5),
        _family("sd3-large", "Stable Diffusion 3.5 large", sd3(38, ()), l_g_t5),
        _family(
            "sd2",
            "Stable Diffusion 2.x",
            unet((1, 1, 1, 0), (1, 2, 4, 4), "linear", False),
            clip("text_encoder", 23, False),
            diffusers_named=True,
            clip="clip_h",
        ),
    ]
    return MappingProxyType({family.name: family for family in supported})


@cache
def other_models() -> Mapping[str, Family]:
    """Return models that share names with a family but must not be mistaken for the family."""
    models = [
        _family("hunyuan-video", "Hunyuan Video", attention_blocks(20, 40, joint=True)),
        _family("ltx-video", "LTX Video", attention_blocks(28, 0, joint=False)),
    ]
    return MappingProxyType({family.name: family for family in models})


def _family(name: str, label: str, *components: Iterable[ModuleRow], **fields: Any) -> Family:
    modules: dict[str, str] = {}
    originals: dict[str, list[ModuleTarget]] = defaultdict(list)
    for row in chain(*components):
        modules[row.module] = row.kind
        component, _, original_name = row.module.partition(".")
        if component in DENOISERS or row.original:
            originals[row.original or original_name].append(ModuleTarget(row.module, row.part, row.swap))
    originals_by_name = MappingProxyType({key: tuple(targets) for key, targets in originals.items()})
    return Family(name, label, MappingProxyType(modules), originals_by_name, **fields)
