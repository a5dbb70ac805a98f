"""The judge: what a drawing shows and in whose style, by a small network that has only ever seen real drawings.

    python bases/emoji/judge.py WORK        trains it (about ten minutes on one core) into WORK/judge.pt

It names one of the 1,606 things and one of five styles (the bases' four and OpenMoji). From the 1,280 features of its
body it reads both; 256 made of them are for the name alone, and say as little of the style as training could manage.
One drawing in twenty is kept from it, so that its own accuracy is known; what a model made is never shown to it.
Accuracy on real drawings is the ceiling that any fidelity must be read against.

A quarter of the drawings of the bases' four sets it sees with lines around every shape (`load_drawings(outlined=True)`)
and learns their names: else it would call a thing another for its changed look, which is not what it is asked. Their
style it is never told: style means the five sets as they are.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from drawings import SETS, Drawings, load_drawings
from openmoji import load_openmoji
from steps import optimise
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["STYLES", "Judge", "Verdict", "judge", "load_judge", "train_judge"]

STYLES = [*SETS, "openmoji"]


class Judge(nn.Module):
    """(n, 3, 64, 64) in -1 … 1 -> (name scores (n, names), style scores (n, 5), features (n, 256) that names are read
    from, features (n, 1280) that both are read from), features of length 1."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        layers: list[nn.Module] = []
        for before, after in ((3, 48), (48, 96), (96, 160), (160, 256)):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU(),
                nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(),
            ]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.project = nn.Linear(256 * 5, 256)
        self.name = nn.Linear(256, len(names), bias=False)
        self.style = nn.Linear(256 * 5, len(STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = self.body(x)
        # The mean of each quarter and of all: where things are matters (hands, arrows), but not to the pixel.
        pooled = torch.cat([F.adaptive_avg_pool2d(y, 2).flatten(1), y.mean(dim=(2, 3))], dim=1)
        features = F.normalize(self.project(pooled), dim=1)
        scores = 20 * features @ F.normalize(self.name.weight, dim=1).T
        return scores, self.style(pooled), features, F.normalize(pooled, dim=1)


@dataclass(frozen=True)
class Verdict:
    """`rank`: place of the true name among all (0 is best). `style`: probability of each of STYLES (n, 5). `features`:
    of the thing alone; `body`: of thing and style."""

    rank: Tensor
    style: Tensor
    features: Tensor
    body: Tensor


@torch.no_grad()
def judge(model: Judge, pictures: Tensor, names: list[str]) -> Verdict:
    """`pictures`: (n, 3, 64, 64) in -1 … 1, which should show `names`."""
    index = {name: i for i, name in enumerate(model.names)}
    true = torch.tensor([index[name] for name in names])
    out = [model(part) for part in pictures.split(256)]
    scores, style, features, body = (torch.cat(each) for each in zip(*out, strict=True))
    rank = (scores > scores.gather(1, true[:, None])).sum(1)
    return Verdict(rank, style.softmax(1), features, body)


def train_judge(
    drawings: Drawings, outlined: Drawings, work: Path, *, steps: int = 1200, batch: int = 128
) -> dict[str, float]:
    """Trains on all `drawings` but one in twenty; returns the accuracy on those. `outlined`: the first, with lines."""
    torch.manual_seed(0)
    names = sorted(set(drawings.names))
    index = {name: i for i, name in enumerate(names)}
    model = Judge(names)
    x = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.tensor([index[n] for n in drawings.names])
    s = torch.tensor([STYLES.index(each) for each in drawings.styles])
    lines = torch.from_numpy(outlined.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    kept, seen = order[: len(x) // 20], order[len(x) // 20 :]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = seen[torch.randint(len(seen), (batch,), generator=generator)]
        lined = (torch.rand(batch, generator=generator) < 0.25) & (rows < len(lines))
        shown = x[rows]
        shown[lined] = lines[rows[lined]]
        with torch.autocast("cpu", torch.bfloat16):
            scores, style, _, _ = model(_varied(shown, generator))
        styles = F.cross_entropy(style[~lined].float(), s[rows][~lined])
        return F.cross_entropy(scores.float(), y[rows]) + 0.2 * styles

    optimise({"judge": model}, loss, steps=steps, learning_rate=3e-3, state=work / "judge-state.pt", average=0.995,
             weight_decay=0.05, muon=True)  # fmt: skip
    model.eval()
    verdict = judge(model, x[kept], [drawings.names[int(i)] for i in kept])
    kept_lines = kept[kept < len(lines)]
    lined = judge(model, lines[kept_lines], [drawings.names[int(i)] for i in kept_lines])
    accuracy = {
        "drawings kept from it": len(kept),
        "top 1": float((verdict.rank == 0).float().mean()),
        "top 5": float((verdict.rank < 5).float().mean()),
        "style": float((verdict.style.argmax(1) == s[kept]).float().mean()),
        "top 1 with lines": float((lined.rank == 0).float().mean()),
    }
    torch.save({"names": names, "state": model.state_dict(), "accuracy": accuracy}, work / "judge.pt")
    return accuracy


def load_judge(work: Path) -> Judge:
    kept = torch.load(work / "judge.pt", weights_only=True)
    model = Judge(kept["names"])
    model.load_state_dict(kept["state"])
    return model.eval()


def _varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 15°, scaled by 0.75 to 1.2, moved, tinted, blurred, noisy: the judge must not mind."""
    n = len(x)

    def draw_(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*(shape or (n,)), generator=generator)

    angle, scale = draw_(-0.26, 0.26), 1 / draw_(0.75, 1.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, draw_(-0.15, 0.15), sin, cos, draw_(-0.15, 0.15)], dim=1).view(n, 2, 3)
    x = F.grid_sample(x - 1, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False) + 1
    x = x * draw_(0.7, 1.0, n, 3, 1, 1) + draw_(-0.15, 0.15, n, 3, 1, 1)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * draw_(0, 1.3, n, 1, 1, 1)
    blurred = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = torch.where(draw_(0, 1, n, 1, 1, 1) < 0.3, blurred, x)
    return x + draw_(0, 0.1, n, 1, 1, 1) * torch.randn(x.shape, generator=generator)


def main() -> None:
    work = Path(sys.argv[1])
    four = load_drawings(work)
    fifth = load_openmoji(work, four.names)
    every = Drawings(
        np.concatenate([four.pixels, fifth.pixels]), [*four.names, *fifth.names], [*four.styles, *fifth.styles]
    )
    print(json.dumps(train_judge(every, load_drawings(work, outlined=True), work)))


if __name__ == "__main__":
    main()
