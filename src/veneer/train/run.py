"""A run, whatever it trains: what all tasks have in common, from an empty folder to a proven adapter and its report.

    with opened(config, unit="tokens", …) as run:            who takes part, who is told, everything back at the end
        result = carry_out(run, TextTask(config, base))      read → check → attach → train → save → prove → report

A `Task` brings what differs: its data, its checks, its loss and score, the file it writes. `train.text.task`,
`train.image.task` and `train.image.slider` (made of the second) are those that there are; tests/train/test_run.py has
one in a few lines. Knows configurations, parameters and steps; no rows, no pictures, no bases by kind.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from veneer.errors import CheckpointError, ConfigError, Interrupted, NoGain, counted
from veneer.files.locks import take_lock
from veneer.models.sources import find_base
from veneer.train import checkpoint, loop
from veneer.train.checkpoint import Progress
from veneer.train.config.load import RunConfig
from veneer.train.config.text import config_keys, why
from veneer.train.devices import Devices, digest_of, joined
from veneer.train.events import Checked, Event, Listener, Note, Resolved, fan_out, silent, validation_text
from veneer.train.loop import Learner, Step, Stepping, StopAsked, TrainingPlan, by_itself
from veneer.train.optim import Schedule, make_optimizer
from veneer.train.preflight import Report
from veneer.train.report.log import ConsoleView, JsonLog
from veneer.train.report.trackers import check_trackers, tracked
from veneer.train.save import Outcome, ReportParts, was_predicted, write_report

NAME = "run"
"""The adapter's name on the base while it trains."""


@dataclass(frozen=True)
class Run:
    """A run from its first second on. `tell`: whoever listens; `early`: what was told before there was a log to write
    it to. `devices`: the processes that share it, of which the first writes and speaks. `sources`: setting -> where it
    came from. `resume`, `dry_run`, `force`: as `train_text` has them. `group`: what the runs are called that are
    trained in one pass with it and have not ended, itself among them; none where it is alone. `name`: what it is called
    there, where its output folder may be moved between two processes that train it."""

    config: RunConfig
    folder: Path
    devices: Devices
    tell: Listener
    early: list[Event]
    sources: Mapping[str, Any] | None = None
    resume: bool = False
    dry_run: bool = False
    force: bool = False
    group: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def called(self) -> str:
        return self.name or str(self.folder)

    def note(self, text: str) -> None:
        self.tell(Note(text))

    def fetch(self, base: str) -> None:
        """The base's files on this machine before anybody loads them: one process of it fetches what is missing."""
        if self.devices.count > 1 and self.devices.local == 0:
            find_base(base, say=self.note)
        self.devices.gather(None)

    def say(self, report: Report, settled: Iterable[tuple[str, Any, str]]) -> None:
        """Tells the settings and the preflight's findings. `settled`: as `resolved` takes it."""
        self.tell(resolved(self.config, self.sources, settled))
        self.tell(Checked(report.text(), report.to_dict(), report.markup()))


D = TypeVar("D")
"""What a task reads."""
_R = TypeVar("_R", bound=Outcome)
"""What a run on it comes to."""


class AttachedTask(Learner, Protocol[_R]):
    """A task whose adapter is on the base, trainable: what the loop trains, and what comes after it.

    `steps`: all of the run, in order. `ends`: the numbers of those that end an epoch."""

    steps: Sequence[Step]
    ends: Sequence[int]

    @property
    def scored(self) -> bool:
        """Whether there are held-out data to score."""
        return False

    @property
    def rewarded(self) -> bool:
        """Whether the held-out loss is minus a mean reward."""
        return False

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds of it: the parameters, and what goes with them (moving averages)."""
        return self.parameters

    @property
    def rates(self) -> Mapping[str, float]:
        """Start of a parameter's name -> a learning rate of its own."""
        return {}

    def kept(self, step: int) -> dict[str, Any]:
        """What else a checkpoint of `step` holds of it, as JSON values."""
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Goes on from what `kept` was."""
        return

    def identity(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, beside the settings, which the preflight compares."""
        return {}

    @property
    def environment(self) -> dict[str, Any]:
        """What bit-for-bit equality depends on beside that, and beside what every run's does (`checkpoint`)."""
        return {}

    def act(self) -> None:
        """Called before anything of it runs, where others are on the same base: its adapter acts from now on."""
        return

    def begin(self, progress: Progress, tell: Listener) -> None:
        """Called once before the loop, on a dry run too; `tell` reaches the log."""
        return

    def end(self, tell: Listener) -> None:
        """Called once after the last step, before anything is saved; `tell` reaches the log."""
        return

    @abstractmethod
    def facts(self, outcome: Outcome, progress: Progress) -> _R:
        """`outcome` with what this kind of task counts."""

    def write(self, folder: Path, progress: Progress) -> None:
        """Writes the adapter as it is now, with its card, into `folder`, which is made. The first process alone is
        asked."""
        raise NotImplementedError

    @abstractmethod
    def save(self, result: _R, progress: Progress, tell: Listener) -> _R:
        """Writes the adapter with its card; `result` with what was written. The first process alone is asked."""

    @abstractmethod
    def prove(self) -> str:
        """Reads what was saved and compares it with what was trained; the finding as a sentence. Raises AdapterError
        where they are not the same."""

    def report(self, result: _R, progress: Progress) -> ReportParts:
        """What the page beside the adapter has of its own."""
        return ReportParts()


