"""The image families: every module's canonical name and original place.

| family     | components                                                | original names                            |
| sd15       | unet, text_encoder (CLIP-L)                               | LDM                                       |
| sd2        | unet, text_encoder (OpenCLIP-H)                           | LDM                                       |
| sdxl       | unet, text_encoder (CLIP-L), text_encoder_2 (OpenCLIP-G)  | sgm                                       |
| sd3        | transformer (3 and 3.5 medium), text_encoder, _2, _3 (T5) | joint_blocks                              |
| sd3-large  | transformer (3.5 large), text_encoder, _2, _3 (T5)        | joint_blocks                              |
| flux1      | transformer (dev, schnell), text_encoder, _2 (T5)         | BFL                                       |
| flux2      | transformer (dev; klein has fewer blocks of the same)     | BFL                                       |
| qwen-image | transformer                                               | the same                                  |
| z-image    | transformer                                               | fused qkv                                 |
| krea2      | transformer                                               | krea-ai/krea-2                            |
| anima      | transformer (Cosmos Predict 2), text_conditioner          | blocks, llm_adapter                       |

Canonical name = component + "." + the name in diffusers' or transformers' class. SD3's two sizes are two
families: their last blocks differ, and so does the place of the last context modulation. Counts are the
official ones; widths are not used, so a file of any width is read in the same way. Sources: diffusers' and
transformers' classes and diffusers' checkpoint converters, against which the tests check every name. If an
original fuses q, k and v and diffusers does not, each of the three is a part of its rows; in the last
modulation the original has (shift, scale) and diffusers (scale, shift). The U-Nets' names follow from a few
counts:

    input_blocks.0.0                conv_in
    input_blocks.{3i+j+1}.0 / .1    down_blocks.i.resnets.j / attentions.j        j = 0, 1
    input_blocks.{3i+3}.0.op        down_blocks.i.downsamplers.0.conv
    middle_block.0 / .1 / .2        mid_block.resnets.0 / attentions.0 / resnets.1
    output_blocks.{3i+j}.0 / .1     up_blocks.i.resnets.j / attentions.j          j = 0, 1, 2
    output_blocks.{3i+2}.n.conv     up_blocks.i.upsamplers.0.conv                 n = 2, or 1 without attentions

Uses names; no tensors, no files.
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
"""Rows [begin, end) of `total`, in equal units: q of a fused qkv is (0, 1, 3)."""


class ModuleRow(NamedTuple):
    """A module, its kind, and its original name ("" if equal).

    It is the whole original module, or `part` of its rows, or has its halves swapped."""

    module: str
    kind: str = "linear"
    original: str = ""
    part: RowRange | None = None
    swap: bool = False


def clip(component: str, layers: int, projection: bool) -> Iterator[ModuleRow]:
    """Yield CLIP's text model.

    transformers' CLIPTextModelWithProjection with `projection`, else CLIPTextModel. CLIPTextModel has the
    names of its files, with `text_model.`, which transformers 5 dropped from the class."""
    top = f"{component}.text_model"
    yield ModuleRow(f"{top}.embeddings.token_embedding", "embedding")
    yield ModuleRow(f"{top}.embeddings.position_embedding", "embedding")
    for i in range(layers):
        layer = f"{top}.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield ModuleRow(f"{layer}.self_attn.{name}")
        yield ModuleRow(f"{layer}.layer_norm1", "norm")
        yield ModuleRow(f"{layer}.mlp.fc1")
        yield ModuleRow(f"{layer}.mlp.fc2")
        yield ModuleRow(f"{layer}.layer_norm2", "norm")
    yield ModuleRow(f"{top}.final_layer_norm", "norm")
    if projection:
        yield ModuleRow(f"{component}.text_projection")


def t5(component: str, layers: int) -> Iterator[ModuleRow]:
    """Yield transformers' T5EncoderModel with a gated feed-forward (T5 v1.1)."""
    yield ModuleRow(f"{component}.shared", "embedding")
    yield ModuleRow(f"{component}.encoder.embed_tokens", "embedding")
    for i in range(layers):
        block = f"{component}.encoder.block.{i}"
        for name in "qkvo":
            yield ModuleRow(f"{block}.layer.0.SelfAttention.{name}")
        if i == 0:
            yield ModuleRow(f"{block}.layer.0.SelfAttention.relative_attention_bias", "embedding")
        yield ModuleRow(f"{block}.layer.0.layer_norm", "norm")
        for name in ("wi_0", "wi_1", "wo"):
            yield ModuleRow(f"{block}.layer.1.DenseReluDense.{name}")
        yield ModuleRow(f"{block}.layer.1.layer_norm", "norm")
    yield ModuleRow(f"{component}.encoder.final_layer_norm", "norm")


