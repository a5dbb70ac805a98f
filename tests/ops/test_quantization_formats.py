"""GGUF blocks dequantize to gguf-py's values, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from veneer.ops.cpu import compiled
from veneer.ops.quantization_formats import GgmlBlocks, QuantizationFormat, StackedRows, to_format

HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,),
}  # fmt: skip
"""Offsets of a block's float16 scales; the other bytes can have any value."""


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    count, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows * columns // count, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = (rng.standard_normal(len(raw)) * 0.01).astype(np.float16)
        scales[0] = np.float16(3e-7)  # a subnormal
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", HALVES)
def test_values_equal_those_of_gguf(kind: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    raw = blocks(kind, 6, 512)
    want = torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))
    code = GgmlBlocks(kind, (6, 512), torch.from_numpy(raw))
    assert torch.equal(code.dense(torch.float32, 0, 6), want)
    assert torch.equal(code.dense(torch.bfloat16, 0, 6), want.bfloat16())
    assert torch.equal(code.dense(torch.float32, 2, 5), want[2:5])
    assert torch.equal(code.dense(torch.float16, 1, 2), want[1:2].half())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "Q4_0"])
def test_rows_of_stacked_weights_equal_the_separate_rows(
    kind: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(compiled, "kernels", lambda: None)

    def weight(rows: int) -> QuantizationFormat:
        if kind == "Q4_0":
            return GgmlBlocks(kind, (rows, 192), torch.from_numpy(blocks(kind, rows, 192)))
        return to_format(torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows)), kind, True)

    parts = [(weight(rows), rows) for rows in (5, 1, 8)]
    want = torch.cat([part.dense(torch.bfloat16, 0, rows) for part, rows in parts])
    stacked = StackedRows(tuple(part for part, _ in parts))
    for first, last in ((0, 14), (0, 5), (3, 6), (5, 6), (7, 13), (4, 4)):
        assert torch.equal(stacked.dense(torch.bfloat16, first, last), want[first:last])
    room = torch.full((14, 192), 7.0, dtype=torch.bfloat16)
    assert stacked.dense(torch.bfloat16, 2, 12, room[1:11]).data_ptr() == room[1:].data_ptr()
    assert torch.equal(room[1:11], want[2:12])
    assert bool((room[[0, 11, 12, 13]] == 7).all())


@pytest.mark.parametrize("kind", [*(k for k in HALVES if k not in ("Q2_K", "Q3_K", "IQ4_NL")), "nf4", "fp4", "int8"])
def test_integer_groups_equal_the_dequantized_weight(kind: str) -> None:
    """int8 can differ in the last bit: the reference applies one scale, veneer two."""
    for columns in (512,) if kind in HALVES else (512, 96, 40):
        if kind in HALVES:
            code: QuantizationFormat = GgmlBlocks(kind, (7, columns), torch.from_numpy(blocks(kind, 7, columns)))
        else:
            code = to_format(torch.randn(7, columns, generator=torch.Generator().manual_seed(columns)), kind, True)
        groups = code.groups(2, 6)
        want, near = code.dense(torch.float32, 2, 6), 2**-22 if kind == "int8" else 0
        assert ((groups.dense() - want).abs() <= near * want.abs()).all()
        if groups.size % 16 == 0:
            assert torch.equal(groups.split(8).dense(), groups.dense())


def test_groups_of_several_types_can_be_fused() -> None:
    whole = [GgmlBlocks(k, (4, 256), torch.from_numpy(blocks(k, 4, 256))) for k in ("Q4_K", "Q6_K", "Q8_0", "Q4_0")]
    joined = StackedRows(tuple(whole)).groups(1, 15)
    assert joined.size == 16
    assert torch.equal(joined.dense(), torch.cat([w.dense(torch.float32, 0, 4) for w in whole])[1:15])
    four = to_format(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)), "nf4", True)
    assert StackedRows((four, whole[0])).groups(0, 8) is None
    assert GgmlBlocks("Q2_K", (4, 256), torch.from_numpy(blocks("Q2_K", 4, 256))).groups(0, 4) is None
    both = StackedRows((four, four)).groups(2, 7)
    assert torch.equal(both.dense(), torch.cat([four.dense(torch.float32, 2, 4), four.dense(torch.float32, 0, 3)]))
