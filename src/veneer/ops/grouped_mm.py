"""Grouped matrix product: each row is multiplied by the weight of its group.

    y_i = x_i·W_g(i)        x: (rows, in), sorted by group    W: (groups, in, out)    offsets: (groups,)

The rows offsets[g-1] to offsets[g] - 1 belong to group g. For experts, each expert is a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.compat import TORCH
from veneer.ops.linear import LinearMap, linear
from veneer.ops.products import in_float32


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Return the rows of x times the weights of their groups, (rows, out), for any sizes and dtype.

    Rows after the last offset belong to no group and give zero."""
    if has_native_grouped_mm(x):
        return _native(x, weight, offsets)
    out, start = [], 0
    for end, w in zip(offsets.tolist(), weight.unbind(0), strict=True):
        if end > start:
            rows, wide = x[start:end], in_float32(x, w) and not w.requires_grad
            out.append(linear(rows, LinearMap(w.t())) if wide else rows @ w)
        start = end
    joined: Tensor = torch.cat([*out, x.new_zeros(len(x) - start, weight.shape[-1])])
    return joined


def has_native_grouped_mm(x: Tensor) -> bool:
    """Return whether torch has a grouped product for x's device and dtype.

    Torch's grouped product reads the offsets on the device and does not copy them to the host."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16


def _native(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Compute `grouped_mm` with torch's grouped product.

    Torch's product requires each row to start at a multiple of 16 bytes (8 values), so rows are padded."""
    # For rows without a group, torch's product and its gradient contain uninitialized memory.
    in_group = (torch.arange(len(x), device=x.device) < offsets[-1])[:, None]
    x = torch.where(in_group, x, 0)
    short, narrow = -x.shape[-1] % 8, -weight.shape[-1] % 8
    if short or narrow:
        x, weight = F.pad(x, (0, short)), F.pad(weight, (0, narrow, 0, short))
    product = getattr(F, "grouped_mm", None) or TORCH("torch._grouped_mm")
    y: Tensor = product(x, weight, offs=offsets.to(torch.int32))
    return torch.where(in_group, y[:, : y.shape[-1] - narrow], 0)
