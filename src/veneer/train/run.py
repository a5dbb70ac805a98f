"""Run a training task, from an empty folder to a verified adapter and its report.

    with opened(config, unit="tokens", …) as run:        processes, listeners; restores global state at the end
        …                                                read data, check, attach: train/text/task, train/image/task
        result = carry_out(run, task, report, newest)    train → save → verify → report

A `Task` has the functions that differ between tasks; tests/train/test_run.py has a small one. This module
uses configurations, parameters and steps, but does not depend on rows, images, or the kind of base.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from veneer.errors import CheckpointError, ConfigError, Interrupted, NoGain, counted
from veneer.files.locks import POSIX, take_lock
from veneer.models.sources import find_base
from veneer.train import checkpoint
from veneer.train.checkpoint import Progress
from veneer.train.config.load import RunConfig
from veneer.train.config.text import config_keys, default_source
from veneer.train.devices import Devices, digest_of, joined
from veneer.train.events import Checked, Event, Listener, Note, Resolved, fan_out, silent, validation_text
from veneer.train.loop import Learner, Loop, Step, TrainingPlan, forget_peaks, peak_memory_bytes, probe, train
from veneer.train.optim import Schedule, make_optimizer
from veneer.train.preflight import Report
from veneer.train.report.log import ConsoleView, JsonLog
from veneer.train.report.page import Page
from veneer.train.report.trackers import check_trackers, tracked
from veneer.train.save import Outcome, write_report

NAME = "run"
"""Name of the adapter on the base during training."""


@dataclass(frozen=True)
class Run:
    """A training run, with its configuration, folder and processes.

    emit: the listener
    early: events before the log was opened
    devices: the processes of the run; the first process writes and reports
    sources: setting -> its origin
    resume, allow_other_machine, dry_run, force: as in `run_text`
    group: names of all unfinished runs that are trained together, including this run; empty for a single
        run"""

    config: RunConfig
    folder: Path
    devices: Devices
    emit: Listener
    early: list[Event]
    sources: Mapping[str, Any] | None = None
    resume: bool = False
    allow_other_machine: bool = False
    dry_run: bool = False
    force: bool = False
    group: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.folder)

    def note(self, text: str) -> None:
        self.emit(Note(text))

    def fetch(self, base: str) -> None:
        """Download the base's missing files in one process, before any process loads it."""
        if self.devices.count > 1 and self.devices.local == 0:
            find_base(base, say=self.note)
        self.devices.gather(None)

    def emit_checks(self, report: Report, decided: Iterable[tuple[str, Any, str]]) -> None:
        """Emit the settings and the preflight's findings. `decided`: as in `resolved`."""
        self.emit(resolved(self.config, self.sources, decided))
        self.emit(Checked(report.text(), report.to_dict()))


_R = TypeVar("_R", bound=Outcome)
"""The result type of a task."""


def _nothing(*args: Any) -> None:
    """Do nothing. This function is the default of a task's optional functions."""


