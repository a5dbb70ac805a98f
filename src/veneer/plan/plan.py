"""A plan: memory, time and money of a run before it runs, from a base's config and a few numbers.

    plan = text_plan("meta-llama/Llama-3.1-70B", shape, load, device, rates, job)
    plan.fits · plan.changes[0] · plan.seconds · plan.cost

Where the run does not fit, its time and price are those of the first change that makes it fit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from veneer.plan.fit import Change, cheapest, peak_on_each, usable_memory
from veneer.plan.memory import Load, Memory, kept_dequantised, text_memory
from veneer.plan.serving import Serving, Traffic, serving
from veneer.plan.shape import TextShape, pair_parameters
from veneer.plan.tables import Device
from veneer.plan.time import Rates, run_seconds

__all__ = ["Job", "Plan", "text_plan"]


@dataclass(frozen=True)
class Job:
    """How much is trained on. `batch`: rows in an optimizer step. `held_out` rows are scored `evaluations` times."""

    rows: int
    tokens_per_row: float
    epochs: float = 1.0
    batch: int = 16
    steps: int | None = None
    held_out: int = 0
    evaluations: int = 0

    @property
    def total_steps(self) -> int:
        return self.steps or math.ceil(self.rows / self.batch) * math.ceil(self.epochs)

    @property
    def passes(self) -> float:
        """Times over the data."""
        return self.epochs if self.steps is None else self.steps * self.batch / max(1, self.rows)

    @property
    def tokens(self) -> int:
        return round(self.rows * self.tokens_per_row * self.passes)


@dataclass(frozen=True)
class Plan:
    """`memory`: of the run as given, on one device; `peak`: what each device holds of it. `planned`: the load and the
    device of `seconds` and `cost`: as given, or with the first of `changes`. `keeps`: bytes of a quantised base's
    layers that may stay dequantised in what is left over."""

    base: str
    parameters: int
    trainable: int
    device: Device
    load: Load
    job: Job
    memory: Memory
    peak: int
    room: int
    changes: tuple[Change, ...]
    planned: tuple[Load, Device] | None
    planned_memory: Memory | None
    keeps: int
    seconds: float | None
    rates: Rates
    serving: Serving | None = None
    traffic: Traffic | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def cost(self) -> float | None:
        """US dollars, None without a price or where nothing fits."""
        if self.seconds is None or self.planned is None or self.planned[1].price is None:
            return None
        return self.seconds / 3600 * self.planned[1].price * self.planned[1].count

    @property
    def adapter_bytes(self) -> int:
        """Of the file, in float32 as veneer writes it."""
        return 4 * self.trainable

    def to_dict(self) -> dict[str, Any]:
        """JSON values; bytes, seconds and dollars."""
        return {
            "base": self.base, "parameters": self.parameters, "fits": self.fits, "peak_bytes": self.peak,
            "room_bytes": self.room, "memory": {**self.memory.parts, "host": self.memory.host},
            "planned_memory": None if self.planned_memory is None else self.planned_memory.parts,
            "changes": [
                {"names": list(c.names), "settings": list(c.settings), "peak_bytes": c.peak,
                 "slower": round(c.slower, 3)} for c in self.changes
            ],
            "kept_dequantised_bytes": self.keeps, "seconds": self.seconds, "cost": self.cost,
            "tokens": self.job.tokens, "steps": self.job.total_steps,
            "device": {"name": self.device.name, "count": self.device.count, "price": self.device.price},
            "rates": {"operations": self.rates.operations, "bandwidth": self.rates.bandwidth,
                      "source": self.rates.source},
            "trainable": self.trainable, "adapter_bytes": self.adapter_bytes,
            "serving": None if self.serving is None else asdict(self.serving), "notes": list(self.notes),
        }  # fmt: skip


def text_plan(
    base: str, shape: TextShape, load: Load, device: Device, rates: Rates, job: Job, *, process: int | None = None,
    room: int | None = None, traffic: Traffic | None = None, notes: tuple[str, ...] = (),
) -> Plan:  # fmt: skip
    """`room`: bytes that may be taken of each device, by default what is usable of it. `process`: as calibrated."""
    limit = usable_memory(device) if room is None else room
    memory = text_memory(shape, load, device, process=process)
    peak = peak_on_each(shape, load, device, process)
    changes: list[Change] = []
    planned: tuple[Load, Device] | None = (load, device)
    if peak > limit:
        changes = cheapest(shape, load, device, rates, process=process, room=limit)
        planned = (changes[0].load, changes[0].device) if changes else None
    seconds = served = planned_memory = None
    if planned is not None:
        seconds = run_seconds(
            shape, *planned, rates, rows=job.rows, tokens_per_row=min(job.tokens_per_row, planned[0].longest),
            epochs=job.passes, held_out=job.held_out, evaluations=job.evaluations,
        )  # fmt: skip
        planned_memory = text_memory(shape, *planned, process=process)
    keeps = 0
    if planned is not None and planned_memory is not None and planned[0].quantise:
        keeps = kept_dequantised(shape, planned_memory, limit)
    if traffic is not None:
        quantise = load.quantise if planned is None else planned[0].quantise
        rank = load.spec.rank if load.spec is not None else load.rank
        served = serving(shape, device, rates, traffic, rank=rank, dtype=load.dtype, quantise=quantise)
    return Plan(
        base, shape.parameters, pair_parameters(shape, load.spec, rank=load.rank), device, load, job, memory, peak,
        limit, tuple(changes), planned, planned_memory, keeps, seconds, rates, served, traffic, notes,
    )  # fmt: skip
