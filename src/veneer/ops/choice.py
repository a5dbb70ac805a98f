"""Which implementation of an op runs: the one place where that is decided, and where it can be asked for.
(Pages and panels as the CPU's kernels lay them out have no twin in torch: serve/forward asks `compiled` for those.)

Every op of this folder has its reference in torch beside it. A device may bring faster implementations of parts of it,
in the module that HOMES names, each with what it takes. The op asks `chosen` and runs its reference where that is None.

    run = chosen("rms_norm", x, weight)
    y = F.rms_norm(x, …) if run is None else run(x, weight, eps)

Where an op has a trial (`measured`), which of its implementations runs is measured on the CPU at first use, for each
class of shapes, dtype and number of threads, and kept beside the compiled kernels (ops/measuring.py); the first that
takes what it was given is the default, which another has to beat clearly. Everything else runs the first that takes it.

    VENEER_OPS=listed            nothing is measured: the first that takes it
    VENEER_OPS=torch             references alone
    VENEER_OPS=rows_attend=torch,rms_norm=compiled       these, and all else as ever
    VENEER_OPS=cuda              the kernels of GPUs on every tensor (TRITON_INTERPRET=1 beside it), to check them

Serving measures nothing once its weights are laid out (`listed`): an answer's bits depend on no clock.

`choices("cpu")` says what runs here, and why; `settled()` what ran so far of what is measured. A run takes what is
`known` once its longest batch has run, and follows it from its first step to its last, through every resume; all that
is decided or followed in it is its own (`own_choices`).

What decides is of a context (contextvars), as a run is: two of them in two threads do not meet, and threads that one
of them begins are given its context (`copy_context().run`). torch computes gradients on the CPU in the thread that asks
for them, so they see it, too; on a GPU in threads of its own, which see the process's: VENEER_OPS, and never a
measurement, which none of them needs, since nothing is measured there.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.measuring import CLEARLY, Kept, Measured, fastest, seconds_of, this_machine
from veneer.ops.sizes import power_of_2

HOMES = {"cpu": "veneer.ops.cpu.implementations", "cuda": "veneer.ops.cuda.implementations"}
"""Device type -> the module whose IMPLEMENTATIONS are its own: op -> Implementation."""

REFERENCE = "torch"
"""The name of every op's reference."""

OPS = {
    "attend": "attention of tokens over all others: softmax(q·kᵀ/√d)·v",
    "attend_backward": "its gradients",
    "attend_rows": "attention of rows beside one another, with windows, capped scores and sinks, and its gradients",
    "causal_softmax": "softmax of scores over the keys that a query may see",
    "coded_product": "x·Wᵀ + b of a few rows, by the codes of a weight",
    "dequantise_blocks4": "a weight of 4 bits, in blocks",
    "dequantise_ggml": "a weight in the blocks of a GGUF file",
    "dequantise_rows8": "a weight of 8 bits, by rows",
    "dropout": "dropout whose mask is made again",
    "frozen_product": "x·Wᵀ + b by a frozen weight, and the gradient of x",
    "gain": "gain ⊙ y + b, DoRA's",
    "gain_backward": "its gradients",
    "gather_heads": "heads of rows laid side by side, turned",
    "geglu": "up ⊙ gelu(gate)",
    "geglu_backward": "its gradient",
    "gelu_gate": "gelu(gate) ⊙ up",
    "gelu_gate_backward": "its gradients",
    "gelu_tanh": "gelu by tanh",
    "gelu_tanh_backward": "its gradient",
    "gelu_tanh_gate": "gelu(gate) ⊙ up, gelu by tanh",
    "gelu_tanh_gate_backward": "its gradients",
    "joint_heads": "q, k and v of a denoiser apart, q and k normed and turned, and its gradient",
    "kept_product": "frozen_product by a weight kept in the order in which products read it",
    "low_rank": "s·(x·Aᵀ)·Bᵀ of all pairs of a product, with their gradients",
    "mixed_rows": "rows_low_rank and DoRA's gain in one pass, by rows under one mix",
    "norm_silu": "silu of a group norm, with its gradient",
    "packed_product": "x·Wᵀ + b by a weight in panels",
    "paged_attention": "attention over pages of keys and values",
    "quantise_blocks4": "a weight into 4 bits",
    "rms_norm": "RMS norm",
    "rms_norm_backward": "its gradient",
    "rows_attend": "causal attention of rows that lie one after another, and its gradients",
    "rows_low_rank": "s·(x·Aᵀ)·Bᵀ with another adapter for each row",
    "scatter_heads": "the inverse of gather_heads",
    "silu_gate": "silu(gate) ⊙ up",
    "silu_gate_backward": "its gradients",
    "softmax_backward": "p ⊙ (dp − Σ p⊙dp)",
    "split_turned": "q, k and v apart, q and k turned by their positions, and its gradient",
    "token_nll": "−log softmax at the targets, and its gradient",
    "turn_and_store": "heads normed and turned, keys and values put into pages",
    "weight_order": "the order in which serving keeps a weight",
}
"""The parts of ops that a device may have an implementation of, and what each computes."""