_RESNET = (
    ("norm1", "norm", "in_layers.0"),
    ("conv1", "conv", "in_layers.2"),
    ("time_emb_proj", "linear", "emb_layers.1"),
    ("norm2", "norm", "out_layers.0"),
    ("conv2", "conv", "out_layers.3"),
)


def unet(depths: Sequence[int], widths: Sequence[int], proj: str, extra: bool, layers: int = 2) -> Iterator[ModuleRow]:
    """Yield diffusers' UNet2DConditionModel.

    `depths`: transformer blocks of each attention, for each level on the way down (0: a level without
    attention; the way up mirrors it, the middle has the last that is not 0). `widths`: the levels' channels
    in any unit. `proj`: the kind of proj_in and proj_out. `extra`: SDXL's second embedding."""
    levels = len(depths)
    yield ModuleRow("unet.conv_in", "conv", "input_blocks.0.0")
    yield ModuleRow("unet.time_embedding.linear_1", "linear", "time_embed.0")
    yield ModuleRow("unet.time_embedding.linear_2", "linear", "time_embed.2")
    if extra:
        yield ModuleRow("unet.add_embedding.linear_1", "linear", "label_emb.0.0")
        yield ModuleRow("unet.add_embedding.linear_2", "linear", "label_emb.0.2")
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
    yield ModuleRow("unet.conv_norm_out", "norm", "out.0")
    yield ModuleRow("unet.conv_out", "conv", "out.2")


def _resnet(name: str, original: str, shortcut: bool) -> Iterator[ModuleRow]:
    for part, kind, its in _RESNET:
        yield ModuleRow(f"{name}.{part}", kind, f"{original}.{its}")
    if shortcut:
        yield ModuleRow(f"{name}.conv_shortcut", "conv", f"{original}.skip_connection")