@dataclass(frozen=True, kw_only=True)
class Task(Generic[_R]):
    """A learner attached to its base, the steps to train, and the functions that the run calls.

    - steps, ends: all steps of the run, in order, and the numbers of the steps that end an epoch
    - result(outcome, progress): adds the counts of this kind of task to the outcome
    - save(result, progress, emit): writes the adapter with its card; returns the result with the files
      written
    - write(folder, progress): writes the current adapter, with its card, into a new folder
      (checkpoint.adapters)
    - prove(): reads the saved adapter and compares it with the trained adapter; returns a sentence or raises
      AdapterError
    - report(result, progress): the task's own parts of the report page
    - check(): raises PreflightError if the base is unusable for the data
    - begin(progress, emit): called before the loop (also on a dry run)
    - extra_state(step), restore(state): return and restore additional checkpoint contents, as JSON values
    - state: the tensors of a checkpoint, if there are more than the parameters (moving averages)
    - identity: values that must be unchanged when the run is resumed, in addition to the settings, which the
      preflight compares
    - environment: values that must be unchanged for a resumed run to be equal bit for bit, in addition to
      those of every run (`checkpoint`)
    - rates: prefix of parameter names -> a separate learning rate
    - rewarded: whether the held-out loss is the negative of a mean reward

    Only the first process calls `save` and `write`."""

    learner: Learner
    steps: Sequence[Step]
    ends: Sequence[int]
    result: Callable[[Outcome, Progress], _R]
    save: Callable[[_R, Progress, Listener], _R]
    prove: Callable[[], str]
    write: Callable[[Path, Progress], None] = _nothing
    report: Callable[[_R, Progress], Page] = lambda result, progress: Page()
    check: Callable[[], None] = _nothing
    begin: Callable[[Progress, Listener], None] = _nothing
    extra_state: Callable[[int], dict[str, Any]] = lambda step: {}
    restore: Callable[[Mapping[str, Any]], None] = _nothing
    state: Mapping[str, Tensor] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    rewarded: bool = False

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of a checkpoint."""
        return self.learner.parameters if self.state is None else self.state


@contextmanager
def opened(
    config: RunConfig, *, unit: str, on_event: Listener | None, lockstep: bool = False, **options: Any
) -> Iterator[Run]:
    """Yield a run with its processes, listeners and random generators set up.

    Random generators are restored at the end, even after an error. Without `on_event`, the run is shown in
    the terminal, with its speed in `unit`s per second. If the run is interrupted, the error says how to
    resume.

    A resumed run uses the profile of its checkpoint (`checkpoint.machine_of`, which raises CheckpointError).

    lockstep: as in Devices. options: further fields of the Run."""
    check_trackers(config.report)
    folder = Path(config.output.directory)
    with joined(config.base.device, lockstep=lockstep) as devices:
        listener = on_event if devices.first else silent
        view = ConsoleView(unit=unit) if listener is None else None
        early: list[Event] = []
        random_before = checkpoint.rng_state()
        forget_peaks()
        try:
            run = Run(config, folder, devices, fan_out(view or listener, early.append), early, **options)
            newest = checkpoint.latest(folder / "checkpoints") if run.resume else None
            with ExitStack() as stack:
                if newest is not None:
                    allow = run.allow_other_machine
                    stack.enter_context(checkpoint.machine_of(newest, allow_other=allow, note=run.note))
                yield run
        except Interrupted as error:
            fix = "run the same command with --resume (in Python: resume=True)"
            raise Interrupted(error.what, where=str(folder / "checkpoints"), fix=fix, signal=error.signal) from None
        finally:
            if view is not None:
                view.close()
            checkpoint.rng_restore(random_before)


def newest_checkpoint(run: Run) -> Path | None:
    """Return the checkpoint to resume from. If none exists, emit a note and return None."""
    newest = checkpoint.latest(run.folder / "checkpoints") if run.resume else None
    if run.resume and newest is None:
        run.note(f"there is no checkpoint in {run.folder}: the run starts from its beginning")
    return newest


def recipe_of(newest: Path | None) -> Mapping[str, Any] | None:
    """Return the recipe of the run that wrote a checkpoint."""
    return None if newest is None else checkpoint.read_checkpoint(newest).get("about", {}).get("recipe")


def raise_if_stopped(run: Run, report: Report) -> None:
    """Raise PreflightError if a finding stops the run, after all processes have finished their checks."""
    report.raise_if_stopped()
    run.devices.gather(None)


def carry_out(run: Run, task: Task[_R], report: Report, newest: Path | None) -> _R:
    """Train from the checkpoint `newest` (or from the beginning), save and report.

    A dry run ends before the first step."""
    if run.dry_run:
        return dry_outcome(run, task, report)
    with started(run, task, newest) as loop:
        train([loop])
        return finished(run, task, report, loop)


def dry_outcome(run: Run, task: Task[_R], report: Report) -> _R:
    """Return the result of a dry run, which runs the largest micro-batch and writes no file."""
    task.check()
    _probe(run, task)
    steps = task.steps
    counts = [(step.tokens, step.trained) for step in steps]
    planned = Progress(len(steps), tokens=sum(n for n, _ in counts), trained_tokens=sum(n for _, n in counts))
    task.begin(planned, run.emit)
    peak = peak_memory_bytes(task.learner.device)
    outcome = Outcome(steps=len(steps), peak_memory_bytes=peak, dry_run=True, preflight=report.to_dict())
    return task.result(outcome, planned)


@contextmanager
def started(run: Run, task: Task[Any], newest: Path | None) -> Iterator[Loop]:
    """Yield the loop of a run, with an open log.

    The loop starts at the checkpoint `newest`, or at the beginning."""
    config, devices = run.config, run.devices
    o, e, total = config.optimizer, config.evaluation, len(task.steps)
    task.check()
    settings = o.model_dump(exclude={"clip", "text_learning_rate"})
    optimizer = make_optimizer(task.learner.parameters, **settings, rates=task.rates)
    identity = {**task.identity, "seed": config.seed, "steps": total}
    progress = _restored(run, task, optimizer, identity, newest) if newest is not None else Progress()
    devices.agree("settings, data and base", digest_of({}, config.recipe(), identity, progress.step))
    devices.agree("adapter", digest_of(task.tensors) if devices.count > 1 else "")
    _probe(run, task)
    plan = TrainingPlan(
        task.steps,
        Schedule.create(config.schedule.name, total, config.schedule.warmup, config.schedule.floor),
        o.clip,
        due(e.every, task.ends, total, start=e.at_start) if task.learner.score is not None else None,
        e.patience or 0,
        due(config.checkpoint.every, task.ends, total, start=False),
        config.seed,
    )

    def save(progress: Progress) -> Path:
        """Write the checkpoint of `progress`. Its tensors are equal on all devices."""
        devices.agree("adapter", digest_of(task.tensors) if devices.count > 1 else "")
        folder = run.folder / "checkpoints"
        own_checkpoint = progress.stopped or progress.step in plan.save_at or progress.step == progress.best_step
        if devices.first:
            checkpoint.save(
                folder,
                parameters=task.tensors,
                optimizer=optimizer,
                progress=progress,
                identity=identity,
                keep=config.checkpoint.keep,
                newest=2 if run.group else 1,
                shared=bool(run.group) and not own_checkpoint,
                devices=devices.count,
                metadata={"recipe": config.recipe(), "together": [*run.group], "kept": task.extra_state(progress.step)},
                conditions=task.environment,
                fill=(lambda folder: task.write(folder / "adapter", progress)) if config.checkpoint.adapters else None,
            )
        devices.gather(None)
        return checkpoint.at_step(folder, progress.step)

    with _logged(run, progress if newest is not None else None) as emit:
        task.begin(progress, emit)
        yield Loop(task.learner, plan, optimizer, progress, save, emit, devices)


def finished(run: Run, task: Task[_R], report: Report, loop: Loop) -> _R:
    """Restore the state to keep, save the adapter, verify the file, and write the report."""
    devices, progress, emit = run.devices, loop.progress, loop.emit
    kept_step, validation = _restore_best(run, task, progress, emit)
    outcome = Outcome(
        steps=progress.step,
        peak_memory_bytes=peak_memory_bytes(task.learner.device),
        loss=progress.loss,
        validation=validation,
        validation_before=progress.first_loss,
        kept_step=kept_step,
        stopped=progress.stopped,
        preflight=report.to_dict(),
    )
    result = task.result(outcome, progress)
    if devices.first:
        result = task.save(result, progress, emit)
    result = devices.gather(result)[0]
    if devices.first or devices.lockstep:
        emit(Note(task.prove()))
    if devices.first:
        page = write_report(run.folder, result, task.report(result, progress))
        result = replace(result, report=str(page))
    return devices.gather(result)[0]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _probe(run: Run, task: Task[Any]) -> None:
    """Run the largest micro-batch, forward and backward, before anything is written."""
    probe(task.learner, (micro for step in task.steps for micro in step.micros), run.emit)


def _restored(run: Run, task: Task[Any], optimizer: Optimizer, identity: Mapping[str, Any], newest: Path) -> Progress:
    restored = checkpoint.restore(
        newest,
        parameters=task.tensors,
        optimizer=optimizer,
        identity=identity,
        devices=run.devices.count,
        conditions=task.environment,
    )
    task.restore(restored.metadata.get("kept", {}))
    run.note(f"resuming after step {restored.progress.step} of {len(task.steps)}")
    missing = {*restored.metadata.get("together", [])} - {*run.group, run.name}
    for note in restored.notes:
        run.note(note)
    if missing:
        runs = counted(len(missing), "other run")
        run.note(f"trained together with {runs} up to this step: results can differ in the last bits")
    return restored.progress


@contextmanager
def _logged(run: Run, resumed: Progress | None) -> Iterator[Listener]:
    """Yield a listener that emits to the run's listener, the log and the trackers.

    The first process creates the output folder and the log."""
    with ExitStack() as open_now:
        log = trackers = None
        if run.devices.first:
            run.folder.mkdir(parents=True, exist_ok=True)
            open_now.enter_context(_folder_lock(run.folder))
            log = JsonLog(run.folder / "log.jsonl", resumed)
            open_now.callback(log.close)
            for event in run.early:
                log(event)
            settings = next(e for e in run.early if isinstance(e, Resolved))
            tracking = tracked(run.config.report, run.folder, settings, resumed is not None, fan_out(run.emit, log))
            trackers = open_now.enter_context(tracking)
        run.devices.gather(None)
        if not run.folder.is_dir():
            text = "a process of this run cannot see the output folder that the first process created"
            fix = "give an output.directory on a file system that all machines share"
            raise ConfigError(text, where=str(run.folder), fix=fix)
        yield fan_out(run.emit, log, trackers)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder inside the context.

    Raises CheckpointError if another run is writing to the folder."""
    if not POSIX:  # folders cannot be opened on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor)
    except BlockingIOError as error:
        os.close(descriptor)
        fix = "wait for the other run to end, or stop it; or set another output.directory for this run"
        raise CheckpointError("another run is writing into this folder", where=str(folder), fix=fix) from error
    except OSError:
        pass  # the file system does not support locks
    try:
        yield
    finally:
        os.close(descriptor)


