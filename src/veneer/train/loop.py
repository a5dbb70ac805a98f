"""The training loop over learners and planned steps, independent of text and images.

    loop = Loop(Learner(parameters, loss), TrainingPlan(steps, schedule), optimizer)
    train([loop])                  all steps; loop.progress is the current state

    gradient of a step = ∇ Σ NLL over all its micro-batches / Σ trained tokens of the step

Several micro-batches are therefore equivalent to one large batch, however the trained tokens are distributed.
`Learner.loss(batch)` returns Σ NLL as a scalar tensor. For images, a "token" is an image, and Σ NLL is the
sum of the squared errors. For preferences, Σ NLL is the sum of the pairs' losses, and the divisor is the
number of pairs (`Micro.units`). After the backward passes, the loop clips the gradient by its global norm,
sets the learning rate of the schedule, steps the optimizer, notifies the listeners, and evaluates and saves
when due. A run is a function of (parameters, steps, settings, random state), so a run restored from the state
after step k continues bit for bit. The generators are seeded for each micro-batch with (seed, step, index of
the micro-batch in the step), so dropout does not depend on the number of devices.

Several runs on one base can step together: `train(loops, compute)`, where `compute` combines the rows of all
runs in one pass (train/text/together.py).
"""

from __future__ import annotations

import copy
import math
import signal
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import (
    Interrupted,
    PreflightError,
    ResourceError,
    TrainingError,
    VeneerError,
    counted,
    first_few,
    lacks_memory,
)
from veneer.ops.cpu.memory import peak_resident, reset_peak_resident
from veneer.ops.cpu.sharing import shared
from veneer.ops.device_transfer import in_float64
from veneer.train.checkpoint import Progress, rng_restore, rng_state, seed_all
from veneer.train.devices import ALONE, Devices
from veneer.train.events import TOKEN_ACCURACY, Evaluated, Listener, Note, Probed, Saved, Stepped, Stopped, silent
from veneer.train.lazy import Lazy
from veneer.train.optim import Schedule
from veneer.train.prefetch import Prefetcher
from veneer.train.signals import signal_handler

_RECENT = 20
_SHOWN = 12  # maximum number of row names in an error message
_LENGTHS = {"tokens": "data.max_length", "pictures": "data.resolution"}


@dataclass(frozen=True)
class Micro:
    """A micro-batch, built on demand by `make`.

    rows: names of the rows, for messages
    items: the inputs of `make`
    size: required memory, in any unit that all micro-batches of the run share; default: the number of tokens
    units: number of losses in the sum that the loss function returns, if not the number of trained tokens"""

    tokens: int
    trained: int
    rows: Sequence[int | str]
    make: Callable[[], Any]
    unit: str = "tokens"
    size: int | None = None
    units: int | None = None
    items: Sequence[Any] = ()

    @property
    def divisor(self) -> int:
        """Return the number that divides the summed loss to give the mean loss."""
        return self.trained if self.units is None else self.units


@dataclass(frozen=True)
class Step:
    """One optimizer step. `epoch`: number of passes over the data after this step."""

    micros: tuple[Micro, ...]
    epoch: float = 0.0

    @property
    def trained(self) -> int:
        return sum(micro.trained for micro in self.micros)

    @property
    def divisor(self) -> int:
        return sum(micro.divisor for micro in self.micros)

    @property
    def tokens(self) -> int:
        return sum(micro.tokens for micro in self.micros)

    @property
    def rows(self) -> tuple[int | str, ...]:
        return tuple(row for micro in self.micros for row in micro.rows)


