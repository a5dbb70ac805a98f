"""The autoencoder of both emoji bases: 64 × 64 pixels <-> 16 × 16 latents of 4 channels.

Trained on pixels (absolute and squared error, and the error of finite differences, which keeps outlines sharp), with a
weak pull to N(0, 1). A third of the steps decode a transformed latent against the equally transformed picture (turned,
mirrored, halved), which makes latents that a denoiser learns faster (EQ-VAE, arXiv 2502.09509). Colours are permuted
and edge pictures mixed in, so that line drawings, other palettes and control pictures are reproduced as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from drawings import Drawings
from edges import edges
from steps import optimise
from torch import Tensor
from torch.nn import functional as F

__all__ = ["encode_all", "new_autoencoder", "train_autoencoder"]


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=8, sample_size=64,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def train_autoencoder(drawings: Drawings, work: Path, *, steps: int = 2400, batch: int = 24) -> AutoencoderKL:
    """A trained autoencoder whose scaled latents (z - shift_factor) * scaling_factor have mean 0 and deviation 1."""
    torch.manual_seed(0)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        def chance() -> float:
            return float(torch.rand((), generator=generator))

        rows = torch.randint(len(pixels), (batch,), generator=generator)
        x = pixels[rows].float() / 127.5 - 1
        x[: batch // 4] = x[: batch // 4, torch.randperm(3, generator=generator)]
        x[: batch // 8] = -x[: batch // 8]
        x[-2:] = edges(x[-2:])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            if step % 3 == 2:
                turns, mirror, half = int(chance() * 4), chance() < 0.5, chance() < 0.5
                x, z = torch.rot90(x, turns, (2, 3)), torch.rot90(z, turns, (2, 3))
                if mirror:
                    x, z = x.flip(3), z.flip(3)
                if half:
                    x, z = F.avg_pool2d(x, 2), F.avg_pool2d(z.float(), 2)
            y = model.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()
        error = y - x
        slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().float().mean() / z[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * slopes + 2e-3 * kl

    optimise({"vae": model}, loss, steps=steps, learning_rate=2e-3, state=work / "autoencoder.pt", average=0.995)
    latents = encode_all(model, drawings)
    model.register_to_config(
        scaling_factor=round(float(1 / latents.std()), 4), shift_factor=round(float(latents.mean()), 4)
    )
    return model.eval()


@torch.no_grad()
def encode_all(model: AutoencoderKL, drawings: Drawings | Tensor, batch: int = 64) -> Tensor:
    """Latents as (z - shift_factor) * scaling_factor, of drawings or of pictures (n, 3, 64, 64) in -1 … 1."""
    out = []
    for i in range(0, len(drawings), batch):
        if isinstance(drawings, Tensor):
            x = drawings[i : i + batch]
        else:
            x = torch.from_numpy(drawings.pixels[i : i + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = model.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        out.append((z - model.config.shift_factor) * model.config.scaling_factor)
    return torch.cat(out)
