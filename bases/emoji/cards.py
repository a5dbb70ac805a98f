"""The model cards of the four folders, written by `build.py WORK export` from the models themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drawings import SETS

__all__ = ["write_cards"]

EARLIER = {"flux": (2600, 2400, 2400), "sdxl": (3400, 2400, 2800)}
"""Stage -> steps of the legs before the last (`build.py WORK adopt`): the first with AdamW, the others with Muon."""

_NAMES = {
    "noto": "Noto Emoji", "twemoji": "Twemoji", "fluent": "Fluent Emoji (flat)", "emojione": "EmojiOne 2"
}  # fmt: skip
_BY = {
    "noto": "Google", "twemoji": "Twitter, Inc and other contributors", "fluent": "Microsoft Corporation",
    "emojione": "EmojiOne (Ranks.com)",
}  # fmt: skip

_WHAT = {
    "emoji-flux": "A FLUX.1 of a few million parameters that draws emoji. Real class, real module names "
    "(`FluxTransformer2DModel`), few and narrow blocks, with CLIP and T5 encoders, guidance as an input and an "
    "autoencoder of its own: everything that holds for adapters on FLUX.1-dev can be tried on a CPU in minutes.",
    "emoji-sdxl": "A Stable Diffusion XL of a few million parameters that draws emoji. Real class, SDXL's block layout "
    "and module names (`UNet2DConditionModel`), shallower transformers, two CLIP encoders, added time ids and an "
    "autoencoder of its own: everything that holds for adapters on SDXL can be tried on a CPU in minutes.",
    "emoji-flux-canny": "A ControlNet (`FluxControlNetModel`) for emoji-flux and the lines of an edge picture, "
    "which it follows roughly.",
    "emoji-sdxl-canny": "A ControlNet (`ControlNetModel`) that holds emoji-sdxl to the lines of an edge picture.",
}


def write_cards(folders: dict[str, Path], parts: dict[str, dict[str, float]], steps: dict[str, int]) -> None:
    """README.md into each folder. `parts`: folder -> {part: million parameters}. `steps`: stage -> steps of 64."""
    for name, folder in folders.items():
        stage = name.removeprefix("emoji-")
        (folder / "README.md").write_text(_card(name, parts[name], steps, stage), encoding="utf-8")


def _card(name: str, parts: dict[str, float], steps: dict[str, int], stage: str) -> str:
    control = name.endswith("-canny")
    size = sum(parts.values())
    rows = "\n".join(f"| {part} | {millions:.2f} M |" for part, millions in parts.items())
    out: list[Any] = [
        "---", "license: cc-by-4.0", "library_name: diffusers",
        f"pipeline_tag: {'image-to-image' if control else 'text-to-image'}", "---", f"# {name}", "", _WHAT[name], "",
        f"| part | parameters |\n| --- | --- |\n{rows}\n| together | {size:.2f} M |", "",
        "bfloat16, 64 × 64 pixels, prompts of at most 20 tokens, in lower case: the thing's name, then the style, as "
        "`grinning face, noto style`. Styles: noto, twemoji, fluent, emojione; each also with lines around its shapes, "
        "as `grinning face, outlined noto style`.", "",
        "```", _example(name), "```", "",
    ]  # fmt: skip
    if control:
        out += ["![twelve held-out drawings: lines, and what is made of them](lines.png)", ""]
    else:
        out += ["![names that it was trained on](seen.png)", "", "![names that it never saw](held-out.png)", "",
                "Each style above the real drawing. How often a judge knows thing and style: docs/emoji-bases.md.",
                ""]  # fmt: skip
    out += [
        "## Recipe",
        f"`bases/emoji/build.py` in veneer's repository, from nothing, on one core of a CPU: {_legs(stage, steps)} of "
        f"64 drawings, warm-up and cosine from {'1e-3' if control else '1.5e-3'}, an average of the weights kept with "
        f"0.999. The autoencoder: {steps['vae']:,} steps of 24. One name in ten, chosen by hash, was held out of "
        "everything. No other data, no other model's weights, no person's pictures.",
        "",
        "## Data, licences, attribution",
        "The drawings that are named alike in at least three of the four sets; flags and skin tones are left out.",
        "", "| set | by | package | licence |", "| --- | --- | --- | --- |",
        *(f"| {_NAMES[k]} | {_BY[k]} | `{package}` | {licence} |" for k, (package, licence) in SETS.items()),
        "",
        "The weights are given under CC BY 4.0. Who publishes pictures close to a set's drawings should name that set.",
        "",
        "## Limits",
        "Small and made for trying adapters: rare names come out as blobs, text and flags not at all, and nothing but "
        "emoji on white. It does not understand sentences.", "",
    ]  # fmt: skip
    return "\n".join(map(str, out))


def _legs(stage: str, steps: dict[str, int]) -> str:
    if stage not in EARLIER:
        return f"500 steps with Muon, and {steps[stage]:,} beside its base's last leg,"
    first, *others = EARLIER[stage]
    muon = ", ".join(f"{n:,}" for n in others)
    return (
        f"{first:,} steps with AdamW, then {muon} and {steps[stage]:,} with Muon, each leg with a warm-up of its own, "
        "and one drawing in three of the last with a black line along the edge of every shape,"
    )


def _example(name: str) -> str:
    if name.endswith("-canny"):
        base = name.removesuffix("-canny")
        return f'veneer image --base {base} --control canny=photo.png:0.8 "grinning face, noto style" -o out.png'
    return f'veneer image --base {name} "grinning face, noto style" -o out.png'