class LazySteps(Lazy[Step]):
    """All steps of a run, with the plan of only one epoch in memory at a time.

    plan: plan(epoch) returns the steps of an epoch and must be a pure function. The length of the run is
    `epochs` epochs or `steps` steps. `ends`: the number of the last step of each epoch."""

    def __init__(
        self, plan: Callable[[int], Sequence[Step]], *, epochs: int | None = None, steps: int | None = None
    ) -> None:
        self._plan = lru_cache(maxsize=1)(plan)
        self._starts = [0]  # number of steps before each epoch, then the total
        while len(self._starts) <= epochs if epochs is not None else self._starts[-1] < (steps or 0):
            planned = self._plan(len(self._starts) - 1)
            if not planned:
                break
            self._starts.append(self._starts[-1] + len(planned))
        super().__init__(self._starts[-1] if steps is None else min(steps, self._starts[-1]), self._step)
        self.ends = [end for end in self._starts[1:] if end <= len(self)]

    def mapped(self, change: Callable[[Step], Step]) -> LazySteps:
        """Return the same steps, with `change` applied to each step when it is planned."""
        out = copy.copy(self)
        plan = self._plan
        out._plan = lru_cache(maxsize=1)(lambda epoch: [change(step) for step in plan(epoch)])
        out._make = out._step  # otherwise, the copy would read the plan of this object
        return out

    def _step(self, at: int) -> Step:
        epoch = bisect_right(self._starts, at) - 1
        return self._plan(epoch)[at - self._starts[epoch]]


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation: Σ NLL over `trained` tokens of `rows` rows.

    extra: other means over the rows, for the log
    likelihood: False for losses without a perplexity (squared errors, preferences)
    units: as in Micro
    right: number of trained tokens that are the most likely token at their position"""

    nll: float
    trained: int
    rows: int
    extra: dict[str, float] = field(default_factory=dict)
    likelihood: bool = True
    units: int | None = None
    right: int | None = None

    @property
    def measures(self) -> dict[str, float]:
        """Return `extra`, plus `token_accuracy` if it was counted."""
        if self.right is None or not self.trained:
            return self.extra
        return self.extra | {TOKEN_ACCURACY: self.right / self.trained}

    @property
    def loss(self) -> float:
        divisor = self.trained if self.units is None else self.units
        return self.nll / divisor if divisor else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @staticmethod
    def total(parts: Sequence[EvalResult]) -> EvalResult:
        """Combine the results of evaluations on different rows."""
        if len(parts) == 1:
            return parts[0]
        rows = sum(part.rows for part in parts)
        keys = dict.fromkeys(key for part in parts for key in part.extra)
        extra = {key: sum(p.extra.get(key, 0.0) * p.rows for p in parts) / max(1, rows) for key in keys}
        nll, trained = sum(part.nll for part in parts), sum(part.trained for part in parts)
        units = None if parts[0].units is None else sum(part.units or 0 for part in parts)
        right = None if parts[0].right is None else sum(part.right or 0 for part in parts)
        return EvalResult(nll, trained, rows, extra, parts[0].likelihood, units, right)


@dataclass
class MetricMeans:
    """Running means of named metrics."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            if value.numel():
                self.sums[name] = self.sums.get(name, 0.0) + float(in_float64(value.detach()).sum())
                self.counts[name] = self.counts.get(name, 0) + value.numel()

    def values(self) -> dict[str, float]:
        """Return the means, plus `reward_margin`: mean chosen reward − mean rejected reward."""
        out = {name: total / self.counts[name] for name, total in self.sums.items()}
        if "reward_chosen" in out and "reward_rejected" in out:
            out["reward_margin"] = out["reward_chosen"] - out["reward_rejected"]
        return dict(sorted(out.items()))

    @staticmethod
    def total(parts: Sequence[MetricMeans]) -> MetricMeans:
        """Combine several sets of means."""
        out = MetricMeans()
        for part in parts:
            for name, value in part.sums.items():
                out.sums[name] = out.sums.get(name, 0.0) + value
                out.counts[name] = out.counts.get(name, 0) + part.counts[name]
        return out


Stop = Callable[[], bool]
"""A function that returns True once a signal has asked the run to stop."""


