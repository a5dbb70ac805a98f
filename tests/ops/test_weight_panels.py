"""Weight panels: bfloat16 and quantized codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.draws import coded
from veneer.ops.cpu import compiled
from veneer.ops.weight_panels import PanelRows, Panels, panels_of_codes

has_panels = pytest.mark.skipif(not compiled.has("panel_product"), reason="no kernels for products here")


@has_panels
@pytest.mark.parametrize(("out", "n"), [(16, 32), (80, 4224), (208, 2080)])
@pytest.mark.parametrize("pack", [Panels.from_weight, Panels.int8, Panels.int4])
def test_panels_of_any_size(pack: Callable[[Tensor], Panels], out: int, n: int) -> None:
    """Covers partial last panels, sums longer than a block, and rows in several blocks.

    Each row computed separately must equal the same row in the batch.
    """
    g = torch.Generator().manual_seed(0)
    w, x, bias = torch.randn(out, n, generator=g), torch.randn(131, n, generator=g), torch.randn(out, generator=g)
    w, x, bias = w.bfloat16(), x.bfloat16(), bias.bfloat16()
    matrix = pack(w)
    want = x.double() @ matrix.dense().double().t()
    got = matrix(x, bias)
    assert (got.double() - want - bias.double()).abs().max() <= 0.006 * want.abs().max()
    assert all(torch.equal(matrix(x[i : i + k], bias), got[i : i + k]) for i, k in ((0, 0), (1, 2), (5, 3), (60, 71)))
    y = x[:, :1].repeat(1, out)
    before = y.clone()
    matrix.add_onto(y, x, bias)
    assert torch.equal(y, before + got)


KINDS = ("nf4", "fp4", "int8", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def rounding(x: Tensor, w: Tensor, kind: str) -> Tensor:
    """Return the error bound of x·wᵀ.

    Sums are float32; the result and each weight are rounded once to bfloat16. The kernel rounds scale and
    zero point together, so its weights can differ by one rounding.
    """
    size, otherwise = x.abs() @ w.abs().t(), kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    return 2**-8 * (x @ w.t()).abs() + (2**-8 if otherwise else 2**-16) * size


@has_panels
@pytest.mark.parametrize(("out", "n"), [(16, 256), (80, 512), (208, 1280)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_codes_equal_those_with_dequantized_weights(kind: str, out: int, n: int) -> None:
    """Compares one to forty rows with float64. For int8, the reference weights are not rounded to bfloat16.

    A single row has the same bits as in a batch, and the codes are unchanged.
    """
    g = torch.Generator().manual_seed(1)
    first, second = (coded(torch.randn(k, n, generator=g).bfloat16() / 8, kind) for k in (out, 32))
    dense = torch.cat([first.dense(), second.dense()])
    laid = panels_of_codes([first, second])
    panels, views = laid
    assert panels.bytes <= 64 * -(-(out + 32) // 64) * (n * BITS[kind] / 8 + 4)
    assert all(torch.equal(v.dense(), w.dense()) for v, w in zip(views, (first, second), strict=True))
    assert torch.equal(views[1][5:21].dense(), second.dense()[5:21])
    assert torch.equal(views[0].clone().dense(), first.dense())
    x = torch.randn(40, n, generator=g).bfloat16()
    exact = torch.cat([w.stored.dense(torch.float32, 0, len(w)) for w in (first, second)]) if kind == "int8" else dense
    got, (x64, w64) = panels(x), (x.double(), exact.double())
    assert ((got.double() - x64 @ w64.t()).abs() <= rounding(x64, w64, kind)).all()
    for rows in range(40):
        assert torch.equal(panels(x[40 - rows :].contiguous()), got[40 - rows :])


BITS = {
    "nf4": 4.5, "fp4": 4.5, "int8": 8, "Q4_0": 5, "Q4_1": 6, "Q5_0": 9, "Q5_1": 10, "Q8_0": 9, "Q4_K": 6, "Q5_K": 10,
    "Q6_K": 10,
}  # fmt: skip


@has_panels
def test_only_compatible_types_share_panels() -> None:
    g = torch.Generator().manual_seed(1)
    w = [torch.randn(16, 256, generator=g).bfloat16() for _ in range(3)]
    for kinds in (("Q4_K", "Q6_K", "Q8_0"), ("int8", "Q4_0", "Q4_1"), ("nf4", "nf4", "nf4")):
        laid = panels_of_codes([coded(own, kind) for own, kind in zip(w, kinds, strict=True)])
        assert torch.equal(laid[0].dense(), torch.cat([v.dense() for v in laid[1]]))
    assert panels_of_codes([coded(w[0], "nf4"), coded(w[1], "int8")]) is None
    assert panels_of_codes([coded(w[0], "nf4"), w[1]]) is None
    assert panels_of_codes([coded(w[0][:15], "nf4")]) is None
    assert panels_of_codes([coded(w[0][:, :100], "nf4")]) is None
    laid = panels_of_codes([coded(w[0], "int8")])
    again = panels_of_codes(laid[1])  # as a second engine over the same base does
    assert isinstance(again[1][0].stored, PanelRows)
    assert torch.equal(again[1][0].dense(), laid[1][0].dense())
