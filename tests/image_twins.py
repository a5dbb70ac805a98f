"""Adapters for tiny image bases, and diffusers pipelines with the same adapters merged into the weights.

Pictures are compared in steps of 1/255, because another order of summation can change a pixel by one step.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor, nn

from tests.tiny_image_base import LENGTH, SIZE
from veneer.core.adapter import Adapter, Pair
from veneer.core.targets import base_modules
from veneer.formats.topology import families
from veneer.models.image.base import ImageBase
from veneer.models.loading import errors_only

Weights = dict[str, Tensor]

_SUFFIXES = (
    ".to_q",
    ".to_v",
    ".ff.net.2",
    ".ff_context.net.2",
    ".conv1",
    ".proj_mlp",
    ".q_proj",
    ".fc1",
    ".SelfAttention.q",
)


def random_adapter(model: nn.Module, seed: int = 0, size: float = 0.3, dora: bool = False) -> Adapter:
    """Return an adapter with pairs on some modules of every block and component."""
    pairs = {}
    for name, module in base_modules(model):
        if not name.endswith(_SUFFIXES):
            continue
        W = module.weight
        g = torch.Generator().manual_seed(seed * 1000 + len(pairs))
        A = torch.randn(2, *W.shape[1:], generator=g) * size
        B = torch.randn(W.shape[0], 2, *[1] * (W.ndim - 2), generator=g) * size
        m = W.detach().flatten(1).norm(dim=1) * 1.3 if dora else None
        pairs[name] = Pair(A, B, 0.5, "linear" if W.ndim == 2 else "conv", m)
    return Adapter(pairs)


def diffusers_pipeline(place: Path, kind: str = "") -> Any:
    """Return diffusers' pipeline, loaded from files; it shares no tensor with a base."""
    import diffusers

    with errors_only():
        made = getattr(diffusers, kind or "DiffusionPipeline").from_pretrained(place, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def parameter_of(pipe: Any, module: str) -> nn.Parameter:
    """Return the weight with this canonical name from diffusers' components."""
    component, _, rest = module.partition(".")
    part = getattr(pipe, component)
    if not hasattr(part, "text_model"):
        rest = rest.removeprefix("text_model.")
    return part.get_submodule(rest).weight


def fold(pipe: Any, mix: Iterable[tuple[Adapter, float | Callable[[str], float]]]) -> None:
    """Add Σ strength·s·B·A to the pipeline's weights, computed in float64.

    With a magnitude, apply DoRA's definition. `strength` can be a function of the module's name."""
    changes: dict[str, Tensor] = {}
    for adapter, strength in mix:
        for name, pair in adapter.pairs.items():
            W = parameter_of(pipe, name).detach().double()
            delta = (pair.scale * pair.B.double().flatten(1) @ pair.A.double().flatten(1)).reshape(W.shape)
            if pair.magnitude is not None:
                new = W + delta
                gain = pair.magnitude.double() / new.flatten(1).norm(dim=1)
                delta = new * gain.reshape(-1, *[1] * (W.ndim - 1)) - W
            by = strength(name) if callable(strength) else strength
            changes[name] = changes.get(name, 0) + by * delta
    for name, change in changes.items():
        weight = parameter_of(pipe, name)
        weight.data = (weight.detach().double() + change).float()


def picture(pipe: Any, prompt: str, seed: int, **settings: Any) -> Image:
    """Return the pipeline's picture.

    If the pipeline accepts a size and a token count, use those of the tiny bases."""
    takes = inspect.signature(type(pipe).__call__).parameters
    tiny = {"height": SIZE, "width": SIZE}
    tiny |= {"max_sequence_length": LENGTH} if hasattr(pipe, "tokenizer_2") else {}
    with errors_only():
        given = {"num_inference_steps": 4} | {k: v for k, v in tiny.items() if k in takes} | settings
        return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **given).images[0]


