"""The one training loop. Knows a learner, planned steps and numbers; no text, no images.

    gradient of a step = ∇ Σ NLL over all its micro-batches / Σ trained tokens of the step

so k micro-batches equal one large batch, however the trained tokens fall. `Learner.loss(batch)` is Σ NLL as a scalar
tensor. For pictures a "token" is a picture, and Σ NLL is the sum of their squared errors; preferences are counted in
pairs (`Micro.units`), and Σ NLL is the sum of the pairs' losses. After the step: clip by the global norm, set the
schedule's rate, step the optimizer, tell the listeners, evaluate and save when due. A run is a function of (parameters,
steps, settings, random state), so that a state saved after step k and restored goes on bit for bit. The generators are
seeded anew for each micro-batch, from (seed, step, its place in the step), so that dropout does not depend on how many
devices share the work.

`stepping` is the loop, a generator that asks for the forward and backward of each step. Whoever drives it has them
made: `by_itself(stepping(learner, plan, optimizer))` one run's, `train/together.py` several runs' at once.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from veneer.errors import (
    Interrupted,
    PreflightError,
    ResourceError,
    TrainingError,
    VeneerError,
    first_few,
    lacks_memory,
)
from veneer.ops.cpu.memory import forget_peak_resident, peak_resident
from veneer.ops.cpu.sharing import shared
from veneer.ops.transfer import in_float64
from veneer.train.ahead import Ahead
from veneer.train.checkpoint import Progress, rng_restore, rng_state, seed_all
from veneer.train.devices import ALONE, Devices
from veneer.train.events import TOKEN_ACCURACY, Evaluated, Listener, Note, Probed, Saved, Stepped, Stopped, silent
from veneer.train.optim import Schedule
from veneer.train.signals import heard

T = TypeVar("T")
_RECENT = 20
_SHOWN = 12  # rows that a message names
_LENGTHS = {"tokens": "data.max_length", "pictures": "data.resolution"}


@dataclass(frozen=True)
class Micro:
    """A micro-batch that is made when its turn comes. `rows`: where it comes from, for messages. `items`: what `make`
    makes it of. `size`: what it needs of memory, in any unit that is the same for the whole run; its tokens where it is
    not given. `units`: how many losses its loss is the sum of, where that is not its trained tokens."""

    tokens: int
    trained: int
    rows: tuple[int | str, ...]
    make: Callable[[], Any]
    unit: str = "tokens"
    size: int | None = None
    units: int | None = None
    items: tuple[Any, ...] = ()

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


class LazySteps(Sequence[Step]):
    """All steps of a run, with the plan of one epoch in memory; another is planned when a step of it is needed.

    `plan(epoch)`: the steps of an epoch, a pure function. The run has `epochs` of them, or `steps` steps.
    `ends`: the numbers of the steps that end an epoch."""

    def __init__(
        self, plan: Callable[[int], list[Step]], *, epochs: int | None = None, steps: int | None = None
    ) -> None:
        self._plan = lru_cache(maxsize=1)(plan)
        self._starts = [0]  # steps before each epoch
        while len(self._starts) <= epochs if epochs is not None else self._starts[-1] < (steps or 0):
            planned = self._plan(len(self._starts) - 1)
            if not planned:
                break
            self._starts.append(self._starts[-1] + len(planned))
        self._count = self._starts[-1] if steps is None else min(steps, self._starts[-1])
        self.ends = [end for end in self._starts[1:] if end <= self._count]

    def mapped(self, change: Callable[[Step], Step]) -> LazySteps:
        """The same steps, each changed when it is planned."""
        out = copy.copy(self)
        plan = self._plan
        out._plan = lru_cache(maxsize=1)(lambda epoch: [change(step) for step in plan(epoch)])
        return out

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        at = range(self._count)[index]  # IndexError beyond the last, and negative indices
        epoch = bisect_right(self._starts, at) - 1
        return self._plan(epoch)[at - self._starts[epoch]]


@dataclass(frozen=True)
class Score:
    """What an evaluation found: Σ NLL over `trained` tokens of `rows` rows. `extra`: further means over the rows, for
    the log. `likelihood`: false for what has no perplexity: squared errors, preferences. `units`: as Micro's. `right`:
    trained tokens than which no other was likelier."""

    nll: float
    trained: int
    rows: int
    extra: dict[str, float] = field(default_factory=dict)
    likelihood: bool = True
    units: int | None = None
    right: int | None = None

    @property
    def measures(self) -> dict[str, float]:
        """`extra`, and of likelihoods `token_accuracy`."""
        return self.extra | (
            {TOKEN_ACCURACY: self.right / self.trained} if self.right is not None and self.trained else {}
        )

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
        right = None if parts[0].right is None else sum(part.right or 0 for part in parts)
        return Score(nll, trained, rows, extra, parts[0].likelihood, units, right)


@dataclass
class Means:
    """Running means by name; what nothing was added to is not there."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            if value.numel():
                self.sums[name] = self.sums.get(name, 0.0) + float(in_float64(value.detach()).sum())
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


