"""A plan: memory, time and cost of a run, from a base's config and a few numbers.

    plan = text_plan("meta-llama/Llama-3.1-70B", shape, load, device, job)
    plan = image_plan("flux.1-dev", config, load, device, job)
    plan.fits · plan.changes[0] · plan.seconds · plan.cost

If the run does not fit, `seconds` and `cost` assume the first of `changes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from veneer.errors import counted, gigabytes
from veneer.plan.fit import AnyLoad, Change, bytes_per_device, cheapest, usable_memory
from veneer.plan.image import ImageLoad, image_counts
from veneer.plan.memory import (
    Counts,
    Load,
    Memory,
    dtype_bytes,
    kept_dequantized,
    packed_weights,
    run_memory,
    text_counts,
)
from veneer.plan.serving import Serving, Traffic, cache_bytes, serving
from veneer.plan.shape import PairForm, TextShape
from veneer.plan.tables import Device
from veneer.plan.time import Rates, rates_of, reading_work, run_work

_MOST_CACHE = 1 << 30
"""Maximum bytes of the KV cache while a run samples completions."""


@dataclass(frozen=True)
class SamplingLoad:
    """The completions that a run samples.

    prompt, answer: maximum tokens of a prompt and of a completion.
    group: completions per prompt; the prompt is computed once for all of them.
    together: completions sampled at once.
    total: completions in the whole run.
    teacher: a model in the same process that reads each completion once.
    teacher_bytes: size of the teacher's base, if the teacher has its own."""

    prompt: int
    answer: int
    group: int
    together: int
    total: int
    teacher: TextShape | None = None
    teacher_bytes: int = 0

    def cache(self, shape: TextShape, dtype: str) -> int:
        """Return the KV cache's bytes for all completions that are sampled at once."""
        return min(_MOST_CACHE, self.together * (self.prompt + self.answer) * cache_bytes(shape, dtype))


@dataclass(frozen=True)
class TrainingJob:
    """The amount of data that a run trains on.

    batch: rows per optimizer step.
    held_out: rows for validation, scored `evaluations` times."""

    rows: int
    tokens_per_row: float = 1.0
    epochs: float = 1.0
    batch: int = 16
    steps: int | None = None
    held_out: int = 0
    evaluations: int = 0

    @property
    def total_steps(self) -> int:
        return self.steps or math.ceil(math.ceil(self.rows / self.batch) * self.epochs)

    @property
    def passes(self) -> float:
        """Return how many times the data is used."""
        return self.epochs if self.steps is None else self.steps * self.batch / max(1, self.rows)

    @property
    def tokens(self) -> int:
        return round(self.rows * self.tokens_per_row * self.passes)


