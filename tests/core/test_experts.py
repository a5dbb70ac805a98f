"""AdaptedWeight computes every product as if its weights were dense sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from veneer.core import experts
from veneer.core.experts import AdaptedWeight
from veneer.ops.lowrank import LowRank


@pytest.mark.parametrize("flipped", [False, True])
def test_adapted_weights_support_torchs_products(flipped: bool) -> None:
    torch.manual_seed(0)
    E, out, rows = 3, 4, 5
    W = torch.randn(E, rows, out) if flipped else torch.randn(E, out, rows)
    A, B = torch.randn(E, 2, rows), torch.randn(E, out, 2)
    part = LowRank(A, B, 0.7)
    part = part.transposed() if flipped else part
    weight = AdaptedWeight(W, [part, replace(part, scale=-0.2)])
    full = W + 0.5 * (B @ A).transpose(1, 2) if flipped else W + 0.5 * B @ A
    torch.testing.assert_close(weight.dense(), full)
    right, dense = (weight, full) if flipped else (weight.transpose(1, 2), full.transpose(1, 2))
    x = torch.randn(E, 6, rows)
    index = torch.tensor([2, 0, 0])
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    flat = torch.randn(7, rows)
    for got, expected in [
        (torch.bmm(x, right), torch.bmm(x, dense)),
        (x @ right, x @ dense),
        (torch.matmul(x[0], right[1]), x[0] @ dense[1]),
        (torch.bmm(right.transpose(-1, -2), x.mT), dense.mT @ x.mT),
        (right.mT @ x.mT, dense.mT @ x.mT),
        (torch.bmm(right.transpose(-1, -2)[index], x.mT), dense.mT[index] @ x.mT),
        (nn.functional.linear(x[0], right[1].mT, torch.ones(out)), x[0] @ dense[1] + 1),
        (torch.einsum("eni,eio->eno", x, right), x @ dense),  # a product that is not supported uses the dense sum
        (right.sum(), dense.sum()),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    grouped = experts.expert_product(flat, dense, offsets)
    torch.testing.assert_close(grouped[:2], flat[:2] @ dense[0])
    torch.testing.assert_close(grouped[2:5], flat[2:5] @ dense[2])
    assert not grouped[5:].any()
    torch.testing.assert_close(experts.expert_product(flat, right, offsets), grouped, rtol=1e-4, atol=1e-5)
