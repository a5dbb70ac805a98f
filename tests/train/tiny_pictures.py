"""Image runs that take about a second, on a tiny base and a folder of drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tests.tiny_image_base import tiny_image_base
from tests.train.text.tiny_runs import merged
from veneer.train.config.load import config_from
from veneer.train.image.run import run_images
from veneer.train.image.save import ImageResult


def drawings(folder: Path, count: int = 6) -> Path:
    """Write `count` captioned pictures of two shapes, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i}.png"
        if path.exists():
            continue
        image = Image.new("RGB", (48, 32) if i % 2 else (40, 40), (30 * i, 200 - 20 * i, 120))
        draw = ImageDraw.Draw(image)
        draw.ellipse((3 + i, 5, 25, 25), fill=(250, 40 * i, 30))
        draw.rectangle((20, 3 + 2 * i, 30, 30), fill=(20 * i, 90, 240 - 30 * i))
        image.save(path)
        path.with_suffix(".txt").write_text(f"a {'red' if i % 2 else 'blue'} house, flat")
    return folder


def image_values(folder: Path, output: Path, family: str = "flux1", /, **sections: Any) -> dict[str, Any]:
    """Return a configuration for six steps; `sections` are merged into it."""
    values: dict[str, Any] = {
        "base": str(tiny_image_base(folder, family)),
        "data": {"pictures": str(drawings(folder / "drawings")), "trigger": "sks", "split": 2},
        "output": str(output),
        "adapter": {"rank": 4, "alpha": 4.0, "dropout": 0.2},
        "optimizer": {"learning_rate": 3e-3},
        "batching": {"rows": 4},
        "schedule": {"steps": 6},
        "evaluation": {"every": 3},
        "checkpoint": {"every": 2},
    }
    values["data"]["cache"] = str(folder / "cache")
    if family.startswith("qwen"):  # the files of qwen bases do not state the image size
        values["data"]["resolution"] = 32
    return merged(values, sections)


def run(
    folder: Path,
    output: Path,
    family: str = "flux1",
    /,
    *,
    resume: bool = False,
    dry_run: bool = False,
    on_event: Any = None,
    base: Any = None,
    force: bool = False,
    **sections: Any,
) -> ImageResult:
    config, sources = config_from(image_values(folder, output, family, **sections))
    listen = on_event or (lambda event: None)
    return run_images(config, resume=resume, dry_run=dry_run, on_event=listen, base=base, sources=sources, force=force)
