"""An adapter: low-rank pairs, other deltas, full modules, token rows and a card.

    y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ        W: (out, in) frozen    A: (rank, in)    B: (out, rank)    s = scale_of(alpha, rank)

This module works on tensors and names, and does not depend on files, models or training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from veneer.core.forms import Delta
from veneer.errors import ConfigError
from veneer.ops.lowrank import LowRank

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PairKind = Literal["linear", "embedding", "conv", "experts"]
NamedMix = tuple[tuple[str, float], ...]
"""Adapters that are active together, as (adapter name, strength) tuples."""
_TABLES = ("pairs", "modules", "token_rows", "deltas")


def scale_of(alpha: float, rank: int, rslora: bool = False) -> float:
    """Return the scale s of s·B·A.

    The scale is alpha/rank for LoRA (arXiv 2106.09685) and alpha/√rank for rsLoRA (arXiv 2312.03732). All
    code that converts alpha and rank to a scale calls this function."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(scale: float, rank: int, rslora: bool = False) -> float:
    """Return the alpha that gives `scale`; the inverse of `scale_of`.

    Used to write file formats that store alpha rather than the scale."""
    return scale * math.sqrt(rank) if rslora else scale * rank


_MOST_STRENGTH = 1e4
"""Largest accepted |strength|, far above any practical value. Multiplied by this strength, the scale of an
ordinary adapter still fits in float16 (at most 65,504), float32 and bfloat16. Code that multiplies by a
strength must itself report an overflow in its dtype."""


def check_strength(label: str, strength: float) -> float:
    """Return `strength` as a float, or raise ConfigError if the strength is invalid.

    NaN and values beyond ±`_MOST_STRENGTH` are invalid. All code that validates a strength calls this
    function.

    label: what the strength belongs to, for the error message."""
    number = float(strength)
    if not abs(number) <= _MOST_STRENGTH:
        fix = f"a number from -{_MOST_STRENGTH:.0f} to {_MOST_STRENGTH:.0f}"
        raise ConfigError(f"the strength of {label} is {number:g}", fix=fix)
    return number


def mix_text(mix: NamedMix) -> str:
    """Return a mix as text for messages, such as "brand:0.8 + product:1"."""
    return " + ".join(f"{name}:{strength:g}" for name, strength in mix)


def all_finite(t: Tensor) -> bool:
    """Return whether every entry is finite (neither NaN nor infinite).

    Computes only the minimum and the maximum, in one pass without a temporary tensor: any NaN or infinity
    makes one of the two non-finite."""
    import torch

    if not t.numel() or t.is_complex() or t.dtype.itemsize == 1:
        return bool(torch.isfinite(t if t.dtype.itemsize > 1 else t.float()).all())
    low, high = torch.aminmax(t.detach())
    return math.isfinite(low) and math.isfinite(high)


@dataclass
class Pair:
    """The low-rank factors A and B of one module, with the resolved scale.

    | kind      | A                      | B                    | delta                                 |
    | linear    | (rank, in)             | (out, rank)          | weight (out, in): s·B·A               |
    | embedding | (rank, rows)           | (dim, rank)          | weight (rows, dim): s·(B·A)ᵀ          |
    | conv      | (rank, in/g, k…)       | (out, rank, 1…)      | weight (out, in/g, k…)                |
    | experts   | (experts, rank, in)    | (experts, out, rank) | 3-d parameter, one delta per expert   |

    A fused expert parameter has the shape (experts, out, in), or (experts, in, out) if its module sets
    `is_transposed`. PEFT uses the same convention, so the shapes alone determine how to read PEFT's files.
    Llama 4 stores the transposed parameter without setting `is_transposed`. For Llama 4, A is therefore
    (experts, rank, last dimension), and s·B·A still has the parameter's shape.

    `magnitude`: DoRA's m (arXiv 2402.09353). The shape is (out,), one norm per output, as in the paper's code
        and PEFT; or (1, in, 1…), one norm per input, as in files from LyCORIS and OneTrainer (core.forms).

    `origin`: frozen factors (A₀, B₀), whose product is subtracted: ΔW = s·(B·A − B₀·A₀). With an origin, an
        initialization from W (PiSSA, OLoRA) starts with a zero delta and leaves the base unchanged.
        `collapsed()` returns the same delta as one pair with twice the rank."""

    A: Tensor
    B: Tensor
    scale: float
    kind: PairKind = "linear"
    magnitude: Tensor | None = None
    origin: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        sizes = f"A {tuple(self.A.shape)}, B {tuple(self.B.shape)}"
        return f"Pair({self.kind}, {sizes}, scale {self.scale:g}{', magnitude' * (self.magnitude is not None)})"

    @property
    def rank(self) -> int:
        return self.A.shape[1] if self.kind == "experts" else self.A.shape[0]

    def module(self, name: str) -> str:
        """Return the name of the module that this pair changes.

        name: the name of the pair in the adapter."""
        return name.rpartition(".")[0] if self.kind == "experts" else name

    def low_rank(self, strength: float = 1.0, dropout: float = 0.0) -> LowRank:
        """Return s·strength·(B·A − B₀·A₀) as one low-rank product, without the magnitude.

        With a single product, the common part of B·A and B₀·A₀ cancels before rounding."""
        collapsed = self.collapsed()
        return LowRank(collapsed.A, collapsed.B, self.scale * strength, dropout)

    def collapsed(self) -> Pair:
        """Return the same delta as a pair without `origin`, with the same scale.

        A' = [A; A₀], B' = [B, −B₀]."""
        if self.origin is None:
            return self
        import torch

        A0, B0 = self.origin
        along = 1 if self.kind == "experts" else 0
        A = torch.cat([self.A, A0], dim=along)
        B = torch.cat([self.B, -B0], dim=along + 1)
        return Pair(A, B, self.scale, self.kind, self.magnitude)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "A", self.A
        yield "B", self.B
        if self.magnitude is not None:
            yield "magnitude", self.magnitude


