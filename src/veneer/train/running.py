"""What a run on text and a run on pictures have in common, around the loop.

    around    watched: who is told, and everything back as it was
    before    newest_checkpoint · resolved: every setting with where it came from
    during    Running.train: restore, probe, log, loop, checkpoints
    after     Running.put_kept · Outcome, what every run comes to

Knows configurations, parameters and steps; no rows, no pictures, no bases by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import ConfigError, Interrupted, NoGain
from veneer.train import checkpoint, loop
from veneer.train.checkpoint import Progress
from veneer.train.config.load import RunConfig
from veneer.train.config.text import config_keys, why
from veneer.train.devices import ALONE, Devices, digest_of
from veneer.train.events import Event, Listener, Note, Resolved, fan_out
from veneer.train.loop import Loss, Means, Score, Step
from veneer.train.optim import Schedule, make_optimizer
from veneer.train.report.log import ConsoleView, JsonLog

__all__ = ["NAME", "Outcome", "Running", "due", "newest_checkpoint", "resolved", "watched"]

NAME = "run"
"""The adapter's name on the base while it trains."""

R = TypeVar("R")


@dataclass
class Outcome:
    """What a run came to. `loss`: over the last 20 steps. `validation`: of the adapter that was kept, None without
    held-out data; `validation_before`: of the base."""

    adapter: str = ""
    digest: str = ""
    steps: int = 0
    peak_memory_bytes: int = 0
    loss: float | None = None
    validation: float | None = None
    validation_before: float | None = None
    kept_step: int = 0
    stopped: str = ""
    report: str = ""
    dry_run: bool = False
    preflight: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The object of `--json`; the preflight's findings only for a dry run, where there is nothing else."""
        values = asdict(self)
        if not self.dry_run:
            del values["preflight"]
        return values


@contextmanager
def watched(folder: Path, on_event: Listener | None, unit: str) -> Iterator[tuple[Listener, list[Event]]]:
    """Around a whole run: (who is told what happens, what was told until now). Without `on_event` it is shown in the
    terminal, speed in `unit`s a second. Random generators are as before afterwards, and an interruption says how to go
    on."""
    view = ConsoleView(unit=unit) if on_event is None else None
    early: list[Event] = []
    random_before = checkpoint.rng_state()
    try:
        yield fan_out(view or on_event, early.append), early
    except Interrupted as error:
        fix = "go on with the same command and --resume (in Python: resume=True)"
        raise Interrupted(error.what, where=str(folder / "checkpoints"), fix=fix, signal=error.signal) from None
    finally:
        if view is not None:
            view.close()
        checkpoint.rng_restore(random_before)


def newest_checkpoint(folder: Path, resume: bool, tell: Listener) -> Path | None:
    """Where a run that is to be resumed goes on; None, which is said, where there is nothing to go on from."""
    newest = checkpoint.latest(folder / "checkpoints") if resume else None
    if resume and newest is None:
        tell(Note(f"there is no checkpoint in {folder}: the run starts from its beginning"))
    return newest