class Task(Protocol[D, _R]):
    """What is trained, before it is on the base. The three are called in this order, each with what came before."""

    @abstractmethod
    def read(self, run: Run) -> D:
        """The data, as the steps will need them. Raises DataError."""

    @abstractmethod
    def check(self, run: Run, data: D, previous: Mapping[str, Any] | None) -> Report:
        """What can be seen before anything is changed or written. `previous`: recipe of the run that is resumed. Tells
        it (`Run.say`) when it is complete, or when it stops the run."""

    @abstractmethod
    def attach(self, run: Run, data: D, report: Report) -> AbstractContextManager[AttachedTask[_R]]:
        """The adapter on the base, selected and trainable; all undone at the end. What can only be checked now is added
        to the `report`, which is then told here."""


@contextmanager
def opened(
    config: RunConfig, *, unit: str, on_event: Listener | None, lockstep: bool = False, **options: Any
) -> Iterator[Run]:
    """Around a whole run: its processes, who is told what happens, and random generators as before at the end, after
    any error too. Without `on_event` the run is shown in the terminal, speed in `unit`s a second. An interruption says
    how to go on. `lockstep`: as Devices has it; `options`: sources, resume, dry_run and force of the Run."""
    check_trackers(config.report)
    folder = Path(config.output.directory)
    with joined(config.base.device, lockstep=lockstep) as devices:
        listener = on_event if devices.first else silent
        view = ConsoleView(unit=unit) if listener is None else None
        early: list[Event] = []
        random_before = checkpoint.rng_state()
        loop.forget_peaks()
        try:
            yield Run(config, folder, devices, fan_out(view or listener, early.append), early, **options)
        except Interrupted as error:
            fix = "go on with the same command and --resume (in Python: resume=True)"
            raise Interrupted(error.what, where=str(folder / "checkpoints"), fix=fix, signal=error.signal) from None
        finally:
            if view is not None:
                view.close()
            checkpoint.rng_restore(random_before)


def carry_out(run: Run, task: Task[D, _R]) -> _R:
    """The whole run, from reading to the report; a dry run ends before the first step.

    Raises PreflightError before step one for what would go wrong, and what reading, training and saving raise."""
    newest = _newest_checkpoint(run)
    data, report = checked_data(run, task, newest)
    with task.attach(run, data, report) as attached:
        return (
            dry_outcome(run, attached, report)
            if run.dry_run
            else by_itself(steps_of_run(run, attached, report, newest))
        )


def checked_data(run: Run, task: Task[D, _R], newest: Path | None) -> tuple[D, Report]:
    """What is trained on, read, and all that can be seen before anything is changed. `newest`: the checkpoint that the
    run goes on from. Raises DataError, and PreflightError for what would go wrong."""
    data = task.read(run)
    previous = checkpoint.read_checkpoint(newest).get("about", {}).get("recipe") if newest is not None else None
    report = task.check(run, data, previous)
    report.raise_if_stopped()
    run.devices.gather(None)  # nobody writes before everybody has looked
    return data, report


def _newest_checkpoint(run: Run) -> Path | None:
    """Where a run that is to be resumed goes on; None, which is said, where there is nothing to go on from."""
    newest = checkpoint.latest(run.folder / "checkpoints") if run.resume else None
    if run.resume and newest is None:
        run.note(f"there is no checkpoint in {run.folder}: the run starts from its beginning")
    return newest


def dry_outcome(run: Run, task: AttachedTask[_R], report: Report) -> _R:
    """What a dry run comes to: the largest micro-batch is tried, and no file is written."""
    _probe(run, task)
    steps = task.steps
    counts = [(step.tokens, step.trained) for step in steps]
    planned = Progress(len(steps), tokens=sum(n for n, _ in counts), trained_tokens=sum(n for _, n in counts))
    task.begin(planned, run.tell)
    outcome = Outcome(
        steps=len(steps),
        peak_memory_bytes=loop.peak_memory_bytes(loop.device_of(task)),
        dry_run=True,
        preflight=report.to_dict(),
    )
    return task.facts(outcome, planned)


