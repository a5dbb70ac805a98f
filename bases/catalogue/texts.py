"""The text encoders learn what words look like before there is a denoiser: caption -> the picture's coarse latents.

A denoiser that learns its text encoders from nothing spends most of its steps on finding out which word means which
drawing (after 750 steps of 64 the pictures still followed the noise and not the caption). A regression finds the same
in minutes: from the encoder's output alone, predict the 8 × 8 means of the drawing's latents, through a small decoder
that is thrown away: from the pooled vector, and from the tokens by cross-attention, as the denoisers will read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from autoencoder import CHANNELS
from denoisers import short_attention
from pool import Pool
from steps import optimise
from torch import Tensor, nn
from torch.nn import functional as F


class _FromTokens(nn.Module):
    """(n, l, width) -> (n, 64, CHANNELS): 64 places ask the tokens, twice."""

    def __init__(self, width: int, inner: int = 128) -> None:
        super().__init__()
        self.places = nn.Parameter(0.5 * torch.randn(64, inner))
        self.tokens = nn.Linear(width, inner)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(inner, 4, 2 * inner, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.out = nn.Linear(inner, CHANNELS)

    def forward(self, tokens: Tensor) -> Tensor:
        y, memory = self.places.expand(len(tokens), -1, -1), self.tokens(tokens)
        for block in self.blocks:
            y = block(y, memory)
        result: Tensor = self.out(y)
        return result


def train_clip(model: nn.Module, pool: Pool, state: Path, steps: int) -> None:
    width = model.config.hidden_size
    heads = nn.ModuleDict(
        {
            "tokens": _FromTokens(width),
            "pooled": nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 64 * CHANNELS)),
        }
    )

    def error(ids: dict[str, Tensor], target: Tensor) -> Tensor:
        out = model(ids["clip"], output_hidden_states=True)
        from_tokens = heads["tokens"](out.hidden_states[-2]).float()
        from_pooled = heads["pooled"](out.pooler_output).float().view(-1, 64, CHANNELS)
        return F.mse_loss(from_tokens, target) + F.mse_loss(from_pooled, target)

    _train({"text": model, "heads": heads}, error, pool, state, steps)


def train_t5(model: nn.Module, pool: Pool, state: Path, steps: int) -> None:
    head = _FromTokens(model.config.d_model)

    def error(ids: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(head(model(ids["t5"])[0]).float(), target)

    _train({"text": model, "heads": head}, error, pool, state, steps)


def _train(parts: dict[str, nn.Module], error: Any, pool: Pool, state: Path, steps: int, batch: int = 256) -> None:
    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(pool.whole, (batch,), generator=generator)
        coarse = F.avg_pool2d(pool.latents[rows].float(), 2).flatten(2).transpose(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            return error(pool.words(rows, generator), coarse)

    with short_attention():
        optimise(parts, loss, steps=steps, learning_rate=2e-3, state=state, average=0.99)