class Learner(Protocol):
    """What the loop trains. Only `parameters` and `loss` have to be there."""

    parameters: Mapping[str, nn.Parameter]

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Σ NLL in nats over the trained tokens of what `Micro.make` made, a scalar with a graph."""

    def ahead(self) -> Callable[[Any], Any] | None:
        """How what `Micro.make` made goes to a device that computes by itself, so that the next batch is made and sent
        by a thread meanwhile: a function that nothing random is drawn in. None, as on a CPU: batches are made when
        their turn comes."""
        return None

    def score(self, interrupted: Callable[[], bool]) -> Score | None:
        """Scores the held-out rows, of several processes this one's share; None as soon as `interrupted()`."""
        raise NotImplementedError

    def draw_step(self, step: Step, number: int, interrupted: Callable[[], bool]) -> Step | None:
        """Step `number` as it is to be made, asked before it begins, for one whose micro-batches are not known when it
        is planned; None as soon as `interrupted()`."""
        return step

    def begin_step(self, step: Step) -> None:
        """Called before each step, for a loss that needs something of the whole step."""
        return

    def end_step(self, number: int) -> None:
        """Called when step `number` is done, before it is evaluated or saved: moving averages, sample sheets."""
        return

    def measured(self) -> Means:
        """What else the loss has measured since `begin_step`, for the log."""
        return Means()


@dataclass(frozen=True)
class TrainingPlan:
    """What is known before step one. `clip`: largest global norm of a gradient, None for any. `evaluate_at`: the steps
    after which the learner is scored (0: before the first one), beside the last one; None where there is nothing to
    score. `patience`: stop after so many evaluations in a row without a new lowest loss; 0 never. `save_at`: the steps
    after which a checkpoint is due. `seed`: of what is drawn in the steps."""

    steps: Sequence[Step]
    schedule: Schedule
    clip: float | None = 1.0
    evaluate_at: Collection[int] | None = None
    patience: int = 0
    save_at: Collection[int] = ()
    seed: int = 0


@dataclass
class StopAsked:
    """True when called once a signal asked the run to stop; `signal`: which."""

    signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0


@dataclass(frozen=True)
class _Loop:
    """The arguments of `stepping`, so that the helpers below need one."""

    learner: Learner
    plan: TrainingPlan
    optimizer: torch.optim.Optimizer
    progress: Progress
    save: Callable[[Progress], Path] | None
    tell: Listener
    devices: Devices
    interrupted: StopAsked
    ahead: Ahead | None


@dataclass(frozen=True)
class StepDone:
    """What a process has of a step: Σ NLL by micro-batch, which of the parameters have a gradient, what else the loss
    has measured, and the seconds that were its own."""

    nlls: dict[int, float]
    reached: list[int]
    means: Means
    seconds: float


@dataclass
class StepWanted:
    """A step whose forward and backward are to be made now, by `make_step` or in the same way. `due`: a checkpoint of
    the state before it is, which `save` writes."""

    loop: _Loop
    number: int
    step: Step
    due: bool

    @property
    def learner(self) -> Learner:
        return self.loop.learner

    @property
    def micros(self) -> list[Micro]:
        """Those that are learned from."""
        return [micro for micro in self.step.micros if micro.trained]

    def save(self) -> None:
        _save(self.loop)

    def begin(self) -> bool:
        """Before its first forward. False where a signal came before it was known what it is made of."""
        self.loop.optimizer.zero_grad(set_to_none=True)
        with _saved_where_it_fails(self.loop):
            step = self.learner.draw_step(self.step, self.number, self.loop.interrupted)
        if step is None:
            return False
        self.step = step
        self.learner.begin_step(step)
        return True

    def seed(self, index: int) -> tuple[int | str, ...]:
        """What the generators are seeded by for its micro-batch `index` (`seed_all`)."""
        return self.loop.plan.seed, self.number, index

    def batch(self, index: int, later: Sequence[int] = ()) -> Any:
        """What the loss takes of its micro-batch `index`. `later`: those that come after it."""
        micros = self.micros
        return _batch(self.loop, micros[index], [micros[i] for i in later], self.number)

    def done(self, nlls: Mapping[int, float], seconds: float, means: Means | None = None) -> StepDone:
        """Return the step's result. `nlls`: Σ NLL of each micro-batch processed here, from `read_losses`."""
        parameters = self.learner.parameters.values()
        reached = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        means = _measured(self.learner) if means is None else means
        return StepDone(dict(nlls), reached, means, seconds)