def steps_of_run(
    run: Run, task: AttachedTask[_R], report: Report, newest: Path | None, asked: StopAsked | None = None
) -> Stepping[_R]:
    """The loop from the checkpoint `newest` (or the beginning), then the adapter, its proof and the report. Asks for
    each step; `asked`: as `stepping` has it."""
    config, devices = run.config, run.devices
    o, e, total = config.optimizer, config.evaluation, len(task.steps)
    optimizer = make_optimizer(
        task.parameters,
        name=o.name,
        learning_rate=o.learning_rate,
        betas=o.betas,
        eps=o.eps,
        momentum=o.momentum,
        weight_decay=o.weight_decay,
        loraplus_ratio=o.loraplus_ratio,
        rates=task.rates,
    )
    identity = {**task.identity(), "seed": config.seed, "steps": total}
    progress = _restored(run, task, optimizer, identity, newest) if newest is not None else Progress()
    devices.agree("settings, data and base", digest_of({}, config.recipe(), identity, progress.step))
    _agree(run, task)
    _probe(run, task)
    plan = TrainingPlan(
        task.steps,
        Schedule.of(config.schedule.name, total, config.schedule.warmup, config.schedule.floor),
        o.clip,
        due(e.every, task.ends, total, start=e.at_start) if task.scored else None,
        e.patience or 0,
        due(config.checkpoint.every, task.ends, total, start=False),
        config.seed,
    )
    with _logged(run, progress if newest is not None else None) as tell:
        task.begin(progress, tell)
        progress = yield from loop.stepping(
            task,
            plan,
            optimizer,
            progress=progress,
            save=lambda p: _save(run, task, optimizer, identity, p, plan),
            on_event=tell,
            devices=devices,
            asked=asked,
        )
        task.end(tell)
        return _finished(run, task, report, progress, tell)


def _finished(run: Run, task: AttachedTask[_R], report: Report, progress: Progress, tell: Listener) -> _R:
    """Puts the state that is kept in place, saves it, proves the file, and writes the report."""
    devices = run.devices
    kept, validation = _put_kept(run, task, progress, tell)
    outcome = Outcome(
        steps=progress.step,
        peak_memory_bytes=loop.peak_memory_bytes(loop.device_of(task)),
        loss=progress.loss,
        validation=validation,
        validation_before=progress.first_loss,
        kept_step=kept,
        stopped=progress.stopped,
        preflight=report.to_dict(),
    )
    result = task.facts(outcome, progress)
    if devices.first:
        result = task.save(result, progress, tell)
    result = devices.gather(result)[0]
    if devices.first or devices.lockstep:
        tell(Note(task.prove()))
    predicted = was_predicted(report.numbers, result.peak_memory_bytes, progress.seconds)
    if predicted and not run.group:  # of a run by itself
        tell(Note(predicted))
    if devices.first:
        page = write_report(run.folder, result, task.report(result, progress))
        result = replace(result, report=str(page))
    return devices.gather(result)[0]


# --- parts of it ------------------------------------------------------------------------------------------------------


def _probe(run: Run, task: AttachedTask[Any]) -> None:
    """The largest micro-batch, forward and backward, before anything is written."""
    loop.probe(task, (micro for step in task.steps for micro in step.micros), run.tell)


def _restored(
    run: Run, task: AttachedTask[Any], optimizer: Optimizer, identity: Mapping[str, Any], newest: Path
) -> Progress:
    restored = checkpoint.restore(
        newest,
        parameters=task.state,
        optimizer=optimizer,
        identity=identity,
        devices=run.devices.count,
        beside=task.environment,
    )
    task.restore(restored.about.get("kept", {}))
    run.note(f"resuming after step {restored.progress.step} of {len(task.steps)}")
    gone = {*restored.about.get("together", [])} - {*run.group, run.called}
    for note in restored.notes:
        run.note(note)
    if gone:
        others = counted(len(gone), "run")
        run.note(f"trained together with {others} more until here: the run goes on, but may differ in the last bits")
    return restored.progress


