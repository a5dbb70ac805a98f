"""Quantised weights by the kernels are the references' bits: torch's of ops/quantisation_formats, and gguf-py's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cuda.laws import FEW, SEEDS, close, drawn
from tests.ops.draws import coded
from tests.serve.forward import test_runner
from tests.serve.forward.test_runner_quantised import model_in
from veneer.ops.cuda.launch import recorded
from veneer.ops.cuda.quantised import GGML
from veneer.ops.dispatch import dispatch, override_ops
from veneer.ops.quantisation_formats import GgmlBlocks, QuantisationFormat, to_format
from veneer.ops.quantised import Quantised, product_of_codes, stacked_rows
from veneer.serve.forward.runner import Runner

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def referred(stored: QuantisationFormat, dtype: torch.dtype, first: int, last: int) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.ops.dispatch.DEVICE", "torch")
        return stored.dense(dtype, first, last)


@FEW
@given(
    st.sampled_from(["nf4", "fp4", "int8"]),
    st.booleans(),
    DTYPES,
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0, 1),
    SEEDS,
)
def test_weights_of_4_and_8_bits(
    device: str, kind: str, double: bool, dtype: torch.dtype, rows: int, columns: int, share: float, seed: int
) -> None:
    stored = to_format(drawn(seed, rows, columns, dtype=torch.float32, device=device, scale=0.02), kind, double)
    op, held = ("dequantise_rows8", "codes") if kind == "int8" else ("dequantise_blocks4", "packed")
    assert dispatch(op, stored.tensors()[held], dtype) is not None
    first = int(share * (rows - 1))
    for part in ((0, rows), (first, rows), (0, first + 1)):
        got = stored.dense(dtype, *part)
        assert torch.equal(got, referred(stored, dtype, *part))


@pytest.mark.parametrize("kind", GGML)
def test_blocks_of_a_gguf_file(device: str, kind: str) -> None:
    """Of random bytes, where a half is not a number of its own accord never."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, (5, 3 * size), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}
    for at in halves.get(kind, (0, 2)):
        for block in range(3):
            raw[:, block * size + at + 1] &= 0xBB  # an exponent below the highest, which is for infinities
    stored = GgmlBlocks(kind, (5, 3 * weights), torch.from_numpy(raw).to(device))
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch("dequantise_ggml", stored.raw, dtype, kind) is not None
        got = stored.dense(dtype, 1, 5)
        assert got.isfinite().all()
        assert torch.equal(got, referred(stored, dtype, 1, 5))


SIXTEEN = st.sampled_from([torch.bfloat16, torch.float16])


@settings(max_examples=6)
@given(
    st.sampled_from(["nf4", "fp4", "int8", *GGML]),
    st.booleans(),
    SIXTEEN,
    st.integers(1, 64),
    st.integers(1, 80),
    st.integers(1, 4),
    st.floats(0, 1),
    st.booleans(),
    SEEDS,
)
def test_a_few_rows_by_codes(
    device: str,
    kind: str,
    double: bool,
    dtype: torch.dtype,
    count: int,
    rows: int,
    blocks: int,
    share: float,
    biased: bool,
    seed: int,
) -> None:
    """As by the dequantised weight, in float64 and rounded once; of int8 before it is rounded. Also of some of its rows
    and through torch's own linear, which asks for codes too."""
    columns = blocks * 256 if kind in GGML else blocks * 64
    plain = drawn(seed, rows, columns, dtype=torch.float32, scale=0.02)
    w = coded(plain, kind) if kind in GGML else Quantised(to_format(plain, kind, double), dtype)
    w = w.to(device, dtype)
    x = drawn(seed + 1, count, columns, dtype=dtype, device=device)
    bias = drawn(seed + 2, rows, dtype=dtype, device=device) if biased else None
    exact = referred(w.stored, torch.float32 if kind == "int8" else dtype, 0, rows).double()
    wanted = x.double() @ exact.t() + (0 if bias is None else bias.double())
    got = product_of_codes(x, w, bias)
    assert got is not None
    close(got, wanted, dtype)
    assert torch.equal(torch.nn.functional.linear(x, w, bias), got)
    first = int(share * (rows - 1))
    some = product_of_codes(x, w[first:], None if bias is None else bias[first:])
    assert some is not None
    assert torch.equal(some, got[:, first:])


def test_weights_of_two_kinds_below_one_another(device: str) -> None:
    parts = [coded(drawn(i, 40, 256, dtype=torch.bfloat16), kind).to(device) for i, kind in enumerate(("Q4_K", "Q6_K"))]
    x, bias = (drawn(7, *s, dtype=torch.bfloat16, device=device) for s in ((3, 256), (80,)))
    got = product_of_codes(x, stacked_rows(parts), bias)
    assert got is not None
    for i, part in enumerate(parts):
        own = slice(40 * i, 40 * i + 40)
        assert torch.equal(got[:, own], product_of_codes(x, part, bias[own]))  # type: ignore[arg-type]


def test_what_codes_do_not_multiply_the_dequantised_weight_does(device: str) -> None:
    """More rows than one tile has, single precision, blocks that cross rows, a weight that is kept dequantised."""
    w = Quantised(to_format(drawn(0, 20, 96, dtype=torch.float32), "nf4", True), torch.bfloat16).to(device)
    x = drawn(1, 3, 96, dtype=torch.bfloat16, device=device)
    assert product_of_codes(x, w) is None
    assert torch.equal(torch.nn.functional.linear(x, w), torch.nn.functional.linear(x, w.dense()))
    w = Quantised(to_format(drawn(0, 20, 128, dtype=torch.float32), "nf4", True), torch.bfloat16).to(device)
    x = drawn(1, 65, 128, dtype=torch.bfloat16, device=device)
    assert product_of_codes(x, w) is None
    assert product_of_codes(x[:3].float(), w) is None
    assert product_of_codes(x[:3], w) is not None
    w.keep()
    assert product_of_codes(x[:3], w) is None


@pytest.mark.slow
def test_a_served_base_in_codes_goes_through_them() -> None:
    """A prompt and single tokens, beside the dequantised weights; in float16, for bfloat16 lies in panels on a CPU."""
    ids = test_runner.prompts([9, 5])
    found = []
    for name in ("cuda", "torch"):
        with override_ops(coded_product=name), recorded() as launches:
            runner = Runner(test_runner.base_of(model_in("nf4", dtype=torch.float16)), cache_bytes=1 << 20)
            found.append(torch.cat(test_runner.serve(runner, [(p, []) for p in ids], [7, 1])))
            runner.close()
        assert ("few_blocks4" in {each.name for each in launches}) == (name == "cuda")
    close(*found, torch.float16, 3.0)
