"""Self-test: compares every compiled kernel with torch's operations in float64.

Runs once per build on the target processor, in a subprocess (build.py), so that a crash ends only the
subprocess. Each case runs ops of this package on the same numbers in the kernels' dtypes and in float64. No
kernel supports float64, so the float64 run uses the references. The results must agree. Uninitialized memory
is filled with NaN, so that missing writes are detected. Sizes are not multiples of any vector length.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import attention, conv, linear, loss, mlp, norms, products
from veneer.ops.cpu import compiled
from veneer.ops.cpu.compiled import Kernels, load_library
from veneer.ops.dispatch import override_ops
from veneer.ops.dropout import Dropout
from veneer.ops.int8 import Int8Weight
from veneer.ops.lowrank import LowRank
from veneer.ops.quantization_formats import GgmlBlocks, Groups, Rows8, to_format
from veneer.ops.weight_panels import Panels

_BF16, _F32, _F64 = torch.bfloat16, torch.float32, torch.float64
_NEAR = {_BF16: 2**-6, _F32: 1e-4}
"""Maximum error by dtype, relative to the largest value of a result."""


class RandomTensors:
    """Random tensors for a case, with the same values in every dtype.

    The values are rounded to bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.exact = dtype, dtype == _F64
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).bfloat16().to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """Return random numbers in float32 or wider."""
        return self(*shape).to(torch.promote_types(self.dtype, _F32))

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def gradients(self, run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        """Return run(*inputs), followed by the gradients of all inputs."""
        inputs = tuple(t.detach().requires_grad_() for t in inputs)
        output = run(*inputs)
        return [output, *torch.autograd.grad(output, inputs, self(*output.shape))]


class Case(NamedTuple):
    """A comparison of kernels with their references.

    run: returns the results to compare.
    kernels: the kernels that `run` calls; if the case fails, all of them are rejected."""

    run: Callable[[RandomTensors], Sequence[Tensor]]
    kernels: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


CASES: list[Case] = []


def _case(*kernels: str, dtypes: tuple[torch.dtype, ...] = (_BF16,)) -> Callable[[Any], Any]:
    def register(run: Callable[[RandomTensors], Sequence[Tensor]]) -> Callable[[RandomTensors], Sequence[Tensor]]:
        CASES.append(Case(run, kernels, dtypes))
        return run

    return register


@contextmanager
def _with_library(library: Kernels | None) -> Iterator[None]:
    """Run the ops inside a with-block with this library, and fill uninitialized memory with NaN."""
    previous, strict = compiled.kernels, torch.are_deterministic_algorithms_enabled()
    compiled.kernels = lambda: library  # type: ignore[assignment]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        compiled.kernels = previous
        torch.use_deterministic_algorithms(strict)


def _library() -> Kernels:
    library = compiled.kernels()
    assert library is not None
    return library


def wrong(library: Kernels, case: Case) -> str:
    """Return a description of a case's failure, or "" if the case passes."""
    with _with_library(library):
        want = [t.detach().double() for t in case.run(RandomTensors(_F64))]
        for dtype in case.dtypes:
            try:
                got = [t.detach().double() for t in case.run(RandomTensors(dtype))]
            except (MemoryError, IndexError, AttributeError, TypeError) as error:
                return f"{type(error).__name__}: {error}"
            for result, exact in zip(got, want, strict=True):
                least = _NEAR[dtype] * exact.abs().amax() if exact.numel() else 0.0
                if result.shape != exact.shape or not bool(((result - exact).abs() <= least).all()):
                    return "disagrees with torch on this machine"
    return ""


def run_checks(arguments: list[str]) -> None:
    """Run all cases, and print a line of JSON before and after each case.

    Skips cases with kernels that the library lacks.

    arguments: path of the library, then the names of kernels to skip."""
    path, *skipped = arguments
    library = load_library(path, skipped)
    for case in CASES:
        if library.has(*case.kernels):
            print(json.dumps({"begins": case.kernels}), flush=True)
            print(json.dumps({"ended": case.kernels, "wrong": wrong(library, case)}), flush=True)


@_case("use_threads")
def _use_threads(random: RandomTensors) -> list[Tensor]:
    """Check that torch and the kernels use the same OpenMP runtime."""
    previous = torch.get_num_threads()
    set_threads = torch.set_num_threads if random.exact else _library().use_threads
    set_threads(3)
    now = torch.get_num_threads()
    set_threads(previous)
    return [torch.tensor([now, torch.get_num_threads()])]


@_case("stay", "meet_asleep")
def _stay(random: RandomTensors) -> list[Tensor]:
    """Check that the kernels set and restore which processors threads run on, and how threads wait."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed, was = sorted(os.sched_getaffinity(0)), torch.tensor([0, 1], dtype=torch.int32)
    if random.exact:
        return [torch.tensor(allowed[-1:]), torch.tensor(allowed), was]
    library, asleep, observed = _library(), torch.full((3,), -1, dtype=torch.int32), list[Tensor]()
    for processors in (allowed[-1:], allowed):
        library.stay((ctypes.c_int * len(processors))(*processors), len(processors), 2)
        observed.append(torch.tensor(sorted(os.sched_getaffinity(0))))
    for i, asleep_value in enumerate((0, 1, 0)):
        library.meet_asleep(asleep_value, asleep[i:].data_ptr())
    return [*observed, asleep[1:]]


# -- a training step ---------------------------------------------------------------------------------------------------


@_case("rms_norm", "rms_norm_backward")
def _rms_norm(random: RandomTensors) -> list[Tensor]:
    w = random(74)
    return random.gradients(lambda x: norms.rms_norm(x, w, 1e-5), random(7, 74))


@_case("norm_silu", "norm_silu_backward")
def _norm_silu(random: RandomTensors) -> list[Tensor]:
    w, b, results = random(6), random(6), []
    for shift in (None, random(2, 6)):
        results += random.gradients(lambda x, shift=shift: norms.norm_silu(x, shift, w, b, 3, 1e-5), random(2, 6, 37))
    return results


@_case("dropped")
def _dropped(random: RandomTensors) -> list[Tensor]:
    return [Dropout(0.25, 0x123456789E3779B9)(random(1003))]


@_case("dora_scale", "dora_scale_backward")
def _dora_scale(random: RandomTensors) -> list[Tensor]:
    """Scale the outputs of a layer with and without a bias.

    No kernel supports the low-rank products of this layer."""
    W, results = random(150, 23) / 4, list[Tensor]()
    for b in (None, random(150)):

        def run(x: Tensor, A: Tensor, B: Tensor, scale: Tensor, b: Tensor | None = b) -> Tensor:
            return linear.linear(x, linear.LinearMap(W, b, (LowRank(A, B),), scale))

        results += random.gradients(
            run, random(5, 23), random.wide(4, 23) / 4, random.wide(150, 4) / 4, random.wide(150)
        )
    return results


@_case("silu_gate", "silu_gate_backward")
def _silu_gate(random: RandomTensors) -> list[Tensor]:
    """Run the activation alone, and an MLP that recomputes the activation in backward."""
    up, down = linear.LinearMap(random(74, 23) / 4), random(9, 37) / 4

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return mlp.gated_mlp(x, up, linear.LinearMap(down, None, (LowRank(A, B),)))

    factors = random.wide(4, 37) / 4, random.wide(9, 4)
    return [*random.gradients(mlp.swiglu, random(5, 74)), *random.gradients(run, random(5, 23), *factors)]


@_case("geglu", "geglu_backward")
def _geglu(random: RandomTensors) -> list[Tensor]:
    return random.gradients(mlp.geglu, random(5, 2 * 37))


@_case("gelu_tanh", "gelu_tanh_backward")
def _gelu_tanh(random: RandomTensors) -> list[Tensor]:
    return random.gradients(mlp.gelu_tanh, random(203))


def _attended(random: RandomTensors, name: str) -> list[Tensor]:
    """Attend within rows of several lengths, with 6 query heads and 2 key heads of size 18."""
    settings, angle = attention.VarlenSettings(attention.RowLayout([70, 1, 33], idle=2), 0.3), random.wide(106, 9)
    cos, sin = angle.cos().bfloat16().to(random.dtype), angle.sin().bfloat16().to(random.dtype)
    with override_ops(rope_varlen_attention=name):
        results = random.gradients(
            lambda qkv: attention.rope_varlen_attention(qkv, cos, sin, 2, settings), random(106, 10, 18)
        )
        inputs, narrow = (random(106, 6, 18), random(106, 2, 18), random(106, 2, 18)), settings._replace(window=20)
        results += random.gradients(lambda q, k, v: attention.varlen_attention(q, k, v, narrow), *inputs)
    return results


@_case("rope_varlen_attention", "rope_varlen_attention_backward", dtypes=(_BF16, _F32))
def _attended_in_tiles32(random: RandomTensors) -> list[Tensor]:
    return _attended(random, "tiles32")


@_case("narrow_rope_varlen_attention", "narrow_rope_varlen_attention_backward")
def _attended_in_tiles(random: RandomTensors) -> list[Tensor]:
    return _attended(random, "tiles")


@_case("attend", "attend_backward")
def _attend(random: RandomTensors) -> list[Tensor]:
    return random.gradients(
        attention.cross_attention, random(2, 70, 3, 40), random(2, 300, 3, 40), random(2, 300, 3, 40)
    )


@_case("causal_softmax", "softmax_backward")
def _kept_probabilities(random: RandomTensors) -> list[Tensor]:
    with override_ops(attend="torch"):
        results: list[Tensor] = _attend(random)
    return results


@_case("float_product", dtypes=(_BF16,))
def _product(random: RandomTensors) -> list[Tensor]:
    """Multiply by weights and by their transposes, with partial blocks and two parts of the summed dimension."""
    results = list[Tensor]()
    with override_ops(product="blocks"):
        for n, k, m in ((197, 74, 150), (35, 4200, 33)):
            x, W, b = random(n, k) / 8, random(m, k) / 8, random(m)
            u, v = random.wide(n, 24), random.wide(24, m) / 8
            v[:9, :70] = v[5:, 70:] = 0
            y = products.product(x, W.t(), b, more=(u, v))
            results += [y, products.product(y, W), products.product(y.t(), x, out=W.clone(), add=True)]
    return results


@_case("conv3x3")
def _conv(random: RandomTensors) -> list[Tensor]:
    """Convolve pictures with odd and even sides, in blocks of several, with gradients of leading channels only."""
    results = list[Tensor]()
    with override_ops(product="columns"):
        for n, channels, outputs, height, width, live in ((5, 35, 18, 5, 7, 35), (2, 70, 33, 4, 140, 20)):
            x, W, b = random(n, channels, height, width), random(outputs, channels, 3, 3) / 8, random(outputs)
            run = functools.partial(conv.frozen_conv, weight=W, bias=b, padding=(1, 1), live=live)
            results += random.gradients(run, x)
    return results


@_case("token_nll", dtypes=(_BF16, _F32))
def _token_nll(random: RandomTensors) -> list[Tensor]:
    """Compute losses with an identity head, so that logits equal hidden states."""
    targets, head = torch.tensor([0, 2074, -100, 1033, 7, 2074]), torch.eye(2075, dtype=random.dtype)
    logits, correct = 3 * random(6, 2075), torch.zeros(6, dtype=torch.bool)
    logits[3, 1033] = 40
    results = random.gradients(lambda x: loss.token_nll(x, head, targets), logits)
    return [*results, loss.token_nll(logits, head, targets, correct=correct), correct]


@_case("lora_forward", "lora_backward", "lora_weight_gradients")
def _low_rank(random: RandomTensors) -> list[Tensor]:
    """Run a layer with two low-rank products: rank 5 on columns 0 … 32, rank 16 on columns 32 … 112."""
    W = random(112, 48) / 8

    def run(x: Tensor, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        return linear.linear(x, linear.LinearMap(W, None, (LowRank(A, B, 0.5), LowRank(A2, B2, 2.0, first=32))))

    factors = random.wide(5, 48) / 4, random.wide(32, 5), random.wide(16, 48) / 4, random.wide(80, 16)
    return random.gradients(run, random(197, 48), *factors)


# -- quantized weights -------------------------------------------------------------------------------------------------


@_case("blocks4_dense", "blocks4_quantize", dtypes=(_BF16, _F32))
def _blocks4(random: RandomTensors) -> list[Tensor]:
    results = list[Tensor]()
    for kind, double in (("nf4", True), ("fp4", False)):
        stored = to_format(random(35, 74), kind, double)
        results += [*stored.tensors().values(), stored.dense(random.dtype, 3, 30)]
    return results


_GGML = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
"""Number of bytes per block, by type."""


def _ggml_blocks(random: RandomTensors, kind: str) -> GgmlBlocks:
    """Return a random weight of three rows, each of two blocks, with finite scales."""
    raw = random.integers(0, 256, 6, _GGML[kind], dtype=torch.uint8)
    for at in [208] if kind == "Q6_K" else [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]:
        raw[:, at : at + 2] = random(6, 1).half().view(torch.uint8)
    return GgmlBlocks(kind, (3, 2 * (256 if kind.endswith("K") else 32)), raw.view(3, -1))


@_case("ggml_dense", dtypes=(_BF16, _F32))
def _ggml_dense(random: RandomTensors) -> list[Tensor]:
    stored = [_ggml_blocks(random, kind) for kind in _GGML]
    if random.exact:
        return [groups.dense() for each in stored if (groups := each.groups(0, 3)) is not None]
    return [each.dense(random.dtype, 0, 3) for each in stored]


@_case("rows8_dense", dtypes=(_BF16, _F32))
def _rows8_dense(random: RandomTensors) -> list[Tensor]:
    codes, absmax = random.integers(-127, 128, 5, 37, dtype=torch.int8), random.wide(5).float().abs()
    return [Rows8((5, 37), codes, absmax).dense(random.dtype, 0, 5)]


@_case("int8_product")
def _int8_product(random: RandomTensors) -> list[Tensor]:
    """Multiply in both directions, with full and partial tiles, with and without outlier channels."""
    results = list[Tensor]()
    for rows, out, inputs in ((37, 80, 208), (400, 32, 48)):
        W, x, g, bias = random(out, inputs), random(rows, inputs), random(rows, out), random(out)
        which = torch.tensor([3, inputs - 1])
        for large in (1.0, 500.0):
            x[:, which] *= large
            copy = Int8Weight(W)
            for t, transposed in ((x, True), (x, True), (g, False)):
                y = copy.product(t, W, bias if transposed else None, transposed)
                results += [] if y is None else [y]
                if copy.codes is None:
                    copy.quantize(W)
    return results


# -- serving ----------------------------------------------------------------------------------------------------------


def _panel_products(random: RandomTensors, name: str) -> list[Tensor]:
    """Multiply by panels of every kind, with full and partial tiles.

    The inputs have one, two or more tiles of rows."""
    results = list[Tensor]()
    wide = [Panels.from_weight(random(80, n).bfloat16() / 8) for n in (200, 320)]
    codes = []
    for groups, bits, zeros in ((1, 8, False), (20, 8, False), (10, 8, True), (40, 4, False)):
        q = random.integers(
            *((-127, 128) if bits == 8 else (0, 16)), 80, 320, dtype=torch.int8 if bits == 8 else torch.uint8
        )
        scales, zero = random.wide(80, groups).float().abs() / 100, random.wide(80, groups).float() if zeros else None
        codes.append(Groups(q, scales, zero, None if bits == 8 else torch.arange(-8.0, 8.0)))
    with override_ops(panel_linear=name):
        panels = [*wide, *map(Panels.of_groups, codes), Panels.int4(random(80, 320).bfloat16())]
    for panel in panels:
        for rows in (1, 3, 17, 70):
            x, y, b = random(rows, panel.columns), random(rows, 80), random(80)
            if random.exact:
                product = x @ panel.dense().double().t()
                results += [product + b, y + product]
                continue
            onto = y.clone()
            panel.add_onto(onto, x)
            results += [panel(x, b), onto]
    return results


@_case("panel_product")
def _panel_product(random: RandomTensors) -> list[Tensor]:
    return _panel_products(random, "compiled")


@_case("amx_panel_product")
def _amx_panel_product(random: RandomTensors) -> list[Tensor]:
    return _panel_products(random, "amx")


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


@_case("lora_rows")
def _lora_rows(random: RandomTensors) -> list[Tensor]:
    """Apply two adapters of rank 16 to five and to two rows; one row uses both."""
    x, y, strengths = random(7, 32), random(7, 40), random.wide(7).float()
    pairs = [(random(16, 32) / 8, random(40, 16) / 8) for _ in range(2)]
    rows, starts = torch.tensor([0, 2, 5, 6, 1, 2, 3]), torch.tensor([0, 5, 7])
    if random.exact:
        for (A, B), first, end in zip(pairs, (0, 5), (5, 7), strict=True):
            for i in range(first, end):
                y[rows[i]] += strengths[i] * (B @ (A @ x[rows[i]]))
        return [y]
    laid = [
        (A.view(1, 16, -1, 2).permute(0, 2, 1, 3).contiguous(), B.view(40, -1, 2).permute(1, 0, 2).contiguous())
        for A, B in pairs
    ]
    table, u = torch.zeros(2, 17, dtype=torch.int64), torch.empty(7, 16)
    for record, (A, B) in zip(table, laid, strict=True):
        record[:7] = torch.tensor([A.data_ptr(), 16, B.data_ptr(), 0, 40, 0, 16])
    numbers = [*_at(table), 2, *_at(starts, rows, strengths, u), 16]
    _library().lora_rows(x.data_ptr(), 32, y.data_ptr(), 40, *numbers, 2)
    return [y]


@_case("store_rows", "rope_and_cache", "paged_attend", "decode")
def _paged(random: RandomTensors) -> list[Tensor]:
    """Store keys and values in pages, and attend to the stored values.

    There are four query heads and two key heads of size 32. A sequence of 35 tokens is stored in blocks 4, 1
    and 3, and a sequence of 20 tokens in blocks 2 and 5. One kernel rotates and stores the tokens, and
    another kernel stores the rotated tokens again. The last 7 tokens of the first sequence and the last token
    of the second attend to their whole sequence. `decode`, which runs a whole layer, is tested against the
    model's layers when a base is served (serve/forward/runner.py)."""
    heads, kv, d, lengths, tables = 4, 2, 32, (35, 20), torch.tensor([[4, 1, 3], [2, 5, 0]])
    qkv, weights, angle = random(55, 8 * d), [random(d), random(d)], random.wide(40, d // 2)
    positions = torch.cat([torch.arange(n) for n in lengths])
    last = torch.cat([torch.arange(28, 35), torch.tensor([54])])
    if random.exact:
        q, k, v = qkv.view(55, 8, d).split([heads, kv, kv], 1)
        q, k = (
            attention.rotate(F.rms_norm(t, (d,), w, 1e-5), angle.cos()[positions], angle.sin()[positions])
            for t, w in zip((q, k), weights, strict=True)
        )
        outs = []
        for query, keys, values in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
            keys, values = (t.repeat_interleave(2, 1).transpose(0, 1) for t in (keys, values))
            scores = 2 * torch.tanh(0.25 * query.transpose(0, 1) @ keys.mT / 2)
            hidden = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
            outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        unused = torch.zeros(6, kv, 16 * d)
        return [torch.cat([q, k, v], 1).flatten(1), torch.cat(outs).flatten(1)[last], unused, unused]
    library, starts, cos, sin = _library(), torch.tensor([0, 35, 55]), angle.cos(), angle.sin()
    slots = torch.cat([tables[i][torch.arange(n) // 16] * 16 + torch.arange(n) % 16 for i, n in enumerate(lengths)])
    K, V, K2, V2 = (torch.zeros(6, kv, 16 * d, dtype=_BF16) for _ in range(4))
    where = _at(positions, slots, starts)
    library.rope_and_cache(qkv.data_ptr(), heads, kv, d, *_at(cos, sin, *weights), 1e-5, *where, 2, *_at(K, V), 2)
    k, v = (qkv[:, first : first + kv * d].contiguous() for first in (heads * d, (heads + kv) * d))
    library.store_rows(*_at(k), kv * d, *_at(v), kv * d, *_at(slots, starts), 2, kv, d, *_at(K2, V2), 2)
    q, out, ends = qkv[last].contiguous(), torch.empty(8, heads * d, dtype=_BF16), torch.tensor([0, 7, 8])
    sizes, positions_of_last = (heads, kv, d), positions[last].contiguous()
    pages = [*_at(positions_of_last, ends), 2, *_at(tables), 3, *_at(K, V)]
    library.paged_attend(q.data_ptr(), 8 * d, out.data_ptr(), *sizes, *pages, 0.25, 2.0, 0, 35, 2)
    return [qkv, out, K - K2, V - V2]
