"""Self-test: every compiled kernel against torch's operations in float64.

Runs once per build on the target processor, in a subprocess (build.py), so that a crash ends only the
subprocess. A case runs ops of this package twice on the same numbers: in the kernels' dtypes, and in
float64, which only the references take. The results must agree. Uninitialized memory is filled with NaN,
so that a kernel which writes nothing is detected. Sizes are not multiples of any vector length.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import attention, linear, loss, mlp, norms
from veneer.ops.cpu import compiled
from veneer.ops.cpu.compiled import Kernels, bound
from veneer.ops.dispatch import override_ops
from veneer.ops.dropout import Dropout
from veneer.ops.lowrank import LowRank
from veneer.ops.quantization_formats import GgmlBlocks, Groups, Rows8, to_format
from veneer.ops.weight_panels import Panels

_BF16, _F32, _F64 = torch.bfloat16, torch.float32, torch.float64
_NEAR = {_BF16: 2**-6, _F32: 1e-4}
"""Largest error, as a share of the largest value of a result, by the dtype of a case."""


class Draw:
    """Random numbers of a case, the same in every dtype, rounded to bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.exact = dtype, dtype == _F64
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).bfloat16().to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """Return random numbers in at least float32."""
        return self(*shape).to(torch.promote_types(self.dtype, _F32))

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def gradients(self, run: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        """Return run(*given), and the gradients of all inputs."""
        given = tuple(t.detach().requires_grad_() for t in given)
        made = run(*given)
        return [made, *torch.autograd.grad(made, given, self(*made.shape))]


class Case(NamedTuple):
    """One comparison.

    run: returns the results to compare.
    kernels: the kernels it calls; if the case fails, none of them is used."""

    run: Callable[[Draw], Sequence[Tensor]]
    kernels: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


CASES: list[Case] = []


def _case(*kernels: str, dtypes: tuple[torch.dtype, ...] = (_BF16,)) -> Callable[[Any], Any]:
    def put(run: Callable[[Draw], Sequence[Tensor]]) -> Callable[[Draw], Sequence[Tensor]]:
        CASES.append(Case(run, kernels, dtypes))
        return run

    return put


@contextmanager
def _by(library: Kernels | None) -> Iterator[None]:
    """Run ops with these kernels, and fill uninitialized memory with NaN."""
    before, strict = compiled.kernels, torch.are_deterministic_algorithms_enabled()
    compiled.kernels = lambda: library  # type: ignore[assignment]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        compiled.kernels = before
        torch.use_deterministic_algorithms(strict)


def _library() -> Kernels:
    library = compiled.kernels()
    assert library is not None
    return library


def wrong(library: Kernels, case: Case) -> str:
    """Return what is wrong with the kernels of a case; "" if nothing is."""
    with _by(library):
        want = [t.detach().double() for t in case.run(Draw(_F64))]
        for dtype in case.dtypes:
            try:
                got = [t.detach().double() for t in case.run(Draw(dtype))]
            except (MemoryError, IndexError, AttributeError, TypeError) as error:
                return f"{type(error).__name__}: {error}"
            for one, exact in zip(got, want, strict=True):
                least = _NEAR[dtype] * exact.abs().amax() if exact.numel() else 0.0
                if one.shape != exact.shape or not bool(((one - exact).abs() <= least).all()):
                    return "disagrees with torch on this machine"
    return ""


def run_checks(arguments: list[str]) -> None:
    """Print a line of JSON before and after each case. `arguments`: PATH SKIPPED…

    Cases run if the library has their kernels and none is skipped."""
    path, *skipped = arguments
    library = bound(path, skipped)
    for case in CASES:
        if library.has(*case.kernels):
            print(json.dumps({"begins": case.kernels}), flush=True)
            print(json.dumps({"ended": case.kernels, "wrong": wrong(library, case)}), flush=True)


@_case("use_threads")
def _use_threads(draw: Draw) -> list[Tensor]:
    """Check that torch and the kernels share one OpenMP."""
    before = torch.get_num_threads()
    set_threads = torch.set_num_threads if draw.exact else _library().use_threads
    set_threads(3)
    now = torch.get_num_threads()
    set_threads(before)
    return [torch.tensor([now, torch.get_num_threads()])]


@_case("stay", "meet_asleep")
def _stay(draw: Draw) -> list[Tensor]:
    """Check the calling thread's affinity and how threads wait; both are restored."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    before, was = sorted(os.sched_getaffinity(0)), torch.tensor([0, 1], dtype=torch.int32)
    if draw.exact:
        return [torch.tensor(before[-1:]), torch.tensor(before), was]
    library, asleep, seen = _library(), torch.full((3,), -1, dtype=torch.int32), list[Tensor]()
    for processors in (before[-1:], before):
        library.stay((ctypes.c_int * len(processors))(*processors), len(processors), 2)
        seen.append(torch.tensor(sorted(os.sched_getaffinity(0))))
    for i, wanted in enumerate((0, 1, 0)):
        library.meet_asleep(wanted, asleep[i:].data_ptr())
    return [*seen, asleep[1:]]


# -- a training step ---------------------------------------------------------------------------------------------------


@_case("rms_norm", "rms_norm_backward")
def _rms_norm(draw: Draw) -> list[Tensor]:
    w = draw(74)
    return draw.gradients(lambda x: norms.rms_norm(x, w, 1e-5), draw(7, 74))


@_case("norm_silu", "norm_silu_backward")
def _norm_silu(draw: Draw) -> list[Tensor]:
    w, b, made = draw(6), draw(6), []
    for shift in (None, draw(2, 6)):
        made += draw.gradients(lambda x, shift=shift: norms.norm_silu(x, shift, w, b, 3, 1e-5), draw(2, 6, 37))
    return made


@_case("dropped")
def _dropped(draw: Draw) -> list[Tensor]:
    return [Dropout(0.25, 0x123456789E3779B9)(draw(1003))]


@_case("dora_scale", "dora_scale_backward")
def _dora_scale(draw: Draw) -> list[Tensor]:
    """With and without a bias, in a layer whose low-rank products no kernel takes."""
    W, made = draw(150, 23) / 4, list[Tensor]()
    for b in (None, draw(150)):

        def run(x: Tensor, A: Tensor, B: Tensor, scale: Tensor, b: Tensor | None = b) -> Tensor:
            return linear.linear(x, linear.LinearMap(W, b, (LowRank(A, B),), scale))

        made += draw.gradients(run, draw(5, 23), draw.wide(4, 23) / 4, draw.wide(150, 4) / 4, draw.wide(150))
    return made


@_case("silu_gate", "silu_gate_backward")
def _silu_gate(draw: Draw) -> list[Tensor]:
    """Separately, and in a whole MLP that recomputes its inner values in backward."""
    up, down = linear.LinearMap(draw(74, 23) / 4), draw(9, 37) / 4

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return mlp.gated_mlp(x, up, linear.LinearMap(down, None, (LowRank(A, B),)))

    factors = draw.wide(4, 37) / 4, draw.wide(9, 4)
    return [*draw.gradients(mlp.swiglu, draw(5, 74)), *draw.gradients(run, draw(5, 23), *factors)]


@_case("geglu", "geglu_backward")
def _geglu(draw: Draw) -> list[Tensor]:
    return draw.gradients(mlp.geglu, draw(5, 2 * 37))


@_case("gelu_tanh", "gelu_tanh_backward")
def _gelu_tanh(draw: Draw) -> list[Tensor]:
    return draw.gradients(mlp.gelu_tanh, draw(203))


def _attended(draw: Draw, name: str) -> list[Tensor]:
    """Rows of several lengths, six heads over two key heads, of an odd width."""
    settings, angle = attention.VarlenSettings(attention.RowLayout([70, 1, 33], idle=2), 0.3), draw.wide(106, 9)
    cos, sin = angle.cos().bfloat16().to(draw.dtype), angle.sin().bfloat16().to(draw.dtype)
    with override_ops(rope_varlen_attention=name):
        made = draw.gradients(
            lambda qkv: attention.rope_varlen_attention(qkv, cos, sin, 2, settings), draw(106, 10, 18)
        )
        given, narrow = (draw(106, 6, 18), draw(106, 2, 18), draw(106, 2, 18)), settings._replace(window=20)
        made += draw.gradients(lambda q, k, v: attention.varlen_attention(q, k, v, narrow), *given)
    return made


@_case("rope_varlen_attention", "rope_varlen_attention_backward", dtypes=(_BF16, _F32))
def _attended_in_tiles32(draw: Draw) -> list[Tensor]:
    return _attended(draw, "tiles32")


@_case("narrow_rope_varlen_attention", "narrow_rope_varlen_attention_backward")
def _attended_in_tiles(draw: Draw) -> list[Tensor]:
    return _attended(draw, "tiles")


@_case("attend", "attend_backward")
def _attend(draw: Draw) -> list[Tensor]:
    return draw.gradients(attention.cross_attention, draw(2, 70, 3, 40), draw(2, 300, 3, 40), draw(2, 300, 3, 40))


@_case("causal_softmax", "softmax_backward")
def _kept_probabilities(draw: Draw) -> list[Tensor]:
    with override_ops(attend="torch"):
        made: list[Tensor] = _attend(draw)
    return made


@_case("token_nll", dtypes=(_BF16, _F32))
def _token_nll(draw: Draw) -> list[Tensor]:
    """Logits that an identity head passes through unchanged."""
    targets, head = torch.tensor([0, 2074, -100, 1033, 7, 2074]), torch.eye(2075, dtype=draw.dtype)
    logits, right = 3 * draw(6, 2075), torch.zeros(6, dtype=torch.bool)
    logits[3, 1033] = 40
    made = draw.gradients(lambda x: loss.token_nll(x, head, targets), logits)
    return [*made, loss.token_nll(logits, head, targets, right=right), right]


@_case("lora_forward", "lora_backward", "lora_weight_gradients")
def _low_rank(draw: Draw) -> list[Tensor]:
    """Two pairs of ranks 5 and 16 on columns 0 … 32 and 32 … 112, over 48 inputs."""
    W = draw(112, 48) / 8

    def run(x: Tensor, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        return linear.linear(x, linear.LinearMap(W, None, (LowRank(A, B, 0.5), LowRank(A2, B2, 2.0, first=32))))

    factors = draw.wide(5, 48) / 4, draw.wide(32, 5), draw.wide(16, 48) / 4, draw.wide(80, 16)
    return draw.gradients(run, draw(197, 48), *factors)


# -- quantized weights -------------------------------------------------------------------------------------------------


@_case("blocks4_dense", "blocks4_quantize", dtypes=(_BF16, _F32))
def _blocks4(draw: Draw) -> list[Tensor]:
    made = list[Tensor]()
    for kind, double in (("nf4", True), ("fp4", False)):
        stored = to_format(draw(35, 74), kind, double)
        made += [*stored.tensors().values(), stored.dense(draw.dtype, 3, 30)]
    return made


_GGML = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
"""Bytes per block."""


def _ggml_blocks(draw: Draw, kind: str) -> GgmlBlocks:
    """Return a weight of three rows of two blocks with finite scales."""
    raw = draw.whole(0, 256, 6, _GGML[kind], dtype=torch.uint8)
    for at in [208] if kind == "Q6_K" else [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]:
        raw[:, at : at + 2] = draw(6, 1).half().view(torch.uint8)
    return GgmlBlocks(kind, (3, 2 * (256 if kind.endswith("K") else 32)), raw.view(3, -1))


@_case("ggml_dense", dtypes=(_BF16, _F32))
def _ggml_dense(draw: Draw) -> list[Tensor]:
    stored = [_ggml_blocks(draw, kind) for kind in _GGML]
    if draw.exact:
        return [groups.dense() for each in stored if (groups := each.groups(0, 3)) is not None]
    return [each.dense(draw.dtype, 0, 3) for each in stored]


@_case("rows8_dense", dtypes=(_BF16, _F32))
def _rows8_dense(draw: Draw) -> list[Tensor]:
    codes, absmax = draw.whole(-127, 128, 5, 37, dtype=torch.int8), draw.wide(5).float().abs()
    return [Rows8((5, 37), codes, absmax).dense(draw.dtype, 0, 5)]


# -- serving, with AVX512-BF16 -----------------------------------------------------------------------------------------


def _panel_products(draw: Draw, name: str) -> list[Tensor]:
    """All kinds of weights, with partial tiles of inputs.

    One, two and more tiles of rows."""
    made = list[Tensor]()
    wide = [Panels.of(draw(80, n).bfloat16() / 8) for n in (200, 320)]
    codes = []
    for groups, bits, zeros in ((1, 8, False), (20, 8, False), (10, 8, True), (40, 4, False)):
        q = draw.whole(
            *((-127, 128) if bits == 8 else (0, 16)), 80, 320, dtype=torch.int8 if bits == 8 else torch.uint8
        )
        scales, zero = draw.wide(80, groups).float().abs() / 100, draw.wide(80, groups).float() if zeros else None
        codes.append(Groups(q, scales, zero, None if bits == 8 else torch.arange(-8.0, 8.0)))
    with override_ops(panel_linear=name):
        panels = [*wide, *map(Panels.of_groups, codes), Panels.int4(draw(80, 320).bfloat16())]
    for own in panels:
        for rows in (1, 3, 17, 70):
            x, y, b = draw(rows, own.columns), draw(rows, 80), draw(80)
            if draw.exact:
                product = x @ own.dense().double().t()
                made += [product + b, y + product]
                continue
            onto = y.clone()
            own.add_onto(onto, x)
            made += [own(x, b), onto]
    return made


@_case("panel_product")
def _panel_product(draw: Draw) -> list[Tensor]:
    return _panel_products(draw, "compiled")


@_case("amx_panel_product")
def _amx_panel_product(draw: Draw) -> list[Tensor]:
    return _panel_products(draw, "amx")


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


@_case("lora_rows")
def _lora_rows(draw: Draw) -> list[Tensor]:
    """Two adapters of rank 16, on five rows and two; one row has both."""
    x, y, strengths = draw(7, 32), draw(7, 40), draw.wide(7).float()
    pairs = [(draw(16, 32) / 8, draw(40, 16) / 8) for _ in range(2)]
    rows, starts = torch.tensor([0, 2, 5, 6, 1, 2, 3]), torch.tensor([0, 5, 7])
    if draw.exact:
        for (A, B), first, end in zip(pairs, (0, 5), (5, 7), strict=True):
            for i in range(first, end):
                y[rows[i]] += strengths[i] * (B @ (A @ x[rows[i]]))
        return [y]
    laid = [
        (A.view(1, 16, -1, 2).permute(0, 2, 1, 3).contiguous(), B.view(40, -1, 2).permute(1, 0, 2).contiguous())
        for A, B in pairs
    ]
    table, u = torch.zeros(2, 17, dtype=torch.int64), torch.empty(7, 16, dtype=_BF16)
    for record, (A, B) in zip(table, laid, strict=True):
        record[:7] = torch.tensor([A.data_ptr(), 16, B.data_ptr(), 0, 40, 0, 16])
    own = [*_at(table), 2, *_at(starts, rows, strengths, u), 16]
    _library().lora_rows(x.data_ptr(), 32, y.data_ptr(), 40, *own, 2)
    return [y]


@_case("store_rows", "rope_and_cache", "paged_attend", "decode")
def _paged(draw: Draw) -> list[Tensor]:
    """Store and attend in pages.

    Two sequences of 35 and 20 tokens, in blocks 4, 1, 3 and 2, 5.

    Four query heads and two key heads of 32: rotated and stored, stored again, and the last 7 tokens and
    the last token attended to all. `decode`, which runs a whole layer, is tested against the layers when
    serving a base (serve/forward/runner.py)."""
    heads, kv, d, lengths, tables = 4, 2, 32, (35, 20), torch.tensor([[4, 1, 3], [2, 5, 0]])
    qkv, weights, angle = draw(55, 8 * d), [draw(d), draw(d)], draw.wide(40, d // 2)
    positions = torch.cat([torch.arange(n) for n in lengths])
    last = torch.cat([torch.arange(28, 35), torch.tensor([54])])
    if draw.exact:
        q, k, v = qkv.view(55, 8, d).split([heads, kv, kv], 1)
        q, k = (
            attention.rotate(F.rms_norm(t, (d,), w, 1e-5), angle.cos()[positions], angle.sin()[positions])
            for t, w in zip((q, k), weights, strict=True)
        )
        outs = []
        for one, keys, values in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
            keys, values = (t.repeat_interleave(2, 1).transpose(0, 1) for t in (keys, values))
            scores = 2 * torch.tanh(0.25 * one.transpose(0, 1) @ keys.mT / 2)
            hidden = torch.ones(len(one), len(one), dtype=torch.bool).triu(1)
            outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        same = torch.zeros(6, kv, 16 * d)
        return [torch.cat([q, k, v], 1).flatten(1), torch.cat(outs).flatten(1)[last], same, same]
    library, starts, cos, sin = _library(), torch.tensor([0, 35, 55]), angle.cos(), angle.sin()
    slots = torch.cat([tables[i][torch.arange(n) // 16] * 16 + torch.arange(n) % 16 for i, n in enumerate(lengths)])
    K, V, K2, V2 = (torch.zeros(6, kv, 16 * d, dtype=_BF16) for _ in range(4))
    where = _at(positions, slots, starts)
    library.rope_and_cache(qkv.data_ptr(), heads, kv, d, *_at(cos, sin, *weights), 1e-5, *where, 2, *_at(K, V), 2)
    k, v = (qkv[:, first : first + kv * d].contiguous() for first in (heads * d, (heads + kv) * d))
    library.store_rows(*_at(k), kv * d, *_at(v), kv * d, *_at(slots, starts), 2, kv, d, *_at(K2, V2), 2)
    q, out, ends = qkv[last].contiguous(), torch.empty(8, heads * d, dtype=_BF16), torch.tensor([0, 7, 8])
    sizes, own = (heads, kv, d), positions[last].contiguous()
    pages = [*_at(own, ends), 2, *_at(tables), 3, *_at(K, V)]
    library.paged_attend(q.data_ptr(), 8 * d, out.data_ptr(), *sizes, *pages, 0.25, 2.0, 0, 35, 2)
    return [qkv, out, K - K2, V - V2]
