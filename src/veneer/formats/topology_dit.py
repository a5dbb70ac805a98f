"""The diffusion transformers: SD3, FLUX, Qwen-Image, Z-Image, Krea 2, Anima; diffusers' names and the original ones.

Where the original has q, k and v in one projection and diffusers has three, each of the three is a part of its rows. In
the last modulation the original has (shift, scale) and diffusers (scale, shift). Knows names alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from veneer.formats.topology_rows import Row

__all__ = ["anima", "attention_blocks", "flux1", "flux2", "krea2", "qwen_image", "sd3", "z_image"]

_TOP = "transformer"
_SAMPLE = ("to_q", "to_k", "to_v")
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj")


def _fused(names: tuple[str, ...], prefix: str, original: str, units: int = 3) -> Iterator[Row]:
    """One unit of the original's rows for each name; the last name takes all the rest."""
    for i, name in enumerate(names):
        end = units if i == len(names) - 1 else i + 1
        yield Row(f"{prefix}.{name}", "linear", original, (i, end, units))


def _norms(prefix: str, names: str, original: str, q: str, k: str) -> Iterator[Row]:
    for letter, its in (("q", q), ("k", k)):
        yield Row(f"{prefix}.{names}_{letter}", "norm", f"{original}.{its}")


def _last(original_linear: str = "final_layer.linear") -> Iterator[Row]:
    yield Row(f"{_TOP}.norm_out.linear", "linear", "final_layer.adaLN_modulation.1", swap=True)
    yield Row(f"{_TOP}.proj_out", "linear", original_linear)


def sd3(layers: int, dual: Collection[int]) -> Iterator[Row]:
    """SD3Transformer2DModel with query and key norms. `dual`: layers with a second attention. The last layer reads the
    text and does not write it."""
    yield Row(f"{_TOP}.pos_embed.proj", "conv", "x_embedder.proj")
    for name, its in (("timestep", "t_embedder"), ("text", "y_embedder")):
        yield Row(f"{_TOP}.time_text_embed.{name}_embedder.linear_1", "linear", f"{its}.mlp.0")
        yield Row(f"{_TOP}.time_text_embed.{name}_embedder.linear_2", "linear", f"{its}.mlp.2")
    yield Row(f"{_TOP}.context_embedder")
    for i in range(layers):
        block, last = f"{_TOP}.transformer_blocks.{i}", i == layers - 1
        x, c = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        yield Row(f"{block}.norm1.linear", "linear", f"{x}.adaLN_modulation.1")
        yield Row(f"{block}.norm1_context.linear", "linear", f"{c}.adaLN_modulation.1", swap=last)
        for attn in ("attn", "attn2") if i in dual else ("attn",):
            yield from _fused(_SAMPLE, f"{block}.{attn}", f"{x}.{attn}.qkv")
            yield from _norms(f"{block}.{attn}", "norm", f"{x}.{attn}", "ln_q", "ln_k")
            yield Row(f"{block}.{attn}.to_out.0", "linear", f"{x}.{attn}.proj")
        yield from _fused(_CONTEXT, f"{block}.attn", f"{c}.attn.qkv")
        yield from _norms(f"{block}.attn", "norm_added", f"{c}.attn", "ln_q", "ln_k")
        yield Row(f"{block}.ff.net.0.proj", "linear", f"{x}.mlp.fc1")
        yield Row(f"{block}.ff.net.2", "linear", f"{x}.mlp.fc2")
        if not last:
            yield Row(f"{block}.attn.to_add_out", "linear", f"{c}.attn.proj")
            yield Row(f"{block}.ff_context.net.0.proj", "linear", f"{c}.mlp.fc1")
            yield Row(f"{block}.ff_context.net.2", "linear", f"{c}.mlp.fc2")
    yield from _last()


def _flux_double(i: int, ff: tuple[str, str]) -> Iterator[Row]:
    block, its = f"{_TOP}.transformer_blocks.{i}", f"double_blocks.{i}"
    for side, names, norm, out, feed in (
        ("img", _SAMPLE, "norm", "to_out.0", "ff"),
        ("txt", _CONTEXT, "norm_added", "to_add_out", "ff_context"),
    ):
        yield from _fused(names, f"{block}.attn", f"{its}.{side}_attn.qkv")
        yield from _norms(f"{block}.attn", norm, f"{its}.{side}_attn.norm", "query_norm", "key_norm")
        yield Row(f"{block}.attn.{out}", "linear", f"{its}.{side}_attn.proj")
        yield Row(f"{block}.{feed}.{ff[0]}", "linear", f"{its}.{side}_mlp.0")
        yield Row(f"{block}.{feed}.{ff[1]}", "linear", f"{its}.{side}_mlp.2")


def _flux_embedders(prefix: str, names: tuple[tuple[str, str], ...]) -> Iterator[Row]:
    yield Row(f"{_TOP}.x_embedder", "linear", "img_in")
    yield Row(f"{_TOP}.context_embedder", "linear", "txt_in")
    for name, its in names:
        yield Row(f"{_TOP}.{prefix}.{name}_embedder.linear_1", "linear", f"{its}.in_layer")
        yield Row(f"{_TOP}.{prefix}.{name}_embedder.linear_2", "linear", f"{its}.out_layer")


