"""The one training loop, with the loss passed in. Knows parameters, planned steps and numbers; no text, no images.

    gradient of a step = ∇ Σ NLL over all its micro-batches / Σ trained tokens of the step

so k micro-batches equal one large batch, however the trained tokens fall. `loss(batch)` returns Σ NLL as a scalar
tensor. For pictures a "token" is a picture, and Σ NLL is the sum of their squared errors; preferences are counted in
pairs (`Micro.units`), and Σ NLL is the sum of the pairs' losses. After the step: clip by the global norm, set the
schedule's rate, step the optimizer, tell the listeners, evaluate and save when due. A run is a function of (parameters,
steps, settings, random state), so that a state saved after step k and restored goes on bit for bit. The generators are
seeded anew for each micro-batch, from (seed, step, its place in the step), so that dropout does not depend on how many
devices share the work.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import Interrupted, PreflightError, ResourceError, TrainingError, lacks_memory
from veneer.ops.cpu.memory import peak_resident
from veneer.ops.cpu.sharing import shared
from veneer.train.checkpoint import Progress, rng_restore, rng_state, seed_all
from veneer.train.devices import ALONE, Devices
from veneer.train.events import Evaluated, Listener, Probed, Saved, Stepped, Stopped
from veneer.train.optim import Schedule

__all__ = ["Loss", "Means", "Micro", "Score", "Step", "memory_errors", "peak_memory_bytes", "probe", "train"]

Loss = Callable[[Any], Tensor]
"""batch -> Σ NLL in nats over the batch's trained tokens, a scalar with a graph."""

_RECENT = 20
_LENGTHS = {"tokens": "data.max_length", "pictures": "data.resolution"}


@dataclass(frozen=True)
class Micro:
    """A micro-batch that is made when its turn comes. `rows`: where it comes from, for messages. `size`: what it needs
    of memory, in any unit that is the same for the whole run; its tokens where it is not given. `units`: how many
    losses its loss is the sum of, where that is not its trained tokens."""

    tokens: int
    trained: int
    rows: tuple[int | str, ...]
    make: Callable[[], Any]
    unit: str = "tokens"
    size: int | None = None
    units: int | None = None

    @property
    def counted(self) -> int:
        """What a mean loss divides by."""
        return self.trained if self.units is None else self.units


@dataclass(frozen=True)
class Step:
    """One optimizer step. `epoch`: how many passes over the data are done after it."""

    micros: tuple[Micro, ...]
    epoch: float = 0.0

    @property
    def trained(self) -> int:
        return sum(micro.trained for micro in self.micros)

    @property
    def counted(self) -> int:
        return sum(micro.counted for micro in self.micros)

    @property
    def tokens(self) -> int:
        return sum(micro.tokens for micro in self.micros)

    @property
    def rows(self) -> tuple[int | str, ...]:
        return tuple(row for micro in self.micros for row in micro.rows)


@dataclass(frozen=True)
class Score:
    """What an evaluation found: Σ NLL over `trained` tokens of `rows` rows. `extra`: further means over the rows, for
    the log. `likelihood`: false for what has no perplexity: squared errors, preferences. `units`: as Micro's."""

    nll: float
    trained: int
    rows: int
    extra: dict[str, float] = field(default_factory=dict)
    likelihood: bool = True
    units: int | None = None

    @property
    def loss(self) -> float:
        counted = self.trained if self.units is None else self.units
        return self.nll / counted if counted else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @staticmethod
    def total(parts: Sequence[Score]) -> Score:
        """What several found, each on other rows."""
        if len(parts) == 1:
            return parts[0]
        rows = sum(part.rows for part in parts)
        keys = dict.fromkeys(key for part in parts for key in part.extra)
        extra = {key: sum(p.extra.get(key, 0.0) * p.rows for p in parts) / max(1, rows) for key in keys}
        nll, trained = sum(part.nll for part in parts), sum(part.trained for part in parts)
        units = None if parts[0].units is None else sum(part.units or 0 for part in parts)
        return Score(nll, trained, rows, extra, parts[0].likelihood, units)


