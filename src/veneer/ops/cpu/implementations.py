"""Implementations of ops with the compiled kernels.

`veneer.ops.dispatch` reads IMPLEMENTATIONS on a CPU. Each implementation rounds as often as its reference,
and requires contiguous bfloat16 tensors unless stated otherwise. References and formulas are in the modules
of the ops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.ops.attention import VarlenSettings
from veneer.ops.cpu import compiled
from veneer.ops.dispatch import Implementation
from veneer.ops.int8 import int8_linear_in_torch
from veneer.ops.lowrank import LowRank
from veneer.ops.step_sizes import SMALL_INPUT
from veneer.ops.weight_layouts import Reordered, reorders
from veneer.ops.weight_panels import Panels

IMPLEMENTATIONS: dict[str, Implementation] = {}
"""op -> its implementation, which uses the compiled kernels."""


def _implements(
    op: str, *names: str, takes: Callable[..., bool] | None = None, wants: str = "contiguous bfloat16"
) -> Callable[[Any], Any]:
    """Return a decorator that registers an implementation of `op`.

    names: the kernels that the implementation calls; by default, the op's name.
    takes: function that returns whether the implementation supports the given tensors.
    wants: the condition of `takes` in words."""
    needed = names or (op,)

    def fits(*tensors: Tensor) -> bool:
        return compiled.usable(needed, *tensors) is not None

    def register(run: Any) -> Any:
        IMPLEMENTATIONS[op] = Implementation(run, takes or fits, wants, lambda: compiled.why_missing(*needed))
        return run

    return register


def _kernel(name: str) -> Any:
    return getattr(compiled.kernels(), name)


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


# -- norms and dropout -------------------------------------------------------------------------------------------------


@_implements("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, d = torch.empty_like(x), x.shape[-1]
    _kernel("rms_norm")(*_at(x, weight, y), x.numel() // d, d, eps, torch.get_num_threads())
    return y


@_implements("rms_norm_backward")
def _rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dx, d = torch.empty_like(x), x.shape[-1]
    _kernel("rms_norm_backward")(*_at(g, x, weight, dx), x.numel() // d, d, eps, torch.get_num_threads())
    return dx


class _NormSilu:
    """Forward and backward of norm_silu; either both kernels are used, or neither."""

    @staticmethod
    def forward(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        y = torch.empty_like(x)
        _kernel("norm_silu")(*_at(x, shift, weight, bias, y), *_NormSilu._sizes(x, groups, eps))
        return y

    @staticmethod
    def backward(
        g: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        dx = torch.empty_like(x)
        _kernel("norm_silu_backward")(*_at(g, x, shift, weight, bias, dx), *_NormSilu._sizes(x, groups, eps))
        return dx

    @staticmethod
    def _sizes(x: Tensor, groups: int, eps: float) -> tuple[int, int, int, int, float, int]:
        n, channels = x.shape[:2]
        return n, groups, channels // groups, x[0, 0].numel(), eps, torch.get_num_threads()


_implements("norm_silu", "norm_silu", "norm_silu_backward")(_NormSilu)


@_implements("dropout", "dropped")
def _dropout(x: Tensor, p: float, seed: int) -> Tensor:
    y, least = torch.empty_like(x), round(p * 2**32)
    words = seed & 0xFFFFFFFF, seed >> 32
    _kernel("dropped")(*_at(x, y), x.numel(), *words, least, 1 / (1 - p), torch.get_num_threads())
    return y


# -- DoRA scales, activations ------------------------------------------------------------------------------------------


def _takes_dora_scale(name: str) -> Callable[..., bool]:
    def takes(scale: Tensor, *tensors: Tensor) -> bool:
        is_usable = scale.dtype == torch.float32 and scale.is_contiguous()
        return is_usable and compiled.usable(name, *tensors) is not None

    return takes


@_implements(
    "dora_scale", "dora_scale", takes=_takes_dora_scale("dora_scale"), wants="contiguous bfloat16, float32 scale"
)
def _dora_scale(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty_like(y)
    _kernel("dora_scale")(*_at(y, scale, bias, out), *y.shape, torch.get_num_threads())
    return out


@_implements(
    "dora_scale_backward",
    "dora_scale_backward",
    takes=_takes_dora_scale("dora_scale_backward"),
    wants="contiguous bfloat16, float32 scale",
)
def _dora_scale_backward(g: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dy, d_scale = torch.empty_like(g), torch.empty_like(scale)
    _kernel("dora_scale_backward")(*_at(g, y, scale, dy, d_scale), *g.shape, torch.get_num_threads())
    return dy, d_scale


def _gate_function(name: str) -> Callable[[Tensor], Tensor]:
    def run(both: Tensor) -> Tensor:
        h = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
        width = h.shape[-1]
        _kernel(name)(*_at(both, h), h.numel() // width, width, torch.get_num_threads())
        return h

    return run


_implements("silu_gate")(_gate_function("silu_gate"))
_implements("geglu")(_gate_function("geglu"))


@_implements("silu_gate_backward")
def _silu_gate_backward(dh: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    d, h = torch.empty_like(both), torch.empty_like(dh)
    _kernel("silu_gate_backward")(*_at(dh, both, d, h), *h.shape, torch.get_num_threads())
    return d, h


@_implements("geglu_backward")
def _geglu_backward(dh: Tensor, both: Tensor) -> Tensor:
    d, f = torch.empty_like(both), dh.shape[-1]
    _kernel("geglu_backward")(*_at(dh, both, d), dh.numel() // f, f, torch.get_num_threads())
    return d


def _elementwise(name: str) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        result = torch.empty_like(tensors[0])
        _kernel(name)(*_at(*tensors, result), result.numel(), torch.get_num_threads())
        return result

    return run


for _name in ("gelu_tanh", "gelu_tanh_backward"):
    _implements(_name)(_elementwise(_name))


# -- attention ---------------------------------------------------------------------------------------------------------


@_implements("causal_softmax")
def _causal_softmax(
    scores: Tensor, batch: int, queries: int, per: int, keys: int, first_query: int, first_key: int, window: int
) -> Tensor:
    sizes = batch, queries, per, keys, first_query, first_key, window
    _kernel("causal_softmax")(scores.data_ptr(), *sizes, torch.get_num_threads())
    return scores


@_implements("softmax_backward")
def _softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    _kernel("softmax_backward")(*_at(p, dp), p.shape[0] * p.shape[1], p.shape[2], torch.get_num_threads())
    return dp


def _takes_tiles(*tensors: Tensor) -> bool:
    return all(
        t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.shape[-1] % 2 == 0 and t.stride(-1) == 1
        for t in tensors
    ) and compiled.has("attend", "attend_backward")


_HEADS_TOGETHER = "bfloat16, contiguous even last dimension"


@_implements("attend", "attend", "attend_backward", takes=_takes_tiles, wants=_HEADS_TOGETHER)
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    n, S, heads, d = q.shape
    out, lse = q.new_empty(n, S, heads, d), torch.empty(n, heads, S)
    sizes = n, heads, S, k.shape[1], d, d**-0.5, torch.get_num_threads()
    _kernel("attend")(*_at(q, k, v, out, lse), compiled.strides(q, k, v, out), *sizes)
    return out, lse


@_implements("attend_backward", "attend", "attend_backward", takes=_takes_tiles, wants=_HEADS_TOGETHER)
def _attend_backward(
    g: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    n, S, heads, d = q.shape
    tensors = q, k, v, out, g, dq, dk, dv
    sizes = n, heads, S, k.shape[1], d, d**-0.5, torch.get_num_threads()
    _kernel("attend_backward")(*_at(*tensors, lse), compiled.strides(*tensors), *sizes)


class _Tiles:
    """Forward and backward of the attention in tiles.c.

    `prefix` selects the float32 or the bfloat16 kernels. The output of tokens after the last row is zero."""

    def __init__(self, prefix: str) -> None:
        self.names = f"{prefix}rope_varlen_attention", f"{prefix}rope_varlen_attention_backward"

    def forward(
        self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, kv: int, settings: VarlenSettings
    ) -> tuple[Tensor, Tensor]:
        """Return (output (N, heads, dim), log Σ exp of the scores (N, heads) float32)."""
        n, heads, dim = qkv.shape[0], qkv.shape[1] - 2 * kv, qkv.shape[2]
        out, lse = qkv.new_empty(n, heads, dim), torch.empty(n, heads)
        out[int(settings.layout.starts[-1]) :].zero_()
        arguments = self._arguments(qkv, cos, sin, kv, settings)
        _kernel(self.names[0])(*arguments, *_at(out, lse), torch.get_num_threads())
        return out, lse

    def backward(
        self,
        g: Tensor,
        out: Tensor,
        lse: Tensor,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        kv: int,
        settings: VarlenSettings,
    ) -> Tensor:
        d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        d_qkv[int(settings.layout.starts[-1]) :].zero_()
        arguments = self._arguments(qkv, cos, sin, kv, settings)
        _kernel(self.names[1])(*_at(g, out, lse), *arguments, d_qkv.data_ptr(), torch.get_num_threads())
        return d_qkv

    @staticmethod
    def _arguments(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, kv: int, settings: VarlenSettings) -> list[Any]:
        per, starts = (qkv.shape[1] - 2 * kv) // kv, settings.layout.starts
        narrow = int(qkv.dtype == torch.bfloat16)
        sizes = (len(starts) - 1, kv, per, qkv.shape[2], settings.scale, settings.window or 0, narrow)
        return [qkv.data_ptr(), qkv.stride(0), *_at(cos, sin, starts), *sizes]


def _takes_rows_of(*dtypes: torch.dtype, names: tuple[str, ...]) -> Callable[..., bool]:
    def takes(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, *_: Any) -> bool:
        tables = [t for t in (cos, sin) if t is not None]
        flat = qkv.stride(2) == 1 and qkv.stride(1) == qkv.shape[2] and qkv.shape[2] % 2 == 0 and qkv.dtype in dtypes
        fits = flat and all(t.dtype == qkv.dtype and t.is_contiguous() for t in tables) and compiled.has(*names)
        # Without oneDNN, libtorch throws an exception for small bfloat16 products, which C cannot catch.
        return fits and (not names[0].startswith("narrow") or bool(torch.backends.mkldnn.enabled))  # type: ignore[attr-defined]

    return takes


def _tiles(
    name: str, prefix: str, *dtypes: torch.dtype, alternatives: tuple[Implementation, ...] = ()
) -> Implementation:
    run = _Tiles(prefix)
    wants = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} with contiguous heads"
    missing = lambda: compiled.why_missing(*run.names)  # noqa: E731
    return Implementation(run, _takes_rows_of(*dtypes, names=run.names), wants, missing, name, alternatives)


IMPLEMENTATIONS["rope_varlen_attention"] = _tiles(
    "tiles", "narrow_", torch.bfloat16, alternatives=(_tiles("tiles32", "", torch.bfloat16, torch.float32),)
)


# -- products in float32 -----------------------------------------------------------------------------------------------


def _takes_product(a: Tensor, b: Tensor, out: Tensor | None) -> bool:
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.dim() == 2 for t in (a, b))
    dtypes = {a.dtype, b.dtype} if out is None else {a.dtype, b.dtype, out.dtype}
    return plain and torch.bfloat16 in dtypes and dtypes <= {torch.bfloat16, torch.float32}


def _takes_blocks(a: Tensor, b: Tensor, out: Tensor | None) -> bool:
    return _takes_product(a, b, out) and compiled.has("float_product")


def _product_in_blocks(
    a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, add: bool, more: tuple[Tensor, Tensor] | None
) -> None:
    """Compute the op "product" with a kernel that widens one block at a time, which stays in the second-level cache."""
    c = out if out.stride(-1) == 1 or out.shape[-1] == 1 else out.contiguous()
    half = [int(t.dtype == torch.bfloat16) for t in (a, b, c)]
    bias = None if bias is None else bias.to(c.dtype).contiguous()
    factors = a.data_ptr(), *a.stride(), half[0], b.data_ptr(), *b.stride(), half[1]
    u, v = more or (None, None)
    low_rank = (None, None, 0, 0, 0) if u is None or v is None else (*_at(u, v), *v.stride(), len(v))
    sizes = *a.shape, b.shape[1]
    _kernel("float_product")(
        *factors, *low_rank, *_at(bias, c), c.stride(0), half[2], int(add), *sizes, torch.get_num_threads()
    )
    if c is not out:
        out.copy_(c)


_COLUMNS = 1 << 22
"""Maximum number of values of `b` that torch widens at a time."""


def _product_by_columns(
    a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, add: bool, more: tuple[Tensor, Tensor] | None
) -> None:
    """Compute the op "product" with torch, widening a few columns of `b` at a time."""
    a, step = a.float(), max(256, _COLUMNS // max(1, len(b)))
    for at in (slice(first, first + step) for first in range(0, b.shape[1], step)):
        part = a @ b[:, at].float()
        if more is not None:
            part.addmm_(more[0], more[1][:, at])
        if bias is not None:
            part += bias[at]
        if add:
            part += out[:, at]
        out[:, at] = part


_FACTORS = "matrices in bfloat16, or bfloat16 and float32"
IMPLEMENTATIONS["product"] = Implementation(
    _product_in_blocks,
    _takes_blocks,
    _FACTORS,
    lambda: compiled.why_missing("float_product"),
    "blocks",
    (Implementation(_product_by_columns, _takes_product, _FACTORS, lambda: "", "columns"),),
)


def _takes_conv(x: Tensor, weight: Tensor) -> bool:
    fits = weight.shape[2:] == (3, 3) and weight[0, 0].is_contiguous() and x.numel() > 0
    return fits and x.dtype == torch.bfloat16 == weight.dtype and x.is_contiguous() and compiled.has("conv3x3")


@_implements("conv3x3", takes=_takes_conv, wants="bfloat16, contiguous kernels")
def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, out: Tensor) -> None:
    """Write the convolution of x to the leading channels of `out`."""
    bias = None if bias is None else bias.contiguous()
    kernels = weight.data_ptr(), weight.stride(0), weight.stride(1), int(turned)
    sizes = out.stride(0), *x.shape[:2], len(weight), *x.shape[2:]
    _kernel("conv3x3")(x.data_ptr(), *kernels, *_at(bias, out), *sizes, torch.get_num_threads())


# -- products with a frozen weight -------------------------------------------------------------------------------------

_LEAST = 256
"""Minimum rows, columns and reduction length for which prepacking the weight pays off."""


def _takes_prepacked(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> bool:
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, weight))
    fits = plain and min(weight.shape) >= _LEAST and x.dtype in (torch.bfloat16, torch.float32)
    return fits and x.is_contiguous() and weight.dtype == x.dtype and reorders(x.dtype)


def _no_order(dtype: torch.dtype) -> str:
    return "" if reorders(dtype) else "this torch does not support oneDNN's packed order"


IMPLEMENTATIONS["prepacked_linear"] = Implementation(
    Reordered,
    _takes_prepacked,
    f"contiguous bfloat16 or float32, at least {_LEAST} rows and columns",
    lambda: _no_order(torch.float32),
    "onednn",
)


def _takes_int8(x: Tensor, codes: Tensor, bias: Tensor | None) -> bool:
    fits = not any(size % 16 for size in codes.shape) and max(codes.shape) <= _LONGEST_INT8
    return fits and compiled.usable("int8_product", x, *([] if bias is None else [bias])) is not None


_LONGEST_INT8 = 65_536
"""Maximum reduction length whose sums of 255 · 127 fit in 32 bits."""


@_implements(
    "int8_linear", "int8_product", takes=_takes_int8, wants="contiguous bfloat16, rows and columns a multiple of 16"
)
def _int8_linear(
    x: Tensor,
    codes: Tensor,
    factor: Tensor,
    column: Tensor,
    transposed: bool,
    outliers: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
) -> Tensor:
    (n, k), columns = x.shape, codes.shape[0 if transposed else 1]
    y, q = x.new_empty(n, columns), torch.empty((n + 7) * k, dtype=torch.int8)
    which, weights = outliers or (None, None)
    weight = codes.data_ptr(), codes.shape[1], int(transposed), columns, column.data_ptr()
    kept = 0 if which is None else len(which)
    last = kept, *_at(weights, bias, q, y), torch.get_num_threads()
    _kernel("int8_product")(x.data_ptr(), n, k, factor.data_ptr(), *weight, *_at(which), *last)
    return y


def _takes_amx(x: Tensor, *_: Any) -> bool:
    return compiled.usable("amx_panel_product", x) is not None


_WITH_AMX = Implementation(
    int8_linear_in_torch, _takes_amx, "bfloat16", lambda: compiled.why_missing("amx_panel_product"), "onednn"
)
IMPLEMENTATIONS["int8_linear"] = IMPLEMENTATIONS["int8_linear"]._replace(alternatives=(_WITH_AMX,))


# -- low-rank products -------------------------------------------------------------------------------------------------

_LOW_RANK = ("lora_forward", "lora_backward", "lora_weight_gradients")


def _takes_low_rank(x: Tensor, y: Tensor, products: Sequence[LowRank]) -> bool:
    if x.numel() > SMALL_INPUT or x.shape[-1] % 16 or y.shape[-1] % 16 or compiled.usable(_LOW_RANK, x, y) is None:
        return False
    return all(
        t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device and not p.first % 16 and not p.last % 16
        for p in products
        for t in (p.A, p.B)
    )


class CompiledLowRank:
    """ops.linear.LowRankProducts in three kernel calls, which cast and stack internally.

    The ranks of u and du are padded to multiples of 16. For a small image with a few hundred tokens, calling
    a dozen torch operations would take several times as long as these three calls."""

    def __init__(self, products: Sequence[LowRank], rows: int, dtype: torch.dtype) -> None:
        self.count, self.factors = len(products), [(p.A, p.B) for p in products]
        self.structs = compiled.low_rank_structs(products)
        self.ranks = sum(-(-len(p.A) // 16) * 16 for p in products)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u = x.new_empty(len(x), self.ranks)
        sizes = len(x), x.shape[1], y.shape[1], torch.get_num_threads()
        _kernel("lora_forward")(self.structs, self.count, *_at(x, y, u), *sizes)
        return u

    def backward(self, g: Tensor, dx: Tensor | None) -> Tensor:
        du = g.new_empty(len(g), self.ranks)
        sizes = len(g), self.factors[0][0].shape[1], g.shape[1], torch.get_num_threads()
        _kernel("lora_backward")(self.structs, self.count, *_at(g, du, dx), *sizes)
        return du

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        out = [torch.empty_like(t) for pair in self.factors for t in pair]
        dA, dB = ((ctypes.c_void_p * self.count)(*_at(*out[offset::2])) for offset in (0, 1))
        sizes = len(g), x.shape[1], g.shape[1], torch.get_num_threads()
        _kernel("lora_weight_gradients")(self.structs, self.count, *_at(g, x, u, du), dA, dB, *sizes)
        return out


_implements(
    "low_rank",
    *_LOW_RANK,
    takes=_takes_low_rank,
    wants=f"contiguous bfloat16 up to {SMALL_INPUT:,} elements, columns a multiple of 16, float32 A and B",
)(CompiledLowRank)


# -- loss --------------------------------------------------------------------------------------------------------------


def _takes_logits(logits: Tensor) -> bool:
    fits = logits.dtype in (torch.bfloat16, torch.float32) and logits.device.type == "cpu"
    return fits and logits.is_contiguous() and compiled.has("token_nll")


@_implements("token_nll", takes=_takes_logits, wants="contiguous bfloat16 or float32")
def _token_nll(logits: Tensor, targets: Tensor, gradient: bool, correct: Tensor | None) -> Tensor:
    nll, half = torch.empty(len(logits), dtype=torch.float32), int(logits.dtype == torch.bfloat16)
    sizes = *logits.shape, int(gradient), torch.get_num_threads()
    _kernel("token_nll")(logits.data_ptr(), half, *_at(targets, nll, correct), *sizes)
    return nll


# -- quantized weights -------------------------------------------------------------------------------------------------


def _takes_bytes(name: str) -> Callable[..., bool]:
    def takes(stored: Tensor, dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float32) and stored.is_contiguous() and compiled.has(name)

    return takes


def _quantized(op: str, name: str) -> Callable[[Any], Any]:
    return _implements(op, name, takes=_takes_bytes(name), wants="contiguous, bfloat16 or float32")


@_quantized("dequantize_blocks4", "blocks4_dense")
def _dequantize_blocks4(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    mean: Tensor | None,
    map8: Tensor,
    table: Tensor,
    start: int,
    count: int,
    block: int,
    nested: int,
    out: Tensor,
) -> None:
    doubly = absmax2 is not None and mean is not None
    constants = _at(absmax2, absmax, map8) if doubly else _at(absmax, None, None)
    _kernel("blocks4_dense")(
        *(packed.data_ptr(), *constants, float(mean) if mean is not None else 0.0, table.data_ptr()),
        *(start, count, block, nested),
        *(out.data_ptr(), int(out.dtype == torch.float32), torch.get_num_threads()),
    )


@_quantized("quantize_blocks4", "blocks4_quantize")
def _quantize_blocks4(
    packed: Tensor, absmax: Tensor, weight: Tensor, bounds: Tensor, order: Tensor, block: int
) -> None:
    _kernel("blocks4_quantize")(
        weight.data_ptr(),
        int(weight.dtype == torch.float32),
        *_at(bounds, order),
        weight.numel(),
        block,
        *_at(packed, absmax),
        torch.get_num_threads(),
    )


@_quantized("dequantize_rows8", "rows8_dense")
def _dequantize_rows8(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    single = int(out.dtype == torch.float32)
    _kernel("rows8_dense")(*_at(codes, absmax), *codes.shape, out.data_ptr(), single, torch.get_num_threads())


_GGML = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
"""Block types that quantized.c supports, and ggml's number for each type."""


