"""A whole step of a denoiser with every kernel in its place is diffusers' own: output and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models.image.test_fast import attached, flux, flux2, same, sdxl, step
from veneer.models.image.fast import fast_denoiser
from veneer.ops.cuda.launch import recorded

RAN = {
    flux: {"norm_pairs", "norm_pairs_backward", "gelu_tanh"},
    flux2: {"norm_pairs", "norm_pairs_backward", "gate", "gate_backward"},
    sdxl: {"norm_silu", "norm_silu_backward", "gate", "gate_backward"},
}


@pytest.mark.parametrize("make", [flux, *(pytest.param(m, marks=pytest.mark.slow) for m in (flux2, sdxl))])
def test_a_step(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = make()
    with attached(model) as attachment:
        with monkeypatch.context() as patch:
            patch.setattr("veneer.ops.dispatch.DEVICE", "torch")
            want = step(attachment)
        with fast_denoiser(model) as how:
            assert how.left == {}
            with recorded() as launches:
                got = step(attachment)
    assert RAN[make] <= {each.name for each in launches}
    assert same(got, want, 1e-3)
