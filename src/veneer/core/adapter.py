"""An adapter: low-rank pairs, other deltas, full modules, token rows and a card.

    y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ        W: (out, in) frozen    A: (rank, in)    B: (out, rank)    s = scale_of(alpha, rank)

This module knows tensors and names; it does not know about files, models or training.
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
"""Adapters that act together: (adapter name, strength) each."""
_TABLES = ("pairs", "modules", "token_rows", "deltas")


def scale_of(alpha: float, rank: int, rslora: bool = False) -> float:
    """Return the factor s of s·B·A.

    alpha/rank (LoRA, arXiv 2106.09685), or alpha/√rank (rsLoRA, arXiv 2312.03732). No other function turns
    alpha and rank into a scale."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(scale: float, rank: int, rslora: bool = False) -> float:
    """Return alpha for a scale, the inverse of `scale_of`.

    For formats that store alpha."""
    return scale * math.sqrt(rank) if rslora else scale * rank


_MOST_STRENGTH = 1e4
"""The largest |strength|: far beyond any use. Times an adapter's own scale, the strength still fits in
float16 (at most 65,504), float32 and bfloat16. Code that computes a product reports an overflow of its
dtype."""


def check_strength(label: str, strength: float) -> float:
    """Return `strength` as a float; raise ConfigError for an invalid strength.

    NaN, and values beyond ±`_MOST_STRENGTH`, are invalid.

    label: the object with the strength, for the error message. No other function validates strengths."""
    number = float(strength)
    if not abs(number) <= _MOST_STRENGTH:
        raise ConfigError(
            f"the strength of {label} is {number:g}", fix=f"a number from -{_MOST_STRENGTH:.0f} to {_MOST_STRENGTH:.0f}"
        )
    return number


def mix_text(mix: NamedMix) -> str:
    """Return a mix as text for messages: "brand:0.8 + product:1"."""
    return " + ".join(f"{name}:{strength:g}" for name, strength in mix)


def all_finite(t: Tensor) -> bool:
    """Return whether no entry is NaN or infinite.

    Any NaN or infinity shows in the minimum or maximum, which take one pass and no extra tensor."""
    import torch

    if not t.numel() or t.is_complex() or t.dtype.itemsize == 1:
        return bool(torch.isfinite(t if t.dtype.itemsize > 1 else t.float()).all())
    low, high = torch.aminmax(t.detach())
    return math.isfinite(low) and math.isfinite(high)


@dataclass
class Pair:
    """A, B and the resolved scale for one module.

    | kind      | A                      | B                    | delta                                 |
    | linear    | (rank, in)             | (out, rank)          | weight (out, in): s·B·A               |
    | embedding | (rank, rows)           | (dim, rank)          | weight (rows, dim): s·(B·A)ᵀ          |
    | conv      | (rank, in/g, k…)       | (out, rank, 1…)      | weight (out, in/g, k…)                |
    | experts   | (experts, rank, in)    | (experts, out, rank) | 3-d parameter, one delta per expert   |

    A fused expert parameter is (experts, out, in), or (experts, in, out) if its module sets
    `is_transposed`. PEFT reads experts this way, so only shapes decide how to read its files. Llama 4
    stores the transpose without setting `is_transposed`: there A is (experts, rank, last dimension), and
    s·B·A is still a delta of the right shape.

    `magnitude`: DoRA's m (arXiv 2402.09353). (out,): one norm per output, as in the paper's code and PEFT;
        or (1, in, 1…): one norm per input, as LyCORIS and OneTrainer have written it (core.forms).

    `origin`: a frozen (A₀, B₀) whose product is subtracted, so that an initialization from W (PiSSA,
        OLoRA) starts at delta zero on an unchanged base: ΔW = s·(B·A − B₀·A₀). `collapsed()` returns the
        same delta as one pair of twice the rank."""

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
        """Return the module that this pair changes.

        name: the pair's name in the adapter."""
        return name.rpartition(".")[0] if self.kind == "experts" else name

    def low_rank(self, strength: float = 1.0, dropout: float = 0.0) -> LowRank:
        """Return s·strength·B·A as one product, with `origin`, without the magnitude.

        One product lets the parts that A₀·B₀ and A·B have in common cancel before rounding."""
        collapsed = self.collapsed()
        return LowRank(collapsed.A, collapsed.B, self.scale * strength, dropout)

    def collapsed(self) -> Pair:
        """Return the delta without `origin`: A' = [A; A₀], B' = [B, −B₀], same scale."""
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
    """Rows that replace rows of an embedding: weight[indices] = rows.

    rows: (len(indices), dim).

    In a mix with other changes of the same weight, token rows count as the change rows − W[indices], and
    the changes add up."""

    indices: tuple[int, ...]
    rows: Tensor


