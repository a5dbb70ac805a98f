"""The end of a run: the adapter on disk, the proof that the file is the adapter, and the report beside it."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.train.events import Resolved
from veneer.train.report.log import duration, read_log, size
from veneer.train.report.page import Page, write_page
from veneer.train.text.encode import Example

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase
    from veneer.models.text.base import TextBase
    from veneer.train.running import Outcome
    from veneer.train.text.task import RunResult

__all__ = [
    "base_facts",
    "known_files",
    "loss_cards",
    "prove",
    "report_records",
    "save_adapter",
    "size_cards",
    "today",
    "write_report",
]

_RELOADED = "reloaded"


def save_adapter(adapter: Adapter, folder: Path, base: TextBase) -> str:
    """Writes the adapter in PEFT's format with its card; returns the digest of what anyone reads back."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    adapter = replace(adapter, card=replace(adapter.card, created=created))
    return peft.write(adapter, folder, base_name=base.name, base=base.model).digest


def prove(attachment: Attachment, name: str, folder: Path, base: TextBase, example: Example) -> str:
    """Reads the folder again, attaches what is in it, and compares logits with those of the trained adapter.

    Equal bit for bit is expected; only an adapter whose file has another form (PiSSA and OLoRA, written with twice the
    rank) may differ by rounding. Returns the finding as a sentence; raises AdapterError when the logits differ."""
    again = peft.read(folder, base.model)
    attachment.add(_RELOADED, again, trainable=True)  # on the same path through the layers as the trained one
    try:
        trained, reloaded = (_logits(attachment, which, base, example) for which in (name, _RELOADED))
    finally:
        attachment.remove(_RELOADED)
    if torch.equal(trained, reloaded):
        return f"saved to {folder}, read back and compared: logits equal bit for bit"
    gap = float((trained.float() - reloaded.float()).abs().max() / trained.float().abs().max().clamp_min(1e-12))
    rewritten = any(pair.origin is not None for pair in attachment.adapters[name].pairs.values())
    # One rounding of the base's dtype, through a few layers.
    allowed = 64 * torch.finfo(base.dtype).eps if rewritten else 0.0
    if gap <= allowed:
        return f"saved to {folder}, read back and compared: logits equal but for rounding ({gap:.1e} of the largest)"
    raise AdapterError(
        f"the saved adapter does not give the logits of the trained one (they differ by {gap:.1e} of the largest)",
        where=str(folder),
        fix="do not use this file; the last checkpoint holds the trained state. This is a bug: please report it",
    )


def _logits(attachment: Attachment, name: str, base: TextBase, example: Example) -> Tensor:
    ids = torch.tensor([example.input_ids], device=base.device)
    with torch.no_grad(), attachment.using(name):
        logits: Tensor = base.model(input_ids=ids, use_cache=False).logits
    return logits


def write_report(folder: Path, result: RunResult, settings: Resolved, base: TextBase, seconds: float) -> str:
    """`report.html` beside the adapter, made from the run's log and its result; returns its path."""
    path = folder / "report.html"
    records = report_records(folder)
    numbers = result.preflight.get("numbers", {})
    weights = (folder / peft.TENSOR_FILE).stat().st_size
    page = Page(
        title=folder.resolve().name, subtitle=f"A LoRA adapter for {base.name}, {today()}", records=records,
        cards=_cards(result, numbers, weights, seconds), settings=settings.settings, sources=settings.sources,
        checks=result.preflight, facts=_facts(result, folder, base), usage=_usage(folder, base), files=_files(folder),
    )  # fmt: skip
    if preference := settings.settings.get("preference.loss"):
        page.loss = f"Loss, {preference}, mean over {'answers' if preference == 'kto' else 'pairs'}"
    write_page(path, page)
    return str(path)


def _cards(result: RunResult, numbers: dict[str, Any], weights: int, seconds: float) -> list[tuple[str, str, str]]:
    predicted = numbers.get("predicted_seconds")
    said = "" if predicted is None else f" · {duration(predicted)} predicted"
    return [
        *loss_cards(result),
        *_preference_cards(result),
        ("Steps", f"{result.steps:,}", result.stopped),
        (
            "Speed",
            f"{result.tokens_per_second:,.0f} tokens/s",
            f"{result.tokens:,} tokens in {duration(seconds)}{said}",
        ),
        ("Trained tokens", f"{result.trained_tokens:,}", f"{result.trained_tokens / max(1, result.tokens):.0%} of all"),
        *size_cards(result, numbers, weights),
    ]


