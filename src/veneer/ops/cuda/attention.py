"""Attention within packed rows, with torch's varlen (flash) or flex attention.

Flex attention is used for capped scores and sinks."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from veneer.compat import varlen_attention
from veneer.ops.attention import RowLayout, VarlenSettings
from veneer.ops.device_transfer import is_fake


def varlen_missing() -> str:
    return "" if varlen_attention() is not None else "torch has no varlen_attn with scale, window and grouped heads"


def takes_varlen(q: Tensor, k: Tensor, v: Tensor, settings: VarlenSettings) -> bool:
    """Return whether varlen attention supports these inputs.

    Requires a 16-bit dtype, a head size that is a multiple of 8 and at most 256, and compute capability 8.0
    or later."""
    if settings.cap or settings.sinks is not None or q.device.type != "cuda" or is_fake(q) or varlen_missing():
        return False
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] <= 256 and q.shape[2] % 8 == 0
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen(q: Tensor, k: Tensor, v: Tensor, settings: VarlenSettings) -> Tensor:
    """Return each row's causal attention, (N, heads, dim), from torch.nn.attention.varlen."""
    layout, scale, window, *_ = settings
    look_back = -1 if window is None else window - 1
    longest, grouped = max(layout.lengths, default=0), q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"scale": scale, "window_size": (look_back, 0), "enable_gqa": grouped}
    out: Tensor = varlen_attention()(q, k, v, layout.ends, layout.ends, longest, longest, **options)
    return out


@functools.cache
def flex_missing() -> str:
    return "" if importlib.util.find_spec("triton") is not None else "triton is not installed"


def takes_flex(q: Tensor, k: Tensor, v: Tensor, settings: VarlenSettings) -> bool:
    """Return whether these inputs need flex attention and flex attention supports the inputs.

    Flex attention is needed for capped scores and sinks, which varlen attention does not support. It requires
    a head size of at least 16."""
    needs_flex = bool(settings.cap) or settings.sinks is not None
    return needs_flex and q.device.type == "cuda" and not is_fake(q) and q.shape[2] >= 16 and not flex_missing()


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, settings: VarlenSettings) -> Tensor:
    """Return each row's causal attention, (N, heads, dim), from flex attention.

    Flex attention is compiled if the inputs are on a GPU. With a cap c, a score s becomes c·tanh(s/c). With
    sinks (heads,), the softmax of a head with sink z is multiplied by σ(log Σ exp − z)."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    layout, scale, window, cap, sinks = settings

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    run = _compiled_flex() if q.device.type == "cuda" else flex_attention
    out, aux = run(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        score_mod=capped if cap else None,
        block_mask=_block_mask(layout, window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        out = out * torch.sigmoid(aux.lse - sinks[:, None].to(aux.lse.dtype)).to(out.dtype)[..., None]
    result: Tensor = out[0].transpose(0, 1)
    return result


def _block_mask(layout: RowLayout, window: int | None) -> Any:
    """Return the flex attention mask for this window, cached in `layout` for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in layout.masks:
        n = sum(layout.lengths)
        row = torch.searchsorted(layout.ends[1:], torch.arange(n, device=layout.device, dtype=torch.int32), right=True)

        def can_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            inside = (row[query] == row[key]) & (query >= key)
            return inside if window is None else inside & (query - key < window)

        layout.masks[window] = create_block_mask(can_attend, None, None, n, n, device=layout.device)
    return layout.masks[window]
