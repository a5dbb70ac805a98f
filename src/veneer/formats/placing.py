"""A module's leaf put under canonical names: rows to their parts, halves changed over, kinds made the module's own.

`split_qkv`: sd-scripts can train q, k and v (and FLUX.1's linear1) as pairs of their own and stores them in one:
A = [A₀; A₁; …], B = diag(B₀, B₁, …), n times the rank, and alpha as for one part. So s is alpha by one part's rank, in
every other file by the rank stored. Such files are known by the metadata, or by B's blocks beside an alpha that is
that of the modules that are not fused. Knows leaves and places; no files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.errors import AdapterError
from veneer.formats.fused import split, swap_halves
from veneer.formats.leaves import Leaf, fitted
from veneer.formats.metadata import json_value
from veneer.formats.structure import Structure, describe
from veneer.formats.topology import Family, Place

__all__ = ["Placer", "alphas_of_blocks", "leaves_of", "outline"]

_POINTWISE = re.compile(r".*\.(proj_in|proj_out|conv_shortcut)")


def outline(base: Any, family: Family | None) -> Structure:
    """The outline of a base under canonical names. A denoiser alone, whose names have no component, gets its own."""
    found = describe(base) if base is not None else Structure({})
    if family is None or any(name.partition(".")[0] in family.components for name in found.kinds):
        return found
    kinds = {f"{family.denoiser}.{name}": kind for name, kind in found.kinds.items()}
    shapes = {f"{family.denoiser}.{name}": shape for name, shape in found.shapes.items()}
    return Structure(kinds, shapes)


def leaves_of(adapter: Adapter) -> dict[str, Leaf]:
    """Canonical module -> all that changes it, sorted by name. Token rows and learned words are no module's."""
    out: dict[str, Leaf] = defaultdict(Leaf)
    for name, pair in adapter.pairs.items():
        out[name].pair = pair
    for name, delta in adapter.deltas.items():
        module, _, parameter = name.rpartition(".")
        out[module].deltas[parameter] = delta
    for name, tensors in adapter.modules.items():
        out[name].full = dict(tensors)
    return dict(sorted(out.items()))


@dataclass
class Placer:
    """Collects what leaves become; `used`: canonical module -> keys of the file."""

    family: Family | None
    base: Structure
    pairs: dict[str, Pair] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)

    def adapter(self) -> Adapter:
        return Adapter(self.pairs, self.modules, deltas=self.deltas)

    def misfits(self) -> list[str]:
        """How what has been placed does not fit the base, where one is given."""
        if not self.base.kinds:
            return []
        names = {name for name in self.used if name not in self.base.kinds}
        missing = [f"{name}: no such module in the base" for name in sorted(names)]
        return missing or self.base.problems(self.adapter())

    def place(
        self, text: str, leaf: Leaf, places: Sequence[Place], keys: list[str], *, blocks: bool = False
    ) -> list[str]:
        """Put a leaf where it belongs, or say all that keeps it from there, and put nothing."""
        problems = [
            f"{text}: lands on {p.module}, where {self.owner[p.module]} has landed"
            for p in places
            if p.module in self.owner
        ]
        try:
            parts = _parts(leaf, places, blocks)
            parts = [self._fitted(part, place.module) for part, place in zip(parts, places, strict=True)]
        except AdapterError as error:
            problems.append(f"{text}: {error.what}" + (f" ({error.where})" if error.where else ""))
        if problems:
            return problems
        for part, place in zip(parts, places, strict=True):
            name = place.module
            self.owner[name], self.used[name] = text, keys
            if part.pair is not None:
                self.pairs[name] = part.pair
            self.deltas.update({f"{name}.{parameter}": delta for parameter, delta in part.deltas.items()})
            if part.full:
                self.modules[name] = part.full
        return []

    def _fitted(self, leaf: Leaf, name: str) -> Leaf:
        """The leaf in the shape of its module: of the base's weight where it is given, else as its kind asks."""
        kind = self.family.modules.get(name) if self.family else None
        pair = leaf.pair
        if kind == "norm" and pair is not None:
            raise AdapterError(f"a pair on {name}, which is a norm")
        if kind in ("linear", "conv", "embedding") and "weight" in leaf.full and leaf.full["weight"].ndim == 1:
            raise AdapterError(f"a vector as the whole new weight of {name}, which is of a {kind}")
        if kind == "embedding" and pair is not None and pair.kind == "linear":
            # ΔW = B·A of a weight (rows, dim); an embedding's pair is the transpose of that.
            leaf = replace(leaf, pair=replace(pair, A=pair.B.t(), B=pair.A.t(), kind="embedding"))
        if (shape := self.base.shapes.get(f"{name}.weight")) is not None and len(shape) >= 2:
            return fitted(leaf, shape, where=name)
        if pair is None or kind not in ("linear", "conv"):
            return leaf
        out, into = pair.B.shape[0], pair.A.shape[1]
        if kind == "linear" and pair.kind == "conv":
            return fitted(leaf, (out, into), where=name)
        if kind == "conv" and pair.kind == "linear" and self.family is not None and _POINTWISE.fullmatch(name):
            return fitted(leaf, (out, into, 1, 1), where=name)
        return leaf


