"""QLoRA on a CUDA device: the same weights as on the CPU, and a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.text.tiny_runs import train, with_rows
from veneer.ops.quantization_formats import KINDS
from veneer.ops.quantized import quantize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_dequantize_to_the_cpus_weights(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = quantize(weight, kind), quantize(weight.cuda(), kind)
    assert torch.equal(here.to("cuda").dense().cpu(), here.dense())
    assert torch.equal(here.to("cuda")[30:70].dense().cpu(), here.dense()[30:70])
    apart = (here.dense().float() - there.dense().cpu().float()).abs()
    assert float(apart.max()) <= 2e-2 * float(weight.abs().max())  # CUDA averages absmax in another order


def test_a_run_in_4_bits_learns(tmp_path: Path) -> None:
    result = train(
        with_rows(tmp_path),
        tmp_path / "run",
        base={"quantize": "nf4", "dtype": "bfloat16", "device": "cuda"},
        optimizer={"learning_rate": 1e-2},
        schedule={"steps": 8},
    )
    assert result.validation < result.validation_before
