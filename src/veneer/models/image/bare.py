"""An image base without weights: its denoiser of the config alone, on any device, and how it runs.

    base = bare_image(config, dtype=torch.bfloat16, quantise="nf4", device="cuda")
    how = twin_denoiser(config, dtype)               what `fast_denoiser` does with a small one, tried for real
    with fast_denoiser(base.denoiser, like=how): …   the same on the one that has no values to try it with

Text encoders and VAE are not there: a step on cached latents and texts needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.errors import BaseError
from veneer.models.image.base import Components, ImageBase, prediction_of
from veneer.models.image.families import FAMILIES, PLANNED_FAMILIES, ImageFamily, denoiser_family, topology_name
from veneer.models.image.fast import DenoiserReport, fast_denoiser
from veneer.models.image.files import require_diffusers
from veneer.models.loading import loading
from veneer.models.quantise import put_empty_codes

_OWN = {"sdxl": {"addition_embed_type": "text_time", "use_linear_projection": True}}
"""What makes SDXL's U-Net one, and is no size."""
_SMALL: dict[str, dict[str, Any]] = {
    "sdxl": {
        "layers_per_block": 1, "cross_attention_dim": 32, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "flux1": {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6],
    },
    "flux2": {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 4, 4],
    },
    "sd3": {
        "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
        "caption_projection_dim": 32, "pooled_projection_dim": 32, "dual_attention_layers": [0],
    },
    "z-image": {
        "n_layers": 1, "n_refiner_layers": 1, "dim": 24, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
        "axes_dims": [4, 4, 4],
    },
    "qwen-image": {
        "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
        "axes_dims_rope": [4, 6, 6],
    },
}  # fmt: skip


def _family(fields: Mapping[str, Any]) -> tuple[ImageFamily, dict[str, Any]]:
    """The family of a denoiser's config (of diffusers, or of the plan's table) and its fields. Raises BaseError."""
    row = PLANNED_FAMILIES.get(str(fields.get("model_type")))
    if row and row.denoiser == "unet" and "projection_class_embeddings_input_dim" not in fields:
        row = FAMILIES["sd15"]  # the plan's table has one word for U-Nets with and without time ids
    fields = {**_OWN.get(row.name if row else "", {}), **fields}
    row = row or denoiser_family(str(fields.get("_class_name")), fields)
    if row is None:
        raise BaseError(f"{fields.get('_class_name')!r} is no denoiser that veneer knows")
    return row, fields


def _denoiser(row: ImageFamily, fields: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The frozen denoiser of these fields on torch's default device; those that are none of its class's are left
    out."""
    import inspect

    import diffusers

    cls = getattr(diffusers, row.classname)
    known = inspect.signature(cls.__init__).parameters
    made = cls(**{k: v for k, v in fields.items() if k in known and k != "self"})
    for module in made.modules():  # one by one: tensors without values cannot be swapped in place
        for key, value in module._parameters.items():
            module._parameters[key] = None if value is None else nn.Parameter(value.to(dtype), requires_grad=False)
    return made.eval()


def bare_image(
    fields: Mapping[str, Any], *, dtype: torch.dtype, device: str = "meta", quantise: str | None = None
) -> ImageBase:
    """The base whose denoiser has this config, frozen, with weights that were never read. `quantise`: the denoiser's
    linears are in codes, as `load_image` would make them. Raises BaseError for a denoiser that is not known."""
    require_diffusers()
    row, fields = _family(fields)
    with loading(), torch.device(device):
        denoiser = _denoiser(row, fields, dtype)
        if quantise:
            put_empty_codes(denoiser, quantise, dtype, torch.device(device))
    scheduler = _scheduler(row)
    parts = {row.denoiser: denoiser, "scheduler": scheduler}
    return ImageBase(
        name=row.label,
        family=topology_name(row, denoiser.config),
        model=Components({row.denoiser: denoiser}).eval(),
        parts=parts,
        directory=Path(),
        fingerprint="",
        dtype=dtype,
        device=torch.device(device),
        dtype_reason="",
        prediction=prediction_of(row, scheduler, Path()),
        size=1024,
        quantised=quantise,
    )


def _scheduler(row: ImageFamily) -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler() if row.flow else diffusers.EulerDiscreteScheduler()


def twin_denoiser(fields: Mapping[str, Any], dtype: torch.dtype) -> DenoiserReport:
    """What `fast_denoiser` swaps on a small denoiser of this family with random weights on the CPU, and what not."""
    require_diffusers()
    row, fields = _family(fields)
    with torch.random.fork_rng(devices=[]), loading():
        torch.manual_seed(0)
        small = {**fields, **_SMALL.get(row.name, {})}
        if row.denoiser == "unet":  # as many levels, each narrow and shallow
            deep = len(small["block_out_channels"]) - 1
            small |= {"block_out_channels": [32, *[64] * deep], "attention_head_dim": [2, *[4] * deep]}
            small |= {"transformer_layers_per_block": [1] * (deep + 1)}
        denoiser = _denoiser(row, small, dtype)
    with fast_denoiser(denoiser) as how:
        return how