def flux1(double: int, single: int, guidance: bool) -> Iterator[Row]:
    """FluxTransformer2DModel: dev with guidance, schnell without. A single block's linear1 is q, k, v and the
    feed-forward, which is four times as wide: 7 units."""
    names = (("timestep", "time_in"), ("text", "vector_in"), *([("guidance", "guidance_in")] if guidance else []))
    yield from _flux_embedders("time_text_embed", names)
    for i in range(double):
        block, its = f"{_TOP}.transformer_blocks.{i}", f"double_blocks.{i}"
        yield Row(f"{block}.norm1.linear", "linear", f"{its}.img_mod.lin")
        yield Row(f"{block}.norm1_context.linear", "linear", f"{its}.txt_mod.lin")
        yield from _flux_double(i, ("net.0.proj", "net.2"))
    for i in range(single):
        block, its = f"{_TOP}.single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield Row(f"{block}.norm.linear", "linear", f"{its}.modulation.lin")
        yield from _fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), block, f"{its}.linear1", 7)
        yield Row(f"{block}.proj_out", "linear", f"{its}.linear2")
        yield from _norms(f"{block}.attn", "norm", f"{its}.norm", "query_norm", "key_norm")
    yield from _last()


def flux2(double: int, single: int, guidance: bool) -> Iterator[Row]:
    """Flux2Transformer2DModel: 8 and 48 blocks (dev), 8 and 24 (klein 9B), 5 and 20 (klein 4B); klein without guidance.
    Modulations are shared by all blocks; a single block's projections are fused in diffusers too."""
    names = (("timestep", "time_in"), *([("guidance", "guidance_in")] if guidance else []))
    yield from _flux_embedders("time_guidance_embed", names)
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield Row(f"{_TOP}.{name}.linear", "linear", f"{name}.lin")
    for i in range(double):
        yield from _flux_double(i, ("linear_in", "linear_out"))
    for i in range(single):
        attn, its = f"{_TOP}.single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        yield Row(f"{attn}.to_qkv_mlp_proj", "linear", f"{its}.linear1")
        yield Row(f"{attn}.to_out", "linear", f"{its}.linear2")
        yield from _norms(attn, "norm", f"{its}.norm", "query_norm", "key_norm")
    yield from _last()


def qwen_image(layers: int) -> Iterator[Row]:
    """QwenImageTransformer2DModel; diffusers is the original."""
    for name in ("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"):
        yield Row(f"{_TOP}.{name}")
    yield Row(f"{_TOP}.txt_norm", "norm")
    for i in range(layers):
        block = f"{_TOP}.transformer_blocks.{i}"
        for name in (*_SAMPLE, *_CONTEXT, "to_out.0", "to_add_out"):
            yield Row(f"{block}.attn.{name}")
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield Row(f"{block}.attn.{name}", "norm")
        for side in ("img", "txt"):
            for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2"):
                yield Row(f"{block}.{side}_{name}")
    for name in ("img_in", "txt_in", "norm_out.linear", "proj_out"):
        yield Row(f"{_TOP}.{name}")


