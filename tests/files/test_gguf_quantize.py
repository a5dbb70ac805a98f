"""Quantized blocks: read back by the gguf package, and equal to ggml's bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.llama_cpp import PYTHON, ggml_blocks
from veneer.files.gguf_quantize import quantize

KINDS = ("Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
BITS = {"Q8_0": 8, "Q5_0": 5, "Q5_1": 5, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def read(coded: np.ndarray, kind: str) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(coded, gguf.GGMLQuantizationType[kind]))


def normal(rows: int, columns: int = 512) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_a_uniform_quantizer(kind: str) -> None:
    """32 normal values span about ±2.1; a step of span/2^bits has the error step/√12."""
    x = normal(64)
    error = np.sqrt(np.mean(np.square(read(quantize(x, kind), kind) - x)))
    assert error < 1.25 * 2 * 2.1 / 2 ** BITS[kind] / math.sqrt(12)


@pytest.mark.parametrize("kind", KINDS)
def test_powers_of_two_scale_exactly(kind: str) -> None:
    x = normal(16)
    assert np.array_equal(read(quantize(4 * x, kind), kind), 4 * read(quantize(x, kind), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_each_other(kind: str) -> None:
    x = normal(700)  # more than one call's superblocks
    whole = quantize(x, kind)
    assert whole.shape[0] == 700
    for row in (0, 127, 128, 300, 699):
        assert np.array_equal(quantize(x[row : row + 1], kind), whole[row : row + 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -0.75])
def test_constant_rows_stay_within_a_step(kind: str, value: float) -> None:
    x = np.full((2, 512), value, np.float32)
    assert np.abs(read(quantize(x, kind), kind) - x).max() <= abs(value) / 2 ** BITS[kind]


def test_rows_must_fill_blocks() -> None:
    with pytest.raises(ValueError, match="blocks of 256"):
        quantize(normal(1, 288), "Q4_K")


@pytest.mark.peers
def test_bits_equal_those_of_ggml(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("llama-cpp-python is not installed: make test-peers")
    g = np.random.default_rng(1)

    def draw(change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.asarray(change(g.standard_normal((64, 1024))))

    rows = np.concatenate(
        [
            draw(lambda x: x),
            draw(lambda x: x / 50),
            draw(np.abs),
            draw(lambda x: -np.abs(x)),
            draw(np.round),
            draw(lambda x: x * np.exp(5 * x)),
            draw(lambda x: np.where(x > 2, x, 0)),
            draw(lambda x: x.astype(np.float16)),
            *(draw(lambda x, scale=scale: x * scale) for scale in (1e30, 1e4, 1e-6, 1e-14, 1e-20, 1e-38, 1e-41)),
            *(np.full((2, 1024), value) for value in (0.0, -0.0, 3.7, -0.1, 1e-45, 65504.0)),
        ]
    ).astype(np.float32)
    for kind, theirs in ggml_blocks(rows, KINDS, tmp_path).items():
        ours = quantize(rows, kind)
        assert not np.flatnonzero((ours != theirs).any(1)).size, kind
