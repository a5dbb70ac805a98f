"""What preflight's checks take and give: the subject of a run, and findings about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from veneer.core.adapter import Adapter
from veneer.train.config.load import RunConfig
from veneer.train.config.text import TrainConfig
from veneer.train.text.encode import EncodedRows, Example
from veneer.train.text.preference import Item
from veneer.train.text.rows import About, Row

__all__ = ["Base", "Finding", "Level", "RunSubject", "Subject", "gigabytes", "share"]


Level = Literal["stop", "warn", "ok"]


class Base(Protocol):
    """What is needed of a base: its model, its tokenizer."""

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Finding:
    """`check` names what was looked at and stays the same between versions; `fix` is the way out."""

    level: Level
    check: str
    text: str
    fix: str = ""


@dataclass(kw_only=True)
class RunSubject:
    """A run about to start, whatever its data. Checks read it, and leave what they measured in `numbers`.

    `largest_micro`: in `unit`s (tokens, pictures). `devices`: how many share the run. `micros`: how many micro-batches
    each step of an epoch has. `force`: what does not fit by the plan is tried all the same."""

    base: Any
    config: RunConfig
    resume: bool = False
    previous: Mapping[str, Any] | None = None
    free_memory: int | None = None
    free_disk: int | None = None
    steps_per_epoch: int = 0
    largest_micro: int = 0
    unit: str = "tokens"
    devices: int = 1
    micros: Sequence[int] = ()
    force: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Subject(RunSubject):
    """A run on text. `rows`: those that `encoded` is of, of preferences each answer. `items`: what a step is made of.
    `start`: the adapter it goes on from."""

    base: Base
    config: TrainConfig
    rows: Sequence[Row]
    encoded: EncodedRows
    held_out_rows: Sequence[Row] = ()
    held_out: EncodedRows | None = None
    about: About | None = None
    longest: int = 0
    items: Sequence[Example] | Sequence[Item] = ()
    start: Adapter | None = None

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that generation with this base stops at."""
        found: set[int] = set()
        settings = getattr(self.base.model, "generation_config", None)
        for ids in (
            getattr(self.base, "end_of_turn_id", None),
            getattr(settings, "eos_token_id", None),
            self.base.tokenizer.eos_token_id,
        ):
            found.update(ids if isinstance(ids, list | tuple | set) else [] if ids is None else [ids])
        return found


def share(part: float, whole: float) -> str:
    """`12 of 40 (30%)`, with a decimal where it matters."""
    percent = 100 * part / whole if whole else 0.0
    return (
        f"{part:,} of {whole:,} ({percent:.0f}%)"
        if percent >= 1 or not part
        else f"{part:,} of {whole:,} ({percent:.2g}%)"
    )


def gigabytes(count: float) -> str:
    """Bytes as GB (10^9) or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
