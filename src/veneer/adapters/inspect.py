"""Inspect and verify an adapter of any format; no base is needed.

This module never changes a file or a base.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from veneer.adapters import use as using
from veneer.core.adapter import Adapter
from veneer.core.forms import BASED, product_of
from veneer.errors import AdapterError, UnsafeFileError, VeneerError
from veneer.files.hashes import verify_hashes
from veneer.formats import read as reader
from veneer.formats.card import CARD_FILE, CardFile, file_digest, read_card
from veneer.formats.reading import Reading, delta_norm, summary

if TYPE_CHECKING:
    from veneer.library.library import Library
    from veneer.models.text.base import TextBase


@dataclass(frozen=True)
class AdapterCheck:
    """The result of one check.

    ok: None if the check could not run.
    detail: what the check found, or why it could not run."""

    name: str
    ok: bool | None
    detail: str = ""


def inspect(name: str, **how: Unpack[reader.ReadOptions]) -> dict[str, Any]:
    """Return a description of the adapter `name`, ready for JSON.

    name: a folder, a file or a name in the library.
    how: options of `formats.read.read`.

    The main keys of the result are:
        verdict: whether veneer can use the adapter; if not, why and how to fix it. The other keys then
            describe the readable part.
        format, reasons: the detected format and why.
        coverage: the number of tensors used, and the tensors that are not recognized or incomplete, such as an A
            without its B. An adapter with such tensors is refused.
        assumed_scale: the number of modules whose scale the file does not state. The result assumes an alpha
            equal to the rank for these modules, and the adapter is refused.
        targets: for each last part of a module name, such as "q_proj": count, ranks, alphas, scales, shapes
            and total ‖ΔW‖ (Frobenius; without DoRA's magnitude, which needs the base).
        deltas: for each form of change that is not a pair: the count, the size in bytes, and the size of all
            ΔW as dense matrices. When the adapter is used, only one dense ΔW is in memory at a time.
        hashes: the hashes of the tensor file.

    Raises the error of `formats.read.read` if the file is not an adapter."""
    path = using.adapter_path(name)
    reading, refusal = _read(path, how)
    return summary(path, reading, refusal)


def _read(path: Path, how: reader.ReadOptions) -> tuple[Reading, AdapterError | None]:
    """Return the readable part of an adapter, and the error that prevents its use.

    The error is None if veneer can use the adapter. If nothing can be read, raises the error instead."""
    how = {**how, "assume_scale": True, "as_arrays": True}
    try:
        reading = reader.read(path, **how)
        return reading, reader.scale_error(reading, path) if reading.assumed_scale else None
    except UnsafeFileError:
        raise
    except AdapterError as error:
        try:
            return reader.read(path, allow_partial=True, **how), error
        except AdapterError:
            raise error from None


def verify_adapter(name: str, base: TextBase | None = None, **how: Unpack[reader.ReadOptions]) -> list[AdapterCheck]:
    """Check the adapter `name` and return one result per check.

    Compares the files' hashes and the adapter's digest with the card, and the hashes in the file header with
    the tensors. Checks that every tensor is recognized and has its counterpart, and that all values are
    finite. With a base, also checks the base's fingerprint, every name and shape, and that the adapter
    changes the base's output. A failed check has `ok` False. Raises AdapterError only if the adapter does not
    exist."""
    path = using.adapter_path(name)
    out: list[AdapterCheck] = []
    card: CardFile | None = None
    if (path / CARD_FILE).is_file():
        try:
            card = read_card(path)
            out.append(AdapterCheck("card", True, f"{CARD_FILE} is sound"))
        except VeneerError as error:
            out.append(AdapterCheck("card", False, str(error)))
    elif path.is_dir():
        out.append(AdapterCheck("card", None, f"there is no {CARD_FILE} to compare the hashes and the digest with"))
    out += _hashes(path, card) + _header_hashes(path)
    try:
        reading = reader.read(path, **how)
    except VeneerError as error:
        return [*out, AdapterCheck("contents", False, str(error))]
    adapter = reading.adapter
    parts: dict[str, Sized] = {"pairs": adapter.pairs, "deltas": adapter.deltas, "full copies": adapter.modules}
    parts["sets of token rows"] = adapter.token_rows
    count = ", ".join(f"{len(tensors)} {label}" for label, tensors in parts.items() if tensors)
    messages = [f"{reading.format}; every tensor is understood and finite: {count}", *reading.notes]
    out.append(AdapterCheck("contents", True, "\n".join(messages)))
    if card is not None and card.digest:
        digest = adapter.digest()
        matches = digest == card.digest
        detail = digest if matches else f"the card says {card.digest}, the tensors give {digest}"
        out.append(AdapterCheck("digest", matches, detail))
    out.append(_not_zero(adapter))
    return out if base is None else out + _base_checks(base, name, card, how)


def verify_stored(library: Library, reference: str) -> list[AdapterCheck]:
    """Run `verify_adapter` on an adapter in the library, and check its files' hashes.

    Records the results in the library, which derives the adapter's health from them. Raises NotInLibrary."""
    from veneer.library.maintenance import FILES_CHECK
    from veneer.library.store import hash_file

    version = library.find(reference)
    stored = library.files(version.entry)
    try:
        path = library.place(version.reference, version.entry, version.format, stored)
        out = verify_adapter(str(path))
        folder = path if path.is_dir() else path.parent
        wrong = [name for name, (sha256, _) in stored.items() if hash_file(folder / name) != sha256]
        message = f"changed since they were added: {', '.join(wrong)}" if wrong else "every file has its sha256"
        out.insert(0, AdapterCheck(FILES_CHECK, not wrong, message))
    except AdapterError as error:
        out = [AdapterCheck(FILES_CHECK, False, str(error))]
    library.record_checks(version.entry, ((check.name, check.ok, check.detail) for check in out))
    return out


def _header_hashes(path: Path) -> list[AdapterCheck]:
    """Check the hashes in a single file's header, which model managers and hubs read."""
    if path.is_dir() or path.suffix != ".safetensors":
        return []
    try:
        checks = verify_hashes(path)
    except VeneerError:
        return []  # the error is reported when the adapter is read
    if not checks:
        return [AdapterCheck("header", None, "the header has no hashes of the tensors")]
    why = "the tensors were changed after the hash was written, or the hash is from other tensors"
    wrong = [f"{c.key}: stored {c.stored}, found {c.found}; {why}" for c in checks if not c.holds]
    message = "\n".join(wrong) or ", ".join(c.key for c in checks) + " hold"
    return [AdapterCheck("header", not wrong, message)]


def _hashes(folder: Path, card: CardFile | None) -> list[AdapterCheck]:
    if card is None or not card.files:
        return []
    wrong = []
    for file, want in sorted(card.files.items()):
        path = folder / file
        got = file_digest(path) if path.is_file() else "missing"
        if got != want:
            wrong.append(f"{file}: the card says {want}, the file is {got}")
    return [AdapterCheck("hashes", not wrong, "\n".join(wrong) or f"{len(card.files)} files match the card")]


def _not_zero(adapter: Adapter) -> AdapterCheck:
    norms = {n: delta_norm(p) for n, p in adapter.pairs.items()}
    additive = {n: d for n, d in adapter.deltas.items() if d.form not in BASED and d.magnitude is None}
    norms |= {n: float(product_of(d).norm()) for n, d in additive.items()}
    scaled = {n for n, p in adapter.pairs.items() if p.magnitude is not None}
    alive = [n for n, norm in norms.items() if norm > 0 or n in scaled]
    has_others = adapter.modules or adapter.token_rows or len(additive) < len(adapter.deltas)
    if norms and not alive and not has_others:
        return AdapterCheck("not zero", False, "every ΔW is zero: the adapter was never trained")
    zero = sorted(set(norms) - set(alive))
    message = f"; {len(zero)} of {len(norms)} changes are zero, including {zero[0]}" if zero else ""
    return AdapterCheck("not zero", True, f"‖ΔW‖ = {sum(n**2 for n in norms.values()) ** 0.5:.4g} in all{message}")


def _base_checks(base: TextBase, name: str, card: CardFile | None, how: reader.ReadOptions) -> list[AdapterCheck]:
    import torch

    from veneer.core.attach import attach

    want = card.card.base_fingerprint if card else ""
    if card is None or not want:
        out = [AdapterCheck("base", None, "the card names no base's fingerprint")]
    elif want == base.fingerprint:
        out = [AdapterCheck("base", True, base.fingerprint)]
    else:
        detail = f"the card says {want} ({card.card.base}), the base is {base.fingerprint}"
        out = [AdapterCheck("base", False, detail)]
    try:
        fitted = using.load_adapter(base, name, allow_other_base=True, **how)
    except VeneerError as error:
        return [*out, AdapterCheck("fits", False, str(error))]
    out.append(AdapterCheck("fits", True, "every name, kind and shape matches the base"))
    ids = torch.arange(min(64, base.model.config.get_text_config().vocab_size), device=base.device)[None]
    if rows := [i for r in fitted.token_rows.values() for i in r.indices]:
        ids = torch.cat([ids, torch.tensor([rows[:64]], device=base.device)], dim=1)
    with torch.no_grad(), attach(base.model) as attachment:
        without = base.model(ids).logits.float()
        attachment.add("verified", fitted)
        attachment.use("verified")
        after = base.model(ids).logits.float()
    if not torch.isfinite(after).all():
        return [*out, AdapterCheck("effect", False, "with the adapter, the base's logits are not finite")]
    moved = float((after - without).abs().max())
    detail = f"logits move by up to {moved:.4g}" if moved else "no logit moves: the adapter has no effect on this base"
    return [*out, AdapterCheck("effect", moved > 0, detail)]