@dataclass
class Card:
    """Metadata of an adapter, stored as JSON next to the adapter.

    Every field can be empty; adapters from other tools have few."""

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
    """Return the ID by which hubs and other tools know a base.

    A built-in base's hub ID, else the name itself."""
    return _HUB_IDS.get(base, base)


@dataclass(frozen=True)
class LoraSpec:
    """A new adapter's modules, ranks and initialization.

    `targets`, `exclude`: see core.targets.
    `layers`: indices of the repeated blocks, None for all.
    `rank_pattern`, `alpha_pattern`: target pattern -> value; the first match wins.
    `init`: "zero-b" (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/rank, B zero), "pissa",
        "olora", "loftq" (from the quantization error of the base).
    `kind`: "lora" makes pairs; "loha" and "lokr" make deltas of those forms (core.forms), with LyCORIS'
        initialization. `factor` and `decompose_both` are passed to `trained_shapes` for these.
    `modules_to_save`: modules trained in full, as copies.
    `token_rows`: embedding name -> ids of the only tokens trained."""

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
    """All changes of one fine-tune by module name, plus the card.

    `pairs`: module name -> pair; for `experts` the key is the parameter's name (`…experts.gate_up_proj`).
    `modules`: module name -> {parameter name: tensor}, full copies that replace the base's tensors while
        attached.
    `deltas`: parameter name (`….weight`, `….bias`) -> a change that is not a pair. A module can have both
        a pair and a delta; each is relative to the base's weight, and they add up."""

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
        """Yield every tensor under a stable name, sorted."""
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
        """Return the part for one model of a pipeline, under its own module names.

        name: `unet`, `text_encoder`, …; the result is empty if the adapter has nothing for this model."""
        start, tables = f"{name}.", dict[str, Any]()
        for kind in _TABLES:
            table = getattr(self, kind)
            tables[kind] = {key.removeprefix(start): table[key] for key in table if key.startswith(start)}
        return replace(self, **tables)

    def renamed(self, change: Callable[[str], str]) -> Adapter:
        """Return the same adapter under other module names; `change` must be one to one."""
        named = {kind: {change(n): item for n, item in getattr(self, kind).items()} for kind in _TABLES}
        return replace(self, **named)  # type: ignore[arg-type]

    def divided(self, by: Callable[[str], float]) -> dict[float, Adapter]:
        """Split the adapter by the number that `by` gives for a module's name; drop 0.

        Σ number·part is the adapter with a strength per module, exactly and in every form: the parts share
        the tensors, and no scale changes."""
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
        """Return the same adapter without any `origin`.

        Files store this form, and `digest` hashes it."""
        return replace(self, pairs={name: pair.collapsed() for name, pair in self.pairs.items()})

    def move(self, device: torch.device) -> None:
        """Move every tensor to `device` in place.

        Parameters stay the same objects, so that an optimizer stays valid."""

        def moved(t: Tensor) -> Tensor:
            t.data = t.data.to(device)
            return t

        self.mapped(moved)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Adapter:
        """Return a copy with `change` applied to every tensor."""
        return self.mapped_by_module(lambda module, t: change(t))

    def mapped_by_module(self, change: Callable[[str, Tensor], Tensor]) -> Adapter:
        """Return a copy with change(module name, tensor) applied to every tensor."""

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
        """Return the sha256 of names, shapes, dtypes, values and scales.

        Equal digests mean equal effects on equal bases. The digest is that of the collapsed adapter, so an
        adapter with an `origin` has the digest of the file it is written to."""
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
    """Return the tensor's values as bytes, as a file stores them."""
    if not tensor.numel():
        return b""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
