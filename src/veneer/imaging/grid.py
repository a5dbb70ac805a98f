"""Sheets for visual comparison: strengths, adapters, or base against mix.

| sheet     | rows          | columns               |
| strength  | seeds         | strengths of one mix  |
| adapters  | prompts       | the base, each adapter |
| compare   | prompts×seeds | the base, the mix     |

All cells of a sheet are requests of one call: batches hold different mixes, and the same seed starts from the
same noise in every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from veneer.errors import ConfigError, nearest
from veneer.imaging.adapters import ImagePipeline, Use, label_of
from veneer.imaging.generate import ImageRequest, Options, RecordedPicture, make
from veneer.models.image.sheet import sheet

if TYPE_CHECKING:
    from PIL.Image import Image

_SHEETS = ("strength", "adapters", "compare")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class GridLayout:
    """The cells of a sheet. `asks`: requests in row-major order."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    asks: tuple[ImageRequest, ...]
    title: str = ""


@dataclass
class PictureGrid:
    """The sheet, and its pictures in row-major order."""

    image: Image
    made: list[RecordedPicture]
    layout: GridLayout


def layout(
    kind: str,
    prompts: Sequence[str],
    uses: Sequence[Use],
    *,
    seeds: Sequence[int] = (0,),
    strengths: Sequence[float] = STRENGTHS,
    negative: str = "",
) -> GridLayout:
    """Return the requests of a sheet and their positions.

    A strength of a `strength` sheet multiplies the strengths of the whole mix. Raises ConfigError for a sheet
    without adapters, prompts, seeds or strengths, or of an unknown kind."""
    if kind not in _SHEETS:
        near = nearest(kind.lower(), _SHEETS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no sheet {kind!r}", fix=f"{hint}known: {', '.join(_SHEETS)}")
    for what, given in (("prompt", prompts), ("adapter", uses), ("seed", seeds)):
        if not given:
            fix = "--adapter NAME_OR_PATH" if what == "adapter" else None
            raise ConfigError(f"the {kind} sheet needs {'an' if what == 'adapter' else 'a'} {what}", fix=fix)
    named = " + ".join(_label(use) for use in uses)
    if kind == "strength":
        if len(prompts) != 1:
            raise ConfigError(f"the strength sheet is of one prompt, not {len(prompts)}", fix="draw a sheet for each")
        if not strengths:
            raise ConfigError("the strength sheet needs strengths", fix="--strengths 0,0.5,1")
        asks = [
            ImageRequest(prompts[0], negative, seed, _times(uses, by) if by else ())
            for seed in seeds
            for by in strengths
        ]
        rows = [f"seed {seed}" for seed in seeds]
        columns = tuple(f"strength {by:g}" for by in strengths)
        return GridLayout(tuple(rows), columns, tuple(asks), f"{prompts[0]}\n{named}")
    mixes: list[tuple[str, tuple[Use, ...]]] = [("base", ())]
    mixes += [(_label(use), (use,)) for use in uses] if kind == "adapters" else [(named, tuple(uses))]
    places = [(prompt, seed) for prompt in prompts for seed in seeds]
    rows = [prompt if len(seeds) == 1 else f"{prompt}\nseed {seed}" for prompt, seed in places]
    asks = [ImageRequest(prompt, negative, seed, mix) for prompt, seed in places for _, mix in mixes]
    title = f"seed {seeds[0]}" if len(seeds) == 1 else ""
    return GridLayout(tuple(rows), tuple(name for name, _ in mixes), tuple(asks), title)


def _times(uses: Sequence[Use], by: float) -> tuple[Use, ...]:
    return tuple((name, replace(strength, strength=strength.strength * by)) for name, strength in uses)


def _label(use: Use) -> str:
    name, strength = use
    return label_of(name) if str(strength) == "1" else f"{label_of(name)}:{strength}"


def draw_grid(
    mixer: ImagePipeline,
    plan: GridLayout,
    options: Options | None = None,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> PictureGrid:
    """Generate the pictures of a layout and draw them on one sheet.

    Raises the errors of `make`."""
    made = make(mixer, plan.asks, options, on_step=on_step)
    wide = len(plan.columns)
    cells = [[m.image for m in made[i : i + wide]] for i in range(0, len(made), wide)]
    return PictureGrid(sheet(cells, rows=plan.rows, columns=plan.columns, title=plan.title), made, plan)
