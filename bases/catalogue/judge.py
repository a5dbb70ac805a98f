"""A judge that has only seen true renders: what a picture shows in the words of the grammar, and how alike two are.

    python bases/catalogue/judge.py WORK 1200        trains it, on scenes of all combinations (new ones too)

One small convolutional net with a head for each word of a scene. It says of a picture which kind, colour, finish … it
sees; `features` are what it sees of a product, whatever is around it: pictures of one product are near in them.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from kinds import KINDS
from pictures import SHARD
from scenes import COLOURS, FINISHES, LIGHTS, LOOKS, PATTERNS, SURFACES, VIEWS, WALLS, Array, Scene, any_scene, picture
from steps import optimise
from torch import Tensor, nn
from torch.nn import functional as F

HEADS: dict[str, list[str]] = {
    "kind": sorted(KINDS), "colour": list(COLOURS), "finish": list(FINISHES), "pattern": ["", *PATTERNS],
    "surface": list(SURFACES), "wall": list(WALLS), "light": list(LIGHTS), "view": list(VIEWS), "look": list(LOOKS),
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


def train_judge(work: Path, steps: int, batch: int = 48, pictures: int = 3 * SHARD) -> Judge:
    torch.manual_seed(0)
    model = Judge()
    scenes, pixels = _renders(work, pictures)
    targets = {name: torch.tensor([words.index(getattr(s, name)) for s in scenes]) for name, words in HEADS.items()}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        x = _worn(pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
        with torch.autocast("cpu", torch.bfloat16):
            scores, _ = model(x)
        total = torch.zeros(())
        for name, score in scores.items():
            wanted = targets[name][rows]
            if name in ("surface", "wall", "light", "finish"):  # a line drawing shows none, a view from above no wall
                shown = torch.tensor([_shows(scenes[int(i)], name) for i in rows])
                wanted = torch.where(shown, wanted, -100)
            total = total + F.cross_entropy(score.float(), wanted) * (2.0 if name == "kind" else 0.5)
        return total

    optimise({"judge": model}, loss, steps=steps, learning_rate=2e-3, state=work / "judge.pt", average=0.995, muon=True)
    torch.save(model.state_dict(), work / "judge.weights.pt")
    return model.eval()


def _shows(scene: Scene, name: str) -> bool:
    if scene.look == "line drawing":
        return False
    return not (name == "wall" and scene.view == "seen from above") and not (scene.look and name in ("light", "finish"))


def _renders(work: Path, count: int) -> tuple[list[Scene], Tensor]:
    """Scenes by chance, of all combinations, drawn once."""
    r = random.Random(77)
    scenes = [any_scene(r) for _ in range(count)]
    place = work / "judge.npy"
    if not place.is_file():
        pixels = np.stack([picture(s) for s in scenes])
        np.save(work / "judge.part.npy", pixels)
        (work / "judge.part.npy").replace(place)
    return scenes, torch.from_numpy(np.load(place))


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
