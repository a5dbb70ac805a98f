"""Format a plan as text: whether the run fits, then hours and dollars, then details."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.errors import counted, gigabytes
from veneer.plan.image import ImageLoad
from veneer.plan.memory import FITS, Memory
from veneer.plan.plan import Plan
from veneer.plan.time import HOST_LINK

_WORDS = {
    "weights": "weights", "constants": "quantization constants", "adapter": "adapter", "gradients": "gradients",
    "optimizer": "optimizer", "activations": "activations", "logits": "logits",
    "working": "gradients of activations", "dequantized": "temporary dequantization", "context": "process",
    "rounding": "allocator", "cache": "keys and values",
    "teacher": "teacher's weights",
}  # fmt: skip


def plan_text(plan: Plan) -> str:
    """Return the plan as `veneer plan` prints it."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    yield from _answer(plan)
    yield ""
    as_given, planned = plan.memory, plan.planned_memory
    columns: list[tuple[str, Memory]] = [("as given", as_given)]
    if plan.changes and planned is not None:
        columns.append(("changed", planned))
    yield "memory of one device".ljust(28) + "".join(f"{title:>12}" for title, _ in columns)
    for name in as_given.parts:
        if any(memory.parts[name] for _, memory in columns):
            title = "CUDA context" if name == "context" and plan.device.kind == "cuda" else _WORDS[name]
            yield f"  {title:<26}" + "".join(f"{gigabytes(memory.parts[name]):>12}" for _, memory in columns)
    yield f"  {'peak':<26}" + "".join(f"{gigabytes(memory.peak):>12}" for _, memory in columns)
    if plan.device.count > 1:
        yield f"  {'of each device':<26}{gigabytes(plan.peak):>12}"
    yield f"  {'available':<26}{gigabytes(plan.available):>12}"
    if plan.dequantizable:
        yield f"  {'optional dequantized weights':<26}{gigabytes(plan.dequantizable):>12}   faster, if memory allows"
    if plan.packable:
        yield f"  {'optional prepacked weights':<26}{gigabytes(plan.packable):>12}   if faster and memory allows"
    if len(plan.changes) > 1:
        yield ""
        yield "also makes it fit"
        for change in plan.changes[1:]:
            yield f"  {change.text}"
    yield ""
    for name, text in plan.facts:
        yield f"{name:<9} {text}"
    yield f"device    {plan.device.count} × {plan.device.label or plan.device.name}; {plan.rates.source}"
    yield from _assumed(plan)
    yield from _serving(plan)


def _assumed(plan: Plan) -> Iterator[str]:
    """Yield the assumptions of a plan for a GPU."""
    if plan.device.kind != "cuda":
        return
    fit = FITS["cuda", "text"]
    text = (
        f"memory    calculated; CUDA's own {gigabytes(fit.process)} and {fit.unplaced:.0%} that its allocator cannot "
    )
    text += "place are assumed"
    yield text
    if plan.memory.host or any(isinstance(c.load, ImageLoad) and c.load.offload for c in plan.changes):
        yield f"transfers {HOST_LINK / 1e9:g} GB/s to and from CPU memory, assumed"


def _answer(plan: Plan) -> Iterator[str]:
    where = plan.device.name if plan.device.count == 1 else f"{plan.device.count} × {plan.device.name}"
    if plan.fits:
        yield f"It fits: {gigabytes(plan.peak)} of the {gigabytes(plan.available)} available on {where}."
    elif plan.changes:
        change = plan.changes[0]
        available = f"{gigabytes(plan.available)} is available on {where}"
        yield f"It does not fit: {gigabytes(plan.peak)}, and {available}."
        yield f"It fits with {change.text}."
    else:
        yield f"It does not fit: {gigabytes(plan.peak)}, and {gigabytes(plan.available)} is available on {where};"
        yield "no three changes together make it fit."
    if plan.seconds is not None:
        money = "" if plan.cost is None else f", ${plan.cost:,.2f} at ${plan.device.price:g} an hour"
        yield f"{'Then it' if plan.changes else 'It'} takes {rough_duration(plan.seconds)}{money}."


def _serving(plan: Plan) -> Iterator[str]:
    s, t = plan.serving, plan.traffic
    if s is None or t is None:
        return
    devices = "it" if s.devices == 1 else f"{s.devices} of them"
    yield ""
    yield f"served on {devices}, {t.together} requests at once of {t.prompt} + {t.answer} tokens"
    base_and_cache = f"the base and {gigabytes(s.cache_bytes)} of keys and values"
    yield f"  {counted(s.adapters, 'adapter')} of {gigabytes(s.adapter_bytes)} fit in memory with {base_and_cache}"
    yield f"  {s.tokens_per_second:,.0f} tokens/s, {s.requests_per_second:,.1f} requests/s at best"


def rough_duration(seconds: float) -> str:
    """Return a duration as text: `3 h 20 min`, `12 min`, `40 s`, `under 1 s`."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
