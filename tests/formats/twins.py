"""Models and random adapters for tests of PEFT's format, and their outputs in PEFT and in veneer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.attached import attached
from tests.families import FAMILIES, VOCAB
from veneer.core.adapter import Adapter, Pair


class Conv(nn.Module):
    """One- and two-dimensional convolutions, strided and padded.

    An embedding precedes the convolutions, and a linear layer follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.conv1 = nn.Conv1d(8, 12, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False)
        self.point = nn.Conv2d(6, 4, 1)
        self.out = nn.Linear(4 * 3 * 4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.table(ids).transpose(1, 2)).relu()
        x = self.point(self.conv2(x.reshape(len(x), 4, 3, -1)).relu())
        return self.out(x.flatten(1))


def model(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """Return a small model in eval mode; equal arguments give equal weights."""
    if name == "conv":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Conv().to(dtype).eval()
    from tests.families import FAMILIES, OTHERS

    net = {**FAMILIES, **OTHERS}[name](**changes).to(dtype).eval()
    net.config._experts_implementation = "eager"  # the grouped kernel does not support float64
    return net


def outputs(net: nn.Module) -> Tensor:
    rows = VOCAB if hasattr(net, "config") else 12
    ids = torch.randint(0, rows, (2, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = net(ids)
    return out.logits if hasattr(out, "logits") else out


def randomise(net: nn.Module, seed: int = 7) -> None:
    """Change the value of every trainable tensor, so that each has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(net.named_parameters()):
        if p.requires_grad and "magnitude" in name:
            p.data.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator, dtype=p.dtype))
        elif p.requires_grad:
            p.data.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def random_adapter(adapter: Adapter, seed: int = 7) -> Adapter:
    """Return a copy of `adapter` in which every tensor has another value."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return t + 0.2 * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    out = adapter.mapped(lambda t: t)
    for pair in out.pairs.values():
        pair.A, pair.B = noise(pair.A), noise(pair.B)
        if pair.magnitude is not None:
            pair.magnitude = pair.magnitude * 1.3
    out.modules = {n: {k: noise(t) for k, t in own.items()} for n, own in out.modules.items()}
    for rows in out.token_rows.values():
        rows.rows = noise(rows.rows)
    return out


def peft_folder(
    net: nn.Module, folder: Path, compute: Callable[[nn.Module], Tensor] = outputs, **config: Any
) -> Tensor:
    """Wrap `net` in PEFT, randomize the adapter, save it, and return the outputs."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        wrapped = get_peft_model(net, LoraConfig(**config))
        randomise(wrapped)
        wrapped.eval()
        y = compute(wrapped)
        wrapped.save_pretrained(str(folder))
    return y


def peft_outputs(net: nn.Module, folder: Path) -> Tensor:
    """Return the outputs of `net` with the adapter loaded by PEFT.

    PEFT's warnings about unmatched keys and modules become errors, except the one that PEFT emits for every
    rank_pattern on a parameter."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words in ("missing", "[Uu]nexpected", "not match", "no module", "were excluded", "Could not", "mismatch"):
            warnings.filterwarnings("error", message=f".*{words}.*")
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module.*")
        return outputs(PeftModel.from_pretrained(net, str(folder)).eval())


def our_outputs(net: nn.Module, adapter: Adapter, compute: Callable[[nn.Module], Tensor] = outputs) -> Tensor:
    with attached(net, adapter):
        return compute(net)


def linear_pairs(names: list[str], rank: int = 2, width: int = 4, scale: float = 2.0, seed: int = 0) -> Adapter:
    """Return an adapter of square linear pairs for modules with these names."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return Adapter({n: Pair(make(rank, width), make(width, rank), scale) for n in names})


__all__ = ["FAMILIES", "VOCAB"]
