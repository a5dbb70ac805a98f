"""QLoRA on a CUDA device: the CPU's values, a run over them, bitsandbytes' optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_base import tiny_base_dir
from veneer.ops.quantization_formats import KINDS
from veneer.ops.quantized import quantize
from veneer.train.config.load import config_from
from veneer.train.events import Stepped
from veneer.train.text.task import run_text

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_codes_stand_for_the_same_weights(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = quantize(weight, kind), quantize(weight.cuda(), kind)
    assert torch.equal(here.to("cuda").dense().cpu(), here.dense())
    assert torch.equal(here.to("cuda")[30:70].dense().cpu(), here.dense()[30:70])
    apart = (here.dense().float() - there.dense().cpu().float()).abs()
    assert float(apart.max()) <= 2e-2 * float(weight.abs().max())  # means of absmax are summed in another order


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_a_run_in_4_bits_learns_and_resumes(optimizer: str, tmp_path: Path) -> None:
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")  # whose they are; `make gpu` has it
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(24):
            asked = {"role": "user", "content": f"The printer number {i} does not work."}
            file.write(json.dumps({"messages": [asked, {"role": "assistant", "content": "it" * (1 + i % 2)}]}) + "\n")
    values: dict[str, Any] = {
        "base": {"name": str(tiny_base_dir(tmp_path)), "quantise": "nf4", "dtype": "bfloat16", "device": "cuda"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "split": 4},
        "output": str(tmp_path / "run"),
        "optimizer": {"name": optimizer, "learning_rate": 1e-2},
        "schedule": {"steps": 8},
        "checkpoint": {"every": 4},
    }
    losses: list[float] = []
    result = run_text(
        config_from(values)[0], on_event=lambda e: losses.append(e.loss) if isinstance(e, Stepped) else None
    )
    assert result.validation is not None
    assert result.validation_before is not None
    assert result.validation < result.validation_before