def _attention(name: str, original: str, depth: int, proj: str) -> Iterator[ModuleRow]:
    """Yield a Transformer2DModel, whose inner names are the same in the original."""
    if not depth:
        return
    inside = [("norm", "norm"), ("proj_in", proj), ("proj_out", proj)]
    for k in range(depth):
        block = f"transformer_blocks.{k}"
        inside += [(f"{block}.norm{n}", "norm") for n in (1, 2, 3)]
        inside += [(f"{block}.attn{n}.{p}", "linear") for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")]
        inside += [(f"{block}.ff.net.0.proj", "linear"), (f"{block}.ff.net.2", "linear")]
    for part, kind in inside:
        yield ModuleRow(f"{name}.{part}", kind, f"{original}.{part}")


_TOP = "transformer"
_SAMPLE = ("to_q", "to_k", "to_v")
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj")


def _fused(names: tuple[str, ...], prefix: str, original: str, units: int = 3) -> Iterator[ModuleRow]:
    """Yield one unit of the original's rows for each name.

    The last name takes all the rest."""
    for i, name in enumerate(names):
        end = units if i == len(names) - 1 else i + 1
        yield ModuleRow(f"{prefix}.{name}", "linear", original, (i, end, units))


def _norms(prefix: str, names: str, original: str, q: str, k: str) -> Iterator[ModuleRow]:
    for letter, its in (("q", q), ("k", k)):
        yield ModuleRow(f"{prefix}.{names}_{letter}", "norm", f"{original}.{its}")


def _last(original_linear: str = "final_layer.linear") -> Iterator[ModuleRow]:
    yield ModuleRow(f"{_TOP}.norm_out.linear", "linear", "final_layer.adaLN_modulation.1", swap=True)
    yield ModuleRow(f"{_TOP}.proj_out", "linear", original_linear)


def sd3(layers: int, dual: Collection[int]) -> Iterator[ModuleRow]:
    """Yield SD3Transformer2DModel with query and key norms.

    `dual`: layers with a second attention. The last layer reads the text and does not write it."""
    yield ModuleRow(f"{_TOP}.pos_embed.proj", "conv", "x_embedder.proj")
    for name, its in (("timestep", "t_embedder"), ("text", "y_embedder")):
        yield ModuleRow(f"{_TOP}.time_text_embed.{name}_embedder.linear_1", "linear", f"{its}.mlp.0")
        yield ModuleRow(f"{_TOP}.time_text_embed.{name}_embedder.linear_2", "linear", f"{its}.mlp.2")
    yield ModuleRow(f"{_TOP}.context_embedder")
    for i in range(layers):
        block, last = f"{_TOP}.transformer_blocks.{i}", i == layers - 1
        x, c = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        yield ModuleRow(f"{block}.norm1.linear", "linear", f"{x}.adaLN_modulation.1")
        yield ModuleRow(f"{block}.norm1_context.linear", "linear", f"{c}.adaLN_modulation.1", swap=last)
        for attn in ("attn", "attn2") if i in dual else ("attn",):
            yield from _fused(_SAMPLE, f"{block}.{attn}", f"{x}.{attn}.qkv")
            yield from _norms(f"{block}.{attn}", "norm", f"{x}.{attn}", "ln_q", "ln_k")
            yield ModuleRow(f"{block}.{attn}.to_out.0", "linear", f"{x}.{attn}.proj")
        yield from _fused(_CONTEXT, f"{block}.attn", f"{c}.attn.qkv")
        yield from _norms(f"{block}.attn", "norm_added", f"{c}.attn", "ln_q", "ln_k")
        yield ModuleRow(f"{block}.ff.net.0.proj", "linear", f"{x}.mlp.fc1")
        yield ModuleRow(f"{block}.ff.net.2", "linear", f"{x}.mlp.fc2")
        if not last:
            yield ModuleRow(f"{block}.attn.to_add_out", "linear", f"{c}.attn.proj")
            yield ModuleRow(f"{block}.ff_context.net.0.proj", "linear", f"{c}.mlp.fc1")
            yield ModuleRow(f"{block}.ff_context.net.2", "linear", f"{c}.mlp.fc2")
    yield from _last()


def _flux_double(i: int, ff: tuple[str, str]) -> Iterator[ModuleRow]:
    block, its = f"{_TOP}.transformer_blocks.{i}", f"double_blocks.{i}"
    for side, names, norm, out, feed in (
        ("img", _SAMPLE, "norm", "to_out.0", "ff"),
        ("txt", _CONTEXT, "norm_added", "to_add_out", "ff_context"),
    ):
        yield from _fused(names, f"{block}.attn", f"{its}.{side}_attn.qkv")
        yield from _norms(f"{block}.attn", norm, f"{its}.{side}_attn.norm", "query_norm", "key_norm")
        yield ModuleRow(f"{block}.attn.{out}", "linear", f"{its}.{side}_attn.proj")
        yield ModuleRow(f"{block}.{feed}.{ff[0]}", "linear", f"{its}.{side}_mlp.0")
        yield ModuleRow(f"{block}.{feed}.{ff[1]}", "linear", f"{its}.{side}_mlp.2")


def _flux_embedders(prefix: str, names: tuple[tuple[str, str], ...]) -> Iterator[ModuleRow]:
    yield ModuleRow(f"{_TOP}.x_embedder", "linear", "img_in")
    yield ModuleRow(f"{_TOP}.context_embedder", "linear", "txt_in")
    for name, its in names:
        yield ModuleRow(f"{_TOP}.{prefix}.{name}_embedder.linear_1", "linear", f"{its}.in_layer")
        yield ModuleRow(f"{_TOP}.{prefix}.{name}_embedder.linear_2", "linear", f"{its}.out_layer")


def flux1(double: int, single: int, guidance: bool) -> Iterator[ModuleRow]:
    """Yield FluxTransformer2DModel: dev with guidance, schnell without.

    A single block's linear1 is q, k, v and the feed-forward, which is four times as wide: 7 units."""
    names = (("timestep", "time_in"), ("text", "vector_in"), *([("guidance", "guidance_in")] if guidance else []))
    yield from _flux_embedders("time_text_embed", names)
    for i in range(double):
        block, its = f"{_TOP}.transformer_blocks.{i}", f"double_blocks.{i}"
        yield ModuleRow(f"{block}.norm1.linear", "linear", f"{its}.img_mod.lin")
        yield ModuleRow(f"{block}.norm1_context.linear", "linear", f"{its}.txt_mod.lin")
        yield from _flux_double(i, ("net.0.proj", "net.2"))
    for i in range(single):
        block, its = f"{_TOP}.single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield ModuleRow(f"{block}.norm.linear", "linear", f"{its}.modulation.lin")
        yield from _fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), block, f"{its}.linear1", 7)
        yield ModuleRow(f"{block}.proj_out", "linear", f"{its}.linear2")
        yield from _norms(f"{block}.attn", "norm", f"{its}.norm", "query_norm", "key_norm")
    yield from _last()