@dataclass(frozen=True)
class Plan:
    """The plan of one run.

    memory: memory of the given run on one device.
    peak: peak bytes of the given run on each device; available: usable bytes.
    changes: changes that make the run fit, if the given run does not fit.
    planned, planned_memory: the load and device that `seconds` and `cost` are for, and their memory: those of
        the given run, or those with the first of `changes`; None if no change suffices.
    dequantizable: bytes of a quantized base's layers that can remain dequantized in the remaining memory.
    packable: bytes of prepacked weight copies that fit in the remaining memory (only for an unquantized base
        on a CPU), if copies make all products faster.
    facts: description of the plan for the user."""

    base: str
    parameters: int
    trainable: int
    device: Device
    job: TrainingJob
    memory: Memory
    peak: int
    available: int
    changes: tuple[Change, ...]
    planned: tuple[AnyLoad, Device] | None
    planned_memory: Memory | None
    seconds: float | None
    rates: Rates
    facts: tuple[tuple[str, str], ...] = ()
    dequantizable: int = 0
    packable: int = 0
    serving: Serving | None = None
    traffic: Traffic | None = None

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    @property
    def cost(self) -> float | None:
        """Return the cost in US dollars, or None if the price is unknown or no change makes the run fit."""
        if self.seconds is None or self.planned is None or self.planned[1].price is None:
            return None
        return self.seconds / 3600 * self.planned[1].price * self.planned[1].count

    @property
    def adapter_bytes(self) -> int:
        """Return the bytes of the adapter's file, which is in float32."""
        return 4 * self.trainable

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, in bytes, seconds and dollars."""
        return {
            "base": self.base,
            "parameters": self.parameters,
            "fits": self.fits,
            "peak_bytes": self.peak,
            "room_bytes": self.available,
            "memory": {**self.memory.parts, "host": self.memory.host},
            "planned_memory": None if self.planned_memory is None else self.planned_memory.parts,
            "changes": [
                {"names": [*c.names], "settings": [*c.settings], "peak_bytes": c.peak, "slower": round(c.slower, 3)}
                for c in self.changes
            ],
            "kept_dequantized_bytes": self.dequantizable,
            "kept_packed_bytes": self.packable,
            "seconds": self.seconds,
            "cost": self.cost,
            "tokens": self.job.tokens,
            "steps": self.job.total_steps,
            "device": {"name": self.device.name, "count": self.device.count, "price": self.device.price},
            "rates": asdict(self.rates),
            "trainable": self.trainable,
            "adapter_bytes": self.adapter_bytes,
            "serving": None if self.serving is None else asdict(self.serving),
            "facts": dict(self.facts),
        }


def _plan(
    base: str,
    counts_of: Callable[[Any, Device], Counts],
    load: AnyLoad,
    device: Device,
    job: TrainingJob,
    limit: int,
    process: int | None = None,
) -> Plan:
    """Return a plan without its facts.

    limit: usable bytes of each device."""
    counts = counts_of(load, device)
    rates = rates_of(device, load.dtype, counts.kind)

    def memory_of(load: AnyLoad, device: Device) -> Memory:
        return run_memory(counts_of(load, device), load, device, process=process)

    def step_seconds(load: AnyLoad, device: Device) -> float:
        return rates.seconds(run_work(counts_of(load, device), load), device.count)

    def peak_of(load: AnyLoad, device: Device) -> int:
        return bytes_per_device(memory_of(load, device), device)

    def item_seconds(load: AnyLoad, device: Device) -> float:
        return step_seconds(load, device) / max(1, load.size)

    memory = memory_of(load, device)
    peak, changes = bytes_per_device(memory, device), []
    if peak > limit:
        changes = cheapest(load, device, peak_of, item_seconds, limit)
    planned = (load, device) if peak <= limit else (changes[0].load, changes[0].device) if changes else None
    seconds = None
    if planned is not None:
        part_load, size = planned[0], max(1, planned[0].size)
        each = min(job.tokens_per_row, part_load.longest) if isinstance(part_load, Load) else 1.0
        # scoring is a step without the backward pass
        scored = job.held_out * each / size * job.evaluations * (2 / 6 if part_load.checkpointing else 1 / 2)
        seconds = step_seconds(*planned) * (math.ceil(job.rows * each / size) * job.passes + scored)
    return Plan(
        base=base,
        parameters=counts.parameters,
        trainable=counts.trainable,
        device=device,
        job=job,
        memory=memory,
        peak=peak,
        available=limit,
        changes=tuple(changes),
        planned=planned,
        planned_memory=None if planned is None else memory_of(*planned),
        seconds=seconds,
        rates=rates,
    )


def _with_sampling(plan: Plan, shape: TextShape, load: Load, device: Device, sampled: SamplingLoad) -> Plan:
    """Return the plan of a run that learns from its own completions.

    Adds the KV cache of the completions, the time to sample the completions (`serving`), and the teacher that
    reads the completions. The available bytes of `plan` exclude the cache and the teacher."""
    rank = load.spec.rank if load.spec is not None else load.rank
    shared = Traffic(max(1, sampled.prompt // sampled.group), sampled.answer, sampled.together, 1)
    each = serving(shape, device, plan.rates, shared, rank=rank, dtype=load.dtype, quantize=load.quantize)
    cache, seconds = sampled.cache(shape, load.dtype), sampled.total / each.requests_per_second
    text = f"{sampled.total:,} sampled, {sampled.together} at once: {gigabytes(cache)} of keys and values"
    facts = [*plan.facts, ("answers", f"{text}, {seconds:,.0f} s")]
    total = None if plan.seconds is None else plan.seconds + seconds
    if sampled.teacher is not None:
        # a separate teacher base is not quantized, even if the trained base is
        plain = replace(load, quantize=None) if sampled.teacher_bytes else load
        passes = sampled.total * (sampled.prompt + sampled.answer) / max(1, load.tokens)
        seconds = passes * plan.rates.seconds(reading_work(sampled.teacher, plain), device.count)
        text = f"reads {counted(sampled.total, 'answer')}: {seconds:,.0f} s"
        if sampled.teacher_bytes:
            text += f"; a separate base, {sampled.teacher.parameters:,} parameters: {gigabytes(sampled.teacher_bytes)}"
        facts.append(("teacher", text))
        total = None if total is None else total + seconds
    sizes: dict[str, Any] = {"cache": cache, "teacher": sampled.teacher_bytes}
    more = cache + sampled.teacher_bytes
    planned = None if plan.planned_memory is None else replace(plan.planned_memory, **sizes)
    return replace(
        plan,
        memory=replace(plan.memory, **sizes),
        peak=plan.peak + more,
        available=plan.available + more,
        planned_memory=planned,
        facts=tuple(facts),
        seconds=total,
    )


def text_plan(
    base: str,
    shape: TextShape,
    load: Load,
    device: Device,
    job: TrainingJob,
    *,
    sampled: SamplingLoad | None = None,
    process: int | None = None,
    available: int | None = None,
    traffic: Traffic | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of a text run.

    sampled: the completions, for a run that learns from its own completions.
    available: usable bytes of each device; the default is `usable_memory`.
    process: bytes of the process before the base is loaded, if known (CPU)."""
    limit = usable_memory(device) if available is None else available
    if sampled is not None:
        limit -= sampled.cache(shape, load.dtype) + sampled.teacher_bytes
    plan = _plan(base, lambda load, device: text_counts(shape, load, device), load, device, job, limit, process)
    rank, quantize = load.spec.rank if load.spec is not None else load.rank, load.quantize
    dequantizable = packable = 0
    if plan.planned is not None and plan.planned_memory is not None:
        part_load, where = plan.planned
        quantize, spare = part_load.quantize, max(0, plan.available - plan.planned_memory.peak)
        if quantize:
            dequantizable = kept_dequantized(shape, plan.planned_memory, plan.available)
        elif where.kind == "cpu":
            packable = min(packed_weights(shape, part_load.dtype, lambda *product: True), spare)
    capacity = None
    if traffic is not None:
        capacity = serving(shape, device, plan.rates, traffic, rank=rank, dtype=load.dtype, quantize=quantize)
    times = f"{counted(job.rows, 'row')} of {job.tokens_per_row:,.0f} tokens, {_times(job.passes)}"
    share = "" if load.trained == 1 else f", {load.trained:.0%} of the tokens have a loss"
    adapter = f"{_form_text(PairForm.of(load.spec))}rank {rank}: {plan.trainable:,} parameters, "
    adapter += f"a file of {plan.adapter_bytes / 1e6:,.1f} MB"
    rows = f"{load.tokens:,} tokens in {counted(len(load.lengths), 'row')}{share}; activations {_activations(load)}"
    facts = (
        ("base", f"{base}: {shape.parameters:,} parameters, {load.quantize or load.dtype}"),
        ("adapter", adapter),
        ("data", f"{times}: {job.tokens:,} tokens, {counted(job.total_steps, 'step')} of {counted(job.batch, 'row')}"),
        ("at once", rows),
        *((("host", f"{gigabytes(plan.memory.host)} in CPU memory"),) if plan.memory.host else ()),
        *(("note", note) for note in notes),
    )
    plan = replace(plan, dequantizable=dequantizable, packable=packable, serving=capacity, traffic=traffic, facts=facts)
    return plan if sampled is None else _with_sampling(plan, shape, load, device, sampled)


