"""Looking at an adapter's folder: what is in it (no base needed), and whether it is what its card says.

Stands above formats and models, beside `using`. Nothing here changes a file or a base.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veneer import using
from veneer.core.adapter import Adapter, Pair
from veneer.core.attach import attach
from veneer.errors import VeneerError
from veneer.formats import peft
from veneer.formats.card import CARD_FILE, CardFile, file_digest, read_card

if TYPE_CHECKING:
    from veneer.models.text import TextBase

__all__ = ["Check", "delta_norm", "inspect", "verify"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked. `ok` None: it could not be checked, and `detail` says why."""

    name: str
    ok: bool | None
    detail: str = ""


def inspect(name: str) -> dict[str, Any]:
    """What is in the adapter `name` (a folder, or a name in the veneer home), ready for JSON.

    `targets`: for each last part of a module's name the count, ranks, scales, shapes and ‖ΔW‖ (Frobenius, over all of
    them; without DoRA's magnitude, which needs the base). Raises what reading it raises."""
    folder = using.adapter_path(name)
    loaded = peft.load(folder)
    adapter = loaded.adapter
    file = read_card(folder) if (folder / CARD_FILE).is_file() else CardFile(adapter.card)
    groups: dict[str, list[Pair]] = defaultdict(list)
    for module, pair in sorted(adapter.pairs.items()):
        groups[module.rpartition(".")[2]].append(pair)
    tensors = [t for _, t in adapter.tensors()]
    return {
        "adapter": str(folder),
        "digest": adapter.digest(),
        "base": file.card.base or loaded.config.get("base_model_name_or_path") or "",
        "base_fingerprint": file.card.base_fingerprint,
        "pairs": len(adapter.pairs),
        "parameters": sum(t.numel() for t in tensors),
        "bytes": adapter.size_bytes(),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
        "ranks": {str(r): n for r, n in sorted(Counter(p.rank for p in adapter.pairs.values()).items())},
        "scales": {f"{s:g}": n for s, n in sorted(Counter(p.scale for p in adapter.pairs.values()).items())},
        "rslora": adapter.rslora,
        "dora": any(p.magnitude is not None for p in adapter.pairs.values()),
        "dropout": adapter.dropout,
        "targets": {leaf: _group(pairs) for leaf, pairs in sorted(groups.items())},
        "full_copies": {n: {k: list(t.shape) for k, t in own.items()} for n, own in sorted(adapter.modules.items())},
        "token_rows": {n: list(r.indices) for n, r in sorted(adapter.token_rows.items())},
        "card": file.card.to_dict(),
        "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
        "notes": [
            *loaded.notes,
            *(f"{CARD_FILE}: the key {k!r} is not understood, kept in extra" for k in file.unknown),
        ],
    }


def _group(pairs: Iterable[Pair]) -> dict[str, Any]:
    pairs = list(pairs)
    return {
        "kind": pairs[0].kind,
        "count": len(pairs),
        "ranks": sorted({p.rank for p in pairs}),
        "scales": sorted({p.scale for p in pairs}),
        "A": [list(s) for s in sorted({tuple(p.A.shape) for p in pairs})],
        "B": [list(s) for s in sorted({tuple(p.B.shape) for p in pairs})],
        "delta_norm": float(sum(delta_norm(p) ** 2 for p in pairs) ** 0.5),
    }


def delta_norm(pair: Pair) -> float:
    """‖s·B·A‖ (Frobenius), from the two thin Gram matrices: tr(BᵀB·AAᵀ), in float64. Experts: over all of them."""
    A, B = pair.collapsed().A.double(), pair.collapsed().B.double()
    if pair.kind == "conv":
        A, B = A.flatten(1), B.flatten(1)
        if B.shape[1] != A.shape[0]:  # grouped: each block of rows of B meets its own part of A
            A = A.view(-1, B.shape[1], A.shape[1])
            B = B.view(len(A), -1, B.shape[1])
    gram = (B.mT @ B) * (A @ A.mT)
    return float(abs(pair.scale) * gram.sum().clamp_min(0).sqrt())


