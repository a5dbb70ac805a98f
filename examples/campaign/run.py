"""Tarnhill's campaign: train product, brand and lens adapters, and combine them.

    python examples/campaign/run.py [--base catalogue-flux] [--output runs/campaign]
    python examples/campaign/run.py --small                  # only product and brand: `veneer image-quickstart`

A renderer (bases/catalogue) creates the training images. The base has never seen the product, the brand's
colors or the lens's light. The renderer can also create the ideal result, which is the last row of the sheet.
All calls of veneer are in `main`, `drawn` and teach.py, and use its public functions.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from teach import OTHERS, guidance_of, stacked, teach  # noqa: I001  (it shows where bases/catalogue is)

import campaign
from kinds import KINDS
from PIL import Image
from rich.console import Console
from rich.markup import escape
from scenes import Scene

import veneer
from veneer.cli.main import exit_on_error
from veneer.errors import ConfigError
from veneer.imaging.sheet import sheet

console = Console(highlight=False)

LEARNED_FROM = {
    "product": f"20 pictures of a lock that the base never saw, beside {OTHERS} other things as it draws them",
    "brand": "50 pictures of other things as the brand draws them",
    "lens": "40 pictures of other things through a photographer's lens",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    started = time.perf_counter()
    roles = campaign.ROLES[:2] if args.small else campaign.ROLES

    step(1, f"The base: a small model that draws a catalogue of {len(KINDS)} kinds of things")
    base = veneer.load_image_base(args.base, say=line)
    line(f"{base.name} on {base.device} in {str(base.dtype).removeprefix('torch.')}: {base.dtype_reason}")

    emptied(args.output)
    adapters = {}
    for number, role in enumerate(roles, start=2):
        step(number, f"The {role}: {LEARNED_FROM[role]}")
        adapters[role] = teach(role, base, args.output / "data", args.output / role, *args.set)
        line(f"{adapters[role]}, from {args.output / 'data' / role}")

    step(len(roles) + 2, "Drawing: scenes that no adapter was shown")
    scenes = campaign.shots()[: args.shots]
    shown = {f"shown of the {role}": shown_of(args.output / "data" / role, len(scenes)) for role in roles}
    rows = shown | drawn(base, scenes, adapters)
    path = args.output / "sheet.png"
    sheet(list(rows.values()), rows=list(rows)).save(path, optimize=True)

    console.print(f"\n  the sheet   {path}\n  time        {time.perf_counter() - started:.0f} s from first to last\n")
    console.print("Draw something yourself:", style="bold")
    command = f"veneer image --base {args.base} --guidance {guidance_of(base):g}"
    for uses, scene in ((stacked(adapters), Scene(campaign.PRODUCT)), ([adapters["brand"]], Scene("mushroom"))):
        mix = " ".join(f"--adapter {shlex.quote(use)}" for use in uses)
        prompt = campaign.words(scene, brand=True, lens=len(uses) > 2)
        console.print(f'  {command} {mix} "{prompt}" -o {scene.kind.split()[-1]}.png', soft_wrap=True)


def emptied(folder: Path) -> None:
    """Remove the results of an earlier run.

    Raises ConfigError if the folder contains other files."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(found - {"data", "sheet.png", *campaign.ROLES}):
        raise ConfigError(f"{folder} holds {others[0]}, which is not from here", fix="--output, a folder of its own")
    shutil.rmtree(folder, ignore_errors=True)


def shown_of(folder: Path, count: int) -> list[Image.Image]:
    """Return the first `count` training images in an adapter's folder."""
    return [Image.open(path) for path in sorted(folder.glob("*.png"))[:count]]


def drawn(base: Any, scenes: Sequence[Scene], adapters: dict[str, str]) -> dict[str, list[Image.Image]]:
    """Return the rows of the sheet: base, each adapter, all adapters, ideal result.

    The images of a scene start from the same noise in every row. Rows without the product's adapter show an
    ordinary padlock, because the base does not know the product."""
    ordinary = [replace(s, kind="padlock", colour="teal") for s in scenes]

    def row(*roles: str) -> list[Image.Image]:
        asked = {"brand": "brand" in roles, "lens": "lens" in roles}
        mix = [adapters[role] for role in roles] if len(roles) < 2 else stacked(adapters)
        prompts = [campaign.words(s, **asked) for s in (scenes if "product" in roles else ordinary)]
        seeds = [s.seed for s in scenes]
        made = veneer.image(base, prompts, adapters=mix, seed=seeds, batch_size=len(scenes), guidance=guidance_of(base))
        return [each.image for each in made]

    names = {"product": "the product", "brand": "a padlock in the brand's look", "lens": "a padlock through the lens"}
    rows = {"the base: a padlock": row()} | {names[role]: row(role) for role in adapters}
    together = "both" if len(adapters) == 2 else "all three"
    wanted = {"brand": "brand" in adapters, "lens": "lens" in adapters}
    return rows | {
        together: row(*adapters),
        "what was wanted": [Image.fromarray(campaign.truth(s, **wanted)) for s in scenes],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a campaign's adapters and draw with them.")
    parser.add_argument("--base", default="catalogue-flux", help="catalogue-flux or catalogue-sdxl")
    parser.add_argument("--output", type=Path, default=Path("runs/campaign"), help="earlier results there are removed")
    parser.add_argument("--small", action="store_true", help="product and brand, without the lens")
    parser.add_argument("--shots", type=int, default=6, choices=range(1, 13), help="scenes to draw", metavar="1 … 12")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the trainings")
    return parser.parse_args(argv)


def step(number: int, title: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{escape(title)}[/]")


def line(text: Any) -> None:
    console.print(f"   {escape(str(text))}", soft_wrap=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