class Implementation(NamedTuple):
    """`run`: what an op calls instead of its reference, or an object of whose functions it calls; None for the
    reference itself, named REFERENCE, where it is tried first. `takes`: whether it runs on what the op was given.
    `wants`: that in words. `missing`: why it cannot run here at all; "" where it can. `name`: how it is pinned and
    reported. `others`: further ones of the same op, in the order they are tried."""

    run: Any
    takes: Callable[..., bool]
    wants: str
    missing: Callable[[], str]
    name: str = "compiled"
    others: tuple[Implementation, ...] = ()


class Trial(NamedTuple):
    """`kind`: the class of shapes of what the op was given, as numbers. `work`: (dtype, *kind) -> a piece of work of
    that class that calls the op. `clearly`: how many times faster than the first another has to be."""

    kind: Callable[..., tuple[int, ...]]
    work: Callable[..., Callable[[], object]]
    clearly: float = CLEARLY


_TRIALS: dict[str, Trial] = {}


def measured(op: str, kind: Callable[..., tuple[int, ...]], clearly: float = CLEARLY) -> Callable[[Any], Any]:
    """Puts what it decorates, `work` of a trial, into the table: from now on `op` is measured."""

    def put(work: Any) -> Any:
        _TRIALS[op] = Trial(kind, work, clearly)
        return work

    return put


TRIED_IN = ("attention", "linear", "loss", "mlp", "norms", "orders", "panels")
"""The modules of this folder that bring trials."""


def trial_of(op: str) -> Trial | None:
    """By what it is measured on a CPU which implementation runs; None: it is not."""
    for name in TRIED_IN:
        importlib.import_module(f"veneer.ops.{name}")
    return _state().trials.get(op)


TRIAL_ROWS = 1024
"""Rows of a trial whose op works row by row: which implementation runs must not depend on who shares a batch."""


def size_class(n: int, most: int = 4096) -> int:
    """n rounded up to a power of two, 16 … `most`: what is measured stands for all sizes near it."""
    return min(most, max(16, power_of_2(n)))


