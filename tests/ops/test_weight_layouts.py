"""Which layout a weight gets for serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.ops.cpu import compiled
from veneer.ops.dispatch import override_ops
from veneer.ops.weight_layouts import Dense, Reordered, packing, prepack_weight, reorders
from veneer.ops.weight_panels import Panels

CPU = torch.device("cpu")


def weight(rows: int = 48, n: int = 96) -> torch.Tensor:
    return (torch.randn(rows, n, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16()


has_panels = pytest.mark.skipif(not compiled.has("panel_product"), reason="no kernels for products here")


PACKS = [
    Dense,
    Reordered.from_weight,
    *(pytest.param(from_weight, marks=has_panels) for from_weight in (Panels.from_weight, Panels.int8, Panels.int4)),
]


@pytest.mark.parametrize("rows", [1, 3, 8, 15, 16, 17, 200])
@pytest.mark.parametrize("pack", PACKS)
def test_products_equal_those_with_the_dense_weight(pack: Callable[[Tensor], Any], rows: int) -> None:
    if pack == Reordered.from_weight and not reorders(torch.bfloat16):
        pytest.skip("this torch packs no weights")
    w = weight()
    matrix = pack(w)
    own = matrix.dense().double() if hasattr(matrix, "dense") else w.double()
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2)).bfloat16()
    want = x.double() @ own.t()
    size = float(want.abs().max())
    assert (matrix(x).double() - want).abs().max() <= 0.01 * size
    assert (matrix(x, bias).double() - (want + bias.double())).abs().max() <= 0.015 * size
    y = bias.repeat(rows, 1)
    matrix.add_onto(y, x)
    assert (y.double() - (want + bias.double())).abs().max() <= 0.015 * size


def test_weights_without_panels_use_other_layouts() -> None:
    with pytest.raises(ValueError, match="cannot be stored in panels"):
        Panels.from_weight(weight(41, 96))
    w, x = weight(41, 96), torch.ones(3, 96).bfloat16()
    assert (prepack_weight(w)(x).double() - x.double() @ w.double().t()).abs().max() <= 0.05


def test_rounding_errors_are_at_most_about_half_a_step() -> None:
    w = weight()
    eight = (Panels.int8(w).dense().float() - w.float()).abs()
    assert (eight <= 0.55 * w.float().abs().amax(1, keepdim=True) / 127 + 0.005 * w.float().abs()).all()
    groups = w.float().view(48, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    four = (Panels.int4(w).dense().float() - w.float()).abs().view(48, 3, 32)
    assert (four <= 0.6 * step[..., None] + 0.01 * groups.abs().amax(-1, keepdim=True)).all()
    with pytest.raises(ValueError, match="no int4 form"):
        Panels.int4(weight(48, 40))


@has_panels
def test_panels_are_kept_unless_another_layout_is_requested() -> None:
    assert packing(torch.bfloat16, CPU) == Panels.from_weight
    if reorders(torch.bfloat16):
        with override_ops(weight_layout="onednn"):
            assert packing(torch.bfloat16, CPU) == Reordered.from_weight


def test_weights_without_other_layouts_are_unchanged() -> None:
    assert packing(torch.float32, CPU) is Dense
    assert packing(torch.bfloat16, torch.device("meta")) is Dense
    with override_ops(weight_layout="torch"):
        assert packing(torch.bfloat16, CPU) is Dense


@has_panels
@pytest.mark.parametrize(("kernel", "name"), [("panel_product", "compiled"), ("amx_panel_product", "amx")])
def test_the_layout_of_a_weight_determines_its_kernel(kernel: str, name: str) -> None:
    if not compiled.has(kernel):
        pytest.skip("this processor has no such kernel")
    with override_ops(panel_linear=name):
        found = [pack(weight(64, 96)) for pack in (Panels.from_weight, Panels.int8, Panels.int4)]
    assert {p.kernel for p in found} == {kernel}
    assert {int(p.pointers[3]) for p in found} == {int(name == "amx")}