def _preference_cards(result: RunResult) -> list[tuple[str, str, str]]:
    now, before = result.measured, result.measured_before
    if "reward_accuracy" not in now:
        return []
    likely = f"{before['logp_chosen']:.1f} before training" if "logp_chosen" in before else ""
    cards = [("Pairs ranked right", f"{now['reward_accuracy']:.1%}", "held-out; by reward over the reference")]
    if "logp_chosen" in now:
        cards.append(("Log p of chosen answers", f"{now['logp_chosen']:.1f}", likely))
    return cards


def loss_cards(result: Outcome) -> list[tuple[str, str, str]]:
    """(title, value, remark) of the losses that a run has."""
    cards = []
    if result.validation is not None:
        before = f"{result.validation_before:.4f} before training" if result.validation_before is not None else ""
        where = f" · kept from step {result.kept_step}" if result.kept_step != result.steps else ""
        cards.append(("Validation loss", f"{result.validation:.4f}", before + where))
    if result.loss is not None:
        cards.append(("Training loss", f"{result.loss:.4f}", f"mean over the last {min(20, result.steps)} steps"))
    return cards


def _said(predicted: float | None, form: Callable[[float], str]) -> str:
    return "the whole process, base included" + ("" if predicted is None else f" · {form(predicted)} predicted")


def size_cards(result: Outcome, numbers: dict[str, Any], weights: int) -> list[tuple[str, str, str]]:
    """The same of memory and of the adapter, whose file of tensors has `weights` bytes."""
    share = ""
    if numbers.get("trainable") and numbers.get("base_parameters"):
        share = f"{numbers['trainable']:,} weights, {numbers['trainable'] / numbers['base_parameters']:.2%} of the base"
    return [
        ("Peak memory", size(result.peak_memory_bytes), _said(numbers.get("predicted_peak_bytes"), size)),
        ("Adapter", size(weights), share),
    ]


def base_facts(base: TextBase | ImageBase) -> list[tuple[str, str]]:
    """Which base it was, and how it ran."""
    return [
        ("base", base.name),
        ("base fingerprint", base.fingerprint),
        ("precision", f"base in {str(base.dtype).removeprefix('torch.')}, adapter and optimizer in float32"),
        ("device", str(base.device)),
    ]


def _facts(result: RunResult, folder: Path, base: TextBase) -> list[tuple[str, str]]:
    return [
        ("adapter", str(folder)),
        ("digest", result.digest),
        *base_facts(base),
    ]


def _usage(folder: Path, base: TextBase) -> list[tuple[str, str]]:
    return [
        (
            "On the command line",
            f'veneer generate "…" --base {base.name} --adapter {folder}\n'
            f"veneer eval --base {base.name} --adapter {folder} --data held_out.jsonl",
        ),
        (
            "In Python",
            f'import veneer\n\nbase = veneer.load_base("{base.name}")\n'
            f'print(veneer.generate(base, ["…"], adapters=["{folder}"])[0])',
        ),
        (
            "With PEFT",
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base.directory}")\n'
            f'model = PeftModel.from_pretrained(base, "{folder}")',
        ),
    ]


def _files(folder: Path) -> list[tuple[str, str, str]]:
    known = {
        peft.TENSOR_FILE: "the weights, in PEFT's format",
        peft.CONFIG_FILE: "ranks, scales and modules, in PEFT's format",
        "log.jsonl": "everything that happened, one JSON object a line",
    }
    return known_files(folder, known)


def known_files(folder: Path, known: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name, size, what it is) of those of the `known` files that are there, and of what every run leaves."""
    known = dict(known) | {
        "veneer.json": "the card: base, data, recipe, results",
        "README.md": "the same for people",
        "report.html": "this page",
    }
    found = [(n, size((folder / n).stat().st_size), what) for n, what in known.items() if (folder / n).is_file()]
    inside = folder / "checkpoints"
    if inside.is_dir():
        total = sum(f.stat().st_size for f in inside.rglob("*") if f.is_file())
        found.append(("checkpoints/", size(total), "to resume from; may be deleted"))
    return found


def report_records(folder: Path) -> list[dict[str, Any]]:
    """The run's log. Notes are told again by a resumed run; once is enough on the page."""
    records: list[dict[str, Any]] = []
    for record in read_log(folder / "log.jsonl"):
        if record.get("event") != "note" or record not in records:
            records.append(record)
    return records


def today() -> str:
    """24 November 2026."""
    date = datetime.date.today()
    return f"{date.day} {date:%B %Y}"
