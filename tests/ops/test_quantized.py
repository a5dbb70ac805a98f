"""Quantized weights: bitsandbytes' codes, exact products, no lasting dense copy."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from veneer.errors import BaseError
from veneer.ops import quantization_formats as blocks
from veneer.ops.cpu import compiled
from veneer.ops.quantization_formats import KINDS, Blocks4, Rows8, dynamic_map, four_bit_values
from veneer.ops.quantized import Quantized, dequantized, quantize, stacked_rows

FOUR = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernels", lambda: None)


# -- the tables --------------------------------------------------------------------------------------------------------


def test_nf4_table_has_normal_quantiles() -> None:
    """The values follow QLoRA, appendix E.

    These are eight quantiles above zero, seven below, and zero, divided by the largest."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    want = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values / above.max()
    torch.testing.assert_close(four_bit_values("nf4").double(), want, rtol=0, atol=2e-7)


def test_fp4_table_has_one_sign_two_exponent_bits() -> None:
    values = sorted(2.0 ** (e - 3) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1))  # 0.25 … 1.5
    want = torch.tensor([*values, 0.0]) / values[-1]
    have = four_bit_values("fp4")
    assert torch.equal(have[:8], -have[8:])
    # all but the smallest are exact; bitsandbytes uses 1/192 for the one subnormal
    assert {round(float(v), 5) for v in want} <= {round(float(v), 5) for v in have[:8]} | {0.0}
    assert float(have[1]) == pytest.approx(1 / 192)


def test_dynamic_map_covers_seven_decades() -> None:
    values = dynamic_map()
    assert len(values) == 256
    assert bool((values.diff() > 0).all())
    positive = values[values > 0]
    assert float(positive[-1]) == 1.0
    for decade in range(7):
        high = 10.0 ** (decade - 6)
        inside = positive[(positive > high / 10) & (positive < high)]
        assert len(inside) == 2**decade
        torch.testing.assert_close(
            inside.diff(), torch.full((len(inside) - 1,), 0.9 * high / 2**decade), rtol=1e-3, atol=0
        )


