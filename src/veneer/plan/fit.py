"""The cheapest changes that make a run fit in memory, and their cost in time.

    cheapest(load, device, peak, seconds, limit)   changes that suffice, in the order of their kinds
    fitting_micro_tokens(shape, device, …)         default tokens per micro-batch

The kinds of changes, in this order: recompute activations, one row (or image) at a time, shorter rows
(smaller images), a lower rank, a 4-bit base, weights on the CPU, more devices. Pairs and triples of changes
are tried only if no single change suffices. More devices mean another machine, so even if more devices
suffice, combinations of settings for this machine are tried too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from veneer.ops.step_sizes import MICRO_TOKENS, micro_tokens
from veneer.plan.image import ImageLoad
from veneer.plan.memory import FITS, Load, Memory, text_memory, weight_bytes
from veneer.plan.shape import TextShape
from veneer.plan.tables import Device

AnyLoad = Load | ImageLoad

_MARGIN = 0.03
"""Share of a device's memory that a plan reserves for other processes and unpredicted needs."""


@dataclass(frozen=True)
class Change:
    """Settings to change together.

    slower: time per token or image, as a multiple of the given run's.
    settings: `section.key=value`; for more devices, which have no key, a description."""

    names: tuple[str, ...]
    settings: tuple[str, ...]
    load: AnyLoad
    device: Device
    peak: int
    slower: float

    @property
    def text(self) -> str:
        """Return one line with the settings to change, the resulting peak, and the cost in time."""
        speed = "at the same speed" if abs(self.slower - 1) < 0.02 else f"{self.slower:.2f} times the time per token"
        return f"{' and '.join(self.names)} ({', '.join(self.settings)}): {self.peak / 1e9:.1f} GB, {speed}"


def usable_memory(device: Device) -> int:
    """Return the number of bytes of a device that a run can use."""
    return int(device.memory * (1 - _MARGIN))


def fitting_micro_tokens(
    shape: TextShape, device: Device, quantize: str | None, available: int, load: Callable[[int], Load]
) -> int:
    """Return the default tokens per micro-batch that fit in `available` bytes.

    Starts with the device's `micro_tokens` (ops/step_sizes.py). Halves this number, but not below
    MICRO_TOKENS, until the micro-batch takes at most nine tenths of `available`, the bytes left after loading
    the base.

    load: returns the load of a micro-batch with a number of tokens.
    """
    products = [parts for layer in shape.layers for parts in layer.products.values()]
    tokens = micro_tokens(
        device.kind,
        device.flops / device.bandwidth,
        weights=shape.matrices,
        operations=sum(linear.multiplied for parts in products for linear in parts),
        values=sum(parts[0].active * parts[0].inputs + sum(p.active * p.outputs for p in parts) for parts in products),
        code_bytes=None if quantize is None else 1.0 if quantize == "int8" else 0.5,
    )
    while tokens > MICRO_TOKENS and text_memory(shape, load(tokens), device).beyond_base > 0.9 * available:
        tokens //= 2
    return tokens


def memory_after_base(shape: TextShape, device: Device, dtype: str, quantize: str | None) -> int:
    """Return the bytes that remain on a device after a base is loaded."""
    return usable_memory(device) - sum(weight_bytes(shape, dtype, quantize)) - FITS[device.kind, "text"].process


Step = tuple[str, str, AnyLoad, Device]


def _checkpointing(load: AnyLoad, device: Device) -> Iterator[Step]:
    if not load.checkpointing:
        yield "recompute activations", "memory.activation_checkpointing=on", replace(load, checkpointing=True), device


def _batch(load: AnyLoad, device: Device) -> Iterator[Step]:
    single: AnyLoad
    if isinstance(load, ImageLoad):
        item, count, single = "picture", load.pictures, replace(load, pictures=1)
    else:
        item, count, single = "row", len(load.lengths), replace(load, lengths=(load.longest,))
    if count > 1:
        yield f"one {item} at a time", "batching.micro_rows=1", replace(single, micros=load.micros * count), device


