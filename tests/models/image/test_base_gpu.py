"""Quantized image bases on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.image_twins import latent_shape
from tests.tiny_image_base import SIZE, tiny_image_base
from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.models.image.base import load_image
from veneer.models.image.predict import embed_prompts, predict
from veneer.ops.quantized import Quantized

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_predicts_closely_and_trains_an_adapter(quantize: Any, tmp_path: Path) -> None:
    folder = str(tiny_image_base(tmp_path, "flux1"))
    base = load_image(folder, dtype="bfloat16", device="cuda", quantize=quantize)
    plain = load_image(folder, dtype="bfloat16", device="cuda")
    assert base.fingerprint == plain.fingerprint
    assert any(isinstance(p, Quantized) for p in base.denoiser.parameters())
    assert {p.device for p in base.model.parameters()} == {torch.device("cuda:0")}
    x = torch.randn(2, *latent_shape(base, SIZE, SIZE), device="cuda")
    t = torch.tensor([0.3, 0.8], device="cuda")
    with torch.no_grad():
        got, want = (predict(b, x, t, embed_prompts(b, ["a red house", "a dog"])).float() for b in (base, plain))
    assert (got - want).norm() < 0.3 * want.norm()
    attachment = attach(base.model)
    attachment.add("it", create(base.model, LoraSpec(rank=2, alpha=2, targets=("to_q",)), seed=0), trainable=True)
    attachment.use("it")
    predict(base, x, t, embed_prompts(base, ["a red house", "a dog"])).float().square().mean().backward()
    assert all(p.B.grad is not None and p.B.grad.any() for p in attachment.adapters["it"].pairs.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_is_on_the_requested_device(quantize: Any, tmp_path: Path) -> None:
    base = load_image(str(tiny_image_base(tmp_path, "flux1")), dtype="bfloat16", device="cuda:1", quantize=quantize)
    assert {p.device for p in base.model.parameters()} == {torch.device("cuda:1")}
    x = torch.randn(1, *latent_shape(base, SIZE, SIZE), device="cuda:1")
    with torch.no_grad():
        out = predict(base, x, torch.tensor(0.3, device="cuda:1"), embed_prompts(base, ["a red house"]))
    assert out.isfinite().all()
    assert out.device == torch.device("cuda:1")
