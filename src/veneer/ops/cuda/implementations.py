"""What runs an op on a GPU: thin calls of torch, Liger-Kernel and bitsandbytes. No GPU has run any of it yet.

IMPLEMENTATIONS is what veneer.ops.dispatch chooses from: op -> Implementation. An op without one runs its reference in
torch, as all do where a library is missing.
"""

from __future__ import annotations

from veneer.ops.cuda import attention, liger, quantised
from veneer.ops.dispatch import Implementation

_NORM = Implementation(liger.rms_norm, liger.takes_norm, "contiguous rows", liger.why_missing, "liger")

IMPLEMENTATIONS: dict[str, Implementation] = {
    "rms_norm": _NORM,
    "rms_norm_autograd": _NORM,
    "rope": Implementation(liger.rope, liger.takes_rope, "contiguous cos and sin", liger.why_missing, "liger"),
    "linear_cross_entropy": Implementation(
        liger.linear_cross_entropy,
        liger.takes_loss,
        "contiguous inputs and a plain weight of one dtype",
        liger.why_missing,
        "liger",
    ),
    "varlen_attention": Implementation(
        attention.varlen,
        attention.takes_varlen,
        "16-bit heads of up to 256 values in multiples of 8, without capped scores and sinks",
        attention.varlen_missing,
        "varlen",
        (
            Implementation(
                attention.flex, attention.takes_flex, "capped scores or sinks", attention.flex_missing, "flex"
            ),
        ),
    ),
    "quantized_linear": Implementation(
        quantised.quantized_linear,
        quantised.takes_codes,
        "nf4 and fp4 whose blocks lie within a row",
        quantised.why_missing,
        "bitsandbytes",
    ),
}
