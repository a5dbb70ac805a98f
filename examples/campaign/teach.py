"""Train and stack the campaign's adapters, for run.py and benchmarks/image_campaign.py."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "bases" / "catalogue"))

import campaign  # noqa: E402
import numpy as np  # noqa: E402
from words import GUIDANCE  # noqa: E402

import veneer  # noqa: E402

OTHERS = 200
"""Number of class images for prior preservation.

With fewer class images, the product's adapter changes other objects more (docs/notes/campaign.md)."""

FOR_NOISE = ("adapter.targets=attention+ff+conv", "loss.noise_offset=0.5", "loss.shift=auto")
"""Settings for a noise-prediction base, because the configurations are for a flow base.

Trains LoRA on the UNet's convolutions. Uses offset noise, because otherwise the model hardly learns the
brand's background and the lens's light. Sets `loss.shift` to auto, because only flow bases have a shift."""


def distilled(base: Any) -> bool:
    """Return whether guidance is an input of the base."""
    return bool(base.denoiser.config.get("guidance_embeds"))


def guidance_of(base: Any) -> float:
    return GUIDANCE["flux" if distilled(base) else "sdxl"]


def teach(role: str, base: Any, data: Path, output: Path, *settings: str, **options: Any) -> str:
    """Create a role's images in `data`, train its adapter and return the adapter's folder.

    `settings` and `options` are passed to train_image."""
    campaign.write_pictures(data, [role])
    beside: list[str] = []
    if role == "product":
        write_others(data / "others", base)
        beside = [f"data.class_folder={data / 'others'}"]
    return learned(HERE / f"{role}.yaml", base, data / role, output, *beside, *settings, **options)


def learned(config: Path, base: Any, pictures: Path, output: Path, *settings: str, **options: Any) -> str:
    """Train an adapter on a folder of images and return the adapter's folder.

    `config`: configuration for a flow base. For a noise-prediction base, FOR_NOISE overrides it; `settings`
    override both."""
    given = [f"base={base.name}", f"data.pictures={pictures}", f"output={output}"]
    if base.prediction != "flow":
        given += FOR_NOISE
    return str(veneer.train_image(config, *given, *settings, base=base, **options).adapter)


def write_others(folder: Path, base: Any) -> None:
    """Generate class images of other objects with the base, for prior preservation.

    A guidance-distilled base gets guidance 1, as in training."""
    r = random.Random(60)
    captions = [campaign.words(campaign.plain_scene(r)) for _ in range(OTHERS)]
    guidance = 1.0 if distilled(base) else guidance_of(base)
    made = veneer.image(base, captions, seed=range(500, 500 + OTHERS), batch_size=16, guidance=guidance)
    campaign.write_rows(folder, zip(arrays(made), captions, strict=True))


def stacked(adapters: Mapping[str, str]) -> list[str]:
    """Return adapter specs with roles; formats/strengths.py chooses their blocks and steps by role."""
    return [f"{place}@campaign={role}" for role, place in adapters.items()]


def arrays(made: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(each.image.convert("RGB")) for each in made]
