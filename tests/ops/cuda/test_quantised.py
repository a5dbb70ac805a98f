"""Quantised weights by the kernels are the references' bits: torch's of ops/quantisation_formats, and gguf-py's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.cuda.laws import FEW, SEEDS, drawn
from veneer.ops import choice
from veneer.ops.choice import chosen
from veneer.ops.cuda.quantised import GGML
from veneer.ops.quantisation_formats import GgmlBlocks, QuantisationFormat, to_format

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def referred(stored: QuantisationFormat, dtype: torch.dtype, first: int, last: int) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "PINNED", "torch")
        return stored.dense(dtype, first, last)


@FEW
@given(
    st.sampled_from(["nf4", "fp4", "int8"]), st.booleans(), DTYPES, st.integers(1, 40), st.integers(1, 300),
    st.floats(0, 1), SEEDS,
)  # fmt: skip
def test_weights_of_4_and_8_bits(
    device: str, kind: str, double: bool, dtype: torch.dtype, rows: int, columns: int, share: float, seed: int
) -> None:
    stored = to_format(drawn(seed, rows, columns, dtype=torch.float32, device=device, scale=0.02), kind, double)
    op, held = ("dequantise_rows8", "codes") if kind == "int8" else ("dequantise_blocks4", "packed")
    assert chosen(op, stored.tensors()[held], dtype) is not None
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
        assert chosen("dequantise_ggml", stored.raw, dtype, kind) is not None
        got = stored.dense(dtype, 1, 5)
        assert got.isfinite().all()
        assert torch.equal(got, referred(stored, dtype, 1, 5))
