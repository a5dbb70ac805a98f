"""The ops of a step by Triton kernels, and by torch's own for GPUs: IMPLEMENTATIONS is what veneer.ops.choice chooses
from on a GPU. All round once where their reference does; references and formulas are the ops' own.
"""

from __future__ import annotations

import functools

from torch import Tensor

from veneer.ops.choice import Implementation
from veneer.ops.cuda import launch, norms

IMPLEMENTATIONS: dict[str, Implementation] = {}
"""op -> how it is done on a GPU."""

_implements = functools.partial(launch.implements, IMPLEMENTATIONS)

_NORM_WIDTH = 1 << 15
"""Values of a row that the registers of a block hold."""


def _takes_norm(*tensors: Tensor) -> bool:
    return launch.contiguous(*tensors) and 0 < tensors[0].shape[-1] <= _NORM_WIDTH


_WANTS_NORM = f"contiguous rows of up to {_NORM_WIDTH:,} values"
_implements("rms_norm", _takes_norm, _WANTS_NORM)(norms.rms_norm_forward)
_implements("rms_norm_backward", _takes_norm, _WANTS_NORM)(norms.rms_norm_backward)
