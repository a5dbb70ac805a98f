"""8-bit products with a frozen weight, forward and backward, from one copy of the weight.

    weight     W ⊙ m ≈ s ⊙ C            C: (out, in) int8, s: (out,), m: (in,) powers of two
    forward    y = q·Cᵀ ⊙ t ⊙ s + x_O·W_Oᵀ + b        t ⊙ q ≈ x / m, without the outlier channels O
    backward   dx = (q·C ⊙ t) / m                     t ⊙ q ≈ g ⊙ s

t contains one step per token, max |row| / 127, and q contains int8 codes. The backward product sums over the
outputs, so the steps s of the outputs are multiplied into g before g is quantized. m moves the size of large
input channels from x into the weight (SmoothQuant, arXiv 2211.10438). The largest channels O are multiplied in
16 bits (LLM.int8(), arXiv 2208.07339). As in SwitchBack (arXiv 2304.13013), only products with the frozen weight
run in 8 bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from veneer.ops.dispatch import dispatch

CODES = 127
"""The largest int8 code; -128 is not used."""
_OUTLIERS = 16
"""Maximum number of outlier channels of a weight."""
_OUTLIER = 1.5
"""A channel is an outlier if its largest |x / m| is more than this many times that of the 32nd largest channel."""


def int8_linear(
    x: Tensor,
    codes: Tensor,
    factor: Tensor,
    column: Tensor,
    transposed: bool = True,
    outliers: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return t ⊙ (q·Cᵀ) ⊙ column + x_O·W_Oᵀ + b in x's dtype. If not `transposed`, q·C replaces q·Cᵀ.

    x: (N, in), or (N, out) if not `transposed`. codes: C, (out, in) int8.
    factor: multiplies the channels of x before they are quantized, float32; 0 for outliers.
    column: multiplies the columns of the result, float32.
    outliers: indices (k,) int32 of channels of x, and their weights (k, columns) float32."""
    run = dispatch("int8_linear", x, codes, bias) or int8_linear_in_torch
    result: Tensor = run(x, codes, factor, column, transposed, outliers, bias)
    return result


def int8_linear_in_torch(
    x: Tensor,
    codes: Tensor,
    factor: Tensor,
    column: Tensor,
    transposed: bool,
    outliers: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute `int8_linear` with torch's products."""
    scaled = x * factor
    most = scaled.abs().amax(1, keepdim=True)
    q = (scaled * (CODES / most).nan_to_num_(0.0, 0.0, 0.0)).round_().to(torch.int8)
    other = codes.t() if transposed else codes
    # With one column, torch's product returns unrelated numbers.
    sums = torch._int_mm(q, other) if q.shape[1] > 1 and torch_sums_are_exact() else q.float() @ other.float()
    y = sums * (most / CODES * column)
    if outliers is not None:
        y += x[:, outliers[0].long()].to(y.dtype) @ outliers[1].to(y.dtype)
    return (y if bias is None else y + bias).to(x.dtype)


@functools.cache
def torch_sums_are_exact() -> bool:
    """Return whether torch's products of int8 matrices are exact on this processor.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate at 32,767."""
    q = torch.full((32, 64), CODES, dtype=torch.int8)
    return bool((torch._int_mm(q, q.t()) == 64 * CODES**2).all())


class Int8Weight:
    """The 8-bit copy of one weight (out, in).

    Until `quantize` is called, products use the weight itself and record the largest |x| of each input
    channel."""

    def __init__(self, weight: Tensor) -> None:
        self.largest = torch.zeros(weight.shape[1], device=weight.device)
        self.codes: Tensor | None = None
        self._outliers: tuple[Tensor, Tensor] | None = None

    @property
    def outliers(self) -> int:
        """The number of outlier channels."""
        return 0 if self._outliers is None else len(self._outliers[0])

    def product(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, transposed: bool = True
    ) -> Tensor | None:
        """Return x·Wᵀ + b, or x·W if not `transposed`; None if the caller must use the weight itself."""
        if self.codes is None:
            if transposed and len(x):
                torch.maximum(self.largest, x.abs().amax(0).float(), out=self.largest)
            return None
        if transposed:
            return int8_linear(x, self.codes, self._inverse, self._steps, True, self._outliers, bias)
        return int8_linear(x, self.codes, self._steps, self._back, False)

    def quantize(self, weight: Tensor) -> None:
        """Quantize the weight. The recorded inputs determine the balance m and the outlier channels."""
        wide = weight.detach().float()
        floor = float(self.largest.amax()) * 1e-4 or 1.0
        ratio = self.largest.clamp(min=floor) / wide.abs().amax(0).clamp(min=1e-6)
        m = ratio.sqrt_().log2_().round_().exp2_()
        self.balance, self._back, self._inverse = m, 1 / m, 1 / m
        scaled = self.largest * self._inverse
        order = scaled.argsort(descending=True, stable=True)
        which = order[:_OUTLIERS][scaled[order[:_OUTLIERS]] > _OUTLIER * scaled[order[min(31, len(order) // 2)]]]
        self._outliers = None
        if len(which):
            self._inverse = self._inverse.index_fill(0, which, 0.0)
            self._outliers = which.to(torch.int32), wide[:, which].t().contiguous()
        wide = wide * m
        self._steps = wide.abs().amax(1).clamp_(min=1e-30) / CODES
        self.codes = (wide / self._steps[:, None]).round_().to(torch.int8)