def random_like(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers to measure with, the same at each call; torch's own generator does not move."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# -- what decides, and what was decided --------------------------------------------------------------------------------


class Words(NamedTuple):
    """What VENEER_OPS asks for. `pins`: op -> name; "*": all others. `listed`: whether nothing is measured. `device`:
    a device type whose implementations run on every tensor; "": each tensor's own."""

    pins: Mapping[str, str]
    listed: bool
    device: str


def words_of(text: str) -> Words:
    """VENEER_OPS, read. Raises ConfigError where a word means nothing."""
    words = [word for word in text.split(",") if word]
    pins = dict(word.split("=", 1) for word in words if "=" in word)
    known = {"cuda", "listed", REFERENCE, *(f"{op}={name}" for op, name in pins.items() if op in OPS)}
    if unknown := [word for word in words if word not in known]:
        raise ConfigError(
            f"VENEER_OPS has {', '.join(unknown)}, which is neither an op nor listed, torch or cuda",
            where="VENEER_OPS",
            fix="an op is pinned as op=name, and the ops are in docs/reference/ops.md",
        )
    every = {"*": REFERENCE} if REFERENCE in words else {}
    return Words(pins | every, "listed" in words, "cuda" if "cuda" in words else "")


_words = words_of(os.environ.get("VENEER_OPS", ""))
PINNED = _words.device
"""A device type whose implementations run on every tensor, whatever device it is on. "cuda" beside TRITON_INTERPRET=1
runs the kernels of GPUs on the CPU, to check them."""


@functools.cache
def _implementations(device: str) -> Mapping[str, Implementation]:
    home = HOMES.get(device)
    return {} if home is None else importlib.import_module(home).IMPLEMENTATIONS


@functools.cache
def _kept() -> Kept:
    """The measurements of this machine, beside the compiled library they belong to."""
    from veneer.ops.cpu import compiled

    library = compiled.kernels()
    file = None if library is None else library.path.with_suffix(".choices.json")
    return Kept(file, f"{this_machine()}, torch {torch.__version__}")


@dataclass
class _Decisions:
    """Of a run, or of what is outside of any. `made`: what `chosen` asks, (op, dtype, threads, *kind) -> name.
    `followed`: key -> name of the record that decides, once there is one (`following`)."""

    made: dict[tuple[Any, ...], str] = field(default_factory=dict)
    followed: dict[str, str] = field(default_factory=dict)
    following: bool = False


@dataclass(frozen=True)
class _State:
    """All that decides (`own_choices` says what each is). A process has one, and a block may have its own. `trying`:
    (op, name) of what a trial is about, where it measures."""

    implementations: Callable[[str], Mapping[str, Implementation]]
    trials: Mapping[str, Trial]
    kept: Callable[[], Kept]
    pins: Mapping[str, str]
    listed: bool
    decisions: _Decisions
    trying: tuple[str, str] = ("", "")


_OF_THE_PROCESS = _State(_implementations, _TRIALS, _kept, _words.pins, _words.listed, _Decisions())
_OF_A_BLOCK: ContextVar[_State | None] = ContextVar("what decides", default=None)
_lock = threading.Lock()


def _state() -> _State:
    return _OF_A_BLOCK.get() or _OF_THE_PROCESS


@contextmanager
def _while_inside(**changes: Any) -> Iterator[None]:
    token = _OF_A_BLOCK.set(replace(_state(), **changes))
    try:
        yield
    finally:
        _OF_A_BLOCK.reset(token)


@contextmanager
def own_choices(**given: Any) -> Iterator[None]:
    """Inside, nothing was decided yet and nothing is followed; after it, all is as it was. Around a run, since what is
    decided or followed there is of no other run; and around what looks at how a choice is made.

    `given`: what else decides there instead of what did. `implementations`: a device type -> op -> Implementation;
    `trials`: op -> Trial; `kept`: () -> the measurements; `pins`: op -> name; `listed`: whether nothing is measured."""
    with _while_inside(decisions=_Decisions(), **given):
        yield


@contextmanager
def pinned(**names: str) -> Iterator[None]:
    """While inside, these ops run the implementations of these names, on what they take; for comparisons."""
    with _while_inside(pins={**_state().pins, **names}):
        yield


@contextmanager
def listed() -> Iterator[None]:
    """Inside, nothing is measured and no measurement followed: the first that takes what it is given runs. For serving,
    whose bits must depend on no clock, and on nothing else that is done beside it."""
    with _while_inside(listed=True, decisions=_Decisions()):
        yield


def settled() -> dict[str, Measured]:
    """What ran so far in this process, or in this run (`own_choices`), of all that is measured: "op dtype kind,
    threads" -> its name, and the milliseconds that are kept of each, if any."""
    names = _made()
    kept = {key: _state().kept().get(key) for key in names}
    return {key: Measured(name, {} if (found := kept[key]) is None else found.ms) for key, name in names.items()}


def what_ran() -> str:
    """By what measured ops ran so far, for a person: `rms_norm compiled; rows_attend tiles, torch`."""
    by: dict[str, set[str]] = {}
    for key, found in settled().items():
        by.setdefault(key.partition(" ")[0], set()).add(found.runs)
    return "; ".join(f"{op} {', '.join(sorted(names))}" for op, names in sorted(by.items()))


def measured_here() -> dict[str, Measured]:
    """What is kept of this machine for the number of threads that there is now, whoever measured it; key -> record."""
    ours = f", {torch.get_num_threads()} threads"
    every = sorted(_state().kept().here.items())
    return {key: found for key, found in every if key.endswith(ours) and found.runs in _names_of(key.split()[0])}


def recorded() -> dict[str, str]:
    """What is followed, and what ran beside it, key -> name, for a run to keep."""
    return _state().decisions.followed | _made()


def known() -> dict[str, str]:
    """`recorded`, and all that was ever measured on this machine: what a run that begins is to follow. Not under
    VENEER_OPS=listed, which asks for the first of each whatever was measured."""
    if _state().listed:
        return recorded()
    return {key: found.runs for key, found in _state().kept().here.items()} | recorded()


def follow(record: Mapping[str, str]) -> None:
    """From now on this record decides, and nothing more is measured: where it has no word, the first implementation
    runs. So a run that was stopped and one that was not come out bit for bit the same, whatever else was measured.
    It holds to the end of `own_choices`."""
    decisions = _state().decisions
    decisions.followed.update(record)
    decisions.following = True
    decisions.made.clear()


def _made() -> dict[str, str]:
    return {_key(asked): name for asked, name in list(_state().decisions.made.items())}


def _key(asked: tuple[Any, ...]) -> str:
    op, dtype, threads, *kind = asked
    return f"{op} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, kind))}, {threads} threads"


@functools.cache
def _names(implementations: Callable[[str], Mapping[str, Implementation]], op: str) -> frozenset[str]:
    homes = [implementations(device).get(op) for device in HOMES]
    return frozenset({REFERENCE} | {one.name for own in homes if own is not None for one in (own, *own.others)})


def _names_of(op: str) -> frozenset[str]:
    """Of all implementations of an op, on whatever device, and its reference."""
    return _names(_state().implementations, op)


def _check_pin(op: str, pin: str) -> None:
    """Raises ConfigError where no device has an implementation of the op by this name."""
    names = _names_of(op)
    if pin not in names:
        raise ConfigError(
            f"VENEER_OPS pins {op} to {pin!r}, and it has no implementation of that name",
            where="VENEER_OPS",
            fix=f"it has: {', '.join(sorted(names))}",
        )


def chosen(op: str, first: Tensor, *given: Any) -> Any:
    """What runs `op` on these tensors (and whatever else decides it), by the device of the first; None: the reference.

    Called on every product, so it costs a look into a few dicts and `takes`."""
    state = _state()
    own = state.implementations(PINNED or first.device.type).get(op)
    if own is None:
        return None
    if op in state.pins:
        _check_pin(op, state.pins[op])
    if not own.others and op not in state.trials and not state.pins:
        return own.run if own.takes(first, *given) else None
    able = [one for one in (own, *own.others) if one.takes(first, *given)]
    if not able:
        return None
    name = _name_of(state, op, able, first, given)
    return next((one.run for one in able if one.name == name), None if name == REFERENCE else able[0].run)


def _name_of(state: _State, op: str, able: list[Implementation], first: Tensor, given: tuple[Any, ...]) -> str:
    """Which of `able`, or the reference: as pinned, as tried just now, as decided before, or as measured."""
    if (pin := state.pins.get(op, state.pins.get("*"))) is not None:
        return pin
    if state.trying[0] == op:
        return state.trying[1]
    trial = state.trials.get(op)
    if trial is None or PINNED or first.device.type != "cpu":
        return able[0].name
    kind = trial.kind(first, *given)
    asked: tuple[Any, ...] = (op, first.dtype, torch.get_num_threads(), *kind)
    decisions = state.decisions
    if asked in decisions.made:
        return decisions.made[asked]
    key = _key(asked)
    if key in decisions.followed:
        name = decisions.followed[key]
    elif decisions.following:
        name = able[0].name
    elif state.listed or state.trying[0] or type(first) not in (Tensor, torch.nn.Parameter):
        return able[0].name  # of a fake tensor, too: its work takes no time
    else:
        name = _measure(state, key, op, able, trial, first.dtype, kind).runs
    return decisions.made.setdefault(asked, name)


def _measure(
    state: _State,
    key: str,
    op: str,
    able: list[Implementation],
    trial: Trial,
    dtype: torch.dtype,
    kind: tuple[int, ...],
) -> Measured:
    """What is kept, or else measured now: by one thread of one process at a time, so that all agree."""
    names, kept = (*(one.name for one in able), REFERENCE), state.kept()

    def known() -> Measured | None:
        found = kept.get(key)
        return found if found is not None and found.runs in names else None

    with _lock:
        if (found := known()) is not None:
            return found
        with kept.alone():
            return known() or _measure_now(state, key, op, names, trial, dtype, kind)


def _measure_now(
    state: _State,
    key: str,
    op: str,
    names: tuple[str, ...],
    trial: Trial,
    dtype: torch.dtype,
    kind: tuple[int, ...],
) -> Measured:
    def tried(name: str) -> Callable[[], object]:
        made: list[Callable[[], object]] = []

        def run() -> None:  # in whatever thread
            token = _OF_A_BLOCK.set(replace(state, trying=(op, name)))
            try:
                if not made:
                    made.append(trial.work(dtype, *kind))
                made[0]()
            finally:
                _OF_A_BLOCK.reset(token)

        return run

    first, works = names[0], {name: tried(name) for name in names}
    seconds = seconds_of(works)
    name = fastest(seconds, trial.clearly) if first in seconds else first
    if (
        name != first and fastest(again := seconds_of(works), trial.clearly) != name
    ):  # what noise has decided is not kept
        seconds, name = again, first
    if first not in seconds:  # it could not be measured: nothing is kept
        return Measured(first, {})
    return state.kept().put(key, Measured(name, {name: s * 1e3 for name, s in seconds.items()}))


class Choice(NamedTuple):
    """What runs an op. `name`: the implementation, or all that are tried, in their order. `reason`: why. `wants`: what
    they take, where it is not everything; the reference runs all else."""

    name: str
    reason: str
    wants: str = ""

    def line(self) -> str:
        return f"{self.name}: {self.reason}" + (f"; for {self.wants}, {REFERENCE} for all else" if self.wants else "")


def choices(device: str) -> dict[str, Choice]:
    """op -> what runs it on a device of this type ("cpu", "cuda"), and why."""
    return {op: _choice(op, PINNED or device) for op in OPS}


def _choice(op: str, device: str) -> Choice:
    state = _state()
    own = state.implementations(device).get(op)
    if own is None:
        return Choice(REFERENCE, f"{device} has no implementation of its own")
    here = [one for one in (own, *own.others) if not one.missing()]
    if not here:
        return Choice(REFERENCE, own.missing())
    names, wants = [one.name for one in here], "; ".join(dict.fromkeys(one.wants for one in here))
    if (pin := state.pins.get(op, state.pins.get("*"))) is not None:
        if op in state.pins:
            _check_pin(op, pin)
        if pin == REFERENCE:
            return Choice(pin, "pinned by VENEER_OPS")
        if pin in names:
            return Choice(pin, "pinned by VENEER_OPS", here[names.index(pin)].wants)
        return Choice(names[0], f"pinned to {pin} by VENEER_OPS, which is not here", here[0].wants)
    if PINNED:
        return Choice(", ".join(names), f"VENEER_OPS={PINNED}", wants)
    if device == "cpu" and not state.listed and trial_of(op) is not None:
        return Choice(
            ", ".join(dict.fromkeys([*names, REFERENCE])), "measured, the first unless another is clearly faster", wants
        )
    return Choice(", ".join(names), "the first that takes what it is given", wants)
