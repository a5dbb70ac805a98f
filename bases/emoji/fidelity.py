"""Do the bases draw what they are told? `python bases/emoji/fidelity.py WORK [emoji-flux emoji-sdxl] [--sheets DIR]`

For names that the base was trained on and names held out of its training, in all four styles, the judge says whether
it recognises the thing (first of 1,606, among the first five) and the style. Beside it the same for the real drawings
after the base's own autoencoder: the ceiling. Prints one JSON object; `--sheets` writes the pictures to look at.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from drawings import SETS, caption, is_held_out, load_drawings
from judge import STYLES, Judge, judge, load_judge
from PIL import Image
from torch import Tensor
from words import LENGTH

from veneer.models.builtin import packaged_place
from veneer.models.image import sheet as image_grid

__all__ = ["generate", "image_of", "measure", "sheet"]

SHIPPED = packaged_place()


@torch.no_grad()
def generate(pipeline: Any, prompts: list[str], *, seed: int = 0, steps: int = 24, guidance: float = 3.0) -> Tensor:
    """(n, 3, 64, 64) in -1 … 1. Each picture has its own generator, seeded by `seed` and its place."""
    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    extra = {"max_sequence_length": LENGTH} if "Flux" in type(pipeline).__name__ else {}
    for i in range(0, len(prompts), 32):
        part = prompts[i : i + 32]
        out = pipeline(
            part, height=64, width=64, num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
            generator=[torch.Generator().manual_seed(seed * 100_003 + i + j) for j in range(len(part))], **extra,
        )  # fmt: skip
        pictures.append(out.images.float() * 2 - 1)
    return torch.cat(pictures)


def measure(model: Judge, pictures: Tensor, names: list[str], styles: list[str]) -> dict[str, float]:
    verdict = judge(model, pictures, names)
    wanted = torch.tensor([STYLES.index(s) for s in styles])
    shares = {
        "top 1": (verdict.rank == 0), "top 5": (verdict.rank < 5), "style": (verdict.style.argmax(1) == wanted)
    }  # fmt: skip
    return {k: round(float(v.float().mean()), 3) for k, v in shares.items()} | {"pictures": len(names)}


def sheet(rows: list[tuple[str, Tensor]], columns: list[str], path: Path, least: int = 64) -> None:
    """Labelled rows of pictures under labelled columns."""
    cells = [[image_of(picture) for picture in pictures] for _, pictures in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    made = image_grid.sheet(cells, rows=[label for label, _ in rows], columns=columns, least=least, font_size=12)
    made.quantize(256).save(path, optimize=True)  # a third of the bytes; they are shipped


def image_of(picture: Tensor) -> Image.Image:
    return Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("work", type=Path)
    options.add_argument("bases", nargs="*", default=["emoji-flux", "emoji-sdxl"])
    options.add_argument("--sheets", type=Path)
    options.add_argument("--guidance", type=float, default=3.0)
    given = options.parse_args()
    drawings, model = load_drawings(given.work), load_judge(given.work)
    where = {(n, s): i for i, (n, s) in enumerate(zip(drawings.names, drawings.styles, strict=True))}
    complete = sorted({n for n in drawings.names if all((n, s) in where for s in SETS)})
    held = [n for n in complete if is_held_out(n)]
    seen = random.Random(0).sample([n for n in complete if not is_held_out(n)], len(held))
    real = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    result: dict[str, Any] = {}
    for base in given.bases:
        pipeline = DiffusionPipeline.from_pretrained(SHIPPED / base, torch_dtype=torch.float32)
        result[base] = {}
        for group, names in (("seen", seen), ("held out", held)):
            pairs = [(n, s) for s in SETS for n in names]
            pictures = generate(pipeline, [caption(n, s) for n, s in pairs], guidance=given.guidance)
            x = real[[where[pair] for pair in pairs]]
            with torch.no_grad():
                coded = torch.cat(
                    [pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mean).sample for part in x.split(64)]
                )
            labels = [n for n, _ in pairs], [s for _, s in pairs]
            result[base][group] = {
                "generated": measure(model, pictures, *labels), "real, coded": measure(model, coded, *labels)
            }  # fmt: skip
            if given.sheets:
                shown = names[:: max(1, len(names) // 12)][:12]
                rows = []
                for k, style in enumerate(SETS):
                    at = [k * len(names) + names.index(n) for n in shown]
                    rows += [(style, pictures[at]), ("real", x[at])]
                name = group.replace(" ", "-")
                sheet(rows, shown, given.sheets / f"{base}-{name}.png")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
