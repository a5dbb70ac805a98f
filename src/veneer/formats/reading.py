"""The result of reading an adapter, and its JSON summary.

The summary contains counts, ranks, shapes, norms and hashes. This module works on adapters and their files.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.core.adapter import Adapter, Pair, alpha_of
from veneer.core.factors import factors, norm
from veneer.errors import AdapterError
from veneer.files.hashes import hashes
from veneer.formats.card import CARD_FILE, CardFile, read_card
from veneer.formats.folder import tensor_file
from veneer.formats.names import component_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Reading:
    """The result of reading an adapter.

    `used`: canonical module -> keys of the module in the file. `unused`: keys with an unknown module or
    layout. `unpaired`: keys of modules that could not be read, with reasons in `notes`. `assumed_scale`:
    modules for which scale 1 was assumed, because the file does not state a scale (PEFT's names without a
    configuration)."""

    adapter: Adapter
    format: str
    reasons: list[str]
    family: str | None
    used: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    assumed_scale: list[str] = field(default_factory=list)


def delta_norm(pair: Pair) -> float:
    """Return ‖s·B·A‖ (Frobenius) without DoRA's magnitude, in float64.

    For experts, this is the norm over all experts together."""
    return norm(factors(pair))


def summary(path: Path, reading: Reading, refusal: AdapterError | None) -> dict[str, Any]:
    """Return the summary that `veneer.adapters.inspect.inspect` returns.

    refusal: the error if the adapter cannot be used."""
    adapter = reading.adapter
    file = read_card(path) if (path / CARD_FILE).is_file() else CardFile(adapter.card)
    groups: dict[str, list[Pair]] = defaultdict(list)
    for module, pair in sorted(adapter.pairs.items()):
        groups[_last_name(module)].append(pair)
    tensors = [t for _, t in adapter.tensors()]
    tensors_at = tensor_file(path, from_pickle=True)
    used = {key for keys in reading.used.values() for key in keys}
    return {
        "adapter": str(path),
        "verdict": {
            "use": refusal is None,
            "why": refusal.what if refusal else "",
            "fix": (refusal.fix or "") if refusal else "",
        },
        "format": reading.format,
        "reasons": reading.reasons,
        "assumed_scale": len(reading.assumed_scale),
        "family": reading.family or "",
        "digest": adapter.digest(),
        "base": file.card.base,
        "base_fingerprint": file.card.base_fingerprint,
        "pairs": len(adapter.pairs),
        "parameters": sum(t.numel() for t in tensors),
        "bytes": adapter.size_bytes(),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
        "ranks": _value_counts(p.rank for p in adapter.pairs.values()),
        "alphas": _value_counts(alpha_of(p.scale, p.rank, adapter.rslora) for p in adapter.pairs.values()),
        "scales": _value_counts(p.scale for p in adapter.pairs.values()),
        "variants": _variants(adapter),
        "rslora": adapter.rslora,
        "dora": any(m is not None for m in _magnitudes(adapter)),
        "dropout": adapter.dropout,
        "components": _value_counts(component_of(n) for n in [*adapter.pairs, *adapter.deltas, *adapter.modules]),
        "targets": {kind: _group(pairs, adapter.rslora) for kind, pairs in sorted(groups.items())},
        "deltas": _deltas(adapter),
        "full_copies": {
            n: {k: list(t.shape) for k, t in full_copy.items()} for n, full_copy in sorted(adapter.modules.items())
        },
        "token_rows": {n: list(r.indices) for n, r in sorted(adapter.token_rows.items())},
        "trigger_words": file.card.trigger_words,
        "card": file.card.to_dict(),
        "coverage": {"used": len(used), "unused": reading.unused, "unpaired": reading.unpaired},
        "hashes": asdict(hashes(tensors_at)),
        "files": _files(path),
        "notes": [
            *reading.notes,
            *(f"{CARD_FILE}: the key {k!r} is unknown; kept in extra" for k in file.unknown),
        ],
    }


_FORMS = {"hadamard": "LoHa", "kronecker": "LoKr", "gain": "(IA)³", "dense": "differences", "replacement": "new biases"}


def _variants(adapter: Adapter) -> list[str]:
    """Return the common names of the kinds of change in an adapter."""
    out = ["rsLoRA" if adapter.rslora else "LoRA"] if adapter.pairs else []
    out += list(dict.fromkeys(_FORMS[d.form] for d in adapter.deltas.values()))
    out += ["DoRA"] if any(m is not None for m in _magnitudes(adapter)) else []
    extras = {"full copies": adapter.modules, "token rows": adapter.token_rows}
    return out + [label for label, values in extras.items() if values]


def _last_name(module: str) -> str:
    """Return a module's last name part, with a trailing number: `to_out.0`."""
    parts = module.split(".")
    at = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[at:])


def _files(path: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in (sorted(path.iterdir()) if path.is_dir() else [path]) if p.is_file()}


def _value_counts(values: Iterable[Any]) -> dict[str, int]:
    """Return {value: count}, sorted by value, with floats rounded to six digits."""
    counts = Counter(values)
    return {f"{v:g}" if isinstance(v, float) else str(v): n for v, n in sorted(counts.items())}


def _magnitudes(adapter: Adapter) -> Iterable[Tensor | None]:
    yield from (p.magnitude for p in adapter.pairs.values())
    yield from (d.magnitude for d in adapter.deltas.values())


def _deltas(adapter: Adapter) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for _, d in sorted(adapter.deltas.items()):
        row = out.setdefault(d.form, {"count": 0, "bytes": 0, "dense_bytes": 0})
        row["count"] += 1
        row["bytes"] += sum(t.numel() * t.element_size() for _, t in d.tensors())
        row["dense_bytes"] += 4 * math.prod(d.shape) if d.shape else 0
    return out


def _group(pairs: Sequence[Pair], rslora: bool) -> dict[str, Any]:
    return {
        "kind": pairs[0].kind,
        "count": len(pairs),
        "ranks": sorted({p.rank for p in pairs}),
        "alphas": sorted({alpha_of(p.scale, p.rank, rslora) for p in pairs}),
        "scales": sorted({p.scale for p in pairs}),
        "A": [list(s) for s in sorted({tuple(p.A.shape) for p in pairs})],
        "B": [list(s) for s in sorted({tuple(p.B.shape) for p in pairs})],
        "delta_norm": float(sum(delta_norm(p) ** 2 for p in pairs) ** 0.5),
    }
