"""Tiny random adapters for the modules of any image family, and helpers that compare ΔW."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.formats.topology import Family

IN, UNIT = 6, 4


def numbers(shape: Iterable[int], seed: str, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def shard_rows(family: Family) -> dict[str, int]:
    """Return canonical module -> rows of its weight.

    Within a fused projection, the rows of the parts are proportional to the parts' units."""
    out = dict.fromkeys(family.modules, 2 * UNIT)
    for places in family.originals.values():
        for place in places:
            if place.part is not None:
                out[place.module] = UNIT * (place.part[1] - place.part[0])
    return out


def one_of_each_kind(family: Family, kinds: tuple[str, ...] = ("linear", "conv")) -> list[str]:
    """Return one module for each name, ignoring the numbers in names.

    If several modules have the name, return the last, because last blocks can differ from the others."""
    found: dict[str, str] = {}
    for module, kind in family.modules.items():
        if kind in kinds:
            found[re.sub(r"\d+", "#", module)] = module
    return list(found.values())


def pair_for(family: Family, module: str, rank: int = 2, scale: float = 1.0, shared: str = "") -> Pair:
    """Return a random pair for a module. `shared`: pairs with the same text have the same A."""
    kernel = ()
    if family.modules[module] == "conv":
        kernel = (1, 1) if re.search(r"proj_in|proj_out|conv_shortcut", module) else (3, 3)
    A = numbers((rank, IN, *kernel), shared or f"A {module}")
    B = numbers((shard_rows(family)[module], rank, *[1] * len(kernel)), f"B {module}")
    return Pair(A, B, scale, "conv" if kernel else "linear")


def random_adapter(family: Family, choose: Callable[[str], bool] = lambda _: True) -> Adapter:
    """Return pairs with ranks 1 to 3 and varied scales, on one module of each kind."""
    scales = (1.0, 0.5, 1 / 3, 2.0, 0.123)
    modules = [m for m in one_of_each_kind(family) if choose(m)]
    return Adapter({m: pair_for(family, m, 1 + i % 3, scales[i % 5]) for i, m in enumerate(modules)})


def by_hand(pair: Pair) -> Tensor:
    """Return ΔW = s·B·A in float64, with shape (out, in·k…)."""
    return pair.scale * (pair.B.double().flatten(1) @ pair.A.double().flatten(1))


def same_changes(got: Adapter, want: Adapter, tolerance: float = 1e-6) -> None:
    """Assert that ΔW is equal for every module, and zero for modules that only `got` has."""
    assert set(want.pairs) <= set(got.pairs)
    for name, pair in got.pairs.items():
        if name not in want.pairs:
            assert not by_hand(pair).any(), name
            continue
        expected = by_hand(want.pairs[name])
        off = (by_hand(pair) - expected).norm() / expected.norm()
        assert off <= tolerance, f"{name}: {off:.2g}"