@dataclass
class Means:
    """Running means by name; what nothing was added to is not there."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            if value.numel():
                self.sums[name] = self.sums.get(name, 0.0) + float(value.detach().double().sum())
                self.counts[name] = self.counts.get(name, 0) + value.numel()

    def values(self) -> dict[str, float]:
        """The means; the difference of two rewards as `reward_margin`."""
        out = {name: total / self.counts[name] for name, total in self.sums.items()}
        if "reward_chosen" in out and "reward_rejected" in out:
            out["reward_margin"] = out["reward_chosen"] - out["reward_rejected"]
        return dict(sorted(out.items()))

    @staticmethod
    def total(parts: Sequence[Means]) -> Means:
        """Over what several have added."""
        out = Means()
        for part in parts:
            for name, value in part.sums.items():
                out.sums[name] = out.sums.get(name, 0.0) + value
                out.counts[name] = out.counts.get(name, 0) + part.counts[name]
        return out


@dataclass
class _Run:
    """The arguments of `train`, so that the helpers below need one."""

    parameters: Mapping[str, nn.Parameter]
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    clip: float | None
    evaluate: Callable[[Callable[[], bool]], Score | None] | None
    evaluate_at: Collection[int]
    patience: int
    save: Callable[[Progress], Path] | None
    save_at: Collection[int]
    progress: Progress
    tell: Listener
    interrupted: _Asked
    steps: Sequence[Step]
    after: Callable[[int], None] | None
    seed: int
    devices: Devices
    before: Callable[[Step], None] | None
    measured: Callable[[], Means] | None


def train(
    parameters: Mapping[str, nn.Parameter],
    steps: Sequence[Step],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    clip: float | None = 1.0,
    evaluate: Callable[[Callable[[], bool]], Score | None] | None = None,
    evaluate_at: Collection[int] = (),
    patience: int = 0,
    save: Callable[[Progress], Path] | None = None,
    save_at: Collection[int] = (),
    progress: Progress | None = None,
    on_event: Listener = lambda event: None,
    after: Callable[[int], None] | None = None,
    seed: int = 0,
    devices: Devices = ALONE,
    before: Callable[[Step], None] | None = None,
    measured: Callable[[], Means] | None = None,
) -> Progress:
    """Runs the steps after `progress.step` and returns how far the run is.

    `evaluate(interrupted)` scores the validation rows; it may return None as soon as `interrupted()` is true. It is
    called after the steps in `evaluate_at` (0: before the first one) and after the last one. `patience`: stop after so
    many evaluations in a row without a new lowest loss; 0 never. `save(progress)` writes a checkpoint: after the
    steps in `save_at`, at each validation loss below all before it (that of step 0 among them), and at the end.
    `after(step)`: called when a step is done, before it is evaluated or saved (moving averages, sample sheets).
    `before(step)`: called when a step begins, for a loss that needs something of the whole step; `measured()`: what
    else the loss has measured since, for the log.

    `devices`: the processes that share the work. Each is given the same arguments and makes the same steps; `loss` runs
    on its own micro-batches, `evaluate` scores its own share of the rows.

    Ctrl-C or SIGTERM (the first; a second one kills): the step that is under way is dropped, the random state put
    back to its beginning, the state saved, and Interrupted raised. Raises TrainingError naming step and rows when a
    loss or a gradient is not finite, before the optimizer moves: nothing is saved over the good checkpoint.
    """
    progress = progress if progress is not None else Progress()
    with _signals() as interrupted:
        run = _Run(
            parameters, loss, optimizer, schedule, clip, evaluate, evaluate_at, patience, save, save_at, progress,
            on_event, interrupted, steps, after, seed, devices, before, measured,
        )  # fmt: skip
        _evaluate_if_due(run)
        while progress.step < len(steps) and not progress.stopped:
            _one_step(run, steps[progress.step])
            improved = _evaluate_if_due(run)
            if patience and progress.waited >= patience and progress.step < len(steps):
                progress.stopped = "early stopping"
            if improved or progress.step in save_at:
                _save(run)
        if not progress.stopped:
            progress.stopped = "finished"
        _save(run)
    on_event(Stopped(progress.step, progress.stopped))
    return progress


def _one_step(run: _Run, step: Step) -> None:
    """Everything of one optimizer step; leaves through `_stop` without a trace when a signal came."""
    progress, began = run.progress, time.perf_counter()
    number, before = progress.step + 1, rng_state()
    if step.trained == 0:
        raise TrainingError(f"step {number} has no trained token", where=f"rows {_some(step.rows)}")
    run.optimizer.zero_grad(set_to_none=True)
    if run.before is not None:
        run.before(step)
    micros = [micro for micro in step.micros if micro.trained]
    parameters = list(run.parameters.values())
    shares = run.devices.gather(_share(run, number, step.counted, micros))
    done = [share for share in shares if share is not None]
    if len(done) < len(shares):
        run.optimizer.zero_grad(set_to_none=True)
        rng_restore(before)
        _stop(run)
    run.devices.add_gradients(parameters, sorted(set().union(*(share.reached for share in done))))
    rate = run.schedule.apply(run.optimizer, number)
    limit = run.clip if run.clip else math.inf
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    found = {index: nll for share in done for index, nll in share.nlls.items()}
    nlls = [found[index] for index in range(len(micros))]
    _check_finite(number, nlls, norm, micros, progress)
    run.optimizer.step()
    total, seconds = sum(nlls), time.perf_counter() - began
    progress.step = number
    progress.tokens += step.tokens
    progress.trained_tokens += step.trained
    progress.seconds += seconds
    progress.recent = [*progress.recent, (total, step.counted)][-_RECENT:]
    run.tell(
        Stepped(
            step=number, steps=len(run.steps), epoch=step.epoch, loss=total / step.counted, learning_rate=rate,
            gradient_norm=norm, tokens=step.tokens, trained_tokens=step.trained, seconds=seconds,
            memory_bytes=peak_memory_bytes(), extra=Means.total([share.means for share in done]).values(),
        )
    )  # fmt: skip
    if run.after is not None:
        run.after(number)


@dataclass(frozen=True)
class _Share:
    """What a process has of a step: Σ NLL by micro-batch, which of the parameters have a gradient, and what else the
    loss has measured."""

    nlls: dict[int, float]
    reached: list[int]
    means: Means


def _share(run: _Run, number: int, counted: int, micros: Sequence[Micro]) -> _Share | None:
    """Forward and backward of this process's micro-batches; None when a signal came."""
    parts: dict[int, Tensor] = {}
    means: Means | None = None
    stopped = run.interrupted()
    for index, counts in run.devices.deal([micro.tokens for micro in micros]):
        stopped = stopped or run.interrupted()
        if stopped and not run.devices.lockstep:
            return None
        micro = micros[index]
        if not counts and means is None:  # those that do not count come last
            means = _measured(run)
        seed_all(run.seed, number, index)
        with shared(), memory_errors(micro):
            nll = run.loss(micro.make())
            (nll / counted if counts else nll * 0.0).backward()  # type: ignore[no-untyped-call]
        if counts:
            parts[index] = nll.detach()
    if stopped:
        return None
    reached = [i for i, parameter in enumerate(run.parameters.values()) if parameter.grad is not None]
    values = torch.stack(list(parts.values())).tolist() if parts else []
    return _Share(dict(zip(parts, values, strict=True)), reached, _measured(run) if means is None else means)


