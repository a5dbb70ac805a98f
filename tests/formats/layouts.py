"""Adapter files in every layout, written according to the format's rules; each ΔW is computed in float64.

Module names are real, widths tiny. `want` contains ΔW of each canonical parameter. It is computed from the
written tensors, without the reader that is tested."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.forms import product_of
from veneer.formats.topology import Family, ModuleTarget, families, flat

UNIT = 4
"""Rows of a plain weight, and of each unit of a fused projection's weight."""
INTO = 6
PAIRS = {
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight"),
    "peft": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "default": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "dotted": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "linear_layer": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "plain": ("{}.down.weight", "{}.up.weight"),
}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class Layout:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    want: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self.seed += 1
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed)).to(dtype)

    def expect(self, places: Iterable[ModuleTarget], change: Tensor, parameter: str = "weight") -> None:
        """Record each target's expected ΔW: its rows of `change`, which is ΔW of the written module."""
        for place in places:
            assert f"{place.module}.{parameter}" not in self.want
            self.want[f"{place.module}.{parameter}"] = rows(change.double(), place)

    def lora(
        self,
        text: str,
        places: tuple[ModuleTarget, ...],
        shape: tuple[int, ...],
        *,
        naming: str = "kohya",
        rank: int = 2,
        alpha: float | None = None,
        scale: float | None = None,
    ) -> None:
        """Add a pair. `scale`: the expected scale, if it is not alpha/rank (without alpha, 1)."""
        down, up = self.random(rank, *shape[1:]), self.random(shape[0], rank, *[1] * (len(shape) - 2))
        for key, tensor in zip(PAIRS[naming], (down, up), strict=True):
            self.tensors[key.format(text)] = tensor
        if alpha is not None:
            self.tensors[f"{text}.alpha"] = torch.tensor(alpha)
        s = scale if scale is not None else 1.0 if alpha is None else alpha / rank
        self.expect(places, s * product(up, down))


def product(up: Tensor, down: Tensor) -> Tensor:
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(up.shape[0], *down.shape[1:])


def rows(change: Tensor, place: ModuleTarget) -> Tensor:
    n = change.shape[0]
    if place.part:
        begin, end, total = place.part
        return change[begin * n // total : end * n // total]
    return torch.cat([change[n // 2 :], change[: n // 2]]) if place.swap else change


def shape_of(family: Family, places: tuple[ModuleTarget, ...]) -> tuple[int, ...]:
    """Return a tiny shape for an original module; all units of a fused module have equally many rows."""
    units = places[0].part[2] if places[0].part else 1
    module = places[0].module
    if family.modules[module] != "conv":
        return (UNIT * units, INTO)
    pointwise = module.endswith(("proj_in", "proj_out", "conv_shortcut"))
    return (UNIT, INTO, *((1, 1) if pointwise else (3, 3)))


def denoiser(family: Family, *, original: bool) -> list[tuple[str, tuple[ModuleTarget, ...]]]:
    """Return (name, targets) of every linear and convolution of the denoiser.

    original: return original names, not those of diffusers."""
    if original:
        found = [(name, places) for name, places in family.originals.items()]
    else:
        prefix = f"{family.denoiser}."
        found = [(m.removeprefix(prefix), (ModuleTarget(m),)) for m in family.modules if m.startswith(prefix)]
    return [(name, places) for name, places in found if family.modules[places[0].module] in ("linear", "conv")]


def encoders(family: Family) -> list[tuple[str, str, tuple[ModuleTarget, ...]]]:
    """Return (component, name, targets) of every linear layer of the text encoders."""
    found = []
    for module, kind in family.modules.items():
        component, _, name = module.partition(".")
        if component != family.denoiser and kind == "linear":
            found.append((component, name, (ModuleTarget(module),)))
    return found


def kohya(
    name: str, *, original: bool, alpha: float | None = 1.0, only: str = "", te: dict[str, str] | None = None
) -> Layout:
    """Return a kohya file, which has flat names.

    `te`: component -> prefix of its names. `only`: include only denoiser names that contain this text."""
    layout, family = Layout(), families()[name]
    for text, places in denoiser(family, original=original):
        if only in text:
            layout.lora(f"lora_unet_{flat(text)}", places, shape_of(family, places), alpha=alpha)
    for component, text, places in encoders(family) if te else []:
        if te and component in te:
            layout.lora(f"{te[component]}_{flat(text)}", places, shape_of(family, places), alpha=alpha)
    return layout


def dotted(
    name: str, prefix: str, *, original: bool, naming: str, alpha: float | None = None, only: tuple[str, ...] = ("",)
) -> Layout:
    layout, family = Layout(), families()[name]
    for text, places in denoiser(family, original=original):
        if any(o in text for o in only):
            layout.lora(f"{prefix}{text}", places, shape_of(family, places), naming=naming, alpha=alpha)
    return layout


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """Return parameter -> ΔW of its pair and delta, in float64; without gains."""
    out = {}
    for name, pair in adapter.pairs.items():
        A, B = pair.A.double(), pair.B.double()
        if pair.kind == "embedding":
            out[f"{name}.weight"] = pair.scale * (B @ A).t()
        else:
            out[f"{name}.weight"] = pair.scale * product(B, A)
    for name, delta in adapter.deltas.items():
        if delta.form == "gain":
            continue
        delta.parts = {n: t.double() for n, t in delta.parts.items()}
        out[name] = out.get(name, 0) + product_of(delta).double()
    return out


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Assert that names are equal, and that ΔW is equal within `tolerance` of its largest entry."""
    assert sorted(got) == sorted(want)
    for name, change in want.items():
        assert tuple(got[name].shape) == tuple(change.shape), name
        error = (got[name] - change).abs().max() / change.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error}"
