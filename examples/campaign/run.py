"""Tarnhill's campaign: teach an image base a product, a brand's look and a lens, and draw with all three.

    python examples/campaign/run.py [--base catalogue-flux] [--output runs/campaign]
    python examples/campaign/run.py --small                       # product and brand alone: `make image-quickstart`

The pictures are drawn by the world of the base (bases/catalogue), which has never shown it the product, the brand or
the lens; so what an adapter should have made can be drawn as well, and stands in the last row of the sheet. Everything
that veneer does here is in `main`, through the public functions.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "bases" / "catalogue"))

import campaign  # noqa: E402
from kinds import KINDS  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from scenes import Scene  # noqa: E402

import veneer  # noqa: E402
from veneer.cli.main import ended  # noqa: E402
from veneer.models.image.sheet import sheet  # noqa: E402

console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    started = time.perf_counter()
    roles = campaign.ROLES[:2] if args.small else campaign.ROLES

    step(1, f"The base: a small model that draws a catalogue of {len(KINDS)} kinds of things")
    base = veneer.load_image_base(args.base, say=line)
    line(f"{base.name} on {base.device} in {str(base.dtype).removeprefix('torch.')}: {base.dtype_reason}")

    step(2, "The pictures: things that the base never saw")
    shutil.rmtree(args.output, ignore_errors=True)
    campaign.write_pictures(args.output, roles)
    for role in roles:
        line(f"{args.output / role}: {len(list((args.output / role).glob('*.png')))} pictures, each with its caption")
    others = args.output / "others"
    campaign.write_others(others, base)
    line(f"{others}: {len(list(others.glob('*.png')))} other things as the base draws them, which is to stay so")

    adapters = {}
    for number, role in enumerate(roles, start=3):
        step(number, f"Training: the {role}")
        places = [f"base={args.base}", f"data.pictures={args.output / role}", f"output={args.output / role}-adapter"]
        places += [f"data.class_folder={others}"] if role == "product" else []
        run = veneer.train_image(HERE / f"{role}.yaml", *places, *campaign.training(base), *args.set, base=base)
        adapters[role] = str(run.adapter)
        line(f"{run.steps} steps, {run.adapter}")

    step(len(roles) + 3, "Drawing: scenes that no adapter was shown")
    scenes = campaign.shots()[: args.shots]
    rows = drawn(base, scenes, adapters)
    path = args.output / "sheet.png"
    columns = [f"{s.surface.removeprefix('a ').removeprefix('an ')}, {s.view}" for s in scenes]
    sheet(list(rows.values()), rows=list(rows), columns=columns).save(path, optimize=True)

    console.print(f"\n  the sheet   {path}\n  time        {time.perf_counter() - started:.0f} s from first to last\n")
    console.print("Draw something yourself:", style="bold")
    asked = " ".join(f"--adapter {use}" for use in in_campaign(adapters))
    prompt = campaign.words(Scene("mug"), brand=True)
    console.print(f'  veneer image --base {args.base} {asked} "{prompt}" -o mug.png', soft_wrap=True)


def drawn(base: Any, scenes: Sequence[Scene], adapters: dict[str, str]) -> dict[str, list[Image.Image]]:
    """Rows of a sheet: the base, each adapter alone, all, and the truth. The same scene starts from the same noise."""

    def row(*roles: str) -> list[Image.Image]:
        asked = {"brand": "brand" in roles, "lens": "lens" in roles}
        mix = [adapters[role] for role in roles] if len(roles) < 2 else in_campaign(adapters)
        prompts = [campaign.words(s, **asked) for s in scenes]
        options = campaign.drawing(base)
        made = veneer.image(
            base, prompts, adapters=mix, seed=[s.seed for s in scenes], batch_size=len(scenes), **options
        )
        return [each.image for each in made]

    rows = {"the base": row()} | {f"the {role}": row(role) for role in adapters}
    together = "both" if len(adapters) == 2 else "all three"
    wanted = {"brand": "brand" in adapters, "lens": "lens" in adapters}
    return rows | {
        together: row(*adapters),
        "the truth": [Image.fromarray(campaign.truth(s, **wanted)) for s in scenes],
    }


def in_campaign(adapters: dict[str, str]) -> list[str]:
    """Each with its role: veneer knows how they are stacked."""
    return [f"{place}@campaign={role}" for role, place in adapters.items()]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a campaign's adapters and draw with them.")
    parser.add_argument("--base", default="catalogue-flux", help="catalogue-flux or catalogue-sdxl")
    parser.add_argument("--output", type=Path, default=Path("runs/campaign"), help="emptied first")
    parser.add_argument("--small", action="store_true", help="product and brand, without the lens")
    parser.add_argument("--shots", type=int, default=6, help="scenes to draw, of twelve")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the trainings")
    return parser.parse_args(argv)


def step(number: int, title: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{escape(title)}[/]")


def line(text: Any) -> None:
    console.print(f"   {escape(str(text))}", soft_wrap=True)


if __name__ == "__main__":
    with ended():
        main()
