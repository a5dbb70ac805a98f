"""A FLUX.1 denoiser in one file of original names: its config from the shapes, its weights under diffusers' names.

    double_blocks.0.img_attn.qkv.weight (3w, w)   ->  transformer_blocks.0.attn.to_q.weight, to_k, to_v (w, w)
    single_blocks.0.linear1.weight (7w, w)        ->  single_transformer_blocks.0.attn.to_q …, proj_mlp (4w, w)

diffusers' own converter knows one width, 3072. Shapes say everything but how positions are divided over a head: that is
the given config's where its heads are as wide, else in FLUX.1's proportions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BaseError

__all__ = ["flux_config", "flux_model", "flux_state", "is_flux_original"]

_PREFIX = "model.diffusion_model."
_WHOLE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{theirs}_in.{end}_layer": f"time_text_embed.{ours}_embedder.linear_{i}"
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for i, end in ((1, "in"), (2, "out"))
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_BLOCKS = {"double": ("transformer_blocks", _DOUBLE), "single": ("single_transformer_blocks", _SINGLE)}
_NAME = re.compile(r"(?:(?P<kind>double|single)_blocks\.(?P<block>\d+)\.)?(?P<module>.+)\.(?P<end>weight|bias|scale)")


def is_flux_original(names: list[str]) -> bool:
    """Whether a FLUX.1 file has the original names, and not diffusers' own."""
    return any(name.removeprefix(_PREFIX).startswith("double_blocks.") for name in names)


def flux_config(shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The config of a FluxTransformer2DModel of these shapes; from `own`, a config as diffusers saves it, what none
    says. Raises BaseError where a tensor that says something is missing, or the shapes are no FLUX.1's."""
    shapes = {name.removeprefix(_PREFIX): tuple(shape) for name, shape in shapes.items()}
    head_name = "double_blocks.0.img_attn.norm.query_norm.scale"
    wanted = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight")
    if missing := [n for n in (*wanted, head_name) if len(shapes.get(n, ())) != (1 if n == head_name else 2)]:
        raise BaseError(f"some of its weights are not in the file: {', '.join(missing)}", where=where)
    (width, channels), (head,) = shapes["img_in.weight"], shapes[head_name]
    if width % head:
        raise BaseError(f"its width {width} is not a multiple of its heads' {head}: this is no FLUX.1", where=where)
    axes = tuple(own.get("axes_dims_rope") or ())
    if sum(axes) != head:
        if head % 32:
            raise BaseError(
                f"its heads are {head} wide, and the config divides positions over {sum(axes)}: {axes}",
                where=where,
                fix="config= a diffusers directory whose transformer has axes_dims_rope of that sum",
            )
        axes = (head // 8, head * 7 // 16, head * 7 // 16)  # FLUX.1's 16, 56, 56 of 128
    out = shapes["final_layer.linear.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _count(shapes, "double"),
        "num_single_layers": _count(shapes, "single"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": axes,
    }


def _count(shapes: Mapping[str, Any], kind: str) -> int:
    found = {int(m["block"]) for name in shapes if (m := _NAME.fullmatch(name)) and m["kind"] == kind}
    return max(found, default=-1) + 1  # a block that lacks is then missing by name


def flux_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are a FLUX.1 denoiser's, under diffusers' names: fused projections in parts, the halves of the last
    modulation, (shift, scale) there, as (scale, shift)."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if found is None or (found["end"] == "scale") != ("_norm" in found["module"]):
            continue  # a norm has a scale, all others weight and bias
        end = found["end"].replace("scale", "weight")
        if found["kind"] is None:
            if found["module"] in _WHOLE:
                halves = tensor.chunk(2) if "adaLN" in found["module"] else (tensor,)
                out[f"{_WHOLE[found['module']]}.{end}"] = torch.cat(halves[::-1])
            continue
        blocks, modules = _BLOCKS[found["kind"]]
        if parts := modules.get(found["module"]):
            # q, k and v are alike; behind those of a single block comes its MLP, four times as wide
            rows = [len(tensor) // (7 if len(parts) == 4 else len(parts))] * (len(parts) - 1)
            for part, piece in zip(parts, tensor.split([*rows, len(tensor) - sum(rows)]), strict=True):
                out[f"{blocks}.{found['block']}.{part}.{end}"] = piece
    return out


def flux_model(tensors: Mapping[str, Tensor], own: Mapping[str, Any], dtype: torch.dtype, where: str = "") -> Any:
    """The denoiser of a file. Raises BaseError for one that is not whole, with every name and shape."""
    import diffusers

    config = flux_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}, own, where)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**config)
    state, want = flux_state(tensors), model.state_dict()
    bad = [f"missing: {name}" for name in want if name not in state]
    bad += [
        f"misshapen: {name} {tuple(state[name].shape)}, by the others {tuple(t.shape)}"
        for name, t in want.items()
        if name in state and state[name].shape != t.shape
    ]
    if bad:
        shown = "\n".join(f"  - {line}" for line in bad[:20]) + (f"\n  … and {len(bad) - 20} more" * (len(bad) > 20))
        raise BaseError(f"some of its weights are not in the file ({len(bad)} faults):\n{shown}", where=where)
    # Copies: parts of a fused projection would share its memory, and all of them the file's.
    model.load_state_dict({name: state[name].to(dtype, copy=True) for name in want}, assign=True)
    return model.eval()
