"""The contact sheets of the cards: `python bases/emoji/contact.py WORK`, after `build.py WORK export`.

Twelve names that a base was trained on and twelve that it was not, in every style, above the real drawing; of a
ControlNet the lines of twelve held-out drawings and what it makes of them. Chosen by the alphabet, not by look.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DiffusionPipeline, FluxControlNetModel, FluxControlNetPipeline
from diffusers import StableDiffusionXLControlNetPipeline as ControlledSDXL
from drawings import SETS, caption, is_held_out, load_drawings
from edges import edges
from fidelity import SHIPPED, generate, sheet
from torch import Tensor
from words import LENGTH


def main() -> None:
    drawings = load_drawings(Path(sys.argv[1]))
    where = {(n, s): i for i, (n, s) in enumerate(zip(drawings.names, drawings.styles, strict=True))}
    real = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    complete = sorted({n for n in drawings.names if all((n, s) in where for s in SETS)})
    for base in ("emoji-flux", "emoji-sdxl"):
        pipeline = DiffusionPipeline.from_pretrained(SHIPPED / base, torch_dtype=torch.float32)
        for file, held in (("seen", False), ("held-out", True)):
            names = _spread([n for n in complete if is_held_out(n) == held])
            rows = []
            for style in SETS:
                rows.append((style, generate(pipeline, [caption(n, style) for n in names])))
                rows.append(("real", real[[where[n, style] for n in names]]))
            sheet(rows, names, SHIPPED / base / f"{file}.png")
        names = _spread([n for n in complete if is_held_out(n)])
        x = real[[where[n, "noto"] for n in names]]
        lines = edges(x)
        made = [(f"at {w:g}", controlled(pipeline, base, names, lines, w)) for w in (0.0, 0.5, 1.0)]
        sheet([("lines", lines), *made, ("real", x)], names, SHIPPED / f"{base}-canny" / "lines.png")


def _spread(names: list[str], count: int = 12) -> list[str]:
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


@torch.no_grad()
def controlled(pipeline: Any, base: str, names: list[str], lines: Tensor, weight: float) -> Tensor:
    """Pictures of these emoji by their lines, as the ControlNet beside the base takes them. lines: in -1 … 1."""
    flux = base == "emoji-flux"
    cls: Any = FluxControlNetModel if flux else ControlNetModel
    control = cls.from_pretrained(SHIPPED / f"{base}-canny", torch_dtype=torch.float32)
    parts = {k: v for k, v in pipeline.components.items() if k not in ("image_encoder", "feature_extractor")}
    made: Any = (FluxControlNetPipeline if flux else ControlledSDXL)(**parts, controlnet=control)
    made.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"image": (lines + 1) / 2}
    if flux:  # whose pipeline gives a tensor to the autoencoder as it is, which knows -1 … 1
        given = {"control_image": lines, "max_sequence_length": LENGTH}
    out = made(
        [caption(n, "noto") for n in names], height=64, width=64, num_inference_steps=24, guidance_scale=3.0,
        controlnet_conditioning_scale=weight, output_type="pt",
        generator=[torch.Generator().manual_seed(i) for i in range(len(names))], **given,
    )  # fmt: skip
    return out.images.float() * 2 - 1  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