Stepping = Generator[StepWanted, "StepDone | None", T]
"""A run, or a part of it, that asks for its steps one after another. It is sent what was done of each, None where a
signal came before it was whole: nothing of it is kept then."""


def read_losses(nlls: Mapping[int, Tensor]) -> dict[int, float]:
    """Return the losses as numbers. Waits for the device, so read a step's clock afterwards."""
    values = torch.stack(list(nlls.values())).tolist() if nlls else []
    return dict(zip(nlls, values, strict=True))


def by_itself(steps: Stepping[T]) -> T:
    """Makes all steps that are asked for, each by itself; what comes out at the end."""
    with closing(steps):
        try:
            wanted = next(steps)
            while True:
                if wanted.due:
                    wanted.save()
                wanted = steps.send(make_step(wanted))
        except StopIteration as end:
            made: T = end.value
            return made


def stepping(
    learner: Learner,
    plan: TrainingPlan,
    optimizer: torch.optim.Optimizer,
    *,
    progress: Progress | None = None,
    save: Callable[[Progress], Path] | None = None,
    on_event: Listener = silent,
    devices: Devices = ALONE,
    asked: StopAsked | None = None,
) -> Stepping[Progress]:
    """Asks for the steps of `plan` after `progress.step`, one after another, and returns how far the run is.

    `save(progress)` writes a checkpoint: after the steps in `plan.save_at`, at each validation loss below all before
    it (that of step 0 among them), and at the end. `devices`: the processes that share the work. Each is given the same
    arguments and makes the same steps; the learner's loss runs on its own micro-batches.

    `asked`: what says that it should stop; None: Ctrl-C or SIGTERM (the first; a second one kills). Then the step that
    is under way is dropped, the random state put back to its beginning, the state saved, and Interrupted raised. One
    that nobody sets leaves signals what they are elsewhere, for steps of which nothing is to be kept. The state is
    saved, too, where drawing a step or scoring raises. Raises TrainingError naming step and rows when a loss or a
    gradient is not finite, before the optimizer moves: nothing is saved over the good checkpoint."""
    progress = progress if progress is not None else Progress()
    send = learner.ahead()
    with (
        stop_signals() if asked is None else nullcontext(asked) as interrupted,
        nullcontext() if send is None else Ahead(send) as ahead,
    ):
        loop = _Loop(learner, plan, optimizer, progress, save, on_event, devices, interrupted, ahead)
        due = False
        _evaluate_if_due(loop)
        while progress.step < len(plan.steps) and not progress.stopped:
            yield from _one_step(loop, plan.steps[progress.step], due)
            improved = _evaluate_if_due(loop)
            if plan.patience and progress.waited >= plan.patience and progress.step < len(plan.steps):
                progress.stopped = "early stopping"
            due = improved or progress.step in plan.save_at
        if not progress.stopped:
            progress.stopped = "finished"
        _save(loop)
    on_event(Stopped(progress.step, progress.stopped))
    return progress


def _one_step(loop: _Loop, step: Step, due: bool) -> Stepping[None]:
    """Everything of one optimizer step; leaves through `_stop` without a trace when a signal came."""
    progress, number, before = loop.progress, loop.progress.step + 1, rng_state()
    wanted = StepWanted(loop, number, step, due)
    if step.trained == 0:
        raise TrainingError(f"step {number} has no trained token", where=f"rows {first_few(step.rows, _SHOWN)}")
    made = yield wanted
    began = time.perf_counter()
    shares = loop.devices.gather(made)
    done = [share for share in shares if share is not None]
    if len(done) < len(shares):
        loop.optimizer.zero_grad(set_to_none=True)
        rng_restore(before)
        _stop(loop)
    step, micros, parameters = wanted.step, wanted.micros, list(loop.learner.parameters.values())
    loop.devices.add_gradients(parameters, sorted(set().union(*(share.reached for share in done))))
    rate = loop.plan.schedule.apply(loop.optimizer, number)
    limit = loop.plan.clip or math.inf
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    found = {index: nll for share in done for index, nll in share.nlls.items()}
    nlls = [found[index] for index in range(len(micros))]
    _check_finite(number, nlls, norm, micros, progress)
    loop.optimizer.step()
    total, seconds = sum(nlls), time.perf_counter() - began + (0.0 if made is None else made.seconds)
    progress.step = number
    progress.tokens += step.tokens
    progress.trained_tokens += step.trained
    progress.seconds += seconds
    progress.recent = [*progress.recent, (total, step.counted)][-_RECENT:]
    loop.tell(
        Stepped(
            step=number,
            steps=len(loop.plan.steps),
            epoch=step.epoch,
            loss=total / step.counted,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=step.tokens,
            learned_tokens=step.trained,
            seconds=seconds,
            memory_bytes=peak_memory_bytes(device_of(loop.learner)),
            extra=Means.total([share.means for share in done]).values(),
        )
    )
    loop.learner.end_step(number)


