"""Image bases of every family, with the official number of blocks at tiny width.

An adapter on every linear module of the denoiser and the text encoders learns in one training step, and
changes the pipeline's picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.attached import attached
from tests.image_twins import latent_shape
from tests.tiny_image_base import SIZE, TINY_FAMILIES, tiny_image_base
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.core.targets import base_modules
from veneer.models.image.base import load_image
from veneer.models.image.generate import ImageRow, MixPlan, PictureSettings, generate_images
from veneer.models.image.predict import alphas_cumprod, embed_prompts, predict

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid value encountered in cast.*:RuntimeWarning"),
]


UNREAD = {
    # SDXL uses the second-to-last layer of its first encoder, and not the pooled vector.
    "sdxl": r"text_encoder\.text_model\.encoder\.layers\.11\..*",
    # The last block's text output is not used.
    "sd3": r"transformer\.transformer_blocks\.23\.attn\.add_q_proj",
    "qwen-image": r"transformer\.transformer_blocks\.59\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)",
}
"""Modules that do not affect any prediction, by architecture."""


def _slow_where_another_has_its_blocks(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow) if family in ("schnell", "klein") else family


@pytest.mark.parametrize("family", [*map(_slow_where_another_has_its_blocks, TINY_FAMILIES)])
def test_every_target_learns_in_one_step(family: str, bases: Path) -> None:
    base = load_image(str(tiny_image_base(bases, family, full=True)))
    adapter = create(base.model, LoraSpec(rank=1, alpha=1, targets="all-linear"), seed=0)
    linears = {n for n, m in base_modules(base.model) if isinstance(m, torch.nn.Linear)}
    assert set(adapter.pairs) == linears
    for number, pair in enumerate(adapter.pairs.values()):
        pair.B.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    shape = (2, *latent_shape(base, SIZE, SIZE))
    x, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    if base.prediction == "flow":
        times = torch.tensor([0.3, 0.8])
        a, b = 1 - times, times
        target = noise - x
    else:
        times = torch.tensor([10, 700])
        cumulative = alphas_cumprod(base)[times]
        a, b = cumulative.sqrt(), (1 - cumulative).sqrt()
        target = noise
    noisy = a.view(-1, 1, 1, 1) * x + b.view(-1, 1, 1, 1) * noise
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2) if base.family == "sdxl" else None
    mix = (("it", 1.0),)
    with attached(base.model, adapter, name="it", trainable=True) as attachment:
        parameters = attachment.parameters("it")

        def loss() -> torch.Tensor:
            text = embed_prompts(base, ["a red house", "a dog"])
            return (predict(base, noisy, times, text, sizes=sizes) - target).square().mean()

        before = loss()
        before.backward()
        still = {n.rpartition(".")[0] for n, p in parameters.items() if p.grad is None or not p.grad.any()}
        assert still == {n for n in linears if re.fullmatch(UNREAD.get(family, "-"), n)}
        with torch.no_grad():
            norm = sum(p.grad.square().sum() for p in parameters.values() if p.grad is not None).sqrt()
            for p in parameters.values():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad / norm)
            assert loss() < before
        rows = [ImageRow("a red house", plan=plan) for plan in (MixPlan(mix, ((0.0, mix),)), MixPlan())]
        settings = PictureSettings(width=SIZE, height=SIZE, steps=2)
        drawn = [np.asarray(p.image, dtype=int) for p in generate_images(base, rows, settings, attachment=attachment)]
    assert drawn[0].shape == (SIZE, SIZE, 3)
    assert np.abs(drawn[0] - drawn[1]).max() > 0