def z_image(layers: int, refiners: int) -> Iterator[Row]:
    """ZImageTransformer2DModel with one patch size, 2 by 1. The context refiner has no modulation."""
    yield Row(f"{_TOP}.all_x_embedder.2-1", "linear", "x_embedder")
    yield Row(f"{_TOP}.all_final_layer.2-1.linear", "linear", "final_layer.linear")
    yield Row(f"{_TOP}.all_final_layer.2-1.adaLN_modulation.1", "linear", "final_layer.adaLN_modulation.1")
    yield Row(f"{_TOP}.t_embedder.mlp.0")
    yield Row(f"{_TOP}.t_embedder.mlp.2")
    yield Row(f"{_TOP}.cap_embedder.0", "norm")
    yield Row(f"{_TOP}.cap_embedder.1")
    for group, count in (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", layers)):
        for i in range(count):
            block, its = f"{_TOP}.{group}.{i}", f"{group}.{i}"
            yield from _fused(_SAMPLE, f"{block}.attention", f"{its}.attention.qkv")
            yield Row(f"{block}.attention.to_out.0", "linear", f"{its}.attention.out")
            yield from _norms(f"{block}.attention", "norm", f"{its}.attention", "q_norm", "k_norm")
            for name in ("w1", "w2", "w3"):
                yield Row(f"{block}.feed_forward.{name}")
            for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                yield Row(f"{block}.{name}", "norm")
            if group != "context_refiner":
                yield Row(f"{block}.adaLN_modulation.0")


def krea2(layers: int, layerwise: int, refiners: int) -> Iterator[Row]:
    """Krea2Transformer2DModel. Its modulations are no modules but tables."""
    yield Row(f"{_TOP}.txt_in.norm", "norm", "txtmlp.0")
    yield Row(f"{_TOP}.final_layer.norm", "norm", "last.norm")
    for name, its in (
        *(("img_in", "first"), ("final_layer.linear", "last.linear"), ("text_fusion.projector", "txtfusion.projector")),
        *(("time_embed.linear_1", "tmlp.0"), ("time_embed.linear_2", "tmlp.2"), ("time_mod_proj", "tproj.1")),
        *(("txt_in.linear_1", "txtmlp.1"), ("txt_in.linear_2", "txtmlp.3")),
    ):
        yield Row(f"{_TOP}.{name}", "linear", its)
    groups = (
        ("transformer_blocks", "blocks", layers),
        ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks", layerwise),
        ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks", refiners),
    )
    for group, its, count in groups:
        for i in range(count):
            for name, own in (("to_q", "wq"), ("to_k", "wk"), ("to_v", "wv"), ("to_out.0", "wo"), ("to_gate", "gate")):
                yield Row(f"{_TOP}.{group}.{i}.attn.{name}", "linear", f"{its}.{i}.attn.{own}")
            for name in ("gate", "up", "down"):
                yield Row(f"{_TOP}.{group}.{i}.ff.{name}", "linear", f"{its}.{i}.mlp.{name}")
            yield from _norms(f"{_TOP}.{group}.{i}.attn", "norm", f"{its}.{i}.attn.qknorm", "qnorm", "knorm")
            for name, own in (("norm1", "prenorm"), ("norm2", "postnorm")):
                yield Row(f"{_TOP}.{group}.{i}.{name}", "norm", f"{its}.{i}.{own}")


def anima(layers: int, adapter: int) -> Iterator[Row]:
    """CosmosTransformer3DModel as Anima has it, and AnimaTextConditioner, which the original calls llm_adapter."""
    yield Row(f"{_TOP}.patch_embed.proj", "linear", "x_embedder.proj.1")
    for n in "12":
        yield Row(f"{_TOP}.time_embed.t_embedder.linear_{n}", "linear", f"t_embedder.1.linear_{n}")
        yield Row(f"{_TOP}.norm_out.linear_{n}", "linear", f"final_layer.adaln_modulation.{n}")
    yield Row(f"{_TOP}.time_embed.norm", "norm", "t_embedding_norm")
    yield Row(f"{_TOP}.proj_out", "linear", "final_layer.linear")
    for i in range(layers):
        block, its = f"{_TOP}.transformer_blocks.{i}", f"blocks.{i}"
        for k, part in (("1", "self_attn"), ("2", "cross_attn"), ("3", "mlp")):
            for n in "12":
                yield Row(f"{block}.norm{k}.linear_{n}", "linear", f"{its}.adaln_modulation_{part}.{n}")
        for attn, own in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for name, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "output")):
                yield Row(f"{block}.{attn}.{name}", "linear", f"{its}.{own}.{old}_proj")
            yield from _norms(f"{block}.{attn}", "norm", f"{its}.{own}", "q_norm", "k_norm")
        yield Row(f"{block}.ff.net.0.proj", "linear", f"{its}.mlp.layer1")
        yield Row(f"{block}.ff.net.2", "linear", f"{its}.mlp.layer2")
    top, own = "text_conditioner", "llm_adapter"
    for name, kind in (("embed", "embedding"), ("out_proj", "linear"), ("norm", "norm")):
        yield Row(f"{top}.{name}", kind, f"{own}.{name}")
    for i in range(adapter):
        for attn in ("self_attn", "cross_attn"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield Row(f"{top}.blocks.{i}.{attn}.{name}", "linear", f"{own}.blocks.{i}.{attn}.{name}")
            for name in ("q_norm", "k_norm"):
                yield Row(f"{top}.blocks.{i}.{attn}.{name}", "norm", f"{own}.blocks.{i}.{attn}.{name}")
        for name in ("norm_self_attn", "norm_cross_attn", "norm_mlp"):
            yield Row(f"{top}.blocks.{i}.{name}", "norm", f"{own}.blocks.{i}.{name}")
        for name in ("mlp.0", "mlp.2"):
            yield Row(f"{top}.blocks.{i}.{name}", "linear", f"{own}.blocks.{i}.{name}")


def attention_blocks(double: int, single: int, *, joint: bool) -> Iterator[Row]:
    """Attention and feed-forward as diffusers calls them: `joint` with the text's projections, else attn1, attn2."""
    for i in range(double):
        block = f"{_TOP}.transformer_blocks.{i}"
        for attn in ("attn",) if joint else ("attn1", "attn2"):
            for name in (*_SAMPLE, "to_out.0", *((*_CONTEXT, "to_add_out") if joint else ())):
                yield Row(f"{block}.{attn}.{name}")
        for feed in ("ff", "ff_context") if joint else ("ff",):
            yield Row(f"{block}.{feed}.net.0.proj")
            yield Row(f"{block}.{feed}.net.2")
    for i in range(single):
        for name in (*(f"attn.{p}" for p in _SAMPLE), "proj_mlp", "proj_out"):
            yield Row(f"{_TOP}.single_transformer_blocks.{i}.{name}")