def _restore_best(run: Run, task: Task[Any], progress: Progress, emit: Listener) -> tuple[int, float | None]:
    """Restore the state that `evaluation.keep` selects. Return the state's step and validation loss.

    Raises NoGain if no evaluated state is better than the initial state."""
    best, first, last = progress.best_step, progress.first_loss, progress.last_loss
    worse = ""
    if first is not None and last is not None and last > first:
        first_text = validation_text(first, task.rewarded).rpartition(" ")[2]
        worse = f"{validation_text(last, task.rewarded)} after step {progress.step}, {first_text} before training"
    if run.config.evaluation.keep == "last":
        if worse:
            emit(Note(f"warning: {worse}"))
        return progress.step, last
    if best is None and worse:
        rate = run.config.optimizer.learning_rate
        text = f"training did not improve the validation {'reward' if task.rewarded else 'loss'}: {worse}"
        fix = f"lower optimizer.learning_rate ({rate:g} here), or check the data; to keep the last adapter anyway, add "
        fix += "--resume evaluation.keep=last"
        raise NoGain(text, where=str(run.folder), fix=fix)
    if best is None or best == progress.step:
        return progress.step, last
    checkpoint.read_parameters(checkpoint.at_step(run.folder / "checkpoints", best), task.tensors)
    score = validation_text(progress.best_loss or 0.0, task.rewarded)
    emit(Note(f"kept the adapter of step {best}, whose {score} is the {'highest' if task.rewarded else 'lowest'}"))
    return best, progress.best_loss


def due(every: int | str, ends: Sequence[int], steps: int, *, start: bool) -> set[int]:
    """Return the steps after which an event is due: each `every`-th step, or the end of each epoch.

    start: include step 0."""
    after = set(ends) if every == "epoch" else set(range(int(every), steps + 1, int(every)))
    return after | {0} if start else after


def resolved(config: RunConfig, sources: Mapping[str, Any] | None, decided: Iterable[tuple[str, Any, str]]) -> Resolved:
    """Return every setting with its value in this run and its origin.

    decided: (key, value, why) of each setting that was `auto` or unset and has been given a value."""
    dump = config.model_dump(mode="json")
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, key in config_keys(type(config)):
        section, _, short_name = name.rpartition(".")
        value = settings[name] = dump[section][short_name] if section else dump[short_name]
        plain = list(key.default) if isinstance(key.default, tuple) else key.default
        origin = "given" if key.is_required() or value != plain else default_source(key)
        origins[name] = sources[name] if sources and name in sources else origin
    for name, value, because in decided:
        settings[name] = value
        origins[name] = f"{origins[name].split(' (')[0]} → {because}"
    return Resolved(settings, origins)