def _takes_ggml(raw: Tensor, dtype: torch.dtype, kind: str) -> bool:
    return kind in _GGML and _takes_bytes("ggml_dense")(raw, dtype)


@_implements("dequantize_ggml", "ggml_dense", takes=_takes_ggml, wants=", ".join(_GGML))
def _dequantize_ggml(raw: Tensor, kind: str, out: Tensor) -> None:
    single = int(out.dtype == torch.float32)
    _kernel("ggml_dense")(_GGML[kind], raw.data_ptr(), raw.numel(), out.data_ptr(), single, torch.get_num_threads())


# -- serving -----------------------------------------------------------------------------------------------------------


def _takes_rows(x: Tensor, y: Tensor) -> bool:
    return x.shape[1] % 2 == 0 and compiled.usable("lora_rows", x, y) is not None


@_implements("rows_low_rank", "lora_rows", takes=_takes_rows, wants="contiguous bfloat16, even columns")
def _rows_low_rank(x: Tensor, y: Tensor, pointers: Sequence[int]) -> None:
    """Add each row's low-rank products to y.

    pointers: the rows and adapters, in the format that serving.c reads."""
    at = x.data_ptr(), x.shape[1], y.data_ptr(), y.shape[1]
    _kernel("lora_rows")(*at, *pointers, torch.get_num_threads())


def _product_of_panels(kernel: str, name: str, *alternatives: Implementation) -> Implementation:
    def takes(probe: Tensor, bits: int) -> bool:
        return compiled.usable(kernel, probe) is not None

    return Implementation(kernel, takes, "bfloat16", lambda: compiled.why_missing(kernel), name, alternatives)


IMPLEMENTATIONS["panel_linear"] = _product_of_panels(
    "panel_product", "compiled", _product_of_panels("amx_panel_product", "amx")
)
"""For this op, `run` is a kernel's name; a packed weight stores the name."""


def _takes_panels(probe: Tensor) -> bool:
    return compiled.usable("panel_product", probe) is not None


def _takes_reordered(probe: Tensor) -> bool:
    return probe.dtype == torch.bfloat16 and reorders(probe.dtype)


IMPLEMENTATIONS["weight_layout"] = Implementation(
    Panels.from_weight,
    _takes_panels,
    "bfloat16",
    lambda: compiled.why_missing("panel_product"),
    "panels",
    (Implementation(Reordered.from_weight, _takes_reordered, "bfloat16", lambda: _no_order(torch.bfloat16), "onednn"),),
)
"""For this op, `run` packs a weight."""
