"""Pairs of expert parameters, as PEFT's `target_parameters` and Unsloth store them: which parameter, which way round.

    A (E·r, in): expert 0 rank 0, expert 0 rank 1, …
    B (out, r·E): rank_major          rank 0 expert 0, rank 0 expert 1, …   PEFT, and Unsloth since 2026-09-17
                  grouped_by_expert   expert 0 rank 0, expert 0 rank 1, …   Unsloth before

Both layouts of B have the same shapes, and Unsloth puts no version into its files: since that day it writes
`lora_B_layout` into the configuration. Knows PEFT's configuration and a base's outline; no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from veneer.core.adapter import Pair, scale_of
from veneer.formats import peft_config as cfg
from veneer.formats.structure import Structure

__all__ = ["EXPERT_ORDER", "ExpertReader"]

EXPERT_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
SWAPPED_SINCE = (0, 19, 1)
"""The first PEFT that lays out 3-d parameters as formats/peft.py says."""


@dataclass
class ExpertReader:
    """`layout`: the caller's word on B's columns, "" where it has none; `problems` collects what is wrong."""

    config: cfg.Config
    base: Structure
    problems: list[str]
    layout: str = ""
    unclear: list[str] = field(default_factory=list)
    """Parameters whose layout of B only the caller can tell."""

    def parameters(self, name: str) -> list[str]:
        """The parameters of module `name` that target_parameters names, in the order PEFT wraps them."""
        leaves = {t.rpartition(".")[2] for t in self.config.target_parameters}
        found = {leaf for leaf in leaves if cfg.names_parameter(self.config, f"{name}.{leaf}")}
        if self.base.detailed:
            own = [key[len(name) + 1 :] for key in self.base.shapes if key.startswith(f"{name}.")]
            return [p for p in own if p in found]
        known = [p for p in EXPERT_ORDER if p in found]
        return known + sorted(found - set(known))

    def read(self, name: str, parameters: list[str], depths: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Pair]:
        """The pairs of one module's parameters; `depths`: how many `.base_layer` -> tensors by part."""
        listed = ", ".join(
            f"{'base_layer ' * d}{part} {tuple(t.shape)}"
            for d, parts in sorted(depths.items())
            for part, t in parts.items()
        )
        if sorted(depths) != list(range(len(parameters))):
            self.problems.append(
                f"{name}: tensors for {len(depths)} parameter(s) ({listed}), "
                f"target_parameters names {len(parameters)} of this module: {', '.join(parameters) or 'none'}"
            )
            return {}
        if len(parameters) > 1 and not self.base.detailed and not set(parameters) <= set(EXPERT_ORDER):
            self.problems.append(f"{name}: which tensors belong to which of {parameters} depends on the base; give it")
            return {}
        out: dict[str, Pair] = {}
        for depth, parts in depths.items():
            parameter = parameters[len(parameters) - 1 - depth]
            if set(parts) != {"A", "B"} or any(t.ndim != 2 or 0 in t.shape for t in parts.values()):
                self.problems.append(f"{name}.{parameter}: A and B, both 2-d, are expected, there is {listed}")
            else:
                out |= self._pair(name, parameter, parts["A"], parts["B"])
        return out

    def _pair(self, name: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Pair]:
        full = f"{name}.{parameter}"
        rank, source = cfg.rank_of_module(self.config, full)
        scale = scale_of(cfg.alpha_of_module(self.config, full), rank, self.config.rslora)
        shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
        stored = self.base.shapes.get(full)
        experts, left = divmod(A.shape[0], rank)
        plain = parameter == "weight" and experts == 1 and len(stored or (0, 0)) == 2
        known = stored is None or plain or (len(stored) == 3 and stored[0] == experts)
        if left or A.shape[0] != B.shape[1] or not known:
            of = f" and the base has {stored}" if stored else ""
            self.problems.append(f"{full}: {shapes} do not fit rank {rank} (the config's {source}) per expert{of}")
            return {}
        if plain:
            return {name: Pair(A, B, scale)}  # a weight named as a parameter is a linear pair
        A3, B3 = A.view(experts, rank, -1), self._by_expert(full, B, experts, rank)
        if self._is_flipped(name, full, shapes, (A.shape[1], B.shape[0]), stored):
            A3, B3 = B3.transpose(1, 2), A3.transpose(1, 2)
        return {full: Pair(A3.contiguous(), B3.contiguous(), scale, "experts")}

    def _by_expert(self, full: str, B: Tensor, experts: int, rank: int) -> Tensor:
        """(out, r·E) -> (E, out, r), by the layout that the file, or the caller, says; PEFT's where nobody does."""
        told = self.config.b_layout or self.layout
        if experts > 1 and rank > 1 and not told and self.config.unsloth:
            self.unclear.append(full)
        if told == cfg.GROUPED:
            return B.view(B.shape[0], experts, rank).permute(1, 0, 2)
        return B.view(B.shape[0], rank, experts).permute(2, 0, 1)

    def _is_flipped(
        self, name: str, full: str, shapes: str, got: tuple[int, int], stored: tuple[int, ...] | None
    ) -> bool:
        """Whether the file holds the pair of the transposed parameter, as PEFT before 0.19.1 wrote it: shapes decide,
        and where a square parameter lets both pass, the version that wrote the file."""
        version = self.config.version
        old = version is not None and version < SWAPPED_SINCE
        if stored is None:
            if version is None or old:
                wrote = "PEFT " + ".".join(map(str, version)) if version else "an unnamed version of PEFT"
                self.problems.append(
                    f"{full}: written by {wrote}, and versions before 0.19.1 laid out expert weights differently "
                    f"({shapes}): only the base's shapes can tell; give the base"
                )
            return False
        transposed = name in self.base.transposed
        want = stored[1:] if transposed else stored[:0:-1]
        if got not in (want, want[::-1]):
            self.problems.append(f"{full}: {shapes} fit neither way round on the base's {stored}")
        if want[0] != want[1]:
            return got != want
        if version is None:
            self.problems.append(
                f"{full}: {shapes} on a square {stored}: which layout it is cannot be told without peft_version"
            )
        return old and (not transposed or version >= (0, 19, 0))  # type: ignore[operator]

    def ask(self) -> None:
        """One problem for all that is unclear, which says how to tell."""
        if self.unclear:
            self.problems.append(
                f"{len(self.unclear)} expert parameter(s) ({', '.join(self.unclear[:3])}, …) of a file with Unsloth's "
                f"marks ({self.config.unsloth}) and without lora_B_layout: Unsloth before 2026-09-17 grouped B's "
                "columns by expert, later versions and PEFT by rank, with the same shapes. Say which: "
                f"--moe-layout {cfg.GROUPED} if that Unsloth trained it, --moe-layout {cfg.RANK_MAJOR} otherwise "
                "(`veneer adapter convert --to peft` with it writes a file that needs no word)"
            )
