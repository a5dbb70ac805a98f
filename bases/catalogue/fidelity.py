"""Do the bases draw what they are told? `python bases/catalogue/fidelity.py WORK [catalogue-flux …] [--sheets DIR]`

Scenes of combinations of kind and colour that the base was trained on, and of combinations held out of everything that
it learned from; the latter as line drawings too, of which kind and view alone are asked. The judge, which has seen true
renders alone, says what it sees; each figure is the share of pictures where that is what was asked for. Beside it the
same for the true pictures after the base's own autoencoder: the ceiling. Prints one JSON object; `--sheets` writes ten
pictures of each, unpicked, under their captions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoencoder import through
from diffusers import DiffusionPipeline
from judge import HEADS, Judge, Shown, judge, load_judge
from pictures import as_line_drawing, is_new
from PIL import Image
from scenes import SIDE, Array, Scene, any_scene, caption, picture
from words import GUIDANCE, LENGTH

from veneer.imaging.sheet import sheet
from veneer.models.builtin import packaged_folder


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("work", type=Path)
    options.add_argument("bases", nargs="*", default=["catalogue-flux", "catalogue-sdxl"])
    options.add_argument("--scenes", type=int, default=300, help="of seen combinations, and as many new ones")
    options.add_argument("--sheets", type=Path)
    given = options.parse_args()
    model = load_judge(given.work)
    result: dict[str, Any] = {}
    for base in given.bases:
        pipeline = DiffusionPipeline.from_pretrained(packaged_folder() / base, torch_dtype=torch.float32)
        new = asked(given.scenes, new=True)
        r = random.Random(5)
        groups = {
            "seen combinations": asked(given.scenes, new=False),
            "new combinations": new,
            "line drawings of new combinations": [as_line_drawing(s, r) for s in new],
        }
        for group, scenes in groups.items():
            drawn = generate(pipeline, [caption(s) for s in scenes])
            truths = np.stack([picture(s) for s in scenes])
            result[f"{base}, {group}"] = fidelity(model, drawn, scenes)
            result[f"{base}, {group}, true pictures through the autoencoder"] = fidelity(
                model, through(pipeline.vae, truths), scenes
            )
            if given.sheets:
                given.sheets.mkdir(parents=True, exist_ok=True)
                _ten(drawn, scenes).save(given.sheets / f"{base}-{group.split()[0]}.png", optimize=True)
    print(json.dumps(result, indent=1))


def asked(count: int, *, new: bool, seed: int = 4) -> list[Scene]:
    r = random.Random(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = any_scene(r)
        if is_new(scene.kind, scene.colour) == new:
            found.append(scene)
    return found


@torch.no_grad()
def generate(pipeline: Any, prompts: list[str], *, seed: int = 0, steps: int = 24) -> Array:
    """Bytes (n, 128, 128, 3), at the guidance that the base draws best at. Each picture has its own generator, seeded
    by `seed` and its place."""
    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    flux = type(pipeline).__name__ == "FluxPipeline"
    extra = {"max_sequence_length": LENGTH} if flux else {}
    guidance = GUIDANCE["flux" if flux else "sdxl"]
    for i in range(0, len(prompts), 16):
        part = prompts[i : i + 16]
        noise = [torch.Generator().manual_seed(seed * 100_003 + i + j) for j in range(len(part))]
        made = pipeline(
            part, height=SIDE, width=SIDE, num_inference_steps=steps, guidance_scale=guidance,
            output_type="np", generator=noise, **extra,
        )  # fmt: skip
        pictures.append((made.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def fidelity(model: Judge, pixels: Array, scenes: list[Scene]) -> dict[str, float]:
    """Head -> share of pictures where the judge says what was asked for, over those that show it; `kind in 5`: the kind
    is among its first five."""
    seen = judge(model, pixels)
    shares = {}
    for head in [h for h in HEADS if h != "lens"]:
        told = [i for i, s in enumerate(scenes) if Shown(s).word(head) is not None]
        if not told:
            continue
        shares[head] = round(sum(seen.words[head][i] == getattr(scenes[i], head) for i in told) / len(told), 3)
    first = seen.chances["kind"].topk(5, 1).indices.tolist()
    shares["kind in 5"] = round(
        sum(s.kind in [HEADS["kind"][j] for j in row] for s, row in zip(scenes, first, strict=True)) / len(scenes), 3
    )
    return shares


def _ten(drawn: Array, scenes: list[Scene]) -> Image.Image:
    """The first ten at four times their size, each under its caption."""
    rows = [
        sheet([[Image.fromarray(p) for p in drawn[i : i + 5]]], columns=[caption(s) for s in scenes[i : i + 5]],
              least=4 * SIDE, font_size=18)
        for i in (0, 5)
    ]  # fmt: skip
    whole = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, row in enumerate(rows):
        whole.paste(row, (0, i * rows[0].height))
    return whole


if __name__ == "__main__":
    main()
