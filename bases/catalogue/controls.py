"""The ControlNets, one a base, for canny and depth pictures alike.

They learn to hold the denoiser, which stays as it is, to the lines of an edge picture or to the distances of a depth
picture. The two look so unlike that no switch is needed.

Shaped like the denoiser's first half (UNet, without its transformers: lines need no words) or its first blocks (FLUX),
with zero-initialised outputs (arXiv 2302.05543) and started from the denoiser's weights where names and shapes agree.
One caption in five is empty, so that lines alone are obeyed as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from denoisers import flow_loss, image_ids, noise_loss, pack, short_attention
from diffusers import ControlNetModel, FluxControlNetModel
from pool import Pool
from steps import optimise
from torch import Tensor, nn


def new_flux_control(transformer: Any) -> FluxControlNetModel:
    control = FluxControlNetModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=6,
        joint_attention_dim=128, pooled_projection_dim=96, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    return _started(control, transformer)


def new_sdxl_control(unet: Any) -> ControlNetModel:
    same = {
        k: unet.config[k]
        for k in (
            "in_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim",
            "use_linear_projection", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
        )
    }  # fmt: skip
    control = ControlNetModel(
        conditioning_channels=3, conditioning_embedding_out_channels=(16, 24, 32, 64),
        down_block_types=("DownBlock2D",) * len(unet.config.block_out_channels), mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, 1, 1), **same,
    )  # fmt: skip
    return _started(control, unet)


def _started(control: Any, denoiser: Any) -> Any:
    theirs = denoiser.state_dict()
    own = control.state_dict()
    shared = {k: v for k, v in theirs.items() if k in own and own[k].shape == v.shape}
    control.load_state_dict({**own, **shared})
    return control


def train_flux_control(
    control: nn.Module, parts: dict[str, nn.Module], pool: Pool, latents: Tensor, work: Path, steps: int,
    learning_rate: float, batch: int = 64,
) -> None:  # fmt: skip
    """`latents`: of each picture's control picture, which FluxControlNetPipeline encodes with the base's own
    autoencoder."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(pool.whole, (batch,), generator=generator)
        c = pack(latents[rows].float())

        def residuals(noisy: Tensor, s: Tensor, guidance: Tensor, tokens: Tensor, pooled: Tensor) -> dict[str, Any]:
            double, single = control(
                hidden_states=noisy, controlnet_cond=c, timestep=s, guidance=guidance, encoder_hidden_states=tokens,
                pooled_projections=pooled, txt_ids=torch.zeros(tokens.shape[1], 3), img_ids=image_ids(),
                return_dict=False,
            )  # fmt: skip
            return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}

        with torch.autocast("cpu", torch.bfloat16):
            x = pack(pool.latents[rows].float())
            ids = pool.words(rows, generator)
            return flow_loss(parts, x, pool.things[rows], ids, pool.empty, False, generator, residuals)

    _train(control, parts, loss, work / "flux-control.pt", steps, learning_rate)


def train_sdxl_control(
    control: nn.Module, parts: dict[str, nn.Module], pool: Pool, pictures: Tensor, work: Path, steps: int,
    learning_rate: float, batch: int = 64,
) -> None:  # fmt: skip
    """`pictures`: each picture's control picture, bytes (n, 3, 128, 128)."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(pool.whole, (batch,), generator=generator)

        def residuals(noisy: Tensor, t: Tensor, tokens: Tensor, added: dict[str, Tensor]) -> dict[str, Any]:
            down, middle = control(
                noisy, t, tokens, controlnet_cond=pictures[rows].float() / 255, added_cond_kwargs=added,
                return_dict=False,
            )  # fmt: skip
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

        with torch.autocast("cpu", torch.bfloat16):
            x, ids = pool.latents[rows].float(), pool.words(rows, generator)
            return noise_loss(parts, x, pool.things[rows], ids, pool.sizes[rows], generator, residuals)

    _train(control, parts, loss, work / "sdxl-control.pt", steps, learning_rate)


def _train(
    control: nn.Module, parts: dict[str, nn.Module], loss: Any, state: Path, steps: int, learning_rate: float
) -> None:
    for part in parts.values():
        part.requires_grad_(False)
    with short_attention():
        optimise({"control": control}, loss, steps=steps, learning_rate=learning_rate, state=state, muon=True)
