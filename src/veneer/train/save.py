"""The end of a run: the result, verification of the saved file, and the report."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment
from veneer.errors import AdapterError, counted
from veneer.train.checkpoint import write_atomically
from veneer.train.events import loss_text, mean_rewards
from veneer.train.report.log import read_log, size
from veneer.train.report.page import Page, render_page

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase
    from veneer.models.text.base import TextBase

_RELOADED = "reloaded"


@dataclass
class Outcome:
    """The result of a run.

    loss: mean over the last 20 steps. validation: loss of the saved adapter; None without held-out data.
    validation_before: loss of the base."""

    adapter: str = ""
    digest: str = ""
    steps: int = 0
    peak_memory_bytes: int = 0
    loss: float | None = None
    validation: float | None = None
    validation_before: float | None = None
    kept_step: int = 0
    stopped: str = ""
    report: str = ""
    dry_run: bool = False
    preflight: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object for `--json`. Only a dry run includes the preflight's findings."""
        values = asdict(self)
        if not self.dry_run:
            del values["preflight"]
        return values

    def metrics(self, **counts: Any) -> dict[str, Any]:
        """Return the metrics for the adapter's card, including the task's `counts`; omit None values."""
        common = {
            "training_loss": self.loss,
            "validation_loss": self.validation,
            "validation_loss_before": self.validation_before,
            "kept_step": self.kept_step,
            "steps": self.steps,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        return {key: value for key, value in {**common, **counts}.items() if value is not None}


def prove(
    attachment: Attachment,
    name: str,
    saved: Adapter,
    outputs: Callable[[], Tensor],
    *,
    path: Path,
    noun: str,
    rounding: float,
) -> str:
    """Attach the saved adapter, and compare its outputs with the trained adapter's outputs.

    The outputs should be equal bit for bit. If the file has another dtype or form, the largest difference can
    be up to `rounding` of the largest output. Returns a sentence about the result. Raises AdapterError if the
    difference is larger.

    name: the trained adapter. outputs: computes the active adapter's outputs. noun: a word for the outputs,
    such as logits."""
    attachment.add(_RELOADED, saved, trainable=True)  # use the same path through the layers as the trained adapter
    try:
        with torch.no_grad():
            with attachment.using(name):
                trained = outputs()
            with attachment.using(_RELOADED):
                reloaded = outputs()
    finally:
        attachment.remove(_RELOADED)
    done = f"saved to {path}, read back and compared: {noun} equal"
    if torch.equal(trained, reloaded):
        return f"{done} bit for bit"
    difference = float((trained.float() - reloaded.float()).abs().max() / trained.float().abs().max().clamp_min(1e-12))
    if difference <= rounding:
        return f"{done} except for rounding ({difference:.1e} of the largest)"
    text = f"the saved adapter's {noun} are not equal to the trained adapter's "
    text += f"(they differ by {difference:.1e} of the largest)"
    fix = "do not use this file; the last checkpoint contains the trained state. This is a bug: please report it"
    raise AdapterError(text, where=str(path), fix=fix)


def write_report(folder: Path, result: Outcome, page: Page) -> Path:
    """Write `report.html` from the log, the result and the task's parts in `page`. Return its path."""
    records = run_records(folder)
    resolved = next(record for record in reversed(records) if record.get("event") == "resolved")
    headline, today = _reward_cards(result, records) or _loss_cards(result), datetime.date.today()
    page = replace(
        page,
        title=folder.resolve().name,
        subtitle=f"A LoRA adapter for {page.base}, {today.day} {today:%B %Y}",
        records=records,
        cards=[*headline, *page.cards, *_size_cards(result, page.weights)],
        settings=resolved["settings"],
        sources=resolved["sources"],
        checks=result.preflight,
        details=[("adapter", result.adapter), ("digest", result.digest), *page.details],
    )
    path = folder / "report.html"
    write_atomically(path, render_page(page).encode())
    return path


def run_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the run's log, without notes that a resumed run repeats."""
    records: list[dict[str, Any]] = []
    for record in read_log(folder / "log.jsonl"):
        if record.get("event") != "note" or record not in records:
            records.append(record)
    return records


def base_facts(base: TextBase | ImageBase) -> list[tuple[str, str]]:
    """Return the report's details about the base: name, fingerprint, precision and device."""
    return [
        ("base", base.name),
        ("base fingerprint", base.fingerprint),
        ("precision", f"base in {str(base.dtype).removeprefix('torch.')}, adapter and optimizer in float32"),
        ("device", str(base.device)),
    ]


def _reward_cards(result: Outcome, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return report cards about rewards, or [] for a run without rewards.

    The cards show the saved adapter's rewards, the rewards before training, and the mean rewards of the last
    steps."""
    scores = {r["step"]: mean_rewards(r["extra"]) or {} for r in records if r.get("event") == "evaluated"}
    first, best = scores.get(0, {}), scores.get(result.kept_step, {})
    where = f" · saved from step {result.kept_step}" if result.kept_step != result.steps else ""
    cards = []
    for name, value in best.items():
        head = "Validation reward" if name == "reward" else f"Validation, {name}"
        note = (f"{first[name]:.3f} before training" if name in first else "") + where * (name == "reward")
        cards.append((head, f"{value:.3f}", note))
    step_rewards = [mean_rewards(r["extra"]) for r in records if r.get("event") == "stepped"]
    values = [each["reward"] for each in step_rewards if each and "reward" in each][-20:]
    if values:
        note = f"mean over the last {counted(len(values), 'step')}"
        cards.append(("Training reward", f"{sum(values) / len(values):.3f}", note))
    return cards


def _loss_cards(result: Outcome) -> list[tuple[str, str, str]]:
    cards = []
    if result.validation is not None:
        first = result.validation_before
        first_text = f"{loss_text(first)} before training" if first is not None else ""
        where = f" · saved from step {result.kept_step}" if result.kept_step != result.steps else ""
        cards.append(("Validation loss", loss_text(result.validation), first_text + where))
    if result.loss is not None:
        last = counted(min(20, result.steps), "step")
        cards.append(("Training loss", loss_text(result.loss), f"mean over the last {last}"))
    return cards


def _size_cards(result: Outcome, weights: Path | None) -> list[tuple[str, str, str]]:
    """Return report cards with the peak memory and the adapter's file size."""
    numbers = result.preflight.get("numbers", {})
    predicted, share = numbers.get("predicted_peak_bytes"), ""
    if numbers.get("trainable") and numbers.get("base_parameters"):
        share = f"{numbers['trainable']:,} weights, {numbers['trainable'] / numbers['base_parameters']:.2%} of the base"
    detail = "the entire process, including the base" + ("" if predicted is None else f" · {size(predicted)} predicted")
    cards = [("Peak memory", size(result.peak_memory_bytes), detail)]
    return cards if weights is None else [*cards, ("Adapter", size(weights.stat().st_size), share)]
