"""A model sharded over two processes: equal numbers, half the bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from veneer.models.shard import blocks, local_bytes
from veneer.train.devices import launch

WIDTH = 6


class Packed(nn.Module):
    """A linear map whose frozen weight is held as codes and scales, as a 4-bit one is: odd sizes, three dtypes."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (size,), generator=g, dtype=torch.uint8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.signed = nn.Parameter(torch.randint(-9, 9, (3, 1), generator=g, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.rand(7, generator=g), requires_grad=False)
        self.offsets = nn.Parameter(torch.rand(5, generator=g).bfloat16(), requires_grad=False)
        self.register_buffer("levels", torch.linspace(-1, 1, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.levels[self.codes.long()].mean() * self.scales.mean() + self.offsets.float().mean()
        return torch.tanh(x * (made + 0.1 * self.signed.float().sum()))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.few = nn.ModuleList([nn.Linear(2, 2)]).requires_grad_(False)
        self.layers = nn.ModuleList(Packed(seed, size) for seed, size in enumerate((1, 13, 1001)))

    def forward(self, x: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        x = self.first(x) @ trained
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def measured(run: Any, model: nn.Module) -> dict[str, Any]:
    """Loss, gradient and bytes of two steps and of one without a gradient."""
    trained = nn.Parameter(torch.eye(WIDTH))
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))
    for _ in range(2):
        loss = run(model, x, trained)
        loss.backward()
    with torch.no_grad():
        again = float(run(model, x, trained))
    assert trained.grad is not None
    return {"loss": loss.item(), "again": again, "gradient": trained.grad.tolist(), "held": local_bytes(model)}


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def main(folder: Path) -> None:
    import torch.distributed as dist

    from veneer.models.shard import shard

    dist.init_process_group("gloo")
    model = stack()
    call = shard(model, blocks(model), torch.device("cpu"))
    found = measured(call, model)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_process_shard_is_equal_at_half_memory(tmp_path: Path) -> None:
    model = stack()
    whole = measured(lambda act, *args: act(*args), model)
    assert launch(2, [sys.executable, "-m", "tests.models.test_shard", str(tmp_path)]) == 0
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    held = 0
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["loss"], found["again"]) == pytest.approx((whole["loss"], whole["again"]))
        torch.testing.assert_close(torch.tensor(found["gradient"]), torch.tensor(whole["gradient"]))
        held += found["held"] - buffers
    assert held == whole["held"] - buffers


def test_blocks_are_those_of_the_largest_list() -> None:
    model = stack()
    assert blocks(model) == list(model.layers)
    assert blocks(nn.Linear(2, 2)) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
