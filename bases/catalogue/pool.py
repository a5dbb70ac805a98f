"""All pictures as the denoisers see them: latents, and the token ids of what is said of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoencoder import encode
from diffusers import AutoencoderKL
from pictures import Kind, read_shard, read_things, shards
from scenes import SIDE
from torch import Tensor
from torch.nn import functional as F
from words import LENGTH

Batch = dict[str, Tensor]
_CROPS = 0.15


@dataclass(frozen=True)
class Pool:
    """`latents`: (n, 16, 16, 16) in half precision, of which the first `whole` are of whole pictures and the rest of
    enlarged crops. `things`: (n, 16, 16), how much of each latent is of the thing, not of what is around it. `sizes`:
    SDXL's time ids (n, 6): original size, top left, target size. `long`, `short`: ids by tokenizer, (n, LENGTH), of
    captions and of the thing alone; `empty`: (1, LENGTH)."""

    latents: Tensor
    whole: int
    things: Tensor
    sizes: Tensor
    long: Batch
    short: Batch
    empty: Batch

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows by chance, of which _CROPS are crops."""
        whole = torch.randint(self.whole, (count,), generator=generator)
        crops = torch.randint(self.whole, len(self.latents), (count,), generator=generator)
        return torch.where(torch.rand(count, generator=generator) < _CROPS, crops, whole)

    def words(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """One caption in ten empty, three in twenty short."""
        chance = torch.rand(len(rows), generator=generator)[:, None]
        return {
            k: torch.where(
                chance < 0.1, self.empty[k], torch.where(chance < 0.25, self.short[k][rows], long[rows])
            ).long()
            for k, long in self.long.items()
        }


def load_pool(
    work: Path, vae: AutoencoderKL, tokenizers: dict[str, Any], *, kind: Kind = "pictures", crops: bool = False
) -> Pool:
    """Of every shard of a kind that WORK has; latents are kept beside it. `crops`: with them, which SDXL alone is told
    of."""
    latents, cut, things, cut_things, sizes, long, short, of_crops = [], [], [], [], [], [], [], []
    for place in shards(work, kind):
        pixels, items = read_shard(place)
        whole, enlarged = place.with_suffix(".latents.pt"), place.with_suffix(".crops.pt")
        if not whole.is_file():
            torch.save(encode(vae, torch.from_numpy(pixels)).half(), whole)
        latents.append(torch.load(whole, weights_only=True))
        things.append(torch.from_numpy(read_things(place)))
        if crops:
            if not enlarged.is_file():
                made, shown, rows, told = _crops(torch.from_numpy(pixels), things[-1], int(place.stem))
                torch.save(
                    {"latents": encode(vae, made).half(), "things": shown, "rows": rows, "sizes": told}, enlarged
                )
            found = torch.load(enlarged, weights_only=True)
            of_crops += [len(long) + int(i) for i in found["rows"]]
            cut.append(found["latents"])
            cut_things.append(found["things"])
            sizes.append(found["sizes"])
        long += [i.caption for i in items]
        short += [i.short for i in items]
    n = len(long)
    long += [long[i] for i in of_crops]
    short += [short[i] for i in of_crops]
    uncut = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE]).expand(n, 6)
    return Pool(
        torch.cat(latents + cut), n, torch.cat(things + cut_things) / 255, torch.cat([uncut, *sizes]),
        _ids(tokenizers, long), _ids(tokenizers, short), {k: v.long() for k, v in _ids(tokenizers, [""]).items()},
    )  # fmt: skip


def _ids(tokenizers: dict[str, Any], texts: list[str]) -> Batch:
    return {
        k: t(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids.short()
        for k, t in tokenizers.items()
    }


def _crops(pixels: Tensor, things: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures enlarged by 1.1 to 1.6 and cut to SIDE, their `things`, which rows they are of, and their time ids.

    The original size is the picture's own, as SDXL's data has it: what is cut is told by the corner alone."""
    random = np.random.default_rng(seed)
    rows = random.permutation(len(pixels))[: int(_CROPS * len(pixels))]
    out, ids = [], []
    for row in rows:
        side = int(random.integers(int(1.1 * SIDE), int(1.6 * SIDE)))
        top, left = (int(random.integers(0, side - SIDE + 1)) for _ in range(2))
        thing = things[row].repeat_interleave(8, 0).repeat_interleave(8, 1)
        x = torch.cat([pixels[row].permute(2, 0, 1).float() / 127.5 - 1, thing[None].float()])[None]
        large = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        out.append(large[0, :, top : top + SIDE, left : left + SIDE])
        ids.append([side, side, top, left, SIDE, SIDE])
    made = torch.stack(out)
    shown = F.avg_pool2d(made[:, 3], 8).byte()
    return made[:, :3], shown, torch.from_numpy(rows.copy()), torch.tensor(ids)