def flux2(double: int, single: int, guidance: bool) -> Iterator[ModuleRow]:
    """Yield Flux2Transformer2DModel; klein without guidance.

    8 and 48 blocks (dev), 8 and 24 (klein 9B), 5 and 20 (klein 4B). All blocks share the modulations; a
    single block's projections are fused in diffusers too."""
    names = (("timestep", "time_in"), *([("guidance", "guidance_in")] if guidance else []))
    yield from _flux_embedders("time_guidance_embed", names)
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield ModuleRow(f"{_TOP}.{name}.linear", "linear", f"{name}.lin")
    for i in range(double):
        yield from _flux_double(i, ("linear_in", "linear_out"))
    for i in range(single):
        attn, its = f"{_TOP}.single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        yield ModuleRow(f"{attn}.to_qkv_mlp_proj", "linear", f"{its}.linear1")
        yield ModuleRow(f"{attn}.to_out", "linear", f"{its}.linear2")
        yield from _norms(attn, "norm", f"{its}.norm", "query_norm", "key_norm")
    yield from _last()


def qwen_image(layers: int) -> Iterator[ModuleRow]:
    """Yield QwenImageTransformer2DModel; diffusers is the original."""
    for name in ("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"):
        yield ModuleRow(f"{_TOP}.{name}")
    yield ModuleRow(f"{_TOP}.txt_norm", "norm")
    for i in range(layers):
        block = f"{_TOP}.transformer_blocks.{i}"
        for name in (*_SAMPLE, *_CONTEXT, "to_out.0", "to_add_out"):
            yield ModuleRow(f"{block}.attn.{name}")
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield ModuleRow(f"{block}.attn.{name}", "norm")
        for side in ("img", "txt"):
            for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2"):
                yield ModuleRow(f"{block}.{side}_{name}")
    for name in ("img_in", "txt_in", "norm_out.linear", "proj_out"):
        yield ModuleRow(f"{_TOP}.{name}")


