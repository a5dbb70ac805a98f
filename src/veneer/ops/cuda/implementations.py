"""What runs an op on a GPU: thin calls of torch. No GPU has run any of it yet.

IMPLEMENTATIONS is what veneer.ops.dispatch chooses from: op -> Implementation. An op without one runs its reference in
torch.
"""

from __future__ import annotations

from veneer.ops.cuda import attention
from veneer.ops.dispatch import Implementation

IMPLEMENTATIONS: dict[str, Implementation] = {
    "attend_rows": Implementation(
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
}
