"""Inspect a plain adapter without torch, for speed.

Importing torch takes longer than reading a small file. Plain means: one safetensors file of a known image
family with only pairs of linears and convolutions with alphas, each on its own module; or a PEFT folder of a
language model with only pairs of linears, whose configuration and tensors agree completely. `inspect_plain`
returns the result of `adapters.inspect` for such an adapter, from the header and numpy; and None for all
others, including any with a fault or a note, which are read in full. Reference: `inspect`; tests compare the
two over every layout.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from veneer.core.adapter import Adapter, Pair, scale_of
from veneer.errors import AdapterError
from veneer.files.safetensors import HeaderEntry, read_header
from veneer.formats import peft_config as cfg
from veneer.formats.card import CARD_FILE, read_card
from veneer.formats.folder import CONFIG_FILE, CONFIG_KEY, TENSOR_FILE
from veneer.formats.keys import ROLES, detect_format, named_adapters, split_key
from veneer.formats.metadata import card_from_metadata, family_in_metadata
from veneer.formats.names import choose_family, has_image_names, lookup
from veneer.formats.reading import Reading, summary

if TYPE_CHECKING:
    from numpy import ndarray

_MAX_BYTES = 64 << 20
"""Maximum size in bytes.

Above it torch is faster despite its import, because it computes norms on all cores."""
_KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LARGE = 1e60
"""Maximum value, so that products stay in float64's range."""
LAYERS = re.compile(r"model\.(language_model\.)?layers\.\d+\.")
"""Names in most language models and no image family.

Avoids building the family tables."""
_PEFT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_AB = {role: re.compile(ROLES[role]) for role in "AB"}


@dataclass(frozen=True)
class _Stored:
    """A tensor's shape and kind like a torch tensor's, and its bytes."""

    entry: HeaderEntry
    raw: bytes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def ndim(self) -> int:
        return len(self.entry.shape)

    @property
    def dtype(self) -> str:
        return f"torch.{_KINDS[self.entry.kind]}"

    def numel(self) -> int:
        return math.prod(self.entry.shape)

    def element_size(self) -> int:
        return len(self.raw) // self.numel()

    def values(self) -> ndarray:
        """Return the values in float64."""
        import numpy as np

        if self.entry.kind == "BF16":  # the upper half of a float32
            wide = np.frombuffer(self.raw, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).astype(np.float64).reshape(self.shape)
        return np.frombuffer(self.raw, _KINDS[self.entry.kind]).astype(np.float64).reshape(self.shape)


def inspect_plain(path: Path) -> dict[str, Any] | None:
    """Return the result of `inspect`, or None if the adapter must be read in full."""
    if path.is_dir():  # like `using.adapter_path`
        path = next((p for p in (path, path / "adapter") if (p / CONFIG_FILE).is_file()), path)
    file = path / TENSOR_FILE if path.is_dir() else path
    if file.suffix.lower() != ".safetensors" or not file.is_file() or file.stat().st_size > _MAX_BYTES:
        return None
    configured = (file.parent / CONFIG_FILE).is_file()
    if configured != path.is_dir():
        return None

    def raw(tensor: Any) -> bytes:
        return bytes(tensor.raw)

    try:
        stored, metadata = _stored(file)
        if stored is None or (reading := _folder(path, stored) if configured else _plain(stored, metadata)) is None:
            return None
        return summary(path, reading, None, digest=reading.adapter.digest(raw), norm=_norm)
    except (AdapterError, OSError, cfg.PatternError):
        return None


def _stored(path: Path) -> tuple[dict[str, _Stored] | None, dict[str, str]]:
    """Return every tensor and the metadata.

    None if a tensor is not a float of usable size."""
    import numpy as np

    header = read_header(path)
    if any(e.kind not in _KINDS or not math.prod(e.shape) for e in header.entries.values()):
        return None, {}
    data = path.read_bytes()[header.data_start :]
    out = {name: _Stored(e, data[e.begin : e.end]) for name, e in header.entries.items()}
    return (out if all((np.abs(t.values()) < _LARGE).all() for t in out.values()) else None), header.metadata


