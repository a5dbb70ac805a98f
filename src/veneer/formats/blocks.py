"""Strengths by block: which block of its model a module belongs to, and the ways people write a strength for each.

    down_blocks.0=0.5, mid_block=1.2, layers.3-7=0      patterns: whole dotted parts of a name, the last that fits wins
    1,0,0,0,1,1,1,1,1,1,0,0                             a list as kohya's scripts and A1111's extension take it (lbw)

Knows names; not tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from veneer.errors import ConfigError

__all__ = ["LBW", "block_of", "parse_blocks"]

_INDEX = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def block_of(module: str) -> str:
    """The block that a module belongs to: its name up to the first number, and for a U-Net up to the attention or
    resnet in it (`unet.down_blocks.1.attentions.0`); the whole name where there is no number."""
    unet = re.match(r"^(.*?(?:down_blocks|up_blocks)\.\d+\.\w+\.\d+|.*?mid_block\.\w+\.\d+)(?:\.|$)", module)
    found = unet or _INDEX.match(module)
    return found[1] if found else module


def parse_blocks(text: str, modules: Sequence[str]) -> dict[str, float]:
    """Module -> strength. `text` is "PATTERN=NUMBER,…": a pattern is whole dotted parts of the name ("mid_block",
    "down_blocks.0", "layers.3-7" for a run of numbers), the last that fits a module counts, `*` fits all; or kohya's
    list of numbers, 12, 17, 20 or 26 of them, for the U-Net of Stable Diffusion 1.5 or SDXL (see `LBW`). Modules that
    no pattern names stay at 1. Raises ConfigError listing patterns that fit nothing, and what is not understood."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if parts and all("=" not in p for p in parts):
        return _kohya_blocks([_number(p) for p in parts], modules)
    out = dict.fromkeys(modules, 1.0)
    problems = []
    for part in parts:
        pattern, equals, number = part.partition("=")
        if not equals:
            problems.append(f"{part!r}: expected PATTERN=NUMBER")
            continue
        hits = [m for m in modules if pattern == "*" or _pattern(pattern.strip()).search(m)]
        if not hits:
            problems.append(f"{pattern!r} fits no module")
        for module in hits:
            out[module] = _number(number)
    if problems:
        blocks = sorted({block_of(m) for m in modules})
        shown = "\n".join(f"  - {p}" for p in problems)
        raise ConfigError(
            f"the strengths by block do not fit:\n{shown}", fix=f"the blocks are {', '.join(blocks[:40])}"
        )
    return out


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise ConfigError(f"{text.strip()!r} is no strength", fix="a number, as in down_blocks.0=0.5")
    return value


def _pattern(text: str) -> re.Pattern[str]:
    span = re.fullmatch(r"(.*?)(\d+)-(\d+)", text)
    body = re.escape(text)
    if span:
        numbers = "|".join(str(n) for n in range(int(span[2]), int(span[3]) + 1))
        body = f"{re.escape(span[1])}(?:{numbers})"
    return re.compile(rf"(?:^|\.){body}(?:\.|$)")


def _places() -> dict[str, tuple[str, ...]]:
    """Block -> the beginnings of its modules' names in a U-Net with two layers a block; SD 1.5 has four levels."""
    out: dict[str, tuple[str, ...]] = {"IN00": ("conv_in",), "MID": ("mid_block",)}
    for i in range(4):
        for j in range(2):
            out[f"IN{3 * i + j + 1:02}"] = (f"down_blocks.{i}.resnets.{j}", f"down_blocks.{i}.attentions.{j}")
        out[f"IN{3 * i + 3:02}"] = (f"down_blocks.{i}.downsamplers.0",)
        for j in range(3):
            out[f"OUT{3 * i + j:02}"] = (f"up_blocks.{i}.resnets.{j}", f"up_blocks.{i}.attentions.{j}")
        out[f"OUT{3 * i + 2:02}"] += (f"up_blocks.{i}.upsamplers.0",)
    return out


_PLACES = _places()


def _names(inner_: Sequence[int], outer: Sequence[int]) -> list[str]:
    return ["BASE", *(f"IN{n:02}" for n in inner_), "MID", *(f"OUT{n:02}" for n in outer)]


LBW = {
    12: _names((4, 5, 7, 8), range(6)),
    17: _names((1, 2, 4, 5, 7, 8), range(3, 12)),
    20: _names(range(9), range(9)),
    26: _names(range(12), range(12)),
}
"""Length of a list -> its blocks, BASE (the text encoders) first: 12 and 20 for SDXL, 17 and 26 for SD 1.5. A block
that a list leaves out stays at 1, as in kohya's merge scripts."""


def _kohya_blocks(numbers: Sequence[float], modules: Sequence[str]) -> dict[str, float]:
    if len(numbers) not in LBW:
        raise ConfigError(f"a list of {len(numbers)} block weights", fix="12, 17, 20 or 26 numbers, or PATTERN=NUMBER")
    by = dict(zip(LBW[len(numbers)], numbers, strict=True))
    out, unplaced = {}, []
    for module in modules:
        component, _, rest = module.partition(".")
        block = "BASE" if component.startswith("text_encoder") else _block_name(rest)
        if component != "unet" and block != "BASE":
            unplaced.append(module)
        out[module] = by.get(block, 1.0)
    if unplaced:
        raise ConfigError(
            f"{len(unplaced)} modules are of no U-Net ({', '.join(unplaced[:3])}), and block weights in a list are a "
            "U-Net's",
            fix="use PATTERN=NUMBER",
        )
    return out


def _block_name(rest: str) -> str:
    for name, places in _PLACES.items():
        if any(rest == p or rest.startswith(f"{p}.") for p in places):
            return name
    return ""
