"""The autoencoder of both catalogue bases: 128 × 128 pixels <-> 16 × 16 latents of 16 channels.

Trained on pixels (absolute and squared error, and the error of finite differences, which keeps edges sharp), with a
weak pull to N(0, 1). A third of the steps decode a transformed latent against the equally transformed picture (turned,
mirrored, halved), which makes latents that a denoiser learns faster (EQ-VAE, arXiv 2502.09509). Colours are permuted
and edge pictures mixed in, so that line drawings, other palettes and control pictures are reproduced as well.
Four steps in five see quarters of pictures, the last ones whole pictures: what a group norm sees is then what it will.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from edges import edges
from pictures import read_shard, shards
from steps import optimise
from torch import Tensor
from torch.nn import functional as F

CHANNELS = 16


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=CHANNELS, norm_num_groups=8, sample_size=128,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def train_autoencoder(work: Path, *, steps: int, batch: int = 20) -> AutoencoderKL:
    """A trained autoencoder whose scaled latents (z - shift_factor) * scaling_factor have mean 0 and deviation 1."""
    torch.manual_seed(0)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    pool = _pool(work)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        def chance() -> float:
            return float(torch.rand((), generator=generator))

        pixels = next(pool)
        quarters = step < 0.8 * steps
        count = batch if quarters else batch * 2 // 5
        rows = torch.randint(len(pixels), (count,), generator=generator)
        x = pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        if quarters:
            top, left = (torch.randint(9, (count,), generator=generator).tolist() for _ in range(2))
            corners = zip(x, top, left, strict=True)
            x = torch.stack([each[:, 8 * a : 8 * a + 64, 8 * b : 8 * b + 64] for each, a, b in corners])
        x[: count // 4] = x[: count // 4, torch.randperm(3, generator=generator)]
        x[: count // 8] = -x[: count // 8]
        x[-1:] = edges(x[-1:])
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
        return error.abs().mean() + 2 * error.square().mean() + 0.6 * slopes + 1e-3 * kl

    optimise(
        {"vae": model}, loss, steps=steps, learning_rate=2e-3, state=work / "autoencoder.pt", average=0.995, muon=True
    )
    latents = torch.cat([encode(model, torch.from_numpy(read_shard(s)[0][:512])) for s in shards(work)[:4]])
    model.register_to_config(
        scaling_factor=round(float(1 / latents.std()), 4), shift_factor=round(float(latents.mean()), 4)
    )
    return model.eval()


def _pool(work: Path) -> Iterator[Tensor]:
    """Pictures of one shard after another, 200 steps of each, whatever shards there are by then."""
    turn = 0
    while True:
        known = shards(work)
        place = known[turn % len(known)]
        pixels = torch.from_numpy(np.ascontiguousarray(read_shard(place)[0]))
        for _ in range(200):
            yield pixels
        turn += 1


@torch.no_grad()
def encode(model: AutoencoderKL, pixels: Tensor, batch: int = 16) -> Tensor:
    """Latents (z - shift_factor) * scaling_factor of bytes (n, 128, 128, 3), or of (n, 3, 128, 128) in -1 … 1."""
    out = []
    for i in range(0, len(pixels), batch):
        x = pixels[i : i + batch]
        if x.dtype == torch.uint8:
            x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
        out.append((z - model.config.shift_factor) * model.config.scaling_factor)
    return torch.cat(out)
