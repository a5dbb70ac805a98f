"""An adapter's strength: overall, by block and component, and by step.

    0.8                                                the overall strength
    0.8@down=0.5,mid=1,up.1=0.2,text=0                 multiplied by block factors; the last matching key counts
    0.8@double.0-2=0.5,single.3=0                      blocks of a transformer, ranges of blocks
    0.8@steps=0-0.6                                    in the first 60% of the steps; 0 in the other steps
    0.8@steps=0-0.3:0.2+0.3-1                          a separate factor for each range
    0.8@campaign=product                               a role in a mix, which sets blocks and steps (`CAMPAIGN`)

| key                            | modules                                            |
| text                           | all text encoders; for one, use `text_encoder_2`   |
| down, down.0, mid, up, up.1    | down_blocks, mid_block, up_blocks of a U-Net       |
| double, double.0-2, joint      | transformer_blocks of a transformer                |
| single, single.3               | single_transformer_blocks of a transformer         |
| anything else: `attn2`, `ff`,  | modules with these whole dotted parts in their     |
| `attentions.1`, `unet`, `*`    | canonical names                                    |

This module works on names, and does not depend on tensors or models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from veneer.core.adapter import check_strength
from veneer.errors import ConfigError, bullets, nearest, quoted

CAMPAIGN_ROLES = ("product", "brand", "lens")

CAMPAIGN: Mapping[str, Mapping[str, str]] = {
    "flow": {"product": "", "brand": "double=0.5,single=0.7", "lens": "steps=0.4-1"},
    "noise": {"product": "", "brand": "", "lens": "steps=0.4-1"},
}
"""Prediction type -> role -> factors.

The role `lens` starts after the steps that determine the content of the picture. On flow bases, the role
`brand` is weaker, especially in the double-stream blocks, which determine the content.
benchmarks/image_campaign.py compares these factors with other factors (docs/image-proof.md)."""


def split_strength(text: str) -> tuple[str, float | None]:
    """Return (name, strength or None), parsed from "NAME[:STRENGTH]".

    Text after the last colon is a strength if it is a number, except in a digest such as `sha256:12`. Raises
    ConfigError for an invalid strength (`check_strength`)."""
    name, colon, number = text.rpartition(":")
    if not colon or name == "sha256":
        return text, None
    try:
        strength = float(number)
    except ValueError:
        return text, None
    return name, check_strength(quoted(name), strength)


def split_factors(text: str) -> tuple[str, str]:
    """Split "NAME[:STRENGTH][@FACTORS]" into (NAME[:STRENGTH], FACTORS or "").

    Text after the last `@` is FACTORS if it contains `=` or `,`. In `brand@2` and `brand@prod`, the text is a
    version.
    """
    head, at, factors = text.rpartition("@")
    return (head, factors) if at and ("=" in factors or "," in factors) else (text, "")


_INDEX = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def block_of(module: str) -> str:
    """Return a module's block: its name up to the first number.

    For a U-Net, the block is the name up to the attention or resnet (`unet.down_blocks.1.attentions.0`). A
    name without a number is returned whole."""
    unet = re.match(r"^(.*?(?:down_blocks|up_blocks)\.\d+\.\w+\.\d+|.*?mid_block\.\w+\.\d+)(?:\.|$)", module)
    match = unet or _INDEX.match(module)
    return match[1] if match else module


def parse_blocks(text: str, modules: Sequence[str]) -> dict[str, float]:
    """Return {module: strength}, parsed from "PATTERN=NUMBER,…".

    A pattern consists of whole dotted parts of a name ("mid_block", "down_blocks.0"), with ranges
    ("layers.3-7"); `*` matches all modules. The last matching pattern counts. Modules without a match have
    strength 1. Raises ConfigError listing patterns without a match, and invalid parts."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    out = dict.fromkeys(modules, 1.0)
    problems = []
    for part in parts:
        pattern, equals, number = part.partition("=")
        if not equals:
            problems.append(f"{part!r}: expected PATTERN=NUMBER")
            continue
        matcher = _pattern(pattern.strip())
        hits = [m for m in modules if pattern == "*" or matcher.search(m)]
        if not hits:
            problems.append(f"{pattern!r} matches no module")
        for module in hits:
            out[module] = _block_number(number)
    if problems:
        blocks = sorted({block_of(m) for m in modules})
        problem = f"invalid block strengths:\n{bullets(problems, None)}"
        raise ConfigError(problem, fix=f"the blocks are {', '.join(blocks[:40])}")
    return out


