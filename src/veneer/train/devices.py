"""The processes of one run, one per device, and their communication.

    with joined(base.device) as devices:      a single process is ALONE and does not import torch.distributed
        devices.device                        this process's device: "cuda:1"
        devices.deal(sizes)                   this process's parts of the work
        devices.gather(value)                 the values of all processes, by rank
        devices.add_gradients(parameters, …)  Σ over the processes, in place

All processes have the same adapter, optimizer and plan. Each process computes its share of every step. Then
all processes take the same optimizer step:

    gradient of a step = Σ over processes ∇ Σ NLL over their micro-batches / Σ trained tokens of the step

The sum is exact for any division into shares. Only the first process writes and prints. `torchrun`,
Kubernetes jobs or Ray start such processes and set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
`launch` starts them on one machine.

If one process fails, all processes end. The failing process writes its error to the shared store and exits.
Waiting processes read the error and raise a copy marked as `already_shown`, so that the error is printed
once.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer import errors
from veneer.errors import ConfigError, Interrupted, TrainingError, VeneerError
from veneer.files.locks import POSIX
from veneer.models import device as processors
from veneer.train.signals import signal_handler

T = TypeVar("T")
_ERROR = "veneer/error"
_TIMEOUT = timedelta(hours=3)
"""Maximum wait for other processes, which can be busy generating samples.

If a process ends, the others notice at once."""
PATIENCE = 20.0
"""Seconds that other processes have to notice a failure before `launch` ends them."""


@dataclass(frozen=True)
class Devices:
    """One process of `count` processes.

    local: number of the process on its machine. lockstep: whether each process has only a part of the
    weights, so that all processes must run the same number of forward passes."""

    rank: int = 0
    count: int = 1
    local: int = 0
    device: str = "auto"
    lockstep: bool = False

    @property
    def first(self) -> bool:
        """Return whether this process writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes by rank, after waiting for all of them.

        Values are pickled and should be small."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        out: list[Any] = [None] * self.count
        dist.all_gather_object(out, value)
        return out

    def deal(self, sizes: Sequence[int]) -> list[tuple[int, bool]]:
        """Return (index, whether its result counts) for this process's parts, in order; see `balance`.

        In lockstep, a process with fewer parts also runs the smallest part, whose result does not count."""
        hands = balance(sizes, self.count)
        mine = [(index, True) for index in hands[self.rank]]
        if self.lockstep and sizes:
            smallest = min(range(len(sizes)), key=lambda i: (sizes[i], i))
            mine += [(smallest, False)] * (max(map(len, hands)) - len(mine))
        return mine

    def add_gradients(self, parameters: Sequence[nn.Parameter], reached: Sequence[int]) -> None:
        """Sum the gradients of `parameters[i]`, i in `reached`, over all processes, in place.

        A missing gradient counts as zero."""
        if self.count == 1:
            return
        import torch.distributed as dist

        kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        for index in reached:
            kinds.setdefault(parameters[index].dtype, []).append(parameters[index])
        for members in kinds.values():
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in members])
            dist.all_reduce(flat)
            for parameter, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
                parameter.grad = part.view_as(parameter)

    def agree(self, noun: str, digest: str) -> None:
        """Raise TrainingError in all processes if their `digest` values differ."""
        digests = self.gather(digest)
        if len(set(digests)) > 1:
            different = next(rank for rank, d in enumerate(digests) if d != digests[0])
            where = f"process 0 has {digests[0][:12]}, process {different} has {digests[different][:12]}"
            fix = "give every machine the same files, versions and kind of device; no state was saved after this"
            raise TrainingError(f"the processes of this run do not have the same {noun}", where=where, fix=fix)


ALONE = Devices()


