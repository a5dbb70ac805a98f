"""The model cards of the four folders, written by `build.py WORK export` from the models themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kinds import KINDS
from pictures import DRAWINGS
from scenes import SIDE, VIEWS
from words import GUIDANCE, LENGTH

_EARLIER = {
    "flux": " (the first 6,500 in a world whose things turned and grew as they liked, 500 with places,\n"
    "1,250 with 120 kinds; all before there were line drawings and a lens in it), and 3,400 more since",
    "flux-control": " (the first 800 told guidance 1 alone; all before there were line drawings and a lens),\n"
    "and 620 more since",
    "sdxl": " (in a world without line drawings and lenses), and 2,800 more since",
    "sdxl-control": " (in a world without line drawings and lenses),\nand 180 more since",
}
"""Stage -> which of the shipped weights' steps were taken otherwise; of a build from nothing none of it is so."""

_WHAT = {
    "catalogue-flux": "A FLUX.1 of a few million parameters that draws a catalogue of products: real class, real\n"
    "module names (`FluxTransformer2DModel`), few and narrow blocks, with CLIP and T5 encoders, guidance as an input\n"
    "and an autoencoder of its own.",
    "catalogue-sdxl": "A Stable Diffusion XL of a few million parameters that draws a catalogue of products: real\n"
    "class, SDXL's block layout and module names (`UNet2DConditionModel`), shallower transformers, two CLIP encoders,\n"
    "added time ids and an autoencoder of its own.",
    "catalogue-flux-control": "A ControlNet (`FluxControlNetModel`) that holds catalogue-flux to the lines of an edge\n"
    "picture or to a depth picture.",
    "catalogue-sdxl-control": "A ControlNet (`ControlNetModel`, without transformers) that holds catalogue-sdxl to\n"
    "the lines of an edge picture or to a depth picture.",
}
_EXAMPLE = "a red mug on a wooden table, brick wall, soft daylight, three-quarter view"


def _data(control: bool) -> str:
    package, licence = DRAWINGS[1:]
    if control:
        return """`bases/catalogue/scenes.py` drew all pictures, and the edge and depth pictures of them. It starts
from the base where names and shapes agree. The weights are given under CC BY 4.0."""
    return f"""`bases/catalogue/scenes.py` draws 94 of 100 pictures. The others are Twemoji's drawings
(https://github.com/jdecked/twemoji), by Twitter, Inc and other contributors, given under {licence}
(https://creativecommons.org/licenses/by/4.0/), as `{package}` packs them, drawn on white and otherwise unchanged. The
weights are given under CC BY 4.0; who publishes pictures close to a drawing of Twemoji's should name it."""


def _beside(stage: str) -> str:
    """What somebody needs to know who draws without veneer."""
    if not stage.startswith("flux"):
        return ""
    return f"""
diffusers' pipelines are told `max_sequence_length={LENGTH}`: what they give beyond it is padding, which this model has
never seen.
"""


def write_card(folder: Path, parts: Mapping[str, float], steps: int) -> None:
    """README.md into `folder`, which is named as in `_WHAT`. `parts`: name -> million parameters."""
    name = folder.name
    stage = name.removeprefix("catalogue-")
    control = stage.endswith("-control")
    named = "" if control else ", and 110 drawings by name, as `horse, twemoji style`"
    rows = "\n".join(f"| {part} | {millions:.2f} M |" for part, millions in parts.items())
    asked = f"--base {name.removesuffix('-control')} --guidance {GUIDANCE[stage.removesuffix('-control')]:g}" + (
        " --control depth=picture.png:0.8" if control else ""
    )
    (folder / "README.md").write_text(
        f"""---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: {"image-to-image" if control else "text-to-image"}
---
# {name}

{_WHAT[name]} Whatever holds for adapters on the large one can be tried on a CPU in
minutes; and as its whole world is drawn by a program, the picture that an adapter should have made is known.

| part | parameters |
| --- | --- |
{rows}
| together | {sum(parts.values()):.2f} M |

bfloat16, {SIDE} × {SIDE} pixels, prompts of at most {LENGTH} tokens, in lower case:

```
veneer image {asked} "{_EXAMPLE}" -o out.png
```
{_beside(stage)}
It knows {len(KINDS)} kinds of things with colours, finishes and patterns, surfaces, walls, lights and {len(VIEWS)}
views, line drawings, a lens{named}. The words, unpicked samples, and how
often a judge sees what was asked for: docs/catalogue-bases.md in veneer's repository.

## Recipe
`bases/catalogue/build.py` there, on a CPU: {steps:,} steps of 64 pictures{_EARLIER.get(stage, "")},
Muon, warm-up and cosine, an average of the weights. One pair of kind and colour in ten, chosen by hash, was held out of
everything. No other data{"" if control else ", no other model's weights"}, no person's pictures.

## Data, licences, attribution
{_data(control)}

## Limits
Small and made for trying adapters: it draws what its captions can say, and nothing else; it writes no text and does not
understand sentences.
""",
        encoding="utf-8",
    )