@contextmanager
def _logged(run: Run, resumed: Progress | None) -> Iterator[Listener]:
    """The output folder and the log in it, which the first process makes; whoever listens, the log, and trackers."""
    with ExitStack() as open_now:
        log = trackers = None
        if run.devices.first:
            run.folder.mkdir(parents=True, exist_ok=True)
            open_now.enter_context(_alone(run.folder))
            log = JsonLog(run.folder / "log.jsonl", resumed)
            open_now.callback(log.close)
            for event in run.early:
                log(event)
            settings = next(e for e in run.early if isinstance(e, Resolved))
            trackers = open_now.enter_context(
                tracked(run.config.report, run.folder, settings, resumed is not None, fan_out(run.tell, log))
            )
        run.devices.gather(None)
        if not run.folder.is_dir():
            raise ConfigError(
                "a process of this run does not see the output folder that the first one made",
                where=str(run.folder),
                fix="give an output.directory on a file system that all machines share",
            )
        yield fan_out(run.tell, log, trackers)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While inside, no other run writes there. Raises CheckpointError where one does."""
    if os.name != "posix":  # a folder cannot be opened there
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        take_lock(held)
    except BlockingIOError as error:
        os.close(held)
        fix = "wait for its end, or stop it; another run has an output.directory of its own"
        raise CheckpointError("another run is writing into this folder", where=str(folder), fix=fix) from error
    except OSError:
        pass  # a file system that has no locks
    try:
        yield
    finally:
        os.close(held)


def _save(
    run: Run,
    task: AttachedTask[Any],
    optimizer: Optimizer,
    identity: Mapping[str, Any],
    progress: Progress,
    plan: TrainingPlan,
) -> Path:
    """The checkpoint of `progress`, there when this returns; what it holds is the same on all devices."""
    _agree(run, task)
    place = run.folder / "checkpoints"
    wanted = progress.stopped or progress.step in plan.save_at or progress.step == progress.best_step
    if run.devices.first:
        checkpoint.save(
            place,
            parameters=task.state,
            optimizer=optimizer,
            progress=progress,
            identity=identity,
            keep=run.config.checkpoint.keep,
            newest=2 if run.group else 1,
            extra=bool(run.group) and not wanted,
            devices=run.devices.count,
            about={"recipe": run.config.recipe(), "together": [*run.group], "kept": task.kept(progress.step)},
            beside=task.environment,
            fill=(lambda folder: task.write(folder / "adapter", progress)) if run.config.checkpoint.adapters else None,
        )
    run.devices.gather(None)
    return checkpoint.at_step(place, progress.step)


def _agree(run: Run, task: AttachedTask[Any]) -> None:
    if run.devices.count > 1:
        run.devices.agree("adapter", digest_of(task.state))


def _put_kept(run: Run, task: AttachedTask[Any], progress: Progress, tell: Listener) -> tuple[int, float | None]:
    """Puts the state that is to be saved in place, by `evaluation.keep`; (its step, its validation loss).

    Raises NoGain where nothing that was scored is better than what the run began with."""
    best, first, last = progress.best_step, progress.first_loss, progress.last_loss
    worse = ""
    if first is not None and last is not None and last > first:
        before = validation_text(first, task.rewarded).rpartition(" ")[2]
        worse = f"{validation_text(last, task.rewarded)} after step {progress.step}, {before} before step one"
    if run.config.evaluation.keep == "last":
        if worse:
            tell(Note(f"warning: {worse}"))
        return progress.step, last
    if best is None and worse:
        beyond = "above" if task.rewarded else "below"
        raise NoGain(
            f"nothing was learned that holds: {worse}, and never {beyond} that",
            where=str(run.folder),
            fix=f"lower optimizer.learning_rate ({run.config.optimizer.learning_rate:g} here), or look at the "
            "data; to have the last adapter all the same: --resume evaluation.keep=last",
        )
    if best is None or best == progress.step:
        return progress.step, last
    checkpoint.read_parameters(checkpoint.at_step(run.folder / "checkpoints", best), task.state)
    score = validation_text(progress.best_loss or 0.0, task.rewarded)
    tell(Note(f"kept the adapter of step {best}, whose {score} is the {'highest' if task.rewarded else 'lowest'}"))
    return best, progress.best_loss


def due(every: int | str, ends: Sequence[int], steps: int, *, start: bool) -> set[int]:
    """The steps after which something is due: each `every`-th, or the ends of epochs; 0 with `start`."""
    after = set(ends) if every == "epoch" else set(range(int(every), steps + 1, int(every)))
    return after | {0} if start else after


def resolved(config: RunConfig, sources: Mapping[str, Any] | None, settled: Iterable[tuple[str, Any, str]]) -> Resolved:
    """Every setting with its value in this run and where that came from.

    `settled`: (key, value, why) for what was left open, as `auto`, and is decided now."""
    dump = config.model_dump(mode="json")
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, key in config_keys(type(config)):
        section, _, leaf = name.rpartition(".")
        value = dump[section][leaf] if section else dump[leaf]
        plain = list(key.default) if isinstance(key.default, tuple) else key.default
        default = not key.is_required() and value == plain
        settings[name] = value
        origins[name] = str(sources[name]) if sources and name in sources else _origin(default, why(key))
    for name, value, because in settled:
        settings[name] = value
        origins[name] = f"{origins[name].split(' (')[0]} → {because}"
    return Resolved(settings, origins)


def _origin(default: bool, reason: str) -> str:
    return ("default" + (f" ({reason})" if reason else "")) if default else "given"