def make_step(wanted: StepWanted) -> StepDone | None:
    """Forward and backward of this process's micro-batches of a step; None when a signal came."""
    loop, learner, began = wanted.loop, wanted.learner, time.perf_counter()
    if not wanted.begin():
        return None
    micros = wanted.micros
    parts: dict[int, Tensor] = {}
    means: Means | None = None
    stopped = loop.interrupted()
    dealt = _dealt(loop, micros)
    for place, (index, counts) in enumerate(dealt):
        stopped = stopped or loop.interrupted()
        if stopped and not loop.devices.lockstep:
            return None
        if not counts and means is None:  # those that do not count come last
            means = _measured(learner)
        seed_all(*wanted.seed(index))
        with shared(), memory_errors(micros[index]):
            nll = learner.loss(wanted.batch(index, [later for later, _ in dealt[place + 1 :]]))
            (nll / wanted.step.counted if counts else nll * 0.0).backward()  # type: ignore[no-untyped-call]
        if counts:
            parts[index] = nll.detach()
    if stopped:
        return None
    losses = read_losses(parts)
    return wanted.done(losses, time.perf_counter() - began, means)


def _dealt(loop: _Loop, micros: Sequence[Micro]) -> list[tuple[int, bool]]:
    """Which micro-batches of a step are this process's, in order."""
    return loop.devices.deal([micro.tokens for micro in micros])


def _batch(loop: _Loop, micro: Micro, later: Sequence[Micro], number: int) -> Any:
    """What the loss takes of a micro-batch of step `number`. `later`: those that come after it in this step."""
    if loop.ahead is None:
        return micro.make()
    if not later and number < len(loop.plan.steps):
        coming = [micro for micro in loop.plan.steps[number].micros if micro.trained]
        later = [coming[index] for index, _ in _dealt(loop, coming)]
    return loop.ahead.take(micro.make, later[0].make if later else None)


def _measured(learner: Learner) -> Means:
    return Means.total([learner.measured()])  # a copy: what follows may not count


def _check_finite(number: int, nlls: list[float], norm: float, micros: list[Micro], progress: Progress) -> None:
    bad = [micro for nll, micro in zip(nlls, micros, strict=True) if not math.isfinite(nll)]
    what = f"the loss of step {number} is not finite" if bad else f"the gradient of step {number} is not finite"
    if not bad and math.isfinite(norm):
        return
    rows = tuple(row for micro in (bad or micros) for row in micro.rows)
    raise TrainingError(
        what,
        where=f"rows {first_few(rows, _SHOWN)}",
        fix="look at these rows; lower optimizer.learning_rate, or lengthen schedule.warmup. "
        f"Steps 1 to {progress.step} were good; no later state was saved",
    )


def _evaluate_if_due(loop: _Loop) -> bool:
    """Scores the validation rows if this step wants it and has not had it; True for a new lowest loss."""
    progress = loop.progress
    if loop.plan.evaluate_at is None or progress.evaluated == progress.step or progress.stopped:
        return False
    if progress.step != len(loop.plan.steps) and progress.step not in loop.plan.evaluate_at:
        return False
    began = time.perf_counter()
    # In lockstep nobody may leave while others score; the step after it sees the signal.
    with shared(), _saved_where_it_fails(loop):
        own = loop.learner.score((lambda: False) if loop.devices.lockstep else loop.interrupted)
    scores = loop.devices.gather(own)
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        _stop(loop)
        return False
    score = Score.total(found)
    if not math.isfinite(score.loss):
        raise TrainingError(
            f"the validation loss after step {progress.step} is not finite",
            fix="lower optimizer.learning_rate, or look at the validation rows; no later state was saved",
        )
    # What the run began with counts too: an adapter that is not better than that is not the best.
    if progress.step == 0:
        progress.first_loss = score.loss
    to_beat = [loss for loss in (progress.first_loss, progress.best_loss) if loss is not None]
    improved = progress.step > 0 and score.loss < min(to_beat, default=math.inf)
    progress.evaluated, progress.last_loss = progress.step, score.loss
    if improved:
        progress.best_step, progress.best_loss, progress.waited = progress.step, score.loss, 0
    elif progress.step > 0:
        progress.waited += 1
    loop.tell(
        Evaluated(
            step=progress.step,
            loss=score.loss,
            perplexity=score.perplexity if score.likelihood else None,
            rows=score.rows,
            learned_tokens=score.trained,
            seconds=time.perf_counter() - began,
            best=improved,
            worse=progress.first_loss is not None and score.loss > progress.first_loss,
            extra=score.measures,
        )
    )
    return improved