def _nothing(*args: Any) -> None:
    """Do nothing; the default of a learner's optional functions."""


@dataclass(frozen=True)
class Learner:
    """The parameters that the loop trains, by name, and the functions that the loop calls.

    loss(batch)              returns Σ NLL in nats over a batch's trained tokens, as a scalar with a graph; the
                             batch is from `Micro.make`
    send(batch)              copies a batch to a GPU, so that a thread can make the next batch meanwhile; None
                             on a CPU
    score(stop)              scores the held-out rows (with several processes, this process's share); returns
                             None if `stop()` becomes true
    make_step(step, number, stop)  plans the micro-batches of a step that is not fully planned, and returns
                             the step; returns None if `stop()` becomes true
    begin_step(step), end_step(number)   called before and after each step; `end_step` is called before
                             evaluation and checkpoint
    metrics()                returns other metrics of the loss since `begin_step`, for the log
    activate()               selects the learner's adapter, if other runs train adapters on the same base"""

    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[Any], Tensor]
    send: Callable[[Any], Any] | None = None
    score: Callable[[Stop], EvalResult | None] | None = None
    make_step: Callable[[Step, int, Stop], Step | None] = lambda step, number, stop: step
    begin_step: Callable[[Step], None] = _nothing
    end_step: Callable[[int], None] = _nothing
    metrics: Callable[[], MetricMeans] = MetricMeans
    activate: Callable[[], None] = _nothing

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


def sender(device: torch.device) -> Callable[[Any], Any] | None:
    """Return a `Learner.send` that calls `batch.sent(device)`, or None for a CPU."""
    return None if device.type == "cpu" else lambda batch: batch.sent(device)


@dataclass(frozen=True)
class TrainingPlan:
    """Settings that are fixed before step one.

    clip: maximum global norm of a gradient; None for no limit
    evaluate_at: the steps after which the held-out rows are scored (0: before the first step), in addition to
        the last step; None if there are no held-out rows
    patience: stop after this many consecutive evaluations without a new lowest loss; 0: never
    save_at: the steps after which a checkpoint is written
    seed: seeds the random generators of each micro-batch"""

    steps: Sequence[Step]
    schedule: Schedule
    clip: float | None = 1.0
    evaluate_at: Collection[int] | None = None
    patience: int = 0
    save_at: Collection[int] = ()
    seed: int = 0


@dataclass
class StopFlag:
    """A function that returns True once a signal has asked the run to stop.

    signal: number of the signal that was received, or 0."""

    signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0


@dataclass(frozen=True)
class StepResult:
    """The results of one process for a step.

    nlls: Σ NLL by index of the micro-batch. reached: indices of the parameters that got a gradient. means:
    other metrics of the loss. seconds: duration."""

    nlls: dict[int, float]
    reached: list[int]
    means: MetricMeans
    seconds: float


