"""bitsandbytes' products with 4-bit weights, compared with the dequantized weight.

On a CPU, bitsandbytes uses its own reference implementation."""

from __future__ import annotations

import pytest
import torch

from veneer.ops.cuda.implementations import IMPLEMENTATIONS
from veneer.ops.quantized import quantize

PRODUCT = IMPLEMENTATIONS["quantized_linear"]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("low", "high"), [(0, 96), (0, 40), (32, 96)])
def test_products_with_some_rows_match_the_dequantized_weight(
    device: str, kind: str, double: bool, low: int, high: int
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[quant]'")
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(96, 128, generator=generator), kind, double=double).to(device)
    x = torch.randn(3, 128, generator=generator).to(device)
    bias, out = torch.randn(high - low, generator=generator).to(device), torch.empty(3, high - low, device=device)
    stored = weight.stored
    PRODUCT.run(x, stored, low, high, bias, out)
    torch.testing.assert_close(out, x @ weight.dense()[low:high].t() + bias, rtol=1e-3, atol=1e-3)


def test_only_blocks_within_a_row_are_supported() -> None:
    x = torch.randn(2, 96)
    assert not PRODUCT.takes(x, quantize(torch.randn(4, 96), "nf4").stored)
    assert not PRODUCT.takes(x, quantize(torch.randn(4, 96), "int8").stored)