def balance(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divide `sizes` into `count` parts of about the same sum, and return the indices of each part.

    In order of decreasing size, each index goes to the part with the smallest sum. The function is
    deterministic, so all processes agree without communication."""
    loads = [0] * count
    hands: list[list[int]] = [[] for _ in loads]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(count), key=lambda r: (loads[r], len(hands[r]), r))
        loads[rank] += sizes[index]
        hands[rank].append(index)
    return [sorted(hand) for hand in hands]


def digest_of(tensors: Mapping[str, Tensor], *more: Any) -> str:
    """Return the sha256 of the exact bits of named tensors, and of JSON values."""
    h = hashlib.sha256(json.dumps(more, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"|{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def process_count() -> int:
    """Return the number of processes of this run, as set by the launcher; 1 without a launcher."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_leader() -> bool:
    """Return whether this process prints, because it is the only process or the first one."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str = "auto", *, lockstep: bool = False) -> Iterator[Devices]:
    """Yield the Devices of this process.

    A single process is ALONE. Several processes use cuda:LOCAL_RANK and nccl, or the CPU and gloo. An
    existing process group (for example Ray's) is used and not destroyed.

    device: base.device of the configuration.

    Raises ConfigError if `device` cannot be shared by several processes. An error in one process is raised in
    all processes."""
    if process_count() == 1:
        yield Devices(device=device)
        return
    import torch.distributed as dist

    initialized_here = not dist.is_initialized()
    if initialized_here:
        cuda = device != "cpu" and torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    rank, count, local = dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    store = dist.distributed_c10d._get_default_store()
    try:
        yield Devices(rank, count, local, own_device(device, local, count), lockstep)
    except Exception as error:
        raise _first_error(error, store, rank) from error
    finally:
        if initialized_here:
            dist.destroy_process_group()


def own_device(device: str, local: int, count: int) -> str:
    """Return the device of process `local` on this machine: "cpu", or its own CUDA device.

    The CUDA device becomes the current one. Raises ConfigError if there is no device for the process.

    device: base.device. count: number of processes."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    having = torch.cuda.device_count()
    named = device not in ("auto", "cuda")
    if named or not having:
        problem = "each process needs its own device" if named else "this machine has no CUDA device"
        text = f"base.device is {device}, the run has {count} processes, and {problem}"
        raise ConfigError(text, where="base.device", fix="set it to auto, cuda or cpu")
    if local >= having:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        fix = f"start {having} processes (--devices, or torchrun's --nproc-per-node), or set base.device to cpu"
        raise ConfigError(f"{here} processes were started on a machine with {having} CUDA devices", fix=fix)
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _first_error(error: Exception, store: Any, rank: int) -> Exception:
    """Return the error to raise in this process, which is the first error of any process.

    error: the error that ended the run in this process."""
    mine = error
    if not isinstance(error, VeneerError) and _is_lost(error):
        text = "another process of this run ended without reporting an error; it was killed, or its machine is gone"
        fix = "run the same command with --resume; it reports if there is no checkpoint to resume from"
        mine = TrainingError(text, fix=fix)
    own_error = {"rank": rank, "kind": type(mine).__name__, "what": str(mine)}
    if isinstance(mine, VeneerError):
        own_error |= {"what": mine.what, "where": mine.where, "fix": mine.fix}
    if isinstance(mine, Interrupted):
        own_error["signal"] = mine.signal
    try:
        first = json.loads(store.compare_set(_ERROR, "", json.dumps(own_error)))
    except RuntimeError:  # the process that hosts the store has also ended
        return mine
    if first["rank"] == rank:
        return mine
    kind = getattr(errors, first["kind"], None)
    if kind is None:
        shared: Any = TrainingError(f"process {first['rank']} of this run stopped: {first['kind']}: {first['what']}")
    else:
        details = {key: first[key] for key in ("where", "fix", "signal") if key in first}
        shared = kind(first["what"], **details)
    shared.already_shown = True
    return shared  # type: ignore[no-any-return]


def _is_lost(error: Exception) -> bool:
    """Return whether the error comes from torch.distributed and means that another process has ended."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def launch(count: int, command: Sequence[str]) -> int:
    """Run `command` in `count` processes on this machine, one per device.

    Returns 0, or the exit code of the first process that failed. Signals are forwarded to all processes. If
    one process fails and the others do not notice, they are ended."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if not POSIX:
        raise ConfigError("a run on several devices needs Linux or macOS", fix="use one device, or WSL")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    settings |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    settings |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    settings.setdefault("OMP_NUM_THREADS", str(max(1, processors.thread_count() // count)))
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int) -> None:
        for process in processes:
            process.send_signal(number)

    with signal_handler(forward, signal.SIGINT, signal.SIGTERM):
        for rank in range(count):
            environment = settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A separate session, so that Ctrl-C in the terminal reaches the process only once, through
            # `forward`.
            processes.append(subprocess.Popen(list(command), env=environment, start_new_session=True))
        _wait(processes)
    codes = [process.returncode for process in processes]
    for rank, code in enumerate(codes):
        if code < 0:
            print(f"process {rank} of {count} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    return next((128 - code if code < 0 else code for code in sorted(codes, key=lambda c: c < 0) if code), 0)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all processes have ended.

    After the first failure, the other processes get time to end, then SIGTERM, then SIGKILL."""
    failed: float | None = None
    stops = [(2 * PATIENCE, subprocess.Popen.kill), (PATIENCE, subprocess.Popen.terminate)]
    while None in (codes := [process.poll() for process in processes]):
        if failed is None and any(codes):
            failed = time.monotonic()
        if failed is not None and stops and time.monotonic() - failed > stops[-1][0]:
            stop = stops.pop()[1]
            for process in processes:
                stop(process)
        time.sleep(0.05)