# -- codes -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(FOUR),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    seed=st.integers(0, 9),
)
def test_each_weight_is_rounded_to_the_nearest_value(
    kind: str, dtype: torch.dtype, rows: int, columns: int, seed: int
) -> None:
    w = weight(rows, columns, dtype=dtype, seed=seed)
    q = quantize(w, kind, double=False, dtype=torch.float32)
    exact = F.pad(w.double().flatten(), (0, -w.numel() % 64)).view(-1, 64)
    most = exact.abs().amax(1, keepdim=True)
    assert torch.equal(q.stored.tensors()["absmax"].double(), most[:, 0])
    away = (exact[..., None] - four_bit_values(kind).double() * most[..., None]).abs().amin(-1).flatten()[: w.numel()]
    got = (q.dense().double().flatten() - w.double().flatten()).abs()
    assert bool((got <= away + 1e-6 * most.max()).all())


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS), dtype=st.sampled_from((torch.float32, torch.bfloat16)), rows=st.integers(1, 50),
    columns=st.sampled_from((2, 64, 100, 192, 256)), double=st.booleans(),
)  # fmt: skip
def test_compiled_kernels_equal_the_reference_bit_for_bit(
    kind: str, dtype: torch.dtype, rows: int, columns: int, double: bool
) -> None:
    if compiled.kernels() is None:
        pytest.skip(compiled.status())
    w = weight(rows, columns, dtype=dtype)
    mine = quantize(w, kind, double=double)
    with pytest.MonkeyPatch.context() as patch:
        without_kernels(patch)
        plain = quantize(w, kind, double=double)
        dense = plain.dense()
    for (name, a), b in zip(mine.stored.tensors().items(), plain.stored.tensors().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(mine.dense(), dense)
    assert torch.equal(mine.part(rows // 2, rows, (rows - rows // 2, columns)).dense(), dense[rows // 2 :])


def test_bits_per_weight_include_the_scales() -> None:
    """Covers nf4 with and without double quantization, and int8.

    nf4: 4 + 8/64 + 32/(64·256) = 4.127 bits with double quantization, 4.5 without. int8: 8 bits, plus one
    scale per row."""
    w = weight(1024, 1024, dtype=torch.bfloat16)
    assert 8 * quantize(w, "nf4").bytes / w.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert 8 * quantize(w, "nf4", double=False).bytes / w.numel() == 4.5
    assert 8 * quantize(w, "int8").bytes / w.numel() == pytest.approx(8 + 32 / 1024)


def test_int8_scales_each_row_by_its_largest_value() -> None:
    w = weight(37, 100)
    q = quantize(w, "int8")
    step = w.double().abs().amax(1, keepdim=True) / 127
    assert bool(((q.dense().double() - w.double()).abs() <= 0.5 * step * (1 + 1e-5)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_keeps_zeros_and_refuses_non_finite(kind: str) -> None:
    assert not quantize(torch.zeros(8, 64), kind).dense().any()
    for bad in (float("nan"), float("inf")):
        w = weight(4, 64)
        w[1, 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize(w, kind)
    with pytest.raises(ValueError, match="nf5"):
        quantize(weight(2, 2), "nf5")


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


def _bnb() -> Any:
    return pytest.importorskip("bitsandbytes.functional", reason="pip install -e '.[quant]'")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_values_equal_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    bnb = _bnb()
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(four_bit_values(kind), bnb.get_4bit_type(kind, device="cpu"))
    for shape in ((64, 128), (100, 192), (576, 1536), (7, 10)):
        w = weight(*shape, dtype=dtype)
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind)
        mine = quantize(w, kind, double=False)
        code = mine.stored
        assert torch.equal(code.packed, packed.flatten())
        assert torch.equal(code.absmax, state.absmax)
        assert torch.equal(mine.dense(), bnb.dequantize_4bit(packed, state))
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=True)
        theirs = Blocks4(kind, tuple(shape), packed.flatten(), state.absmax, state.state2.absmax, state.offset, 64, 256)
        assert torch.equal(Quantized(theirs, dtype).dense(), bnb.dequantize_4bit(packed, state))
        code = quantize(w, kind).stored
        assert torch.equal(code.mean, state.offset)
        assert torch.equal(code.absmax2, state.state2.absmax)


def test_int8_codes_equal_bitsandbytes() -> None:
    bnb = _bnb()
    for dtype in (torch.float32, torch.float16):
        w = weight(96, 200, dtype=dtype)
        codes, stats, _ = bnb.int8_vectorwise_quant(w)
        code = quantize(w, "int8").stored
        assert torch.equal(code.absmax, stats)
        assert float((code.codes != codes).double().mean()) < (1e-9 if dtype == torch.float32 else 0.02)
        theirs = Quantized(Rows8((96, 200), codes, stats), torch.float32)
        assert torch.equal(theirs.dense(), bnb.int8_vectorwise_dequant(codes, stats))


# -- a tensor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_product_equals_that_with_the_dequantized_weight(
    kind: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        without_kernels(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        q = quantize(weight(96, 128, dtype=dtype), kind)
        x, bias = weight(2, 5, 128, dtype=dtype, seed=2) * 50, weight(96, dtype=dtype, seed=3)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = F.linear(mine, q, bias), F.linear(other, q.dense(), bias)
        assert torch.equal(y, want)
        g = torch.randn_like(y)
        y.backward(g)
        want.backward(g)
        assert torch.equal(mine.grad, other.grad)


def test_backward_keeps_codes_and_no_dense_weight() -> None:
    layer = nn.Linear(128, 96, bias=False).bfloat16()
    layer.weight = nn.Parameter(quantize(layer.weight, "nf4"), requires_grad=False)
    kept: list[Any] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x = torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(layer(x)[:, :96] @ torch.zeros(96, 128, dtype=torch.bfloat16)).sum().backward()
    weights = [t for t in kept if t.shape in ((96, 128), (128, 96)) and not isinstance(t, Quantized)]
    assert any(isinstance(t, Quantized) for t in kept)
    assert len(weights) <= 1  # the zero matrix above


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_row_views_stay_quantized(kind: str) -> None:
    q = quantize(weight(4, 32, 128, dtype=torch.bfloat16), kind)
    dense = q.dense()
    views: list[tuple[Any, Tensor]] = [
        (q[2], dense[2]),
        (q[1:3], dense[1:3]),
        (q[-1], dense[-1]),
        (q.transpose(1, 2), dense.transpose(1, 2)),
        (q[3].t(), dense[3].t()),
        (q[1][4:9], dense[1][4:9]),
        *zip(q.split(2), dense.split(2), strict=True),
        *zip(q.unbind(0), dense.unbind(0), strict=True),
        (q.mT, dense.mT),
        (q.detach(), dense),
    ]
    for got, want in views:
        assert isinstance(got, Quantized), want.shape
        assert got.shape == want.shape
        assert torch.equal(got.dense(), want)
    plain: list[tuple[Any, Tensor]] = [
        (q + 1, dense + 1),
        (q[:, 3], dense[:, 3]),
        (q.reshape(-1), dense.reshape(-1)),
        (q.sum(), dense.sum()),
        (q[[0, 2]], dense[[0, 2]]),
        (torch.cat([q, q]), torch.cat([dense, dense])),
        (q[..., ::2], dense[..., ::2]),
        (torch.where(q > 0, q, 0), torch.where(dense > 0, dense, 0)),
        (q[0] @ q[1].t(), dense[0] @ dense[1].t()),
    ]
    for got, want in plain:
        assert not isinstance(got, Quantized)
        assert torch.equal(got, want)


def test_embedding_lookup_equals_the_dequantized_table() -> None:
    q = quantize(weight(40, 64), "nf4")
    ids = torch.tensor([[3, 39, 3], [0, 1, 3]])
    assert torch.equal(F.embedding(ids, q), F.embedding(ids, q.dense()))
    many = torch.arange(40).repeat(2)
    assert torch.equal(F.embedding(many, q), F.embedding(many, q.dense()))


def test_low_rank_weights_move_copy_and_pickle_as_parameters() -> None:
    layer = nn.Linear(64, 32).bfloat16()
    layer.weight = nn.Parameter(quantize(layer.weight, "nf4"), requires_grad=False)
    want = dequantized(layer.weight).clone()
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, Quantized)
    assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(twin.weight.dense(), want)
    assert twin.weight.stored.tensors()["packed"].data_ptr() != layer.weight.stored.tensors()["packed"].data_ptr()
    twin.to("cpu")
    twin.to(torch.float32)
    assert isinstance(twin.weight, Quantized)
    assert twin.weight.dtype == torch.float32
    torch.testing.assert_close(twin.weight.dense(), want.float(), rtol=2**-8, atol=0)
    again = pickle.loads(pickle.dumps(layer.weight))
    assert torch.equal(again.dense(), want)
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.device.type == "meta"
    assert meta.weight.shape == (32, 64)


def test_stacked_rows_multiply_as_one_weight() -> None:
    parts = [quantize(weight(rows, 128, dtype=torch.bfloat16, seed=rows), "nf4") for rows in (32, 8, 40)]
    whole = stacked_rows(parts)
    want = torch.cat([p.dense() for p in parts])
    assert whole.shape == (80, 128)
    assert torch.equal(whole.dense(), want)
    assert torch.equal(whole[30:45].dense(), want[30:45])
    assert whole.bytes == sum(p.bytes for p in parts)
    assert stacked_rows(parts[:1]) is parts[0]


def test_keeping_a_dense_copy_changes_no_values() -> None:
    q = quantize(weight(16, 64), "nf4")
    want = q.dense()
    q.keep()
    assert q.dense() is q.kept
    assert torch.equal(q.dense(), want)
    assert torch.equal(q.t().dense(), want.t())
    assert torch.equal(q[3:5].dense(), want[3:5])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_writing_to_a_quantized_weight_is_refused(kind: str, kept: bool) -> None:
    """An in-place operation would change a temporary tensor and be lost.

    If a dense copy is kept, the operation would change the copy, and thus the base."""
    q = quantize(weight(4, 32, 64, dtype=torch.bfloat16), kind)
    if kept:
        q.keep()
    want = q.dense().clone()
    other = torch.zeros(4, 32, 64, dtype=torch.bfloat16)
    writes: list[Any] = [
        lambda: q.add_(1),
        lambda: q.zero_(),
        lambda: q.copy_(other),
        lambda: q[1].fill_(2),
        lambda: q[1:3].mul_(2),
        lambda: q.__setitem__(0, 1.0),
        lambda: q.mT.add_(1),
        lambda: nn.init.normal_(q),
        lambda: q.clamp_(max=0),
        lambda: torch.add(other, 1, out=q),
        lambda: torch._foreach_mul_([other, q], 2.0),
        lambda: q.index_fill_(0, torch.tensor([1]), 3.0),
        lambda: q.detach().sub_(1),
    ]
    with torch.no_grad():
        for write in writes:
            with pytest.raises(BaseError, match=f"write to a weight in {kind}"):
                write()
        for view in (q.view(-1), q.flatten(), q[:, :, :5], q.unsqueeze(0), q.permute(2, 1, 0)):
            view.add_(1)  # changes a separate tensor
    assert torch.equal(q.dense(), want)
    other.copy_(q)
    assert torch.equal(other, want), "it is read by operations that write elsewhere"
    product = torch.zeros(32, 32, dtype=torch.bfloat16)
    torch.mm(q[0], q[1].t(), out=product)
    assert torch.equal(product, want[0] @ want[1].t())


def test_loading_over_a_quantized_weight_raises() -> None:
    layer = nn.Linear(64, 32)
    state = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    layer.weight = nn.Parameter(quantize(layer.weight, "nf4"), requires_grad=False)
    with pytest.raises(RuntimeError, match="write to a weight in nf4"):
        layer.load_state_dict(state)
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer.weight, state["weight"])


def test_bitsandbytes_kernels_run_only_for_supported_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' dequantize_4bit on CUDA treats every kind except fp4 as nf4."""
    monkeypatch.setattr(blocks, "bitsandbytes_operators", lambda: "bitsandbytes")
    asked = {kind: blocks.gpu_library(kind, 64, "cuda") for kind in KINDS}
    assert asked == {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": None}
    assert blocks.gpu_library("nf4", 48, "cuda") is None
    assert blocks.gpu_library("nf4", 64, "cpu") is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_decodes_every_kind_as_the_cpu_does(kind: str) -> None:
    q = quantize(weight(96, 128), kind)
    assert torch.equal(q.to("cuda").dense().cpu(), q.dense())