@dataclass
class TokenRows:
    """Replacement rows of an embedding: weight[indices] = rows.

    rows: (len(indices), dim).

    In a mix that also has other changes of the same weight, token rows are treated as the change
    (rows − W[indices]), and all changes are summed."""

    indices: tuple[int, ...]
    rows: Tensor


@dataclass
class Card:
    """Metadata of an adapter, stored as JSON next to the adapter.

    Every field can be empty, and most fields are empty for adapters from other tools."""

    base: str = ""
    base_fingerprint: str = ""
    kind: str = "text"
    rank: int = 0
    alpha: float = 0.0
    targets: list[str] = field(default_factory=list)
    data_digest: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    trigger_words: list[str] = field(default_factory=list)
    licence: str = ""
    parents: list[str] = field(default_factory=list)
    created: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def hub_id(base: str) -> str:
    """Return the Hugging Face Hub id of a base.

    For a built-in base, this is the Hub id of its weights; otherwise it is `base` itself."""
    return _HUB_IDS.get(base, base)


@dataclass(frozen=True)
class LoraSpec:
    """The target modules, ranks and initialization of a new adapter.

    `targets`, `exclude`: see core.targets.
    `layers`: indices of the repeated blocks to train, or None for all blocks.
    `rank_pattern`, `alpha_pattern`: target pattern -> value; the first match wins.
    `init`: "zero-b" (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/rank, B zero), "pissa",
        "olora", or "loftq" (from the quantization error of the base).
    `kind`: "lora" creates pairs; "loha" and "lokr" create deltas of these forms (core.forms), initialized as
        in LyCORIS. `factor` and `decompose_both` apply only to these forms (see `forms.trained_shapes`).
    `modules_to_save`: modules to train in full, as copies.
    `token_rows`: embedding name -> ids of the tokens to train; the rows of other tokens stay frozen."""

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: Literal["zero-b", "gaussian", "pissa", "olora", "loftq"] = "zero-b"
    modules_to_save: tuple[str, ...] = ()
    token_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kind: Literal["lora", "loha", "lokr"] = "lora"
    factor: int | None = None
    decompose_both: bool = False


