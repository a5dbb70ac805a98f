"""Models built from their configuration, without weights."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES
from veneer.models.quantize import quantized_weights
from veneer.models.text.meta_model import meta_text_model
from veneer.ops.quantized import Quantized, quantize


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_model_has_real_shapes_and_no_bytes(family: str) -> None:
    real = FAMILIES[family]()
    bare = meta_text_model(real.config, dtype=torch.bfloat16)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.bfloat16 and not p.requires_grad for p in bare.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_meta_model_quantizes_to_the_same_codes_as_a_loaded_model(kind: str) -> None:
    real = FAMILIES["qwen3_moe"]()
    bare = meta_text_model(real.config, dtype=torch.bfloat16, quantize=kind)
    names = quantized_weights(real)
    assert names == [n for n, p in bare.named_parameters() if isinstance(p, Quantized)]
    for name in names:
        made, found = quantize(real.get_parameter(name), kind), bare.get_parameter(name)
        assert isinstance(found, Quantized)
        assert {k: (t.shape, t.dtype) for k, t in found.stored.tensors().items()} == {
            k: (t.shape, t.dtype) for k, t in made.stored.tensors().items()
        }
