"""Trackers for `report.trackers`: TensorBoard, W&B, MLflow and Trackio.

They receive a run's scalars and sample sheets.

    | name        | package, an extra of the same name | destination |
    | tensorboard | tensorboard   | OUTPUT/tensorboard |
    | wandb       | wandb         | set by `wandb login` and WANDB_MODE; files in OUTPUT/wandb |
    | mlflow      | mlflow-skinny | set by MLFLOW_TRACKING_URI |
    | trackio     | trackio       | this machine (TRACKIO_DIR), or set by its variables |

A resumed run continues its tracker run, whose ID is in OUTPUT/trackers.json. The steps since the checkpoint
run again with the same values, so a tracker that already has them loses nothing. If a tracker cannot start,
the run stops before step one; a tracker that fails later is reported once, and the run continues without it.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from veneer.errors import ConfigError, MissingExtraError
from veneer.train.checkpoint import write_atomically
from veneer.train.config.text import ReportSection
from veneer.train.events import Evaluated, Event, Listener, Note, Resolved, Sampled, Stepped


class Tracker(Protocol):
    """A run in one tracker."""

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, path: str) -> None: ...

    def finish(self, failed: bool) -> None: ...


def check_trackers(report: ReportSection) -> None:
    """Check that the packages of the trackers are installed.

    Raises MissingExtraError with all missing names."""
    missing = [name for name in report.trackers if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"report.trackers names {', '.join(missing)}, and what is needed for that is not installed",
            fix=f"pip install 'veneer[{','.join(missing)}]', or take it out of report.trackers",
        )


@contextmanager
def tracked(
    report: ReportSection, folder: Path, settings: Resolved, resumed: bool, tell: Listener
) -> Iterator[Listener]:
    """Return a listener that sends events to the trackers inside a with-block.

    `folder`: the run's output. `tell`: receives a note about a tracker that fails. Raises ConfigError with
    the tracker's message if a tracker cannot start."""
    ids_path = folder / "trackers.json"
    ids: dict[str, str] = json.loads(ids_path.read_text()) if resumed and ids_path.is_file() else {}
    name = report.name or folder.resolve().name
    running: dict[str, Tracker] = {}
    for each in report.trackers:
        try:
            with redirect_stdout(sys.stderr):  # trackers print greetings; stdout is for programs
                running[each] = _TRACKERS[each](report, name, folder, settings.settings, ids.get(each))
        except Exception as error:
            for begun in running.values():
                begun.finish(True)
            raise ConfigError(
                f"{each} could not begin: {error}",
                where="report.trackers",
                fix=f"mend what it says, or leave {each} out",
            ) from error
        ids[each] = running[each].id
    if running:
        write_atomically(ids_path, json.dumps(ids).encode())

    def each_does(what: Callable[[Tracker], None]) -> None:
        for each, tracker in list(running.items()):
            try:
                with redirect_stdout(sys.stderr):
                    what(tracker)
            except Exception as error:
                del running[each]
                tell(Note(f"warning: {each} failed and is told no more: {error}"))

    def listener(event: Event) -> None:
        if isinstance(event, Sampled):
            each_does(lambda tracker: tracker.picture(event.step, str(folder / event.path)))
        elif isinstance(event, Stepped | Evaluated):
            values = scalars(event)
            each_does(lambda tracker: tracker.log(event.step, values))

    failed = True
    try:
        yield listener
        failed = False
    finally:
        each_does(lambda tracker: tracker.finish(failed))


def scalars(event: Stepped | Evaluated) -> dict[str, float]:
    """Return the scalars of a step or an evaluation, by their names in all trackers."""
    if isinstance(event, Stepped):
        return {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/gradient_norm": event.gradient_norm,
            "speed/tokens_per_second": event.tokens_per_second,
            "memory/peak_bytes": event.memory_bytes,
            **{f"train/{name}": value for name, value in event.extra.items()},
        }
    values = {"validation/loss": event.loss}
    if event.perplexity is not None:
        values["validation/perplexity"] = event.perplexity
    return values | {f"validation/{name}": value for name, value in event.extra.items()}


class _TensorBoard:
    def __init__(
        self, report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = "tensorboard"
        self._make: Any = SummaryWriter
        self._folder, self._writer = folder / "tensorboard", None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def picture(self, step: int, path: str) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._at(step).add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int) -> Any:
        if self._writer is None:  # purge_step hides values written after the resumed step
            self._writer = self._make(str(self._folder), purge_step=step)
        return self._writer


class _WandB:
    def __init__(
        self, report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None
    ) -> None:
        import wandb

        entity, _, project = report.project.rpartition("/")
        self.id = id or uuid.uuid4().hex[:8]
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            name=name,
            id=self.id,
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            tags=list(report.tags) or None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)  # W&B drops older steps, whose values are the same

    def picture(self, step: int, path: str) -> None:
        self._run.log({"samples": self._wandb.Image(path)}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(
        self, report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._tracking = Metric, MlflowClient()
        self._last: dict[str, int] = {}  # metric -> last step that an earlier part of the run wrote
        self._again = id is not None
        if id is None:
            found = self._tracking.get_experiment_by_name(report.project)
            experiment = found.experiment_id if found else self._tracking.create_experiment(report.project)
            tags = dict.fromkeys(report.tags, "true")
            id = self._tracking.create_run(experiment, run_name=name, tags=tags).info.run_id
            params = [Param(k, str(v)[:6000]) for k, v in settings.items()]
            for i in range(0, len(params), 100):  # the maximum per request
                self._tracking.log_batch(id, params=params[i : i + 100])
        else:
            self._tracking.set_terminated(id, "RUNNING")
        self.id: str = id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        new = [self._metric(k, v, now, step) for k, v in values.items() if step > self._seen(k)]
        if new:
            self._tracking.log_batch(self.id, metrics=new)

    def picture(self, step: int, path: str) -> None:
        self._tracking.log_artifact(self.id, path, "samples")

    def finish(self, failed: bool) -> None:
        self._tracking.set_terminated(self.id, "FAILED" if failed else "FINISHED")

    def _seen(self, name: str) -> int:
        if not self._again:
            return -1
        if name not in self._last:
            history = self._tracking.get_metric_history(self.id, name)
            self._last[name] = max((m.step for m in history), default=-1)
        return self._last[name]


class _Trackio:
    def __init__(
        self, report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None
    ) -> None:
        import trackio

        self._trackio = trackio
        self.id = id or f"{name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=report.project.rpartition("/")[2],
            name=self.id,
            config=dict(settings),
            resume="allow" if id else "never",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: str) -> None:
        self._run.log({"samples": self._trackio.Image(path)}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