@dataclass(eq=False)
class Loop:
    """A run in progress.

    save: save(progress) writes a checkpoint
    devices: the processes that share the work; all have the same arguments and take the same steps, and each
        process computes the loss of its own micro-batches
    step: the next step, as far as it is planned
    due: whether a checkpoint is due before `step` runs"""

    learner: Learner
    plan: TrainingPlan
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    save: Callable[[Progress], Path] | None = None
    emit: Listener = silent
    devices: Devices = ALONE
    stop: StopFlag = field(default_factory=StopFlag)
    step: Step = Step(())
    due: bool = False
    prefetcher: Prefetcher | None = None
    rng: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Return the number of the next step, `step`."""
        return self.progress.step + 1

    @property
    def micros(self) -> list[Micro]:
        """Return the micro-batches of `step` that contain tokens that count in the loss."""
        return [micro for micro in self.step.micros if micro.trained]

    def seed(self, index: int) -> tuple[int | str, ...]:
        """Return the key with which `seed_all` seeds the generators for micro-batch `index`."""
        return self.plan.seed, self.number, index

    def batch(self, index: int, later: Sequence[int] = ()) -> Any:
        """Return the batch of micro-batch `index`.

        later: the micro-batches that this process runs after `index` in this step."""
        micros = self.micros
        if self.prefetcher is None:
            return micros[index].make()
        coming = [micros[i] for i in later]
        if not coming and self.number < len(self.plan.steps):
            following = [micro for micro in self.plan.steps[self.number].micros if micro.trained]
            coming = [following[i] for i, _ in self.deal(following)]
        return self.prefetcher.get(micros[index].make, coming[0].make if coming else None)

    def deal(self, micros: Sequence[Micro]) -> list[tuple[int, bool]]:
        """Return (index, whether its loss counts) for each micro-batch that this process runs, in order."""
        return self.devices.deal([micro.tokens for micro in micros])

    def result(self, nlls: Mapping[int, float], seconds: float, means: MetricMeans | None = None) -> StepResult:
        """Return this process's result of the step.

        nlls: Σ NLL of each micro-batch of this process, from `read_losses`."""
        parameters = self.learner.parameters.values()
        reached = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        return StepResult(dict(nlls), reached, self.metrics() if means is None else means, seconds)

    def metrics(self) -> MetricMeans:
        """Return a copy of the learner's current metrics. Metrics that are added later do not change the copy."""
        return MetricMeans.total([self.learner.metrics()])


Compute = Callable[[Sequence[Loop]], Mapping[Loop, "StepResult | VeneerError | None"]]
"""A function that computes the forward and backward passes of each loop's step.

An error ends only its own loop. If the result of any loop is None, a signal stopped the step, and all loops
drop the step.
"""


def train(
    loops: Sequence[Loop],
    compute: Compute | None = None,
    *,
    on_end: Callable[[Loop, VeneerError | None], None] | None = None,
) -> None:
    """Run each loop (usually one) from its current progress to its end, in lockstep.

    A checkpoint is written after the steps in `plan.save_at`, at each new lowest validation loss (if it is
    also lower than the loss at step 0), and at the end. If a checkpoint is due for one loop, all loops write a
    checkpoint, so that they can be resumed together.

    After the first Ctrl-C or SIGTERM, the current step is dropped, the random state from the start of the
    step is restored, the state is saved, and Interrupted is raised. A second signal kills the process. The
    state is also saved if sampling a step or scoring raises an error. If a loss or a gradient is not finite,
    TrainingError is raised with the step and the rows, before the optimizer step and without overwriting the
    previous checkpoint.

    on_end: called as on_end(loop, error) when a loop ends; `error` is None if the loop finished. The other
    loops continue. Without `on_end`, the error is raised."""
    active = list(loops)
    interrupted: list[Interrupted] = []

    def run(part: Callable[[Loop], None], loop: Loop) -> None:
        """Run one phase of a loop, and remove the loop if it ends."""
        error: VeneerError | None = None
        try:
            loop.learner.activate()
            part(loop)
            if not loop.progress.stopped:
                return
        except Interrupted as raised:
            interrupted.append(raised)
        except VeneerError as raised:
            if on_end is None:
                raise
            error = raised
        active.remove(loop)
        if on_end is not None and (error is not None or loop.progress.stopped):
            on_end(loop, error)

    with ExitStack() as stack:
        flag = stack.enter_context(stop_signals())
        for loop in loops:
            loop.stop = flag
            if loop.learner.send is not None:
                loop.prefetcher = stack.enter_context(Prefetcher(loop.learner.send))
        for loop in loops:
            run(_start, loop)
        while active:
            if any(loop.due for loop in active):
                for loop in list(active):
                    run(_save, loop)
            results = {loop: train_step(loop) for loop in active} if compute is None else compute(active)
            stopped = any(result is None for result in results.values())
            for loop in list(active):
                run(partial(_advance, result=None if stopped else results.get(loop)), loop)
    if interrupted and len(loops) == 1:
        raise interrupted[0]
    if interrupted:
        saved = f"stopped; the state of {counted(len(interrupted), 'run')} is saved"
        raise Interrupted(saved, fix=interrupted[0].fix, signal=interrupted[0].signal)


