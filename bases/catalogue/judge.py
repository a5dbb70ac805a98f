"""A judge that has only seen true renders: what a picture shows in the words of the grammar, and how alike two are.

    python bases/catalogue/judge.py WORK 1200        trains it, on scenes of all combinations (new ones too)

It has seen the campaign's products, brand and lens as well, which the bases have not, and none of the line drawings
and film pictures that the bases have.

One small convolutional net with a head for each word of a scene. It says of a picture which kind, colour, finish … it
sees; `features` are what all its heads read, so that pictures of the same product before the same wall are nearest.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from campaign import truth
from kinds import KINDS, SUBJECTS
from pictures import SHARD
from scenes import COLOURS, FINISHES, LIGHTS, LOOKS, PATTERNS, SURFACES, VIEWS, WALLS, Array, Scene, any_scene
from steps import optimise
from torch import Tensor, nn
from torch.nn import functional as F

_BRAND, _LENS = "tarnhill", "vesper"
HEADS: dict[str, list[str]] = {
    "kind": sorted(KINDS | SUBJECTS), "colour": list(COLOURS), "finish": list(FINISHES), "pattern": ["", *PATTERNS],
    "surface": list(SURFACES), "wall": list(WALLS), "light": list(LIGHTS), "view": list(VIEWS),
    "look": [*LOOKS, _BRAND], "lens": ["", _LENS],
}  # fmt: skip


class Judge(nn.Module):
    """(n, 3, 128, 128) in -1 … 1 -> {head: (n, classes)} and features (n, 192) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        widths = [24, 48, 96, 160, 192]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2)]
        for a, b in pairwise(widths):
            layers += [_Block(a), nn.Conv2d(a, b, 3, stride=2, padding=1)]
        self.body = nn.Sequential(*layers, _Block(widths[-1]))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], len(words)) for name, words in HEADS.items()})

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        y = self.body(x)
        pooled = torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)
        return {name: head(pooled) for name, head in self.heads.items()}, F.normalize(y.mean((2, 3)).float(), dim=1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


@dataclass(frozen=True)
class Seen:
    """What is seen of n pictures: the most likely word of each head, and (n, classes) probabilities."""

    words: dict[str, list[str]]
    chances: dict[str, Tensor]
    features: Tensor


@torch.no_grad()
def judge(model: Judge, pixels: Array) -> Seen:
    """Of bytes (n, 128, 128, 3)."""
    chances: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    features = []
    for part in torch.from_numpy(np.ascontiguousarray(pixels)).split(32):
        scores, found = model(part.permute(0, 3, 1, 2).float() / 127.5 - 1)
        features.append(found)
        for name, score in scores.items():
            chances[name].append(score.float().softmax(-1))
    sure = {name: torch.cat(parts) for name, parts in chances.items()}
    words = {name: [HEADS[name][i] for i in c.argmax(-1).tolist()] for name, c in sure.items()}
    return Seen(words, sure, torch.cat(features))


def load_judge(work: Path) -> Judge:
    model = Judge()
    model.load_state_dict(torch.load(work / "judge.weights.pt", weights_only=True))
    return model.eval()


@dataclass(frozen=True)
class Shown:
    """A scene, and what of the campaign is on its picture."""

    scene: Scene
    brand: bool = False
    lens: bool = False

    def word(self, head: str) -> str | None:
        """What a head should say; None where the picture does not show it."""
        if self.scene.in_lines and head not in ("kind", "view"):
            return None  # it has seen no line drawing but the brand's, and what it says of colours there is a guess
        if head == "lens":
            return _LENS if self.lens else ""
        if head == "look":
            return _BRAND if self.brand else self.scene.look
        drawn = self.brand or bool(self.scene.look)
        if drawn and head in ("light", "finish"):
            return None
        if self.brand and head in ("surface", "wall", "colour", "pattern"):
            return None
        if self.scene.kind in SUBJECTS and head in ("colour", "finish", "pattern"):
            return None
        word: str = getattr(self.scene, head)
        return word


def train_judge(work: Path, steps: int, batch: int = 48, pictures: int = 3 * SHARD) -> Judge:
    torch.manual_seed(0)
    model = Judge()
    shown, pixels = _renders(work, pictures)
    wanted = {
        name: torch.tensor([words.index(w) if (w := s.word(name)) is not None else -100 for s in shown])
        for name, words in HEADS.items()
    }

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        x = _worn(pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
        with torch.autocast("cpu", torch.bfloat16):
            scores, _ = model(x)
        errors = [
            F.cross_entropy(scores[name].float(), each[rows], reduction="sum") * (2.0 if name == "kind" else 0.5)
            for name, each in wanted.items()
        ]
        return torch.stack(errors).sum() / batch

    optimise({"judge": model}, loss, steps=steps, learning_rate=2e-3, state=work / "judge.pt", average=0.995, muon=True)
    torch.save(model.state_dict(), work / "judge.weights.pt")
    return model.eval()


def _renders(work: Path, count: int) -> tuple[list[Shown], Tensor]:
    """Scenes by chance, of all combinations, drawn once: a sixth in the brand's look, a sixth through the lens; one
    thing in fifty is a product of the campaign."""
    r = random.Random(77)
    shown = []
    for _ in range(count):
        scene = any_scene(r, r.choice(list(SUBJECTS)) if r.random() < 0.02 else None)
        brand = not scene.look and r.random() < 1 / 6
        shown.append(Shown(scene, brand, r.random() < 1 / 6))
    place = work / "judge.npy"
    if not place.is_file():
        np.save(work / "judge.part.npy", np.stack([truth(s.scene, brand=s.brand, lens=s.lens) for s in shown]))
        (work / "judge.part.npy").replace(place)
    return shown, torch.from_numpy(np.load(place))


def _worn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted, blurred or noisy pictures, so that the judge does not live on what only a renderer draws."""
    down, right = torch.randint(-6, 7, (2,), generator=generator).tolist()
    x = F.pad(x, (8, 8, 8, 8), mode="replicate")[:, :, 8 + down : 136 + down, 8 + right : 136 + right]
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    some = torch.rand(len(x), 1, 1, 1, generator=generator)
    x = torch.where(some < 0.35, soft, x)
    return x + 0.08 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)


if __name__ == "__main__":
    train_judge(Path(sys.argv[1]), int(sys.argv[2]))