def levels(a: Image, b: Image) -> int:
    """Return the largest difference between pixel values, in steps of 1/255."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def state_of(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


_OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}


def open_clip(encoder: nn.Module, prefix: str = "conditioner.embedders.1.model.") -> Weights:
    """Return SDXL's second text encoder under OpenCLIP's names.

    q, k and v are fused, and the projection is transposed."""
    out: Weights = {}
    joined: dict[str, Weights] = {}
    for name, tensor in encoder.state_dict().items():
        for ours, theirs in _OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        block, _, rest = name.partition(".self_attn.")
        if rest:
            which, _, part = rest.partition("_proj.")
            joined.setdefault(f"{prefix}{block}.attn.in_proj_{part}", {})[which] = tensor
        else:
            out[prefix + name] = (tensor.T if name == "text_projection" else tensor).contiguous().clone()
    return out | {name: torch.cat([three[which] for which in "qkv"]) for name, three in joined.items()}


def original_vae(vae: nn.Module, prefix: str = "first_stage_model.") -> Weights:
    """Return an AutoencoderKL's weights under their original names.

    The linear layers of attention become 1 × 1 convolutions."""
    out: Weights = {}
    levels = len(vae.config.block_out_channels)  # type: ignore[arg-type,union-attr]
    for name, tensor in vae.state_dict().items():
        if ".attentions.0." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        for ours, theirs in {
            "down_blocks.": "down.",
            "samplers.0.conv": "sample.conv",
            "mid_block.resnets.0": "mid.block_1",
            "mid_block.resnets.1": "mid.block_2",
            "mid_block.attentions.0": "mid.attn_1",
            "resnets.": "block.",
            "conv_norm_out": "norm_out",
            "conv_shortcut": "nin_shortcut",
            "group_norm": "norm",
            "to_out.0": "proj_out",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
        }.items():
            name = name.replace(ours, theirs)
        out[prefix + name] = tensor.clone()
    return out


def original(base: ImageBase, encoder: bool = False, prefix: str = "model.diffusion_model.") -> Weights:
    """Return the denoiser's weights under their original names.

    Projections are fused, and the halves of the last modulation are swapped, as in the original.
    `encoder`: include SD 1's CLIP."""
    state = {f"{base.row.denoiser}.{n}": t for n, t in base.denoiser.state_dict().items()}
    out = {}
    if base.family == "qwen-image":  # Qwen-Image's original names are diffusers' names
        return {prefix + n.removeprefix("transformer."): t for n, t in state.items()}
    for name, places in families()[base.family].originals.items():
        modules = [p.module for p in places]
        for part in ("weight", "bias"):
            if all(f"{m}.{part}" in state for m in modules):
                value = torch.cat([state.pop(f"{m}.{part}") for m in modules])
                if places[0].swap:
                    value = torch.cat(value.chunk(2)[::-1])
                scale = part == "weight" and name.endswith(("query_norm", "key_norm"))
                out[f"{prefix}{name}.{'scale' if scale else part}"] = value.clone()
    if base.family == "sd3":
        out[f"{prefix}pos_embed"] = state.pop("transformer.pos_embed.pos_embed")
    out |= {f"{prefix}{n.removeprefix('transformer.')}": state.pop(n) for n in [*state] if n.endswith("_pad_token")}
    if encoder:
        for name, tensor in base.parts["text_encoder"].state_dict().items():
            own = name if name.startswith("text_model.") else f"text_model.{name}"
            out[f"cond_stage_model.transformer.{own}"] = tensor.clone()
    return out


def latent_shape(base: ImageBase, height: int, width: int) -> tuple[int, int, int]:
    """Return (c, h, w) of the latents of a picture with this size in pixels."""
    scale = base.vae_scale
    if base.family == "flux2":
        return int(base.denoiser.config.in_channels), height // scale // 2, width // scale // 2
    channels = base.denoiser.config.in_channels
    if base.family in ("flux1", "qwen-image"):
        channels //= 4
    elif base.row.denoiser == "unet":
        channels = base.denoiser.config.out_channels  # an inpainting U-Net has further input channels: mask and picture
    return int(channels), height // scale, width // scale


def infotext_of(path: str | Path) -> str:
    with PIL.Image.open(path) as picture:
        return str(picture.info["parameters"])


def parse_as_a1111(text: str) -> dict[str, str]:
    """Parse an infotext as stable-diffusion-webui 1.10 does.

    Abridged from its modules/infotext_utils.py."""
    parameter = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    assert len(parameter.findall(last)) >= 3
    found = {"Prompt": "", "Negative prompt": ""}
    key = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            key, line = "Negative prompt", line[16:].strip()
        found[key] += ("\n" if found[key] else "") + line
    for name, value in parameter.findall(last):
        found[name] = json.loads(value) if value[:1] == '"' == value[-1:] else value
    return found