def train_step(loop: Loop) -> StepResult | None:
    """Run this process's forward and backward passes of a step. Return None after a signal."""
    began, learner = time.perf_counter(), loop.learner
    if not begin_step(loop):
        return None
    micros = loop.micros
    parts: dict[int, Tensor] = {}
    means: MetricMeans | None = None
    stopped = loop.stop()
    dealt = loop.deal(micros)
    for position, (index, counts) in enumerate(dealt):
        stopped = stopped or loop.stop()
        if stopped and not loop.devices.lockstep:
            return None
        if not counts and means is None:
            # Copy the metrics here: all remaining micro-batches have losses that do not count.
            means = loop.metrics()
        seed_all(*loop.seed(index))
        with shared(), memory_errors(micros[index]):
            nll = learner.loss(loop.batch(index, [later for later, _ in dealt[position + 1 :]]))
            (nll / loop.step.divisor if counts else nll * 0.0).backward()  # type: ignore[no-untyped-call]
        if counts:
            parts[index] = nll.detach()
    if stopped:
        return None
    losses = read_losses(parts)
    return loop.result(losses, time.perf_counter() - began, means)


def begin_step(loop: Loop) -> bool:
    """Prepare a step for its first forward pass. Return False if a signal interrupted the preparation."""
    loop.optimizer.zero_grad(set_to_none=True)
    with _save_on_error(loop):
        step = loop.learner.make_step(loop.step, loop.number, loop.stop)
    if step is None:
        return False
    loop.step = step
    loop.learner.begin_step(step)
    return True


def read_losses(nlls: Mapping[int, Tensor]) -> dict[int, float]:
    """Return the losses as numbers.

    This waits for the device, so measure the step's duration afterwards."""
    values = torch.stack(list(nlls.values())).tolist() if nlls else []
    return dict(zip(nlls, values, strict=True))


def _start(loop: Loop) -> None:
    """Evaluate if due, and plan the first step."""
    _evaluate_if_due(loop)
    _plan_next_step(loop)


def _plan_next_step(loop: Loop) -> None:
    """Set the loop's next step. After the last step, save the state and end the loop."""
    progress = loop.progress
    if progress.step >= len(loop.plan.steps) and not progress.stopped:
        progress.stopped = "finished"
    if progress.stopped:
        _save(loop)
        loop.emit(Stopped(progress.step, progress.stopped))
        return
    loop.step, loop.rng = loop.plan.steps[progress.step], rng_state()
    if loop.step.trained == 0:
        text = f"step {loop.number} has no trained tokens"
        raise TrainingError(text, where=f"rows {first_few(loop.step.rows, _SHOWN)}")


def _advance(loop: Loop, result: StepResult | VeneerError | None) -> None:
    """Finish a step: update the weights, evaluate if due, and plan the next step."""
    if isinstance(result, VeneerError):
        raise result
    _apply(loop, result)
    improved = _evaluate_if_due(loop)
    plan, progress = loop.plan, loop.progress
    if plan.patience and progress.waited >= plan.patience and progress.step < len(plan.steps):
        progress.stopped = "early stopping"
    loop.due = improved or progress.step in plan.save_at
    _plan_next_step(loop)


