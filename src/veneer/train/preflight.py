"""What a run would do, looked at before step one: findings that stop it, warnings, and the numbers behind them.

    report = preflight(base, config, rows, encoded, held_out_rows=…, held_out=…, about=about)
    print(report.text())          also report.markup() for rich, report.to_dict() for JSON
    report.raise_if_stopped()     PreflightError with everything that must change

A finding stops the run when going on would train nothing, the wrong thing, or not fit. What only may be meant is a
warning. The data's checks are in `check_data`, the base's and the machine's in `check_run`. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.core.adapter import Adapter
from veneer.errors import PreflightError
from veneer.train.check_run import RUN_CHECKS
from veneer.train.config.text import TrainConfig
from veneer.train.findings import Base, Finding, Subject
from veneer.train.text.batches import plan_steps
from veneer.train.text.checks import DATA_CHECKS
from veneer.train.text.encode import EncodedRows, Example
from veneer.train.text.preference import Item
from veneer.train.text.rows import About, Row

__all__ = ["Finding", "Report", "preflight"]


@dataclass
class Report:
    """`findings`: stops first. `numbers`: what was measured, by name. `sample`: one row as (text, learned) pieces."""

    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    sample: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def stops(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "stop"]

    @property
    def warnings(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "warn"]

    def add(self, *findings: Finding) -> None:
        """Adds what was found later, the gravest first still."""
        order = {"stop": 0, "warn": 1, "ok": 2}
        self.findings = sorted([*self.findings, *findings], key=lambda finding: order[finding.level])

    def raise_if_stopped(self) -> None:
        """PreflightError listing every finding that stops the run, with its fix."""
        stops = self.stops
        if len(stops) == 1:
            raise PreflightError(stops[0].text, fix=stops[0].fix or None)
        if stops:
            lines = "\n".join(f"  - {f.text}" + (f"\n    fix: {f.fix}" if f.fix else "") for f in stops)
            raise PreflightError(f"{len(stops)} things would make this run fail or teach nothing:\n{lines}")

    def text(self) -> str:
        """Plain text: the sample with its learned tokens between ⟦ and ⟧, then the findings, the gravest last: nothing
        follows that would push them out of sight."""
        signs = {"stop": "STOP", "warn": "warn", "ok": "ok"}
        lines = [
            f"{signs[f.level]:>4}  {f.text}" + (f"\n      fix: {f.fix}" if f.fix else "")
            for f in reversed(self.findings)
        ]
        shown = "".join(f"⟦{piece}⟧" if learned else piece for piece, learned in self.sample)
        return "\n".join(["one row, learned tokens between ⟦ and ⟧:", shown, "", *lines] if shown else lines)

    def markup(self) -> str:
        """The same for rich: colours for levels, learned tokens in bold green."""
        from rich.markup import escape

        styles = {"stop": "bold red", "warn": "yellow", "ok": "green"}
        lines = []
        for f in reversed(self.findings):
            lines.append(f"[{styles[f.level]}]{f.level:>4}[/]  {escape(f.text)}")
            if f.fix:
                lines.append(f"      fix: {escape(f.fix)}")
        shown = "".join(f"[bold green]{escape(p)}[/]" if learned else escape(p) for p, learned in self.sample)
        return "\n".join(["one row, [bold green]learned tokens[/] marked:", shown, "", *lines] if shown else lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.stops,
            "findings": [{"level": f.level, "check": f.check, "text": f.text, "fix": f.fix} for f in self.findings],
            "numbers": self.numbers,
            "sample": [{"text": piece, "learned": learned} for piece, learned in self.sample],
        }


def preflight(
    base: Base,
    config: TrainConfig,
    rows: Sequence[Row],
    encoded: EncodedRows,
    *,
    held_out_rows: Sequence[Row] = (),
    held_out: EncodedRows | None = None,
    about: About | None = None,
    items: Sequence[Example] | Sequence[Item] | None = None,
    start: Adapter | None = None,
    resume: bool = False,
    previous: Mapping[str, Any] | None = None,
    free_memory: int | None = None,
    free_disk: int | None = None,
    devices: int = 1,
    force: bool = False,
) -> Report:
    """Check everything that can be seen before training.

    rows, encoded: the training rows and `encode` of them. items: what steps are made of, the examples themselves by
    default. start: the adapter that the run goes on from. previous: the recipe (`TrainConfig.recipe`) of the run that
    is resumed. free_memory, free_disk: bytes; measured when None. devices: how many share the run. force: what does not
    fit is a warning. Raises nothing of its own: see `raise_if_stopped`."""
    items = encoded.examples if items is None else items
    lengths = [item.tokens for item in items]
    plan = plan_steps(lengths, config.batching, seed=config.seed, epoch=0, pieces=devices)
    subject = Subject(
        base=base,
        config=config,
        rows=rows,
        encoded=encoded,
        held_out_rows=held_out_rows,
        held_out=held_out,
        about=about,
        resume=resume,
        previous=previous,
        free_memory=free_memory,
        free_disk=free_disk,
        force=force,
        steps_per_epoch=len(plan),
        largest_micro=max((sum(lengths[i] for i in micro) for step in plan for micro in step), default=0),
        longest=max((e.tokens for e in encoded.examples), default=0),
        devices=devices,
        micros=[len(step) for step in plan],
        items=items,
        start=start,
    )
    checks: Iterable[Callable[[Subject], Iterator[Finding]]] = (*DATA_CHECKS, *RUN_CHECKS)
    report = Report(numbers=subject.numbers)
    report.add(*(finding for check in checks for finding in check(subject)))
    report.sample = marked(encoded.examples[0], base.tokenizer) if encoded.examples else []
    return report


def marked(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row as (text, learned) pieces: runs of tokens that are, and are not, trained."""
    pieces: list[tuple[list[int], bool]] = []
    for token, trained in zip(example.input_ids, example.trained, strict=True):
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), trained) for ids, trained in pieces]
