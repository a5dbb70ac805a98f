"""Sheets for visual comparison: strengths of one mix, or several adapters.

| sheet    | rows            | columns                |
| strength | prompts × seeds | strengths of one mix   |
| adapters | prompts × seeds | the base, each adapter |

All cells of a sheet are generated in one call. A batch can contain different mixes, and the same seed starts
from the same noise in every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from veneer.errors import ConfigError, nearest
from veneer.imaging.adapters import ImagePipeline, Use, label_of
from veneer.imaging.generate import ImageRequest, Options, RecordedPicture, generate
from veneer.imaging.sheet import sheet

if TYPE_CHECKING:
    from PIL.Image import Image

_SHEETS = ("strength", "adapters")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class GridLayout:
    """The cells of a sheet. `requests` are in row-major order."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    requests: tuple[ImageRequest, ...]
    title: str


def layout(
    kind: str,
    prompts: Sequence[str],
    uses: Sequence[Use],
    *,
    seeds: Sequence[int] = (0,),
    strengths: Sequence[float] = STRENGTHS,
    negative: str = "",
) -> GridLayout:
    """Return the layout of a sheet: the labels of rows and columns, and the requests.

    On a `strength` sheet, each value of `strengths` multiplies the strengths of all adapters in the mix.
    Raises ConfigError if `kind` is unknown or if `uses` is empty."""
    if kind not in _SHEETS:
        suggestion = nearest(kind.lower(), _SHEETS, 1)
        hint = f"did you mean {suggestion[0]}? " if suggestion else ""
        raise ConfigError(f"there is no sheet {kind!r}", fix=f"{hint}known: {', '.join(_SHEETS)}")
    if not uses:
        raise ConfigError(f"the {kind} sheet needs an adapter", fix="--adapter NAME_OR_PATH")
    if kind == "strength":
        names = " + ".join(_label(use) for use in uses)
        title = f"{prompts[0]}\n{names}" if len(prompts) == 1 else names
        mixes = [(f"strength {factor:g}", _scaled(uses, factor)) for factor in strengths]
    else:
        title = f"seed {seeds[0]}" if len(seeds) == 1 else ""
        mixes = [("base", ()), *((_label(use), (use,)) for use in uses)]
    rows, requests = [], []
    for prompt in prompts:
        for seed in seeds:
            label = [prompt] if kind == "adapters" or len(prompts) > 1 else []
            label += [f"seed {seed}"] if kind == "strength" or len(seeds) > 1 else []
            rows.append("\n".join(label))
            requests += [ImageRequest(prompt, negative, seed, mix) for _, mix in mixes]
    return GridLayout(tuple(rows), tuple(name for name, _ in mixes), tuple(requests), title)


def _scaled(uses: Sequence[Use], factor: float) -> tuple[Use, ...]:
    if not factor:
        return ()
    return tuple((name, replace(strength, strength=strength.strength * factor)) for name, strength in uses)


def _label(use: Use) -> str:
    name, strength = use
    return label_of(name) if str(strength) == "1" else f"{label_of(name)}:{strength}"


def draw_grid(
    pipeline: ImagePipeline,
    grid: GridLayout,
    options: Options | None = None,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Image, list[RecordedPicture]]:
    """Generate the images of a layout.

    Returns (the sheet, the images in row-major order)."""
    pictures = generate(pipeline, grid.requests, options, on_step=on_step)
    wide = len(grid.columns)
    cells = [[p.image for p in pictures[i : i + wide]] for i in range(0, len(pictures), wide)]
    return sheet(cells, rows=grid.rows, columns=grid.columns, title=grid.title), pictures