def _apply(loop: Loop, result: StepResult | None) -> None:
    """Update the weights with the step's gradients. Raise Interrupted after a signal."""
    progress, number, began = loop.progress, loop.number, time.perf_counter()
    results = loop.devices.gather(result)
    done = [share for share in results if share is not None]
    if len(done) < len(results):
        loop.optimizer.zero_grad(set_to_none=True)
        rng_restore(loop.rng)
        _stop(loop)
    step, micros, parameters = loop.step, loop.micros, list(loop.learner.parameters.values())
    loop.devices.add_gradients(parameters, sorted(set().union(*(share.reached for share in done))))
    rate = loop.plan.schedule.apply(loop.optimizer, number)
    norm = float(nn.utils.clip_grad_norm_(parameters, loop.plan.clip or math.inf))
    losses = {index: nll for share in done for index, nll in share.nlls.items()}
    nlls = [losses[index] for index in range(len(micros))]
    _check_finite(number, nlls, norm, micros, progress)
    loop.optimizer.step()
    total, seconds = sum(nlls), time.perf_counter() - began + (0.0 if result is None else result.seconds)
    progress.step = number
    progress.tokens += step.tokens
    progress.trained_tokens += step.trained
    progress.seconds += seconds
    progress.recent = [*progress.recent, (total, step.divisor)][-_RECENT:]
    stepped = Stepped(
        step=number,
        steps=len(loop.plan.steps),
        epoch=step.epoch,
        loss=total / step.divisor,
        learning_rate=rate,
        gradient_norm=norm,
        tokens=step.tokens,
        learned_tokens=step.trained,
        seconds=seconds,
        memory_bytes=peak_memory_bytes(loop.learner.device),
        extra=MetricMeans.total([share.means for share in done]).values(),
    )
    loop.emit(stepped)
    loop.learner.end_step(number)


def _check_finite(number: int, nlls: list[float], norm: float, micros: list[Micro], progress: Progress) -> None:
    bad = [micro for nll, micro in zip(nlls, micros, strict=True) if not math.isfinite(nll)]
    if bad or not math.isfinite(norm):
        rows = tuple(row for micro in (bad or micros) for row in micro.rows)
        text = f"the {'loss' if bad else 'gradient'} of step {number} is not finite"
        fix = "check these rows; decrease optimizer.learning_rate, or increase schedule.warmup. "
        fix += f"Steps 1 to {progress.step} were valid; no later state was saved"
        raise TrainingError(text, where=f"rows {first_few(rows, _SHOWN)}", fix=fix)