@dataclass
class Adapter:
    """All changes that one fine-tune makes, by name, plus the card.

    `pairs`: module name -> pair; for `experts`, the key is the parameter's name (`…experts.gate_up_proj`).
    `modules`: module name -> {parameter name: tensor}, full copies that replace the base's tensors while the
        adapter is active.
    `deltas`: parameter name (`….weight`, `….bias`) -> a change that is not a pair. If a module has a pair and
        a delta, each is relative to the base's weight, and the two are summed."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    card: Card = field(default_factory=Card)
    rslora: bool = False
    dropout: float = 0.0
    deltas: dict[str, Delta] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = {"pair": len(self.pairs), "full copy": len(self.modules), "delta": len(self.deltas)}
        counts["module with token rows"] = len(self.token_rows)
        parts = [f"{count:,} × {name}" for name, count in counts.items() if count]
        card = self.card
        parts += [f"base {card.base!r}"] * bool(card.base) + [f"rank {card.rank}"] * bool(card.rank)
        return f"Adapter({', '.join(parts)})"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for every tensor, in a fixed order and with stable names."""
        for name in sorted(self.pairs):
            for part, tensor in self.pairs[name].tensors():
                yield f"{name}.{part}", tensor
        for name in sorted(self.modules):
            for part in sorted(self.modules[name]):
                yield f"{name}={part}", self.modules[name][part]
        for name in sorted(self.token_rows):
            yield f"{name}#rows", self.token_rows[name].rows
        for name in sorted(self.deltas):
            for part, tensor in self.deltas[name].tensors():
                yield f"{name}~{part}", tensor

    def component(self, name: str) -> Adapter:
        """Return the part of the adapter that changes one model of a pipeline.

        Module names in the result are those of the model itself. The result is empty if the adapter does not
        change the model.

        name: the model's name in the pipeline, such as `unet` or `text_encoder`."""
        start, tables = f"{name}.", dict[str, Any]()
        for kind in _TABLES:
            table = getattr(self, kind)
            tables[kind] = {key.removeprefix(start): table[key] for key in table if key.startswith(start)}
        return replace(self, **tables)

    def renamed(self, change: Callable[[str], str]) -> Adapter:
        """Return the same adapter with `change` applied to every module name.

        change: must not map two names to the same name."""
        named = {kind: {change(n): item for n, item in getattr(self, kind).items()} for kind in _TABLES}
        return replace(self, **named)  # type: ignore[arg-type]

    def divided(self, by: Callable[[str], float]) -> dict[float, Adapter]:
        """Return strength -> the part of the adapter whose modules have this strength.

        by: returns the strength for a module's name. Modules with strength 0 are left out.

        For every form of change, Σ strength·part equals exactly the adapter with each module at its own
        strength. The parts share the adapter's tensors and keep its scales."""
        out: dict[float, Adapter] = {}
        for kind in _TABLES:
            for name, item in getattr(self, kind).items():
                is_full = kind == "deltas" or (kind == "pairs" and item.kind == "experts")
                number = by(name.rpartition(".")[0] if is_full else name)
                if number and number not in out:
                    empty: dict[str, dict[str, Any]] = {k: {} for k in _TABLES}
                    out[number] = replace(self, **empty)  # type: ignore[arg-type]
                if number:
                    getattr(out[number], kind)[name] = item
        return out

    def collapsed(self) -> Adapter:
        """Return the same adapter with every `origin` collapsed into its pair.

        Files store the adapter in this form, and `digest` hashes the adapter in this form."""
        return replace(self, pairs={name: pair.collapsed() for name, pair in self.pairs.items()})

    def move(self, device: torch.device) -> None:
        """Move every tensor to `device` in place.

        Parameters remain the same objects, so an optimizer that refers to them remains valid."""

        def moved(t: Tensor) -> Tensor:
            t.data = t.data.to(device)
            return t

        self.mapped(moved)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Adapter:
        """Return a copy with `change` applied to every tensor."""
        return self.mapped_by_module(lambda module, t: change(t))

    def mapped_by_module(self, change: Callable[[str, Tensor], Tensor]) -> Adapter:
        """Return a copy with every tensor replaced by `change(module name, tensor)`."""

        def every(named: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
            return {key: change(module, t) for key, t in named.items()}

        pairs, deltas = {}, {}
        for name, p in self.pairs.items():
            at = p.module(name)
            magnitude = None if p.magnitude is None else change(at, p.magnitude)
            origin = None if p.origin is None else (change(at, p.origin[0]), change(at, p.origin[1]))
            pairs[name] = Pair(change(at, p.A), change(at, p.B), p.scale, p.kind, magnitude, origin)
        for name, d in self.deltas.items():
            at = name.rpartition(".")[0]
            magnitude = None if d.magnitude is None else change(at, d.magnitude)
            deltas[name] = replace(d, parts=every(d.parts, at), magnitude=magnitude)
        modules = {name: every(tensors, name) for name, tensors in self.modules.items()}
        rows = {name: TokenRows(r.indices, change(name, r.rows)) for name, r in self.token_rows.items()}
        return replace(self, pairs=pairs, modules=modules, token_rows=rows, deltas=deltas)

    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def digest(self) -> str:
        """Return the SHA-256 of the adapter's names, shapes, dtypes, values and scales.

        Adapters with equal digests have equal effects on the same base. The collapsed adapter is hashed, so
        an adapter with an `origin` has the same digest as its file."""
        h = hashlib.sha256()
        for name, tensor in self.collapsed().tensors():
            h.update(f"{name}|{tensor.dtype!s}|{tuple(tensor.shape)}\0".encode())
            h.update(_tensor_bytes(tensor))
        for name in sorted(self.pairs):
            h.update(f"{name}|scale|{float(self.pairs[name].scale)!r}\0".encode())
        for name in sorted(self.token_rows):
            h.update(f"{name}|indices|{self.token_rows[name].indices}\0".encode())
        for name in sorted(self.deltas):
            d = self.deltas[name]
            h.update(f"{name}|{d.form}|{tuple(d.shape)}|{d.scale!r}|{d.rows}|{tuple(d.whole)}\0".encode())
        return "sha256:" + h.hexdigest()


def _tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of the tensor's values, in the order that files store them."""
    if not tensor.numel():
        return b""
    if hasattr(tensor, "tobytes"):  # formats.arrays.Array, which replaces a tensor
        return bytes(tensor.tobytes())
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