def _measured(run: _Run) -> Means:
    return Means.total([run.measured()] if run.measured is not None else [])  # a copy: what follows may not count


def _check_finite(number: int, nlls: list[float], norm: float, micros: list[Micro], progress: Progress) -> None:
    bad = [micro for nll, micro in zip(nlls, micros, strict=True) if not math.isfinite(nll)]
    what = f"the loss of step {number} is not finite" if bad else f"the gradient of step {number} is not finite"
    if not bad and math.isfinite(norm):
        return
    rows = tuple(row for micro in (bad or micros) for row in micro.rows)
    raise TrainingError(
        what,
        where=f"rows {_some(rows)}",
        fix="look at these rows; lower optimizer.learning_rate, or lengthen schedule.warmup. "
        f"Steps 1 to {progress.step} were good; no later state was saved",
    )


def _evaluate_if_due(run: _Run) -> bool:
    """Scores the validation rows if this step wants it and has not had it; True for a new lowest loss."""
    progress = run.progress
    due = progress.step == len(run.steps) or progress.step in run.evaluate_at
    if run.evaluate is None or not due or progress.evaluated == progress.step or progress.stopped:
        return False
    began = time.perf_counter()
    # In lockstep nobody may leave while others score; the step after it sees the signal.
    with shared():
        own = run.evaluate((lambda: False) if run.devices.lockstep else run.interrupted)
    scores = run.devices.gather(own)
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        _stop(run)
        return False
    score = Score.total(found)
    if not math.isfinite(score.loss):
        raise TrainingError(
            f"the validation loss after step {progress.step} is not finite",
            fix="lower optimizer.learning_rate, or look at the validation rows; no later state was saved",
        )
    # What the run began with is in the contest: an adapter that is no better than that is not the best of anything.
    if progress.step == 0:
        progress.first_loss = score.loss
    to_beat = [loss for loss in (progress.first_loss, progress.best_loss) if loss is not None]
    improved = progress.step > 0 and score.loss < min(to_beat, default=math.inf)
    progress.evaluated, progress.last_loss = progress.step, score.loss
    if improved:
        progress.best_step, progress.best_loss, progress.waited = progress.step, score.loss, 0
    elif progress.step > 0:
        progress.waited += 1
    run.tell(
        Evaluated(
            step=progress.step, loss=score.loss, perplexity=score.perplexity if score.likelihood else None,
            rows=score.rows, trained_tokens=score.trained, seconds=time.perf_counter() - began, best=improved,
            worse=progress.first_loss is not None and score.loss > progress.first_loss, extra=score.extra,
        )
    )  # fmt: skip
    return improved