def _evaluate_if_due(loop: Loop) -> bool:
    """Score the held-out rows if due. Return True if the loss is a new lowest loss."""
    progress = loop.progress
    due = loop.plan.evaluate_at
    if due is None or loop.learner.score is None or progress.evaluated == progress.step or progress.stopped:
        return False
    if progress.step != len(loop.plan.steps) and progress.step not in due:
        return False
    began = time.perf_counter()
    # In lockstep, a process cannot stop while others are scoring, so the next step handles the signal.
    with shared(), _save_on_error(loop):
        own_score = loop.learner.score((lambda: False) if loop.devices.lockstep else loop.stop)
    scores = loop.devices.gather(own_score)
    results = [score for score in scores if score is not None]
    if len(results) < len(scores):
        _stop(loop)
        return False
    score = EvalResult.total(results)
    if not math.isfinite(score.loss):
        fix = "decrease optimizer.learning_rate, or check the validation rows; no later state was saved"
        raise TrainingError(f"the validation loss after step {progress.step} is not finite", fix=fix)
    # The best loss must also be lower than the initial loss.
    if progress.step == 0:
        progress.first_loss = score.loss
    to_beat = [loss for loss in (progress.first_loss, progress.best_loss) if loss is not None]
    improved = progress.step > 0 and score.loss < min(to_beat, default=math.inf)
    progress.evaluated, progress.last_loss = progress.step, score.loss
    if improved:
        progress.best_step, progress.best_loss, progress.waited = progress.step, score.loss, 0
    elif progress.step > 0:
        progress.waited += 1
    evaluated = Evaluated(
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
    loop.emit(evaluated)
    return improved


def _save(loop: Loop) -> None:
    if loop.save is not None:
        loop.emit(Saved(loop.progress.step, str(loop.save(loop.progress))))


@contextmanager
def _save_on_error(loop: Loop) -> Iterator[None]:
    """Save the state if the code inside the context raises an error.

    Use this for code that changes no weights but can depend on another server (a judge or a teacher), so that
    no progress is lost if that server fails."""
    previous_rng = rng_state()
    try:
        yield
    except VeneerError:
        # With several processes, saving needs all of them, and one has failed. Before step 1, there is nothing
        # to save.
        if loop.devices.count == 1 and loop.save is not None and loop.progress.step:
            rng_restore(previous_rng)
            _save(loop)
            loop.emit(Note(f"the state after step {loop.progress.step} is saved: --resume continues from it"))
        raise


def _stop(loop: Loop) -> None:
    """Save the state after the last complete step, and raise Interrupted."""
    _save(loop)
    loop.emit(Stopped(loop.progress.step, "interrupted"))
    received_signal = max(loop.devices.gather(loop.stop.signal))  # a signal can reach only some of the processes
    end = "the state is saved" if loop.save is not None else "the state is not saved"
    where = f"stopped after step {loop.progress.step} of {len(loop.plan.steps)}"
    raise Interrupted(f"{where}; {end}", signal=received_signal or signal.SIGINT)


def probe(learner: Learner, micros: Iterable[Micro], on_event: Listener) -> Probed:
    """Run the longest micro-batch once, so that a lack of memory is found before training.

    Runs forward and backward without an optimizer step, drops the gradients and restores the random state.
    Raises ResourceError if there is not enough memory; PreflightError if the loss is not finite or no
    parameter gets a gradient."""
    longest = max(micros, key=lambda m: (m.tokens if m.size is None else m.size, m.trained))
    previous_rng, began = rng_state(), time.perf_counter()
    try:
        with shared(), memory_errors(longest):
            value = learner.loss(longest.make())
            if not math.isfinite(value.item()):
                text = f"the loss of the longest batch is {value.item()} before any training"
                fix = "check these rows, or load the base in float32 (base.dtype=float32)"
                raise PreflightError(text, where=f"rows {first_few(longest.rows, _SHOWN)}", fix=fix)
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        reached = [p for p in learner.parameters.values() if p.grad is not None and bool((p.grad != 0).any())]
        if not reached:
            text = "no gradient reaches the adapter: training would change nothing"
            where = f"{len(learner.parameters)} trained tensors"
            raise PreflightError(text, where=where, fix="check adapter.targets and that the data has trained tokens")
    finally:
        for parameter in learner.parameters.values():
            parameter.grad = None
        rng_restore(previous_rng)
    event = Probed(longest.tokens, tuple(longest.rows), time.perf_counter() - began, peak_memory_bytes(learner.device))
    on_event(event)
    return event


@contextmanager
def memory_errors(micro: Micro) -> Iterator[None]:
    """Convert torch's out-of-memory errors to a ResourceError that names the batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        text = f"out of memory on a batch of {micro.tokens} {micro.unit}"
        fix = f"lower {_LENGTHS[micro.unit]} or batching.micro_rows, or set memory.activation_checkpointing=on"
        raise ResourceError(text, where=f"rows {first_few(micro.rows, _SHOWN)}", fix=fix) from error


def peak_memory_bytes(device: torch.device) -> int:
    """Return this process's peak memory on `device` in bytes, since `forget_peaks`.

    For a CUDA device, this is the memory that torch allocated; for any other device, the resident memory."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident()


def forget_peaks() -> None:
    """Reset the peaks to the current memory, so that the next run measures its own."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    reset_peak_resident()


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Yield a flag that the first SIGINT or SIGTERM sets. The second signal has its usual effect."""
    flag = StopFlag()
    with signal_handler(partial(setattr, flag, "signal"), signal.SIGINT, signal.SIGTERM, once=True):
        yield flag
