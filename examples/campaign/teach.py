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

import veneer  # noqa: E402

DRAWING = {"guidance": 3.0}
"""What all pictures are drawn with: what the bases draw best at (docs/catalogue-bases.md). Guided from outside,
catalogue-sdxl makes what each adapter does stronger, and diffusers' own 5 is too much for three of them."""


def distilled(base: Any) -> bool:
    """Whether guidance is an input of the base."""
    return bool(base.denoiser.config.get("guidance_embeds"))


def knows_lines(base: Any) -> bool:
    """Whether it has seen line drawings and a lens."""
    return Path(base.name).name in campaign.KNOW_LINES


def words_for(base: Any, scene: campaign.Scene, *, brand: bool = False, lens: bool = False) -> str:
    """What this base is asked for, in words that it knows."""
    return campaign.words(scene, brand=brand, lens=lens, lines=knows_lines(base))


def teach(role: str, base: Any, data: Path, output: Path, *settings: str, **options: Any) -> str:
    """The role's adapter, learned from pictures that are drawn into `data` first. `settings` and
    `options` are train_image's."""
    campaign.write_pictures(data, [role], lines=knows_lines(base))
    beside: list[str] = []
    if role == "product":
        write_others(data / "others", base)
        beside = [f"data.class_folder={data / 'others'}"]
    return learned(HERE / f"{role}.yaml", base, data / role, output, *beside, *settings, **options)


def learned(config: Path, base: Any, pictures: Path, output: Path, *settings: str, **options: Any) -> str:
    """The adapter that is learned from a folder of pictures. A base that guidance is no input of is told none."""
    places = [f"base={base.name}", f"data.pictures={pictures}", f"output={output}"]
    if not distilled(base):
        places.append("loss.guidance=1")
    return str(veneer.train_image(config, *places, *settings, base=base, **options).adapter)


def write_others(folder: Path, base: Any, count: int = 40) -> None:
    """Class pictures for the product: other things as the base itself draws them, which it is to go on doing. With
    distilled guidance at 1, which is what it is told while it learns from them."""
    r = random.Random(60)
    captions = [campaign.words(campaign.plain_scene(r)) for _ in range(count)]
    drawing = {"guidance": 1.0} if distilled(base) else DRAWING
    made = veneer.image(base, captions, seed=range(500, 500 + count), batch_size=16, **drawing)
    campaign.write_rows(folder, zip(arrays(made), captions, strict=True))


def stacked(adapters: Mapping[str, str]) -> list[str]:
    """Each with its role: veneer knows how they are stacked (formats/campaign.py)."""
    return [f"{place}@campaign={role}" for role, place in adapters.items()]


def arrays(made: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(each.image.convert("RGB")) for each in made]