def _parts(leaf: Leaf, places: Sequence[Place], blocks: bool) -> list[Leaf]:
    """The leaf of each place."""
    if len(places) == 1 and places[0].part is None and not places[0].swap:
        return [leaf]
    out = [Leaf() for _ in places]
    rows = [place.part or (0, 1, 1) for place in places]
    if leaf.pair is not None:
        pairs = split(leaf.pair, rows)
        for i, (part, pair) in enumerate(zip(out, pairs, strict=True)):
            part.pair = _block(pair, i, len(places)) if blocks else pair
    for parameter, delta in leaf.deltas.items():
        for part, own in zip(out, split(delta, rows), strict=True):
            part.deltas[parameter] = own
    for parameter, tensor in leaf.full.items():
        for part, (begin, end, total) in zip(out, rows, strict=True):
            if len(tensor) % total:
                raise AdapterError(f"{len(tensor)} rows of {parameter} cannot be cut into {total} equal units")
            unit = len(tensor) // total
            part.full[parameter] = tensor[begin * unit : end * unit]
    return [_swapped(part) if place.swap else part for part, place in zip(out, places, strict=True)]


def _swapped(leaf: Leaf) -> Leaf:
    if any(len(t) % 2 for t in leaf.full.values()):
        raise AdapterError("an odd number of rows has no halves")
    return Leaf(
        leaf.pair and swap_halves(leaf.pair),
        {name: swap_halves(delta) for name, delta in leaf.deltas.items()},
        {name: t.roll(len(t) // 2, 0) for name, t in leaf.full.items()},
    )


def _block(pair: Pair, i: int, n: int) -> Pair:
    """Part i's own A and B, which are views, of a block-diagonal B's rows. The scale is already that of one part."""
    rank = pair.rank // n
    own = slice(i * rank, (i + 1) * rank)
    return replace(pair, A=pair.A[own], B=pair.B[:, own])


def alphas_of_blocks(
    known: Mapping[str, Mapping[str, Tensor]],
    places: Mapping[str, Sequence[Place] | None],
    metadata: Mapping[str, str],
    notes: list[str],
) -> dict[str, float]:
    """Module text -> the alpha that its stored rank needs, for the fused modules of a `split_qkv` file."""
    said = _said_split(metadata)
    if said is False:  # as veneer's own files say, whose alpha is for the rank that is stored
        return {}
    plain = {
        (float(own["alpha"]), own["lora_down.weight"].shape[0])
        for text, own in known.items()
        if {"alpha", "lora_down.weight"} <= set(own) and len(places[text] or ()) == 1
        if own["alpha"].numel() == 1 and own["lora_down.weight"].ndim  # what is not is said where it is read
    }
    out: dict[str, float] = {}
    unclear: list[str] = []
    for text, own in known.items():
        n = len(places[text] or ())
        down, up, alpha = (own.get(s) for s in ("lora_down.weight", "lora_up.weight", "alpha"))
        if (
            n < 2
            or down is None
            or up is None
            or alpha is None
            or alpha.numel() != 1
            or not down.ndim
            or not _is_blocks(up, [p.part for p in places[text] or ()])
        ):
            continue
        value, rank = float(alpha), down.shape[0]
        kept = _number(metadata.get("ss_network_alpha"))
        unscaled = kept is None or kept == value
        if (said and unscaled) or (value, rank // n) in plain:
            out[text] = value * n
        elif not said and value != rank and not plain:
            unclear.append(text)
    if out:
        notes.append(
            f"{len(out)} fused modules hold split_qkv parts and one part's alpha: they are scaled by a part's rank"
        )
    if unclear:
        notes.append(
            f"{len(unclear)} fused modules hold blocks, and nothing says that alpha is for one part: it is taken "
            f"for all: {', '.join(unclear[:5])}"
        )
    return out


def _said_split(metadata: Mapping[str, str]) -> bool | None:
    """What ss_network_args says of split_qkv; None where it says nothing."""
    arguments = json_value(metadata, "ss_network_args")
    said = str(arguments.get("split_qkv", "")).lower() if isinstance(arguments, dict) else ""
    return {"true": True, "1": True, "false": False, "0": False}.get(said)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _is_blocks(up: Tensor, parts: Sequence[tuple[int, int, int] | None]) -> bool:
    """Whether each part's rows use its own ranks alone, all of them some."""
    rank, n = up.shape[1] if up.ndim == 2 else 0, len(parts)
    if rank == 0 or rank % n or any(p is None or up.shape[0] % p[2] for p in parts):
        return False
    rank //= n
    for i, part in enumerate(parts):
        assert part is not None
        unit = up.shape[0] // part[2]
        used = up[part[0] * unit : part[1] * unit].ne(0)
        own = torch.zeros(up.shape[1], dtype=torch.bool)
        own[i * rank : (i + 1) * rank] = True
        if bool(used[:, ~own].any()):
            return False
    return bool(up.ne(0).any())