def z_image(layers: int, refiners: int) -> Iterator[ModuleRow]:
    """Yield ZImageTransformer2DModel with one patch size, 2 by 1.

    The context refiner has no modulation."""
    yield ModuleRow(f"{_TOP}.all_x_embedder.2-1", "linear", "x_embedder")
    yield ModuleRow(f"{_TOP}.all_final_layer.2-1.linear", "linear", "final_layer.linear")
    yield ModuleRow(f"{_TOP}.all_final_layer.2-1.adaLN_modulation.1", "linear", "final_layer.adaLN_modulation.1")
    yield ModuleRow(f"{_TOP}.t_embedder.mlp.0")
    yield ModuleRow(f"{_TOP}.t_embedder.mlp.2")
    yield ModuleRow(f"{_TOP}.cap_embedder.0", "norm")
    yield ModuleRow(f"{_TOP}.cap_embedder.1")
    for group, count in (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", layers)):
        for i in range(count):
            block, its = f"{_TOP}.{group}.{i}", f"{group}.{i}"
            yield from _fused(_SAMPLE, f"{block}.attention", f"{its}.attention.qkv")
            yield ModuleRow(f"{block}.attention.to_out.0", "linear", f"{its}.attention.out")
            yield from _norms(f"{block}.attention", "norm", f"{its}.attention", "q_norm", "k_norm")
            for name in ("w1", "w2", "w3"):
                yield ModuleRow(f"{block}.feed_forward.{name}")
            for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                yield ModuleRow(f"{block}.{name}", "norm")
            if group != "context_refiner":
                yield ModuleRow(f"{block}.adaLN_modulation.0")


def krea2(layers: int, layerwise: int, refiners: int) -> Iterator[ModuleRow]:
    """Yield Krea2Transformer2DModel, whose modulations are tables, not modules."""
    yield ModuleRow(f"{_TOP}.txt_in.norm", "norm", "txtmlp.0")
    yield ModuleRow(f"{_TOP}.final_layer.norm", "norm", "last.norm")
    for name, its in (
        *(("img_in", "first"), ("final_layer.linear", "last.linear"), ("text_fusion.projector", "txtfusion.projector")),
        *(("time_embed.linear_1", "tmlp.0"), ("time_embed.linear_2", "tmlp.2"), ("time_mod_proj", "tproj.1")),
        *(("txt_in.linear_1", "txtmlp.1"), ("txt_in.linear_2", "txtmlp.3")),
    ):
        yield ModuleRow(f"{_TOP}.{name}", "linear", its)
    groups = (
        ("transformer_blocks", "blocks", layers),
        ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks", layerwise),
        ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks", refiners),
    )
    for group, its, count in groups:
        for i in range(count):
            for name, own in (("to_q", "wq"), ("to_k", "wk"), ("to_v", "wv"), ("to_out.0", "wo"), ("to_gate", "gate")):
                yield ModuleRow(f"{_TOP}.{group}.{i}.attn.{name}", "linear", f"{its}.{i}.attn.{own}")
            for name in ("gate", "up", "down"):
                yield ModuleRow(f"{_TOP}.{group}.{i}.ff.{name}", "linear", f"{its}.{i}.mlp.{name}")
            yield from _norms(f"{_TOP}.{group}.{i}.attn", "norm", f"{its}.{i}.attn.qknorm", "qnorm", "knorm")
            for name, own in (("norm1", "prenorm"), ("norm2", "postnorm")):
                yield ModuleRow(f"{_TOP}.{group}.{i}.{name}", "norm", f"{its}.{i}.{own}")


def anima(layers: int, adapter: int) -> Iterator[ModuleRow]:
    """Yield Anima's CosmosTransformer3DModel and AnimaTextConditioner.

    The original calls the latter llm_adapter."""
    yield ModuleRow(f"{_TOP}.patch_embed.proj", "linear", "x_embedder.proj.1")
    for n in "12":
        yield ModuleRow(f"{_TOP}.time_embed.t_embedder.linear_{n}", "linear", f"t_embedder.1.linear_{n}")
        yield ModuleRow(f"{_TOP}.norm_out.linear_{n}", "linear", f"final_layer.adaln_modulation.{n}")
    yield ModuleRow(f"{_TOP}.time_embed.norm", "norm", "t_embedding_norm")
    yield ModuleRow(f"{_TOP}.proj_out", "linear", "final_layer.linear")
    for i in range(layers):
        block, its = f"{_TOP}.transformer_blocks.{i}", f"blocks.{i}"
        for k, part in (("1", "self_attn"), ("2", "cross_attn"), ("3", "mlp")):
            for n in "12":
                yield ModuleRow(f"{block}.norm{k}.linear_{n}", "linear", f"{its}.adaln_modulation_{part}.{n}")
        for attn, own in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for name, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "output")):
                yield ModuleRow(f"{block}.{attn}.{name}", "linear", f"{its}.{own}.{old}_proj")
            yield from _norms(f"{block}.{attn}", "norm", f"{its}.{own}", "q_norm", "k_norm")
        yield ModuleRow(f"{block}.ff.net.0.proj", "linear", f"{its}.mlp.layer1")
        yield ModuleRow(f"{block}.ff.net.2", "linear", f"{its}.mlp.layer2")
    top, own = "text_conditioner", "llm_adapter"
    for name, kind in (("embed", "embedding"), ("out_proj", "linear"), ("norm", "norm")):
        yield ModuleRow(f"{top}.{name}", kind, f"{own}.{name}")
    for i in range(adapter):
        for attn in ("self_attn", "cross_attn"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield ModuleRow(f"{top}.blocks.{i}.{attn}.{name}", "linear", f"{own}.blocks.{i}.{attn}.{name}")
            for name in ("q_norm", "k_norm"):
                yield ModuleRow(f"{top}.blocks.{i}.{attn}.{name}", "norm", f"{own}.blocks.{i}.{attn}.{name}")
        for name in ("norm_self_attn", "norm_cross_attn", "norm_mlp"):
            yield ModuleRow(f"{top}.blocks.{i}.{name}", "norm", f"{own}.blocks.{i}.{name}")
        for name in ("mlp.0", "mlp.2"):
            yield ModuleRow(f"{top}.blocks.{i}.{name}", "linear", f"{own}.blocks.{i}.{name}")


def attention_blocks(double: int, single: int, *, joint: bool) -> Iterator[ModuleRow]:
    """Yield attention and feed-forward by diffusers' names.

    `joint`: with the text's projections, else attn1, attn2."""
    for i in range(double):
        block = f"{_TOP}.transformer_blocks.{i}"
        for attn in ("attn",) if joint else ("attn1", "attn2"):
            for name in (*_SAMPLE, "to_out.0", *((*_CONTEXT, "to_add_out") if joint else ())):
                yield ModuleRow(f"{block}.{attn}.{name}")
        for feed in ("ff", "ff_context") if joint else ("ff",):
            yield ModuleRow(f"{block}.{feed}.net.0.proj")
            yield ModuleRow(f"{block}.{feed}.net.2")
    for i in range(single):
        for name in (*(f"attn.{p}" for p in _SAMPLE), "proj_mlp", "proj_out"):
            yield ModuleRow(f"{_TOP}.single_transformer_blocks.{i}.{name}")


DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class ModulePlace:
    """The place of (a part of) a foreign module.

    `part`: rows [begin, end) of `total` in equal units, None for all. `swap`: the two halves of the rows are
    swapped."""

    module: str
    part: RowRange | None = None
    swap: bool = False


@dataclass(frozen=True)
class Family:
    """An image family.

    `modules`: canonical name -> linear, conv, embedding or norm. `originals`: original name of each denoiser
    module, without a prefix -> its places. `diffusers_named`: sd-scripts and musubi-tuner use diffusers'
    names for the denoiser. `clip`: ComfyUI's name of the first text encoder."""

    name: str
    label: str
    modules: Mapping[str, str]
    originals: Mapping[str, tuple[ModulePlace, ...]]
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

        A T5 is always its third."""
        if len(self.encoders) == 1:
            return "lora_te_"
        return "lora_te3_" if self._is_t5(component) else f"lora_te{component[13:] or 1}_"

    def comfyui_encoder(self, component: str) -> str:
        """Return ComfyUI's name of a text encoder."""
        if self._is_t5(component):
            return "t5xxl"
        return "clip_g" if component == "text_encoder_2" else self.clip

    def _is_t5(self, component: str) -> bool:
        return f"{component}.shared" in self.modules


def flat(name: str) -> str:
    """Replace dots with underscores, as in kohya's keys.

    Not invertible without a table."""
    return name.replace(".", "_")


@cache
def families() -> Mapping[str, Family]:
    """Return all families by name, cached, the more common ones first."""
    l_g_t5 = [*clip("text_encoder", 12, True), *clip("text_encoder_2", 32, True), *t5("text_encoder_3", 24)]
    made = [
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
        _family("krea2", "Krea 2", krea2(28, 2, 2)),
        _family("anima", "Anima", anima(28, 6)),
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
    return MappingProxyType({family.name: family for family in made})


@cache
def strangers() -> Mapping[str, Family]:
    """Return models with a family's diffusers names that must not be read as it."""
    made = [
        _family("hunyuan-video", "Hunyuan Video", attention_blocks(20, 40, joint=True)),
        _family("ltx-video", "LTX Video", attention_blocks(28, 0, joint=False)),
    ]
    return MappingProxyType({family.name: family for family in made})


def _family(name: str, label: str, *components: Iterable[ModuleRow], **facts: Any) -> Family:
    modules: dict[str, str] = {}
    originals: dict[str, list[ModulePlace]] = defaultdict(list)
    for row in chain(*components):
        modules[row.module] = row.kind
        component, _, own = row.module.partition(".")
        if component in DENOISERS or row.original:
            originals[row.original or own].append(ModulePlace(row.module, row.part, row.swap))
    landed = MappingProxyType({key: tuple(places) for key, places in originals.items()})
    return Family(name, label, MappingProxyType(modules), landed, **facts)
