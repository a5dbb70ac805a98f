"""Measured rates of this machine, one record per device in the veneer home.

    record = calibrate("smollm2-135m")                         short real steps of two sizes: operations, bandwidth
    write_calibration(record) · read_calibration(device_key)   plan-calibration.json

Two steps of different sizes give two equations in 1/rate and 1/bandwidth.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, ResourceError, counted
from veneer.files.atomic import replace_file
from veneer.models.device import thread_count
from veneer.models.home import veneer_home
from veneer.plan.memory import Load
from veneer.plan.shape import model_shape
from veneer.plan.tables import Device, device_of_card
from veneer.plan.time import Rates, Work, rates_of, text_work

if TYPE_CHECKING:
    import torch

_FILE = "plan-calibration.json"


@dataclass(frozen=True)
class Calibration:
    """Measured training rates of a device.

    operations, bandwidth: per second.
    device: the device, with its number of threads.
    base, dtype: of the model that was trained."""

    device: str
    operations: float
    bandwidth: float
    base: str
    dtype: str

    def rates(self) -> Rates:
        return Rates(
            self.operations,
            self.bandwidth,
            f"{self.operations / 1e9:,.0f} GFLOP/s, {self.bandwidth / 1e9:,.1f} GB/s, measured here with {self.base}",
            True,
        )


def _file() -> Path:
    return veneer_home() / _FILE


def read_calibration(device: str) -> Calibration | None:
    """Return the record of a device, or None. Raises ConfigError for an invalid file."""
    try:
        records = json.loads(_file().read_text(encoding="utf-8"))
        if device not in records:
            return None
        return Calibration(**{name: records[device][name] for name in Calibration.__annotations__})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"the calibration cannot be read: {error}", where=str(_file()), fix="delete it, and veneer plan --calibrate"
        ) from None


def write_calibration(record: Calibration) -> Path:
    """Write a record next to those of other devices; return the file.

    An unreadable file is replaced."""
    file = _file()
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        records = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, [(json.dumps({**records, record.device: asdict(record)}, indent=1) + "\n").encode()])
    return file


def rates_here(device: Device, dtype: str) -> Rates:
    """Return a device's calibrated rates, else the assumed share of its data sheet."""
    record = read_calibration(device_key(device, dtype))
    return rates_of(device, dtype) if record is None else record.rates()


def cpu_device() -> Device:
    """Return this machine's CPU.

    Uncalibrated, the rate is a guess: at best 1 TFLOP/s per core."""
    import psutil

    cores = thread_count()
    total = int(psutil.virtual_memory().total)
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text(encoding="utf-8").strip() if group.is_file() else ""
    total = min(total, int(limit)) if limit.isdigit() else total
    return Device("cpu", "cpu", total, cores * 1e12, 20e9, f"this CPU, {counted(cores, 'thread')}")


def device_here(where: torch.device) -> Device:
    """Return the device that torch computes on: a GPU, or this machine's CPU."""
    import torch

    if where.type == "cuda":
        return device_of_card(torch.cuda.get_device_name(where), int(torch.cuda.mem_get_info(where)[1]))
    return cpu_device()


def device_key(device: Device, dtype: str) -> str:
    """Return a record's key: device and precision, for a CPU also the threads."""
    return f"{f'cpu/{thread_count()}' if device.kind == 'cpu' else device.name}/{dtype}"


def solved(first: tuple[Work, float], second: tuple[Work, float]) -> tuple[float, float]:
    """Return (operations per second, bytes per second) from two measured works.

    If the two equations have no positive solution, all of the larger work's time is attributed to
    operations, with bytes in the proportion of a typical machine."""
    (a, t), (b, u) = first, second
    determinant = a.operations * b.bytes - b.operations * a.bytes
    if determinant:
        x = (t * b.bytes - u * a.bytes) / determinant
        y = (a.operations * u - b.operations * t) / determinant
        if x > 0 and y > 0:
            return 1 / x, 1 / y
    work, seconds = max(first, second, key=lambda pair: pair[0].operations)
    rate = 1.15 * work.operations / seconds
    return rate, work.bytes / (seconds - work.operations / rate)


def calibrate(
    name: str, *, dtype: str = "auto", rank: int = 16, say: Callable[[str], None] = lambda line: None
) -> Calibration:
    """Measure short training steps of two sizes on the training device.

    Raises what loading the base raises, and ResourceError if there is no memory for 1,024 tokens."""
    from veneer.models.text.base import load_text

    base = load_text(name, dtype=dtype, say=say)
    shape, device, dtype = model_shape(base.model), device_here(base.device), str(base.dtype).removeprefix("torch.")
    timed: list[tuple[Work, float]] = []
    for n in (512, 64):
        load = Load((n, n), 0.25, rank=rank, dtype=dtype)
        try:
            seconds = _shortest_step(base, load, rank)
        except (MemoryError, RuntimeError) as error:
            what = f"the calibration's step of {load.tokens:,} tokens failed: {error}"
            raise ResourceError(what, fix="calibrate with a smaller base") from None
        say(f"{load.tokens:,} tokens: {seconds:.2f} s a step")
        timed.append((text_work(shape, load, device), seconds))
    return Calibration(device_key(device, dtype), *solved(*timed), name, dtype)


def _shortest_step(base: Any, load: Load, rank: int, count: int = 6) -> float:
    """Return the shortest step after the first, in seconds.

    Other load only adds time."""
    import torch

    from veneer.core.adapter import LoraSpec
    from veneer.core.attach import attach
    from veneer.core.init import create
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import text_loss

    model, seconds, generator = base.model, list[float](), torch.Generator().manual_seed(0)
    vocabulary, training = model.get_input_embeddings().weight.shape[0], model.training
    trained = (torch.arange(load.tokens) % load.longest >= load.longest - load.wanted // len(load.lengths)).to(
        base.device
    )
    with attach(model) as attachment:
        attachment.add("plan", create(model, LoraSpec(rank=rank), seed=0), trainable=True)
        attachment.use("plan")
        parameters = list(attachment.parameters("plan").values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        model.train()
        try:
            with fast(model):
                for _ in range(count):
                    ids = torch.randint(3, vocabulary, (load.tokens,), generator=generator).to(base.device)
                    began = time.perf_counter()
                    loss = text_loss(model, ids, load.lengths, trained)
                    (loss / trained.sum()).backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    float(loss.detach())
                    seconds.append(time.perf_counter() - began)
        finally:
            model.train(training)
    return min(seconds[1:])