def _save(run: _Run) -> None:
    if run.save is not None:
        run.tell(Saved(run.progress.step, str(run.save(run.progress))))


def _stop(run: _Run) -> None:
    """Saves the state after the last whole step and raises Interrupted."""
    _save(run)
    run.tell(Stopped(run.progress.step, "interrupted"))
    raise Interrupted(
        f"stopped after step {run.progress.step} of {len(run.steps)}"
        + ("; the state is saved" if run.save is not None else "; nothing was asked to be saved"),
        signal=run.interrupted.signal or signal.SIGINT,
    )


def probe(
    parameters: Mapping[str, nn.Parameter], step_micros: Sequence[Micro], loss: Loss, on_event: Listener
) -> Probed:
    """Runs the longest micro-batch forward and backward, so that a run which will not fit fails now and not in an
    hour. No optimizer step; gradients are dropped and the random state is put back.

    Raises ResourceError when the memory does not suffice, PreflightError when the loss is not finite or no parameter
    gets a gradient.
    """
    longest = max(step_micros, key=lambda m: (m.tokens if m.size is None else m.size, m.trained))
    before, began = rng_state(), time.perf_counter()
    try:
        with shared(), memory_errors(longest):
            value = loss(longest.make())
            if not math.isfinite(value.item()):
                raise PreflightError(
                    f"the loss of the longest batch is {value.item()} before any training",
                    where=f"rows {_some(longest.rows)}",
                    fix="look at these rows, or load the base in float32 (base.dtype=float32)",
                )
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        reached = [p for p in parameters.values() if p.grad is not None and bool((p.grad != 0).any())]
        if not reached:
            raise PreflightError(
                "no gradient reaches the adapter: training would change nothing",
                where=f"{len(parameters)} trained tensors",
                fix="check adapter.targets and that the data has trained tokens",
            )
    finally:
        for parameter in parameters.values():
            parameter.grad = None
        rng_restore(before)
    event = Probed(longest.tokens, longest.rows, time.perf_counter() - began, peak_memory_bytes())
    on_event(event)
    return event


@contextmanager
def memory_errors(micro: Micro) -> Iterator[None]:
    """Turns torch's ways of saying "out of memory" into one ResourceError that names the batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise ResourceError(
            f"out of memory on a batch of {micro.tokens} {micro.unit}",
            where=f"rows {_some(micro.rows)}",
            fix=f"lower {_LENGTHS[micro.unit]} or batching.micro_rows, or set memory.activation_checkpointing=on",
        ) from error


def peak_memory_bytes() -> int:
    """The most memory the process has held: on CUDA what torch allocated there, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident()


@dataclass
class _Asked:
    """True when called once a signal asked the run to stop; `signal`: which."""

    signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0


@contextmanager
def _signals() -> Iterator[_Asked]:
    """While inside, the first SIGINT or SIGTERM only makes the yielded function true; the second acts as usual."""
    asked = _Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _some(rows: Sequence[int | str], most: int = 12) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown + (f" and {len(rows) - most} more" if len(rows) > most else "")