def _length(load: AnyLoad, device: Device) -> Iterator[Step]:
    for part in (2, 4, 8):
        if isinstance(load, ImageLoad):
            side = max(load.height, load.width) // part
            if side >= 256:
                smaller: AnyLoad = replace(load, height=load.height // part, width=load.width // part)
                yield "smaller pictures", f"data.resolution={side}", smaller, device
        elif (longest := load.longest // part) >= 64:
            smaller = replace(load, lengths=tuple(min(n, longest) for n in load.lengths))
            yield "shorter rows", f"data.max_length={longest}", smaller, device


def _rank(load: AnyLoad, device: Device) -> Iterator[Step]:
    for lower in (load.rank // 2, load.rank // 4, load.rank // 8):
        if lower >= 4:
            smaller: AnyLoad = replace(load, rank=lower)
            if isinstance(smaller, Load) and smaller.spec is not None:
                smaller = replace(smaller, spec=replace(smaller.spec, rank=lower))
            yield "a lower rank", f"adapter.rank={lower}", smaller, device


def _four_bits(load: AnyLoad, device: Device) -> Iterator[Step]:
    if load.quantize is None and not (isinstance(load, ImageLoad) and load.offload):
        yield "a 4-bit base", "base.quantize=nf4", replace(load, quantize="nf4"), device


def _offload(load: AnyLoad, device: Device) -> Iterator[Step]:
    """Yield steps that offload a quarter, a half, three quarters and all of the blocks.

    Only for image runs on a GPU that recompute activations and do not quantize the base."""
    if device.kind == "cuda" and isinstance(load, ImageLoad) and load.checkpointing and load.quantize is None:
        for count in sorted({-(-load.blocks * quarters // 4) for quarters in (1, 2, 3, 4)}):
            if count > load.offload:
                yield "weights on the CPU", f"memory.offload_blocks={count}", replace(load, offload=count), device


def _devices(load: AnyLoad, device: Device) -> Iterator[Step]:
    if device.kind == "cuda":
        for count in (2, 4, 8, 16):
            if count > device.count:
                yield "more devices", f"{count} × {device.name}", load, replace(device, count=count)


_Kind = Callable[[AnyLoad, Device], Iterator[Step]]
_KINDS: tuple[_Kind, ...] = (_checkpointing, _batch, _length, _rank, _four_bits, _offload, _devices)


def cheapest(
    load: AnyLoad,
    device: Device,
    peak: Callable[[AnyLoad, Device], int],
    seconds: Callable[[AnyLoad, Device], float],
    limit: int,
) -> list[Change]:
    """Return changes that reduce each device's peak to at most `limit` bytes, by kind.

    Each change is the smallest of its kind that suffices. If changes of settings suffice, they come first, and
    changes that add devices come last. The result is empty if no three changes together suffice.

    peak: returns the peak bytes of each device.
    seconds: returns the time per token or image."""

    def tried(steps: list[Step]) -> Change | None:
        own_load, own_device = steps[-1][2:]
        peak_bytes = peak(own_load, own_device)
        if peak_bytes > limit:
            return None
        slower = seconds(own_load, own_device) / seconds(load, device)
        names, settings = tuple(s[0] for s in steps), tuple(s[1] for s in steps)
        return Change(names, settings, own_load, own_device, peak_bytes, slower)

    def can_suffice(kinds: tuple[_Kind, ...]) -> bool:
        """Return whether these kinds of changes suffice if each change is as large as possible.

        A larger change never takes more memory, so this check avoids a search of several seconds if nothing
        suffices."""
        now = load, device
        for kind in kinds:
            *_, last = itertools.chain([None], kind(*now))
            if last is None:
                return False
            now = last[2:]
        return peak(*now) <= limit

    def search(kinds: tuple[_Kind, ...], steps: list[Step]) -> Change | None:
        """Return the smallest changes that suffice together.

        The search tries all changes of the last kind before it enlarges a change of an earlier kind."""
        now = steps[-1][2:] if steps else (load, device)
        for step in kinds[0](*now):
            change = search(kinds[1:], [*steps, step]) if len(kinds) > 1 else tried([*steps, step])
            if change is not None:
                return change
        return None

    on_more_devices: list[Change] = []
    for together in (1, 2, 3):
        kinds = filter(can_suffice, itertools.combinations(_KINDS, together))
        changes = [change for kind in kinds if (change := search(kind, [])) is not None]
        on_device = [change for change in changes if change.device == device]
        if on_device:
            return [*on_device, *on_more_devices] if on_more_devices else changes
        on_more_devices = on_more_devices or changes
    return on_more_devices


def bytes_per_device(memory: Memory, device: Device) -> int:
    """Return the peak bytes of each device.

    Weights and adapter state are divided among the devices; activations are not."""
    divided = memory.weights + memory.constants + memory.adapter + memory.gradients + memory.optimizer
    return memory.peak - divided + -(-divided // device.count)