def _save(loop: _Loop) -> None:
    if loop.save is not None:
        loop.tell(Saved(loop.progress.step, str(loop.save(loop.progress))))


@contextmanager
def _saved_where_it_fails(loop: _Loop) -> Iterator[None]:
    """Around what changes no weight and may need others, a server that judges or teaches: if it fails, nothing that was
    learned is lost."""
    before = rng_state()
    try:
        yield
    except VeneerError:
        # saving is for all devices, and one has failed; before step 1 there is nothing to lose
        if loop.devices.count == 1 and loop.save is not None and loop.progress.step:
            rng_restore(before)
            _save(loop)
            loop.tell(Note(f"the state after step {loop.progress.step} is saved: --resume goes on from there"))
        raise


def _stop(loop: _Loop) -> None:
    """Saves the state after the last whole step and raises Interrupted."""
    _save(loop)
    loop.tell(Stopped(loop.progress.step, "interrupted"))
    came = max(loop.devices.gather(loop.interrupted.signal))  # maybe to another process alone
    raise Interrupted(
        f"stopped after step {loop.progress.step} of {len(loop.plan.steps)}"
        + ("; the state is saved" if loop.save is not None else "; nothing was asked to be saved"),
        signal=came or signal.SIGINT,
    )


def probe(learner: Learner, micros: Iterable[Micro], on_event: Listener) -> Probed:
    """Runs the longest micro-batch forward and backward, so that a run which will not fit fails now and not in an
    hour. No optimizer step; gradients are dropped and the random state is put back.

    Raises ResourceError when the memory does not suffice, PreflightError when the loss is not finite or no parameter
    gets a gradient.
    """
    longest = max(micros, key=lambda m: (m.tokens if m.size is None else m.size, m.trained))
    before, began = rng_state(), time.perf_counter()
    try:
        with shared(), memory_errors(longest):
            value = learner.loss(longest.make())
            if not math.isfinite(value.item()):
                raise PreflightError(
                    f"the loss of the longest batch is {value.item()} before any training",
                    where=f"rows {first_few(longest.rows, _SHOWN)}",
                    fix="look at these rows, or load the base in float32 (base.dtype=float32)",
                )
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        reached = [p for p in learner.parameters.values() if p.grad is not None and bool((p.grad != 0).any())]
        if not reached:
            raise PreflightError(
                "no gradient reaches the adapter: training would change nothing",
                where=f"{len(learner.parameters)} trained tensors",
                fix="check adapter.targets and that the data has trained tokens",
            )
    finally:
        for parameter in learner.parameters.values():
            parameter.grad = None
        rng_restore(before)
    event = Probed(longest.tokens, longest.rows, time.perf_counter() - began, peak_memory_bytes(device_of(learner)))
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
            where=f"rows {first_few(micro.rows, _SHOWN)}",
            fix=f"lower {_LENGTHS[micro.unit]} or batching.micro_rows, or set memory.activation_checkpointing=on",
        ) from error


def peak_memory_bytes(device: torch.device) -> int:
    """Return this process's peak memory for `device` since `forget_peaks`: torch's allocations on a CUDA device,
    resident memory for any other device."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident()


def forget_peaks() -> None:
    """Reset the peaks to the current memory, for runs after the first in a process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    forget_peak_resident()


def device_of(learner: Learner) -> torch.device:
    """Return the device of the learner's parameters."""
    return next(iter(learner.parameters.values())).device


@contextmanager
def stop_signals(asked: StopAsked | None = None) -> Iterator[StopAsked]:
    """While inside, the first SIGINT or SIGTERM only makes the yielded function true; the second acts as usual."""
    asked = StopAsked() if asked is None else asked

    def ask(number: int) -> None:
        asked.signal = number

    with heard(ask, signal.SIGINT, signal.SIGTERM, once=True):
        yield asked
