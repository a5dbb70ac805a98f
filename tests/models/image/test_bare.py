"""A denoiser of its config alone against one with weights, and what a small twin of it finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_image_base import SMALL_DENOISERS, tiny_image_base
from veneer.models.image.bare import bare_image, twin_denoiser
from veneer.models.image.base import load_image
from veneer.models.image.fast import fast_denoiser
from veneer.models.quantise import quantised_weights
from veneer.ops.quantised import Quantised
from veneer.plan.tables import base_config

KINDS = ("flux1", "sdxl", "sd3", "z-image", "klein", "qwen-image")


@pytest.mark.parametrize("family", KINDS)
def test_a_bare_denoiser_has_the_shapes_of_a_real_one_and_no_bytes(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    real = load_image(str(tiny_image_base(_folder(tmp_path_factory), family)), dtype="float32")
    bare = bare_image(real.denoiser.config, dtype=torch.bfloat16)
    assert bare.family == real.family
    assert bare.prediction == real.prediction
    assert {n: p.shape for n, p in bare.denoiser.named_parameters()} == {
        n: p.shape for n, p in real.denoiser.named_parameters()
    }
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in bare.denoiser.parameters())
    with fast_denoiser(real.denoiser) as tried:
        pass
    with fast_denoiser(real.denoiser, like=twin_denoiser(real.denoiser.config, torch.float32)) as believed:
        assert believed.swapped == tried.swapped


def test_a_u_net_of_the_table_without_time_ids_is_sd15() -> None:
    bare = bare_image(base_config("sd15"), dtype=torch.bfloat16)
    assert bare.family == "sd15"
    assert sum(p.numel() for p in bare.denoiser.parameters()) == 859_520_964  # as its card says


def test_quantised_its_linears_are_codes() -> None:
    fields = {"_class_name": "FluxTransformer2DModel", **SMALL_DENOISERS["flux.1-dev"]}
    bare = bare_image(fields, dtype=torch.bfloat16, quantise="nf4")
    names = [n for n, p in bare.denoiser.named_parameters() if isinstance(p, Quantised)]
    assert names
    assert names == quantised_weights(bare_image(fields, dtype=torch.bfloat16).denoiser)


def _folder(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "tiny-image-bases"