@dataclass
class Running:
    """A run that is ready to begin: its adapter is attached and trainable, its preflight has passed.

    `evaluate`: scores the held-out data, None where there are none. `extra`: further state that belongs to each
    checkpoint (moving averages). `begin(progress, tell)`: called when the log is open, before the loop; `after(step)`:
    after each optimizer step; `before(step)`, `measured()`: as `loop.train` has them. `rates`: prefix of parameter
    names -> a learning rate of their own. `early`: the events until now, for the log. `devices`: the processes that
    share the run, of which the first writes."""

    config: RunConfig
    folder: Path
    parameters: Mapping[str, nn.Parameter]
    steps: Sequence[Step]
    ends: Sequence[int]
    loss: Loss
    identity: Mapping[str, Any]
    tell: Listener
    early: Sequence[Event]
    evaluate: Callable[[Callable[[], bool]], Score | None] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    begin: Callable[[Progress, Listener], None] | None = None
    after: Callable[[int], None] | None = None
    before: Callable[[Step], None] | None = None
    measured: Callable[[], Means] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    devices: Devices = ALONE

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the adapter."""
        return {**self.parameters, **self.extra}

    def probe(self) -> None:
        """The largest micro-batch, forward and backward, before anything is written."""
        loop.probe(self.parameters, [m for step in self.steps for m in step.micros], self.loss, self.tell)

    def train(self, newest: Path | None, finish: Callable[[Progress, Listener], R]) -> R:
        """Runs the loop from the checkpoint `newest` (or the beginning), then `finish` while the log is still open."""
        config, devices = self.config, self.devices
        o = config.optimizer
        optimizer = make_optimizer(
            self.parameters, name=o.name, learning_rate=o.learning_rate, betas=o.betas, eps=o.eps, momentum=o.momentum,
            weight_decay=o.weight_decay, loraplus_ratio=o.loraplus_ratio, rates=self.rates,
        )  # fmt: skip
        progress = Progress()
        if newest is not None:
            progress, notes = checkpoint.restore(
                newest, parameters=self.state, optimizer=optimizer, identity=self.identity, devices=devices.count
            )  # fmt: skip
            self.tell(Note(f"resuming after step {progress.step} of {len(self.steps)}"))
            for note in notes:
                self.tell(Note(note))
        devices.agree("settings, data and base", digest_of({}, config.recipe(), self.identity, progress.step))
        self._agree()
        self.probe()
        log = self._log(progress if newest is not None else None)
        tell = fan_out(self.tell, log)
        try:
            if self.begin is not None:
                self.begin(progress, tell)
            total = len(self.steps)
            progress = loop.train(
                self.parameters, self.steps, self.loss, optimizer,
                Schedule.of(config.schedule.name, total, config.schedule.warmup, config.schedule.floor),
                clip=o.clip,
                evaluate=self.evaluate,
                evaluate_at=due(config.evaluation.every, self.ends, total, start=config.evaluation.at_start),
                patience=config.evaluation.patience or 0,
                save=lambda p: self._save(p, optimizer),
                save_at=due(config.checkpoint.every, self.ends, total, start=False),
                progress=progress, on_event=tell, after=self.after, before=self.before, measured=self.measured,
                seed=config.seed, devices=devices,
            )  # fmt: skip
            return finish(progress, tell)
        finally:
            if log is not None:
                log.close()

    def _log(self, resumed: Progress | None) -> JsonLog | None:
        """The output folder and the log in it, which the first process makes."""
        log = None
        if self.devices.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = JsonLog(self.folder / "log.jsonl", resumed)
            for event in self.early:
                log(event)
        self.devices.gather(None)
        if not self.folder.is_dir():
            raise ConfigError(
                "a process of this run does not see the output folder that the first one made",
                where=str(self.folder),
                fix="give an output.directory on a file system that all machines share",
            )
        return log

    def _save(self, progress: Progress, optimizer: Optimizer) -> Path:
        """The checkpoint of `progress`, there when this returns; what it holds is the same on all devices."""
        self._agree()
        place = self.folder / "checkpoints"
        if self.devices.first:
            checkpoint.save(
                place, parameters=self.state, optimizer=optimizer, progress=progress, identity=self.identity,
                keep=self.config.checkpoint.keep, about={"recipe": self.config.recipe()}, devices=self.devices.count,
            )  # fmt: skip
        self.devices.gather(None)
        return checkpoint.at_step(place, progress.step)

    def _agree(self) -> None:
        if self.devices.count > 1:
            self.devices.agree("adapter", digest_of(self.state))

    def put_kept(self, progress: Progress, tell: Listener) -> tuple[int, float | None]:
        """Puts the state that is to be saved in place, by `evaluation.keep`; (its step, its validation loss).

        Raises NoGain where nothing that was scored is better than what the run began with."""
        best, first, last = progress.best_step, progress.first_loss, progress.last_loss
        worse = ""
        if first is not None and last is not None and last > first:
            worse = f"validation loss {last:.4f} after step {progress.step}, {first:.4f} before step one"
        if self.config.evaluation.keep == "last":
            if worse:
                tell(Note(f"warning: {worse}"))
            return progress.step, last
        if best is None and worse:
            raise NoGain(
                f"nothing was learned that holds: {worse}, and never below that", where=str(self.folder),
                fix=f"lower optimizer.learning_rate ({self.config.optimizer.learning_rate:g} here), or look at the "
                "data; to have the last adapter all the same: --resume evaluation.keep=last",
            )  # fmt: skip
        if best is None or best == progress.step:
            return progress.step, last
        checkpoint.read_parameters(checkpoint.at_step(self.folder / "checkpoints", best), self.state)
        tell(Note(f"kept the adapter of step {best}, whose validation loss {progress.best_loss:.4f} is the lowest"))
        return best, progress.best_loss


def due(every: int | str, ends: Sequence[int], steps: int, *, start: bool) -> set[int]:
    """The steps after which something is due: each `every`-th, or the ends of epochs; 0 with `start`."""
    after = set(ends) if every == "epoch" else set(range(int(every), steps + 1, int(every)))
    return after | {0} if start else after


def resolved(
    config: RunConfig, sources: Mapping[str, Any] | None, settled: Iterable[tuple[str, Any, str]]
) -> Resolved:  # fmt: skip
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
