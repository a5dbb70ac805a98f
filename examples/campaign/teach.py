"""Teaching the campaign's adapters and stacking them, as run.py does and benchmarks/image_campaign.py measures."""

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
"""Class pictures beside the product: with fewer its adapter draws more of all other things worse
(docs/notes/campaign.md)."""

FOR_NOISE = ("adapter.targets=attention+ff+conv", "loss.noise_offset=0.5", "loss.shift=auto")
"""Settings for a base that predicts noise, as the configurations are for a flow: pairs on the UNet's convolutions;
noise that moves whole channels, without which a brand's ground and a lens's light are hardly learned; and no shift,
which is of flows."""


def distilled(base: Any) -> bool:
    """Whether guidance is an input of the base."""
    return bool(base.denoiser.config.get("guidance_embeds"))


def guidance_of(base: Any) -> float:
    return GUIDANCE["flux" if distilled(base) else "sdxl"]


def teach(role: str, base: Any, data: Path, output: Path, *settings: str, **options: Any) -> str:
    """The role's adapter, learned from pictures that are drawn into `data` first. `settings` and
    `options` are train_image's."""
    campaign.write_pictures(data, [role])
    beside: list[str] = []
    if role == "product":
        write_others(data / "others", base)
        beside = [f"data.class_folder={data / 'others'}"]
    return learned(HERE / f"{role}.yaml", base, data / role, output, *beside, *settings, **options)


def learned(config: Path, base: Any, pictures: Path, output: Path, *settings: str, **options: Any) -> str:
    """The adapter that is learned from a folder of pictures, by a configuration for a flow, which FOR_NOISE changes on
    another base. `settings` go before both."""
    given = [f"base={base.name}", f"data.pictures={pictures}", f"output={output}"]
    if base.prediction != "flow":
        given += FOR_NOISE
    return str(veneer.train_image(config, *given, *settings, base=base, **options).adapter)


def write_others(folder: Path, base: Any) -> None:
    """Class pictures for the product: other things as the base itself draws them, which it is to go on doing. With
    distilled guidance at 1, which is what it is told while it learns from them."""
    r = random.Random(60)
    captions = [campaign.words(campaign.plain_scene(r)) for _ in range(OTHERS)]
    guidance = 1.0 if distilled(base) else guidance_of(base)
    made = veneer.image(base, captions, seed=range(500, 500 + OTHERS), batch_size=16, guidance=guidance)
    campaign.write_rows(folder, zip(arrays(made), captions, strict=True))


def stacked(adapters: Mapping[str, str]) -> list[str]:
    """Each with its role: veneer knows how they are stacked (formats/campaign.py)."""
    return [f"{place}@campaign={role}" for role, place in adapters.items()]


def arrays(made: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(each.image.convert("RGB")) for each in made]
