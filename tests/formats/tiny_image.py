"""Tiny image models with real topology, and adapters for any component, with canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Pair
from veneer.core.attach import Attachment, attach

WIDTHS = (16, 32, 64)
CONTEXT = 32


def sdxl_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[2, 4, 8],
        use_linear_projection=True,
        cross_attention_dim=CONTEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        norm_num_groups=8,
    ).double()


def flux(double: int = 2, single: int = 2) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"in_channels": 4, "joint_attention_dim": CONTEXT, "pooled_projection_dim": 16}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    blocks = {"num_layers": double, "num_single_layers": single}
    return FluxTransformer2DModel(patch_size=1, guidance_embeds=True, **sizes, **heads, **blocks).double()


def clip(projection: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = CLIPTextConfig(projection_dim=12, **sizes, **tokens)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).double()


def unet_output(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, context = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((1, 4, 8, 8), (1, 5, CONTEXT)))
    added = {"text_embeds": torch.ones(1, 32).double(), "time_ids": torch.zeros(1, 6).double()}
    with torch.no_grad():
        return model(x, torch.tensor(3), context, added_cond_kwargs=added).sample


def flux_output(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (1, 4, 4), "encoder_hidden_states": (1, 3, CONTEXT), "pooled_projections": (1, 16)}
    given = {name: torch.randn(s, generator=g, dtype=torch.float64) for name, s in shapes.items()}
    one = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        out = model(**given, timestep=one, guidance=one, img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3))
    return out.sample


def clip_output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[0, 5, 6, 2]]))[0]


def own_name(canonical: str, model: nn.Module) -> str:
    """Return the module's name in its class.

    transformers 5 dropped CLIP's `text_model.` prefix from one of its two classes."""
    name = canonical.partition(".")[2]
    return name if hasattr(model, "text_model") else name.removeprefix("text_model.")


def random_pairs(
    model: nn.Module,
    component: str,
    names: Iterable[str],
    *,
    dora: bool = False,
    ranks: tuple[int, ...] = (2, 3, 4),
    scales: tuple[float, ...] = (0.5, 1, 3),
) -> dict[str, Pair]:
    """Return a pair for each name, by canonical name; ranks and scales alternate."""
    modules = dict(model.named_modules())
    out = {}
    for i, name in enumerate(names):
        W = modules[own_name(f"{component}.{name}", model)].weight
        g = torch.Generator().manual_seed(i)
        rank, ones = ranks[i % len(ranks)], [1] * (W.ndim - 2)
        A = torch.randn(rank, *W.shape[1:], generator=g, dtype=W.dtype) * 0.3
        B = torch.randn(W.shape[0], rank, *ones, generator=g, dtype=W.dtype) * 0.3
        m = torch.rand(W.shape[0], generator=g, dtype=W.dtype) + 0.5 if dora else None
        kind = "linear" if W.ndim == 2 else "conv"
        out[f"{component}.{name}"] = Pair(A, B, scales[i % len(scales)], kind, m)
    return out


def attached(model: nn.Module, component: str, adapter: Adapter) -> Attachment:
    """Attach to `model` the part of `adapter` that belongs to `component`."""

    def own(items: Mapping) -> dict:
        return {own_name(n, model): v for n, v in items.items() if n.startswith(f"{component}.")}

    attachment = attach(model)
    attachment.add("it", Adapter(own(adapter.pairs), own(adapter.modules), deltas=own(adapter.deltas)))
    attachment.use("it")
    return attachment