def image_plan(
    base: str,
    config: Mapping[str, Any],
    load: ImageLoad,
    device: Device,
    job: TrainingJob,
    *,
    available: int | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of a run on `job.rows` images.

    config: the denoiser's config; see `image_counts`."""
    load = replace(load, blocks=len(image_counts(config, load).blocks))
    limit = usable_memory(device) if available is None else available
    plan = _plan(base, lambda load, device: image_counts(config, load), load, device, job, limit)
    words = load.targets if isinstance(load.targets, str) else ", ".join(load.targets)
    pairs = f", source pictures: {load.before} each" if load.before else ""
    pictures = f"{counted(job.rows, 'picture')}, {_times(job.passes)}"
    facts = [
        ("base", f"{base}: a denoiser of {plan.parameters:,} parameters, {load.quantize or load.dtype}"),
        ("adapter", f"{_form_text(load.form)}rank {load.rank} on {words}: {plan.trainable:,} parameters"),
        ("data", f"{pictures}: {counted(job.total_steps, 'step')} of {job.batch}"),
        ("at once", f"{load.pictures} of {load.width} × {load.height}{pairs}; activations {_activations(load)}"),
    ]
    if encoders := sum((config.get("encoders") or {}).values()) + int(config.get("vae") or 0):
        e = dtype_bytes(load.dtype)
        text = f"text encoders and VAE take {encoders * e / 1e9:.1f} GB while pictures and captions are encoded, "
        text += f"before step one; together with the complete denoiser {(plan.parameters + encoders) * e / 1e9:.1f} GB"
        facts.append(("note", text))
    return replace(plan, facts=(*facts, *(("note", note) for note in notes)))


def _times(passes: float) -> str:
    """Return a number of passes as text: 0.5 times, once, 3 times, 1,000 times."""
    if passes == 1:
        return "once"
    return f"{passes:,.0f} times" if passes >= 100 else f"{passes:.3g} times"


def _form_text(form: PairForm) -> str:
    """Return the text that precedes the rank: the form of the pairs, or "" for plain pairs."""
    return "" if form.kind == "lora" else f"{form.kind}, "


def _activations(load: AnyLoad) -> str:
    return "recomputed" if load.checkpointing else "kept"
