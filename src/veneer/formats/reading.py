"""What there is to say of an adapter that has been read, ready for JSON: counts, ranks, shapes, norms, hashes, card.

Whoever read it says how a digest and a norm are made of its tensors, of which all else needs shapes and kinds alone.
Knows adapters and their files; loads no torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from veneer.core.adapter import Adapter, Pair, alpha_of
from veneer.errors import AdapterError
from veneer.files import hashes as file_hashes
from veneer.formats.card import CARD_FILE, CardFile, read_card
from veneer.formats.names import component_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Read", "facts"]


class Read(Protocol):
    """As formats.read.Reading."""

    @property
    def adapter(self) -> Adapter: ...
    @property
    def format(self) -> str: ...
    @property
    def reasons(self) -> list[str]: ...
    @property
    def family(self) -> str | None: ...
    @property
    def used(self) -> Mapping[str, list[str]]: ...
    @property
    def unused(self) -> list[str]: ...
    @property
    def unpaired(self) -> list[str]: ...
    @property
    def notes(self) -> list[str]: ...


def _tensors_of(folder: Path) -> Path:
    """The file with the tensors, as `formats.read` chooses it."""
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
    files = sorted(folder.glob("*.safetensors"))
    return next((folder / n for n in names if (folder / n).is_file()), files[0] if files else folder / names[0])


def facts(
    path: Path, reading: Read, refusal: AdapterError | None, *, digest: str, norm: Callable[[Pair], float]
) -> dict[str, Any]:
    """What `veneer.adapters.inspect.inspect` returns. `refusal`: why it is not read for use. `norm`: ‖ΔW‖ of a pair."""
    adapter = reading.adapter
    file = read_card(path) if (path / CARD_FILE).is_file() else CardFile(adapter.card)
    groups: dict[str, list[Pair]] = defaultdict(list)
    for module, pair in sorted(adapter.pairs.items()):
        groups[_leaf(module)].append(pair)
    tensors = [t for _, t in adapter.tensors()]
    tensor_file = _tensors_of(path) if path.is_dir() else path
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
        "family": reading.family or "",
        "digest": digest,
        "base": file.card.base,
        "base_fingerprint": file.card.base_fingerprint,
        "pairs": len(adapter.pairs),
        "parameters": sum(t.numel() for t in tensors),
        "bytes": adapter.size_bytes(),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
        "ranks": _counted(p.rank for p in adapter.pairs.values()),
        "alphas": _counted(alpha_of(p.scale, p.rank, adapter.rslora) for p in adapter.pairs.values()),
        "scales": _counted(p.scale for p in adapter.pairs.values()),
        "variants": _variants(adapter),
        "rslora": adapter.rslora,
        "dora": any(m is not None for m in _magnitudes(adapter)),
        "dropout": adapter.dropout,
        "components": _counted(component_of(n) for n in [*adapter.pairs, *adapter.deltas, *adapter.modules]),
        "targets": {leaf: _group(pairs, adapter.rslora, norm) for leaf, pairs in sorted(groups.items())},
        "deltas": _deltas(adapter),
        "full_copies": {n: {k: list(t.shape) for k, t in own.items()} for n, own in sorted(adapter.modules.items())},
        "token_rows": {n: list(r.indices) for n, r in sorted(adapter.token_rows.items())},
        "new_tokens": {n: sorted(words) for n, words in sorted(adapter.new_tokens.items())},
        "trigger_words": file.card.trigger_words,
        "card": file.card.to_dict(),
        "coverage": {"used": len(used), "unused": reading.unused, "unpaired": reading.unpaired},
        "hashes": asdict(file_hashes.hashes(tensor_file)),
        "files": _files(path),
        "notes": [
            *reading.notes,
            *(f"{CARD_FILE}: the key {k!r} is not understood, kept in extra" for k in file.unknown),
        ],
    }


_FORMS = {"hadamard": "LoHa", "kronecker": "LoKr", "gain": "(IA)³", "dense": "differences", "replacement": "new biases"}


def _variants(adapter: Adapter) -> list[str]:
    """What kinds of change it holds, as people call them."""
    out = ["rsLoRA" if adapter.rslora else "LoRA"] if adapter.pairs else []
    out += list(dict.fromkeys(_FORMS[d.form] for d in adapter.deltas.values()))
    out += ["DoRA"] if any(m is not None for m in _magnitudes(adapter)) else []
    others = {"full copies": adapter.modules, "token rows": adapter.token_rows, "learned words": adapter.new_tokens}
    return out + [what for what, own in others.items() if own]


def _leaf(module: str) -> str:
    """The last part of a name that is no number, and what follows it: `to_out.0`."""
    parts = module.split(".")
    at = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[at:])


def _files(path: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in (sorted(path.iterdir()) if path.is_dir() else [path]) if p.is_file()}


def _counted(values: Iterable[Any]) -> dict[str, int]:
    """Value -> how often, in order of the values; numbers to six digits."""
    shown = Counter(values)
    return {f"{v:g}" if isinstance(v, float) else str(v): n for v, n in sorted(shown.items())}


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


def _group(pairs: Sequence[Pair], rslora: bool, norm: Callable[[Pair], float]) -> dict[str, Any]:
    return {
        "kind": pairs[0].kind,
        "count": len(pairs),
        "ranks": sorted({p.rank for p in pairs}),
        "alphas": sorted({alpha_of(p.scale, p.rank, rslora) for p in pairs}),
        "scales": sorted({p.scale for p in pairs}),
        "A": [list(s) for s in sorted({tuple(p.A.shape) for p in pairs})],
        "B": [list(s) for s in sorted({tuple(p.B.shape) for p in pairs})],
        "delta_norm": float(sum(norm(p) ** 2 for p in pairs) ** 0.5),
    }
