"""Denoisers and their inputs for benchmarks: those of the built-in bases, and random ones."""

from __future__ import annotations

from typing import Any

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The default targets of diffusers' train_dreambooth_lora scripts."""

SHAPES: dict[str, dict[str, Any]] = {
    "catalogue-flux": {"joint": 128, "pooled": 96, "in": 64},
    "catalogue-sdxl": {"cross": 192, "pooled": 96, "in": 16},
    "flux at width 3072": {
        "layers": (1, 1), "heads": 24, "width": 128, "axes": (16, 56, 56), "joint": 4096, "pooled": 768,
    },
    "sdxl at width 640": {
        "channels": (640,), "cross": 2048, "heads": (10,), "pooled": 1280, "depths": 2, "layers": 1,
        "side": 64, "tokens": 77,
    },
    "tiny flux": {"layers": (1, 1), "heads": 2, "width": 16, "axes": (4, 6, 6), "joint": 16, "pooled": 16},
    "tiny sdxl": {"channels": (32, 32, 64), "cross": 32, "heads": (2, 2, 4), "pooled": 16},
}  # fmt: skip
TEXT_TOKENS = 32


def is_flux(name: str) -> bool:
    return "flux" in name


def denoiser(name: str, seed: int = 0) -> Any:
    """Return a frozen denoiser in float32 and eval mode.

    Tiny denoisers have SDXL's block layout or FLUX.1's modules. "sdxl at width 640" has SDXL's second level on
    the way down and up (residual blocks, two-layer transformers, heads of size 64) with half as many blocks,
    on 64 × 64 positions, as for images of 1024 × 1024 pixels."""
    import diffusers
    import torch

    from veneer.models.builtin import packaged_folder

    torch.manual_seed(seed)
    s = SHAPES[name]
    if name.startswith("catalogue"):
        cls = diffusers.FluxTransformer2DModel if is_flux(name) else diffusers.UNet2DConditionModel
        folder = packaged_folder() / name / ("transformer" if is_flux(name) else "unet")
        if torch.get_default_device().type == "meta":
            return cls.from_config(cls.load_config(folder))
        model = cls.from_pretrained(folder, torch_dtype=torch.float32)
    elif is_flux(name):
        model = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=s["layers"][0],
            num_single_layers=s["layers"][1],
            attention_head_dim=s["width"],
            num_attention_heads=s["heads"],
            joint_attention_dim=s["joint"],
            pooled_projection_dim=s["pooled"],
            guidance_embeds=True,
            axes_dims_rope=s["axes"],
        )
    else:
        without = max(0, len(s["channels"]) - 2)  # levels without transformers
        with_ = len(s["channels"]) - without
        model = diffusers.UNet2DConditionModel(
            sample_size=s.get("side", 16),
            block_out_channels=s["channels"],
            layers_per_block=s.get("layers", 2),
            down_block_types=("DownBlock2D",) * without + ("CrossAttnDownBlock2D",) * with_,
            up_block_types=("CrossAttnUpBlock2D",) * with_ + ("UpBlock2D",) * without,
            mid_block_type="UNetMidBlock2DCrossAttn" if without else None,
            cross_attention_dim=s["cross"],
            transformer_layers_per_block=s.get("depths", (1, 1, 2)),
            attention_head_dim=s["heads"],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=s["pooled"] + 6 * 32,
        )
    return model.eval().requires_grad_(False)


def inputs(name: str, rows: int, dtype: Any, seed: int = 1, side: int = 8) -> dict[str, Any]:
    """Return the arguments of a call; "x" is the latents.

    For FLUX, x has side² packed tokens. For SDXL, x is 2·side × 2·side."""
    import torch

    s, g = SHAPES[name], torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=g).to(dtype)

    if not is_flux(name):
        return {
            "x": random(rows, s.get("in", 4), *[s.get("side", 2 * side)] * 2),
            "encoder_hidden_states": random(rows, s.get("tokens", TEXT_TOKENS), s["cross"]),
            "added_cond_kwargs": {
                "text_embeds": random(rows, s["pooled"]),
                "time_ids": torch.tensor([[128, 128, 0, 0, 128, 128]] * rows).to(dtype),
            },
        }
    places = torch.zeros(side * side, 3)
    places[:, 1] = torch.arange(side).repeat_interleave(side)
    places[:, 2] = torch.arange(side).repeat(side)
    return {
        "x": random(rows, side * side, s.get("in", 16)),
        "encoder_hidden_states": random(rows, TEXT_TOKENS, s["joint"]),
        "pooled_projections": random(rows, s["pooled"]),
        "guidance": torch.full((rows,), 3.5, dtype=dtype),
        "img_ids": places.to(dtype),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3).to(dtype),
    }


def predict(name: str, model: Any, given: dict[str, Any], x: Any, t: Any) -> Any:
    """Call the denoiser once. t: (rows,), 0..1."""
    rest = {k: v for k, v in given.items() if k != "x"}
    if is_flux(name):
        return model(hidden_states=x, timestep=t.to(x.dtype), return_dict=False, **rest)[0]
    return model(x, (t * 999).long(), return_dict=False, **rest)[0]


def adapter_tensors(name: str, seed: int, rank: int, targets: list[str]) -> dict[str, Any]:
    """Return A and B for every targeted module, under diffusers' names, with scale 1.

    B is nonzero, as after training."""
    import torch

    g = torch.Generator().manual_seed(100 + seed)
    out: dict[str, Any] = {}
    with torch.device("meta"):
        shapes = denoiser(name)
    for module, linear in shapes.named_modules():
        if any(module.endswith("." + t) for t in targets):
            rows, columns = linear.weight.shape
            out[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=g) / columns**0.5
            out[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=g) * 0.02
    return out


def as_adapter(tensors: dict[str, Any], scale: float = 1.0) -> Any:
    from veneer.core import Adapter, Pair

    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    pairs = {n: Pair(tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"], scale) for n in names}
    return Adapter(pairs=pairs)
