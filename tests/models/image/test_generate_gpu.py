"""On a CUDA device, a seed gives nearly the same picture as on the CPU, with and without a mix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.image_twins import random_adapter
from tests.tiny_image_base import tiny_image_base
from veneer.core.attach import attach
from veneer.models.image.base import load_image
from veneer.models.image.generate import ImageRow, MixPlan, PictureSettings, generate_images

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["sdxl", "flux1"])
@pytest.mark.parametrize("scheduler", [None, "euler"])
def test_seed_gives_the_same_picture_on_both_devices(family: str, scheduler: str | None, tmp_path: Path) -> None:
    mix = (("a", 1.6),)  # strength 0.8 changes FLUX.1's picture by 0.95, less than the assertion below requires
    rows = [ImageRow("a cat", seed=1), ImageRow("a cat", seed=1, plan=MixPlan(mix, ((0.0, mix),)))]
    found = []
    for device in ("cpu", "cuda"):
        base = load_image(str(tiny_image_base(tmp_path, family)), device=device, dtype="float32")
        with attach(base.model) as attachment:
            attachment.add("a", random_adapter(load_image(str(base.directory), device="cpu").model, 1))
            made = generate_images(base, rows, PictureSettings(steps=4, scheduler=scheduler), attachment=attachment)
        found.append(np.stack([np.asarray(p.image).astype(int) for p in made]))
    assert np.abs(found[0] - found[1]).mean() < 1
    assert np.abs(found[0][0] - found[0][1]).mean() > 1