def verify(name: str, base: TextBase | None = None) -> list[Check]:
    """Check the adapter `name`: the files' hashes and the digest against the card, the configuration against the
    tensors, values finite; with a base its fingerprint, every name and shape, and that the adapter changes what the
    base says. Failures are Checks with `ok` False. Raises AdapterError only where there is no such folder."""
    folder = using.adapter_path(name)
    out: list[Check] = []
    card: CardFile | None = None
    if (folder / CARD_FILE).is_file():
        try:
            card = read_card(folder)
            out.append(Check("card", True, f"{CARD_FILE} is sound"))
        except VeneerError as error:
            out.append(Check("card", False, str(error)))
    else:
        out.append(Check("card", None, f"there is no {CARD_FILE}: hashes and digest cannot be compared"))
    out += _hashes(folder, card)
    try:
        loaded = peft.load(folder)
    except VeneerError as error:
        return [*out, Check("contents", False, str(error))]
    adapter = loaded.adapter
    count = (
        f"{len(adapter.pairs)} pairs, {len(adapter.modules)} full copies, {len(adapter.token_rows)} sets of token rows"
    )
    out.append(
        Check("contents", True, "; ".join([f"configuration and tensors agree, all finite: {count}", *loaded.notes]))
    )
    if card is not None and card.digest:
        digest = adapter.digest()
        same = digest == card.digest
        out.append(Check("digest", same, digest if same else f"the card says {card.digest}, the tensors give {digest}"))
    out.append(_not_zero(adapter))
    return out if base is None else out + _against(base, name, adapter, card)


def _hashes(folder: Path, card: CardFile | None) -> list[Check]:
    if card is None or not card.files:
        return []
    wrong = []
    for file, want in sorted(card.files.items()):
        path = folder / file
        got = file_digest(path) if path.is_file() else "missing"
        if got != want:
            wrong.append(f"{file}: the card says {want}, the file is {got}")
    return [Check("hashes", not wrong, "\n".join(wrong) or f"{len(card.files)} files are as the card says")]


def _not_zero(adapter: Adapter) -> Check:
    norms = {n: delta_norm(p) for n, p in adapter.pairs.items()}
    alive = [n for n, norm in norms.items() if norm > 0 or adapter.pairs[n].magnitude is not None]
    if adapter.pairs and not alive and not adapter.modules and not adapter.token_rows:
        return Check("not zero", False, "every B·A is zero: an adapter that was never trained")
    zero = sorted(set(norms) - set(alive))
    said = f"; {len(zero)} of {len(norms)} pairs are zero, {zero[0]} among them" if zero else ""
    return Check("not zero", True, f"‖ΔW‖ = {sum(n**2 for n in norms.values()) ** 0.5:.4g} in all{said}")


def _against(base: TextBase, name: str, adapter: Adapter, card: CardFile | None) -> list[Check]:
    want = card.card.base_fingerprint if card else ""
    same = want == base.fingerprint
    told = (
        base.fingerprint
        if same
        else f"the card says {want} ({card.card.base if card else ''}), the base is {base.fingerprint}"
    )
    out = [Check("base", same, told) if want else Check("base", None, "the card names no base's fingerprint")]
    try:
        fitted = peft.read(using.adapter_path(name), base.model)
    except VeneerError as error:
        return [*out, Check("fits", False, str(error))]
    out.append(Check("fits", True, "every name, kind and shape is the base's"))
    ids = torch.arange(min(64, base.model.config.get_text_config().vocab_size), device=base.device)[None]
    if rows := [i for r in fitted.token_rows.values() for i in r.indices]:
        ids = torch.cat([ids, torch.tensor([rows[:64]], device=base.device)], dim=1)
    with torch.no_grad(), attach(base.model) as attachment:
        before = base.model(ids).logits.float()
        attachment.add("verified", fitted)
        attachment.use("verified")
        after = base.model(ids).logits.float()
    if not torch.isfinite(after).all():
        return [*out, Check("effect", False, "the base's logits under the adapter are not finite")]
    moved = float((after - before).abs().max())
    detail = f"logits move by up to {moved:.4g}" if moved else "no logit moves: the adapter has no effect on this base"
    return [*out, Check("effect", moved > 0, detail)]
