"""The ops of a step by Triton kernels, and by torch's own for GPUs: IMPLEMENTATIONS is what veneer.ops.choice chooses
from on a GPU. All round once where their reference does; references and formulas are the ops' own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.ops.attention import HeadNorms
from veneer.ops.cuda import activations, attention, launch, loss, lowrank, mixed_rows, norms, paged, quantised
from veneer.ops.dispatch import Implementation
from veneer.ops.lowrank import LowRank
from veneer.ops.quantisation_formats import QuantisationFormat

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
_implements("norm_silu")(norms.NormSilu)

# -- gates, activations, gains, dropout --------------------------------------------------------------------------------

for _act in ("silu", "gelu", "gelu_tanh"):
    _implements(f"{_act}_gate")(functools.partial(activations.gate_forward, act=_act))
    _implements(f"{_act}_gate_backward")(functools.partial(activations.gate_backward, act=_act))
_implements("geglu")(functools.partial(activations.gate_forward, act="gelu", up_first=True))
_implements("geglu_backward")(activations.geglu_backward)
_implements("gelu_tanh")(activations.gelu_tanh_forward)
_implements("gelu_tanh_backward")(activations.gelu_tanh_backward)
_implements("dropout")(activations.dropout)


def _takes_gain(gain: Tensor, *tensors: Tensor) -> bool:
    return gain.dtype == torch.float32 and launch.contiguous(gain, *tensors)


_WANTS_GAIN = "a float32 gain beside contiguous tensors"
_implements("gain", _takes_gain, _WANTS_GAIN)(activations.gain)
_implements("gain_backward", _takes_gain, _WANTS_GAIN)(activations.gain_backward)

# -- loss --------------------------------------------------------------------------------------------------------------

_implements("token_nll")(loss.token_nll)

# -- serving -----------------------------------------------------------------------------------------------------------

_implements("mixed_rows")(mixed_rows.mixed_rows)


def _takes_pages(q: Tensor, K: Tensor) -> bool:
    return launch.takes(q, K) and q.dtype == K.dtype and q.shape[-1] % 2 == 0 and q.stride(-1) == 1


_WANTS_PAGES = "heads that lie together, in the pages' dtype"
_implements("paged_attention", _takes_pages, _WANTS_PAGES)(paged.paged_attention)
_implements("turn_and_store", _takes_pages, _WANTS_PAGES)(paged.turn_and_store)

# -- attention ---------------------------------------------------------------------------------------------------------


def _takes_heads(q: Tensor, *others: Tensor | None) -> bool:
    return launch.takes(q, *others) and 0 < q.shape[-1] <= 256


@_implements("split_turned", _takes_heads, "heads of up to 256 values")
def _split_turned(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv: int, norms: HeadNorms | None
) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor]
    if norms is None:
        made = attention.TurnedHeads.apply(qkv, cos, sin, kv)
    else:
        made = attention.NormedTurnedHeads.apply(qkv, norms.weight, norms.eps, cos, sin, kv)
    return made


def _takes_joint(qkv: Tensor, weight: Tensor | None, turn: Tensor | None) -> bool:
    return launch.contiguous(qkv, weight, turn) and qkv.shape[-1] % 2 == 0 and qkv.shape[-1] <= 256


@_implements("joint_heads", _takes_joint, "contiguous heads of up to 256 values")
def _joint_heads(qkv: Tensor, weight: Tensor | None, eps: float, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] = attention.JointHeads.apply(qkv, weight, eps, turn)
    return made


_implements("attend_rows", _takes_heads, "heads of up to 256 values")(attention.attend_rows)

# -- low-rank products -------------------------------------------------------------------------------------------------


def _takes_low_rank(x: Tensor, y: Tensor, products: Sequence[LowRank]) -> bool:
    return y.dtype == x.dtype


IMPLEMENTATIONS["low_rank"] = Implementation(
    lowrank.ShadowedProducts, _takes_low_rank, "every low-rank product, by torch's own products", lambda: "", "cuda"
)

# -- quantised weights -------------------------------------------------------------------------------------------------


def _takes_bytes(stored: Tensor, dtype: torch.dtype, *kind: str) -> bool:
    return launch.contiguous(stored) and dtype != torch.float64 and all(k in quantised.GGML for k in kind)


_implements("dequantise_blocks4", _takes_bytes, "contiguous bytes")(quantised.dequantise_blocks4)
_implements("dequantise_rows8", _takes_bytes, "contiguous bytes")(quantised.dequantise_rows8)
_implements("dequantise_ggml", _takes_bytes, ", ".join(quantised.GGML))(quantised.dequantise_ggml)


def _takes_few(x: Tensor, stored: QuantisationFormat) -> bool:
    fits = x.ndim == 2 and 0 < len(x) <= quantised.FEW_ROWS and x.element_size() == 2 and quantised.takes_codes(stored)
    return fits and launch.contiguous(x, *stored.tensors().values())


_WANTS_FEW = f"up to {quantised.FEW_ROWS} rows of 16 bits, widths of 4-bit codes a multiple of 64"
_implements("coded_product", _takes_few, _WANTS_FEW)(quantised.coded_product)