def _finite(text: str) -> float | None:
    """Return the number in a text, or None if invalid or not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _block_number(text: str) -> float:
    if (value := _finite(text)) is None:
        raise ConfigError(f"{text.strip()!r} is not a strength", fix="a number, as in down_blocks.0=0.5")
    return check_strength("a block", value)


_LONGEST_RUN = 1000
"""Maximum length of a range of blocks. Ranges are expanded, and the text can come from an untrusted
source."""


def _pattern(text: str) -> re.Pattern[str]:
    """Return a compiled regular expression for a block pattern.

    Raises ConfigError for an invalid range."""
    span = re.fullmatch(r"(.*?)(?<!\d)(\d{1,9})-(\d{1,9})", text)
    body = re.escape(text)
    if span:
        first, last = int(span[2]), int(span[3])
        if not 0 <= last - first < _LONGEST_RUN:
            raise ConfigError(f"{text!r} is not a range of blocks", fix=f"write FROM-TO, at most {_LONGEST_RUN} blocks")
        body = f"{re.escape(span[1])}(?:{'|'.join(map(str, range(first, last + 1)))})"
    return re.compile(rf"(?:^|\.){body}(?:\.|$)")


_SHORT = {
    "down": "down_blocks", "mid": "mid_block", "up": "up_blocks", "double": "transformer.transformer_blocks",
    "joint": "transformer.transformer_blocks", "single": "transformer.single_transformer_blocks",
}  # fmt: skip
_RANGE = re.compile(r"(\d*\.?\d+(?:e-\d+)?)-(\d*\.?\d+(?:e-\d+)?)(?::(.+))?")
_EXAMPLE = "as in brand:0.8@down=0.5,text=0,steps=0-0.6"


@dataclass(frozen=True)
class Strength:
    """A strength that is multiplied by factors per module and per step.

    `blocks`: (key, factor), see the table in the module's docstring. `steps`: (from, to, factor) with from
    and to as fractions of the run, 0 to 1. Step i of n is in a range if from ≤ i/n < to; the factor is 0
    outside all ranges. Without ranges, the factor is 1 at all steps. Factors of text encoders apply when the
    prompt is encoded, before the first step.
    `campaign`: a role instead of blocks and steps; `in_campaign` replaces the role with the factors for a
        base."""

    strength: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()
    steps: tuple[tuple[float, float, float], ...] = ()
    campaign: str = ""

    def __post_init__(self) -> None:
        if self.campaign and _role(self.campaign) and (self.blocks or self.steps):
            problem = f"campaign={self.campaign} sets blocks and steps; other factors cannot be added"
            raise ConfigError(problem, fix="remove campaign=, or everything else after the @")
        factors, step_factors = [f for _, f in self.blocks], [f for _, _, f in self.steps]
        for number in (self.strength, *factors, *step_factors):
            if not math.isfinite(number):
                check_strength(f"a part of {self}", number)
        most = max(map(abs, (1.0, *factors))) * max(map(abs, step_factors or [1.0]))
        check_strength(
            f"the strongest part of {self}" if factors or step_factors else "the whole", self.strength * most
        )
        end = 0.0
        for begin, until, _ in sorted(self.steps):
            if not 0 <= begin < until <= 1:
                raise ConfigError(
                    f"{begin:g}-{until:g} is not a range of steps", fix="use fractions from 0 to 1: steps=0-0.6"
                )
            if begin < end:
                raise ConfigError(f"the ranges of steps overlap at {begin:g}", fix="shorten one of the ranges")
            end = until

    def factor_at(self, share: float) -> float:
        """Return the step factor at `share`, a fraction of the run from 0 to 1."""
        if not self.steps:
            return 1.0
        return next((f for begin, end, f in self.steps if begin <= share < end), 0.0)

    def idle(self, steps: int) -> list[str]:
        """Return the ranges that contain none of the steps of a run with `steps` steps."""
        fractions = [i / steps for i in range(steps)]
        ranges = [(begin, end) for begin, end, _ in self.steps if not any(begin <= share < end for share in fractions)]
        return [f"{_text(begin)}-{_text(end)}" for begin, end in ranges]

    @property
    def by_block(self) -> Strength:
        """A strength with only the block factors."""
        return Strength(1.0, self.blocks)

    @property
    def edges(self) -> tuple[float, ...]:
        """The fractions of the run at which the step factor can change, starting with 0."""
        return tuple(sorted({0.0, *(e for begin, end, _ in self.steps for e in (begin, end) if e < 1)}))

    def __str__(self) -> str:
        """Return text that parses back to exactly this strength."""
        parts = [f"{key}={_text(factor)}" for key, factor in self.blocks]
        if self.steps:
            ranges = (f"{_text(b)}-{_text(e)}" + ("" if f == 1 else f":{_text(f)}") for b, e, f in self.steps)
            parts.append("steps=" + "+".join(ranges))
        parts += [f"campaign={self.campaign}"] * bool(self.campaign)
        return _text(self.strength) + ("@" + ",".join(parts) if parts else "")


def _text(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def parse_strength(options: str, strength: float = 1.0) -> Strength:
    """Return a strength parsed from the text after the `@`, such as "down=0.5,steps=0-0.6".

    Raises ConfigError for a part that is not KEY=NUMBER, a repeated key or an unknown role.
    `factors_by_module` checks whether the blocks exist."""
    blocks: dict[str, float] = {}
    campaign = ""
    steps: tuple[tuple[float, float, float], ...] = ()
    for part in filter(None, (p.strip() for p in options.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            raise ConfigError(f"{part!r}: BLOCK=NUMBER is expected", fix=_EXAMPLE)
        if key == "steps":
            if steps:
                raise ConfigError("steps= occurs twice", fix="steps=0-0.3:0.2+0.3-1 for two ranges")
            steps = tuple(_range(r) for r in value.split("+"))
        elif key == "campaign":
            if campaign:
                raise ConfigError("campaign= occurs twice", fix="one role for each adapter: campaign=product")
            campaign = _role(value)
        elif not key or key in blocks:
            raise ConfigError(f"{part!r}: " + ("the key occurs twice" if key else "the key is missing"), fix=_EXAMPLE)
        else:
            blocks[key] = _number(value, part)
    if not (blocks or steps or campaign):
        raise ConfigError("nothing follows the @", fix=_EXAMPLE)
    return Strength(strength, tuple(blocks.items()), steps, campaign)


def _role(text: str) -> str:
    if text in CAMPAIGN_ROLES:
        return text
    similar = nearest(text.lower(), CAMPAIGN_ROLES, 1)
    hint = f"did you mean {similar[0]}? " if similar else ""
    raise ConfigError(f"{text!r} is not a role of a campaign", fix=f"{hint}roles: {', '.join(CAMPAIGN_ROLES)}")


def check_roles(uses: Iterable[tuple[str, Strength]]) -> None:
    """Raise ConfigError if two adapters of a mix have the same role.

    uses: (name, strength) of each adapter."""
    played: dict[str, str] = {}
    for name, strength in uses:
        if strength.campaign and strength.campaign in played:
            problem = f"the campaign's {strength.campaign} occurs twice: {played[strength.campaign]}, {name}"
            raise ConfigError(problem, fix="give each role to one adapter; an adapter without a role acts unchanged")
        played[strength.campaign] = name


def in_campaign(strength: Strength, prediction: str, modules: Sequence[str]) -> Strength:
    """Return the strength with its campaign role replaced by factors for a base.

    prediction, modules: the base's prediction type and modules.

    A strength without a role is returned unchanged. If the base lacks a block that `CAMPAIGN` uses, no role
    gets factors: applying only some of the factors would weaken adapters without separating their effects."""
    if not strength.campaign:
        return strength
    roles = CAMPAIGN["flow" if prediction == "flow" else "noise"]
    row = {role: parse_strength(text) if text else Strength() for role, text in roles.items()}
    if not all(_has_blocks(modules, each) for each in row.values()):
        return Strength(strength.strength)
    return replace(row[strength.campaign], strength=strength.strength)


def _has_blocks(modules: Sequence[str], strength: Strength) -> bool:
    try:
        factors_by_module(strength, modules)
    except ConfigError:
        return False
    return True


def _number(text: str, part: str) -> float:
    if (value := _finite(text)) is None:
        raise ConfigError(f"{part!r}: {text!r} is not a strength", fix=_EXAMPLE)
    return value


def _range(text: str) -> tuple[float, float, float]:
    if (match := _RANGE.fullmatch(text.strip())) is None:
        raise ConfigError(f"{text!r} is not a range of steps", fix="steps=FROM-TO with fractions: steps=0-0.6")
    return float(match[1]), float(match[2]), 1.0 if match[3] is None else _number(match[3], text)


def factors_by_module(strength: Strength, modules: Sequence[str]) -> dict[str, float]:
    """Return {module: factor} for all modules of a base.

    modules: the canonical names of the base's modules.

    Raises ConfigError for a key that matches no module, and suggests the nearest valid keys."""
    encoders = sorted({m.partition(".")[0] for m in modules if m.startswith("text_encoder")})
    factors = []
    for key, factor in strength.blocks:
        head, dot, block = key.partition(".")
        patterns = encoders if key == "text" else [_SHORT.get(head, head) + dot + block]
        if not any(_fits(p, modules) for p in patterns):
            names = {short for short, long in _SHORT.items() if any(f".{long}." in f".{m}." for m in modules)}
            names |= {"steps", *(["text"] if encoders else []), *(_short(block_of(m)) for m in modules)}
            similar = nearest(key, sorted(names - {key}))
            fix = f"did you mean {' or '.join(similar)}?" if similar else f"its blocks: {', '.join(sorted(names)[:30])}"
            raise ConfigError(f"{key!r} names no block of this base", fix=fix)
        factors += [f"{p}={factor!r}" for p in patterns]
    return parse_blocks(",".join(factors), modules)


def _fits(pattern: str, modules: Sequence[str]) -> bool:
    try:
        parse_blocks(f"{pattern}=1", modules)
    except ConfigError:
        return False
    return True


def _short(block: str) -> str:
    """Return the short form of a block's name, such as `down.0`."""
    for short, long in _SHORT.items():
        full_name = long if "." in long else f"unet.{long}"
        if block == full_name or block.startswith(f"{full_name}."):
            return short + block.removeprefix(full_name)
    return block
