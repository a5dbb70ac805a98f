"""The cheapest change that makes a run fit, and what each change costs in time.

    changes(shape, load, device, …)      those that suffice, cheapest kind first

Kinds, in this order: recompute activations, one row at a time, shorter rows, a lower rank, a 4-bit base, weights on the
CPU, more devices. One change is better than two: pairs and triples are looked at only where no single one suffices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from veneer.plan.memory import Load, text_memory
from veneer.plan.shape import TextShape
from veneer.plan.tables import Device
from veneer.plan.time import Rates, text_work

__all__ = ["Change", "cheapest", "usable_memory"]

_MARGIN = 0.03
"""Share of a device's memory that a plan leaves free: other processes, and what a plan cannot see."""


@dataclass(frozen=True)
class Change:
    """What to change together. `slower`: seconds a token over those of the run as it was given. `settings`: as
    `section.key=value` where a configuration can say it, else words."""

    names: tuple[str, ...]
    settings: tuple[str, ...]
    load: Load
    device: Device
    peak: int
    slower: float

    @property
    def text(self) -> str:
        speed = "at the same speed" if abs(self.slower - 1) < 0.02 else f"{self.slower:.2f} times the time a token"
        return f"{' and '.join(self.names)} ({', '.join(self.settings)}): {self.peak / 1e9:.1f} GB, {speed}"


def usable_memory(device: Device) -> int:
    """Bytes of one device that a run may take."""
    return int(device.memory * (1 - _MARGIN))


Step = tuple[str, str, Load, Device]


def _checkpointing(load: Load, device: Device) -> Iterator[Step]:
    if not load.checkpointing:
        yield "recompute activations", "memory.activation_checkpointing=on", replace(load, checkpointing=True), device


def _batch(load: Load, device: Device) -> Iterator[Step]:
    if len(load.lengths) > 1:
        micros = load.micros * len(load.lengths)
        fewer = replace(load, lengths=(load.longest,), micros=micros)
        yield "one row at a time", "batching.micro_rows=1", fewer, device


def _length(load: Load, device: Device) -> Iterator[Step]:
    for part in (2, 4, 8):
        if load.longest // part >= 64:
            lengths = tuple(min(n, load.longest // part) for n in load.lengths)
            longest = max(lengths)
            yield "shorter rows", f"data.max_length={longest}", replace(load, lengths=lengths), device


def _rank(load: Load, device: Device) -> Iterator[Step]:
    rank = load.spec.rank if load.spec is not None else load.rank
    for lower in (rank // 2, rank // 4, rank // 8):
        if lower >= 4:
            spec = None if load.spec is None else replace(load.spec, rank=lower)
            yield "a lower rank", f"adapter.rank={lower}", replace(load, rank=lower, spec=spec), device


def _four_bits(load: Load, device: Device) -> Iterator[Step]:
    if load.quantise is None:
        yield "a 4-bit base", "base.quantise=nf4", replace(load, quantise="nf4"), device


def _offload(load: Load, device: Device) -> Iterator[Step]:
    if device.kind == "cuda":
        for share in (0.25, 0.5, 0.75, 0.9):
            yield "weights on the CPU", f"{share:.0%} of them", replace(load, offload=share), device


def _devices(load: Load, device: Device) -> Iterator[Step]:
    if device.kind == "cuda":
        for count in (2, 4, 8, 16):
            if count > device.count:
                yield "more devices", f"{count} × {device.name}", load, replace(device, count=count)


_KINDS: Mapping[str, Callable[[Load, Device], Iterator[Step]]] = {
    "checkpointing": _checkpointing, "batch": _batch, "length": _length, "rank": _rank, "4 bits": _four_bits,
    "offload": _offload, "devices": _devices,
}  # fmt: skip


def cheapest(
    shape: TextShape, load: Load, device: Device, rates: Rates, *, process: int | None = None, room: int | None = None
) -> list[Change]:
    """The changes that make it fit in `room` bytes of each device (by default, what is usable), in order of kind; each
    the smallest of its kind that suffices. Empty where three of them together do not."""
    limit = usable_memory(device) if room is None else room
    before = rates.seconds(text_work(shape, load, device), device.count) / max(1, load.tokens)

    def tried(steps: list[Step]) -> Change | None:
        last_load, last_device = steps[-1][2], steps[-1][3]
        memory = peak_on_each(shape, last_load, last_device, process)
        if memory > limit:
            return None
        after = rates.seconds(text_work(shape, last_load, last_device), last_device.count) / max(1, last_load.tokens)
        return Change(
            tuple(s[0] for s in steps), tuple(s[1] for s in steps), last_load, last_device, memory, after / before
        )  # fmt: skip

    def search(kinds: tuple[str, ...], done: list[Step]) -> Change | None:
        """The smallest of each kind, the last one varied first, that together suffice."""
        load_now, device_now = (done[-1][2], done[-1][3]) if done else (load, device)
        for step in _KINDS[kinds[0]](load_now, device_now):
            found = search(kinds[1:], [*done, step]) if len(kinds) > 1 else tried([*done, step])
            if found is not None:
                return found
        return None

    for together in (1, 2, 3):
        found = [c for kinds in itertools.combinations(_KINDS, together) if (c := search(kinds, [])) is not None]
        if found:
            return found
    return []


def peak_on_each(shape: TextShape, load: Load, device: Device, process: int | None = None) -> int:
    """Bytes at the peak of each device: weights and what belongs to the adapter are divided, activations are not."""
    memory = text_memory(shape, load, device, process=process)
    held = memory.weights + memory.constants + memory.adapter + memory.gradients + memory.optimizer
    return memory.peak - held + -(-held // device.count)