def _plain(stored: dict[str, _Stored], metadata: dict[str, str]) -> Reading | None:
    """Return the adapter under canonical names, or None if it is not plain."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(stored):
        parts = split_key(key)
        role = next((r for r, p in _AB.items() if parts and p.fullmatch(parts[1])), parts[1] if parts else "")
        if parts is None or role not in ("A", "B", "alpha") or role in groups[parts[0]] or ":" in key:
            return None
        groups[parts[0]][role] = key
    if {CONFIG_KEY, "lora_adapter_metadata"} & set(metadata) or not all(
        {"A", "B"} <= set(own) for own in groups.values()
    ):
        return None
    if any(stored[own[ab]].ndim < 2 for own in groups.values() for ab in "AB"):
        return None
    if len(named_adapters(stored)) > 1:
        return None
    shapes = {text: (stored[own["B"]].shape[0], stored[own["A"]].shape[1]) for text, own in groups.items()}
    choice = choose_family(shapes, family_in_metadata(metadata), None)
    if (family := choice.family) is None:
        return None
    pairs: dict[str, Pair] = {}
    used: dict[str, list[str]] = {}
    for text, own in groups.items():
        places = lookup(family, text) or ()
        if len(places) != 1 or places[0].part is not None or places[0].swap or places[0].module in pairs:
            return None
        module = places[0].module
        pair = _pair(stored, own, family.modules.get(module, ""))
        if pair is None:
            return None
        pairs[module], used[module] = pair, sorted(own.values())
    card = card_from_metadata(metadata)
    ranks = {pair.rank for pair in pairs.values()}
    if card.rank not in ranks:
        card.rank = ranks.pop() if len(ranks) == 1 else 0
    format_, reasons = detect_format(stored, metadata)
    if format_ == "peft" and not all("alpha" in own for own in groups.values()):
        return None  # its scale is not stated
    return Reading(Adapter(pairs, card=card), format_, [*reasons, *choice.reasons], family.name, used)


def _folder(folder: Path, stored: dict[str, _Stored]) -> Reading | None:
    """Return the adapter of a PEFT folder with plain pairs, or None.

    Reads like `peft`."""
    config, problems = cfg.parse_config(cfg.read_config(folder))
    more = (config.dora, config.lora_bias, config.bias != "none", config.modules_to_save, config.target_parameters)
    if problems or any(more) or config.token_indices is not None or config.stamps or config.velora:
        return None
    halves: dict[str, dict[str, _Stored]] = defaultdict(dict)
    used: dict[str, list[str]] = defaultdict(list)
    for key in sorted(stored):
        match = _PEFT.fullmatch(key)
        if match is None or split_key(key) != (key[: match.end("module")], key[match.end("module") + 1 :]):
            return None
        name = match["module"]
        if "lora_" in name or ".base_layer" in name or ".experts." in name or stored[key].ndim != 2:
            return None
        halves[name][match["half"]] = stored[key]
        used[name].append(key)
    pairs: dict[str, Pair] = {}
    for name, own in sorted(halves.items()):
        rank, _ = cfg.rank_of_module(config, name)
        if set(own) != {"A", "B"} or not own["A"].shape[0] == own["B"].shape[1] == rank:
            return None
        if not cfg.selects(config, name):
            return None
        scale = scale_of(cfg.alpha_of_module(config, name), rank, config.rslora)
        pairs[name] = Pair(cast(Any, own["A"]), cast(Any, own["B"]), scale)
    if not pairs or cfg.idle_targets(config, pairs)[0] or cfg.idle_patterns(config, pairs):
        return None
    texts = {f"base_model.model.{n}": (p.B.shape[0], p.A.shape[1]) for n, p in pairs.items()}
    reasons = [f"a folder with {CONFIG_FILE}"]
    if not all(LAYERS.match(name) for name in pairs):
        choice = choose_family(texts)
        reasons += choice.reasons
        if all(choice.lookup(text) is not None for text in texts):
            return None  # under canonical names of an image family
    if has_image_names(texts):
        return None
    card = read_card(folder).card if (folder / CARD_FILE).is_file() else cfg.card_from_config(config)
    return Reading(Adapter(pairs, card=card, rslora=config.rslora, dropout=config.dropout), "peft", reasons, "", used)


def _pair(stored: dict[str, _Stored], own: dict[str, str], kind: str) -> Pair | None:
    A, B = stored[own["A"]], stored[own["B"]]
    rank, out = A.shape[0] if A.ndim else 0, B.shape[0] if B.ndim else 0
    dims = {"linear": 2, "conv": 4}.get(kind)
    if A.ndim != dims or B.ndim != dims or B.shape[1] != rank or any(n != 1 for n in B.shape[2:]):
        return None
    if (dims == 2 and rank > out == A.shape[1]) or rank > 1 << 12:
        return None
    alpha = float(rank)
    if "alpha" in own:
        held = stored[own["alpha"]]
        alpha = float(held.values().reshape(-1)[0])
        if held.numel() != 1 or alpha == 0:
            return None
    return Pair(cast(Any, A), cast(Any, B), scale_of(alpha, rank), "linear" if dims == 2 else "conv")


def _norm(pair: Pair) -> float:
    """‖s·B·A‖ from Gram matrices: ‖B·A‖² = Σ (BᵀB) ⊙ (AAᵀ).

    Under cancellation from B = QR."""
    import numpy as np

    A, B = (cast(_Stored, t).values().reshape(t.shape[0], -1) for t in (pair.A, pair.B))
    BB, AA = B.T @ B, A @ A.T
    square = float((BB * AA).sum())
    if square < 1e-6 * float(BB.trace() * AA.trace()):
        square = float(np.linalg.norm(np.linalg.qr(B, "r") @ A)) ** 2
    return abs(pair.scale) * math.sqrt(square)
