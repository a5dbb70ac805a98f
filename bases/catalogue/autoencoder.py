"""The autoencoder of both catalogue bases: 128 × 128 pixels <-> 16 × 16 latents of 16 channels.

Trained on pixels (absolute and squared error, and the error of finite differences, which keeps edges sharp), with a
weak pull to N(0, 1). A third of the steps decode a transformed latent against the equally transformed picture (turned,
mirrored, halved), which makes latents that a denoiser learns faster (EQ-VAE, arXiv 2502.09509). Colours are permuted
and edge pictures mixed in, so that line drawings, other palettes and control pictures are reproduced as well.
Four steps in five see quarters of pictures, the last ones whole pictures: what a group norm sees is then what it will.
Afterwards it is sharpened against a critic, since errors alone leave pictures soft.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from edges import edges
from pictures import read_shard, shards
from scenes import Array
from steps import optimise
from torch import Tensor, nn
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
    shown = _shown(work)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        def chance() -> float:
            return float(torch.rand((), generator=generator))

        pixels = next(shown)
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
        return _drawn_error(y, x) + 1e-3 * posterior.kl().float().mean() / z[0].numel()

    optimise(
        {"vae": model}, loss, steps=steps, learning_rate=2e-3, state=work / "autoencoder.pt", average=0.995, muon=True
    )
    _scale(model, work)
    return model


def _drawn_error(y: Tensor, x: Tensor) -> Tensor:
    error = y - x
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.6 * slopes


def _scale(model: AutoencoderKL, work: Path) -> None:
    """Latents (z - shift_factor) * scaling_factor have mean 0 and deviation 1 from here on."""
    model.eval().register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = torch.cat([encode(model, torch.from_numpy(read_shard(s)[0][:512])) for s in shards(work)[:4]])
    model.register_to_config(
        scaling_factor=round(float(1 / latents.std()), 4), shift_factor=round(float(latents.mean()), 4)
    )


def sharpen_autoencoder(model: AutoencoderKL, work: Path, steps: int, batch: int = 16) -> None:
    """Goes on with a trained autoencoder, so that what it draws is crisp: on scenes in looks by chance as well, on the
    quarters of pictures that have detail, and against a critic that learns to tell its pictures from true ones.

    The critic's part in the loss grows to 0.4 of the rest's, by their gradients at the last layer (arXiv 2012.09841);
    what its layers see of both pictures must agree as well (feature matching)."""
    model.to(memory_format=torch.channels_last).requires_grad_(True).train()
    torch.manual_seed(1)
    critic = _Critic().to(memory_format=torch.channels_last)
    learning = torch.optim.AdamW(critic.parameters(), lr=5e-4, betas=(0.5, 0.9), weight_decay=0.01)
    shown = _shown(work, looks=True)
    last = model.decoder.conv_out.weight

    def loss(step: int, generator: torch.Generator) -> Tensor:
        quarters = step < 0.85 * steps
        x = _detailed(next(shown), batch if quarters else batch * 2 // 5, 64 if quarters else 128, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            turns = int(torch.randint(4, (), generator=generator)) if step % 4 == 3 else 0
            x, z = torch.rot90(x, turns, (2, 3)), torch.rot90(z, turns, (2, 3))
            y = model.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()
            real, made = critic(x), critic(y.detach())
            mistaken = F.relu(1 - real[-1].float()).mean() + F.relu(1 + made[-1].float()).mean()
            learning.zero_grad()
            mistaken.backward()
            learning.step()
            critic.requires_grad_(False)
            seen = critic(y)
            with torch.no_grad():
                wanted = critic(x)
            critic.requires_grad_(True)
        alike = torch.stack(
            [F.l1_loss(a.float(), b.float()) for a, b in zip(seen[:-1], wanted[:-1], strict=True)]
        ).mean()
        fooled = alike - 0.2 * seen[-1].float().mean()
        drawn = _drawn_error(y, x)
        of_drawn, of_fooled = (torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (drawn, fooled))
        share = 0.4 * min(1.0, step / 500) * (of_drawn / (of_fooled + 1e-8)).clamp(max=10)
        return drawn + share * fooled + 1e-3 * posterior.kl().float().mean() / z[0].numel()

    optimise({"vae": model}, loss, steps=steps, learning_rate=1e-3, state=work / "sharper.pt", average=0.998, muon=True)
    _scale(model, work)


class _Critic(nn.Module):
    """(n, 3, h, w) -> what its layers see, the last a map of verdicts, above 0: a true picture."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 32, 4, 2, 1),
                nn.Sequential(nn.Conv2d(32, 64, 4, 2, 1), nn.GroupNorm(8, 64)),
                nn.Sequential(nn.Conv2d(64, 96, 3, 1, 1), nn.GroupNorm(8, 96)),
            ]
        )
        self.verdict = nn.Conv2d(96, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            found.append(x)
        return [*found, self.verdict(x)]


def _detailed(pixels: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 3, side, side) in -1 … 1: of each of some pictures the one of three places with the most in it."""
    rows = torch.randint(len(pixels), (count,), generator=generator)
    whole = pixels.shape[1] // 8 - side // 8 + 1
    found = []
    for row in rows.tolist():
        places = 8 * torch.randint(whole, (3, 2), generator=generator)
        parts = [
            pixels[row, a : a + side, b : b + side].permute(2, 0, 1).float() / 127.5 - 1 for a, b in places.tolist()
        ]
        found.append(max(parts, key=lambda part: float(part.diff(dim=2).abs().mean() + part.diff(dim=1).abs().mean())))
    return torch.stack(found).contiguous(memory_format=torch.channels_last)


def _shown(work: Path, *, looks: bool = False) -> Iterator[Tensor]:
    """Pictures of one shard after another, 200 steps of each, whatever shards there are by then. `looks`: every other
    shard is of scenes in looks by chance."""
    turn = 0
    while True:
        known = shards(work)
        others = shards(work, "looks") if looks else []
        place = others[turn // 2 % len(others)] if others and turn % 2 else known[turn % len(known)]
        pixels = torch.from_numpy(np.ascontiguousarray(np.load(place)["pixels"]))
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


@torch.no_grad()
def through(model: AutoencoderKL, pixels: Array, batch: int = 16) -> Array:
    """Bytes (n, 128, 128, 3) encoded and decoded: the most that a base over this autoencoder can show of them."""
    out = []
    for part in torch.from_numpy(pixels).split(batch):
        x = part.permute(0, 3, 1, 2).to(model.dtype) / 127.5 - 1
        out.append(model.decode(model.encode(x).latent_dist.mode()).sample.float())
    made: Array = ((torch.cat(out).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
    return made
