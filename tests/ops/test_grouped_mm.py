"""Rows times the weights of their groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.elsewhere import OnCuda
from veneer.ops.grouped_mm import grouped_mm


def test_each_row_is_multiplied_by_the_weight_of_its_group() -> None:
    x, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    expected = torch.stack([x[i] @ weight[group] for i, group in enumerate((0, 0, 2, 2, 2))])
    y = grouped_mm(x, weight, torch.tensor([2, 2, 5]))
    torch.testing.assert_close(y[:5], expected)
    assert not y[5:].any()


def test_rows_of_no_group_are_zero_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, torch leaves rows after the last offset, and their gradients, uninitialized."""

    def product(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        x, weight, ends = x.as_subclass(Tensor), weight.as_subclass(Tensor), offs.as_subclass(Tensor).tolist()
        parts = [x[a:b] @ w for a, b, w in zip([0, *ends], ends, weight, strict=False)]
        return torch.cat([*parts, x[ends[-1] :] @ weight[0] * float("nan")])

    arange = torch.arange
    monkeypatch.setattr("torch.arange", lambda n, device=None: arange(n))  # ignore the device, which this machine lacks
    monkeypatch.setattr("torch.nn.functional.grouped_mm", product, raising=False)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 16, generator=g).bfloat16(), torch.randn(2, 16, 8, generator=g).bfloat16()
    offsets = torch.tensor([1, 4])
    held = x.clone().requires_grad_()
    y = grouped_mm(held.as_subclass(OnCuda), weight, offsets).as_subclass(Tensor)
    assert torch.equal(y, grouped_mm(x, weight, offsets))
    assert not y[4:].any()
    y.float().sum().backward()
    assert torch.isfinite(held.grad).all()
    assert not held.grad[4:].any()
