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

import functools
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, MissingExtraError
from veneer.train.checkpoint import write_atomically
from veneer.train.config.text import ReportSection
from veneer.train.events import Evaluated, Event, Listener, Note, Resolved, Sampled, Stepped


@dataclass(frozen=True)
class Tracker:
    """A run in one tracker.

    log(step, values), picture(step, path), finish(failed)."""

    id: str
    log: Callable[[int, dict[str, float]], Any]
    picture: Callable[[int, str], Any]
    finish: Callable[[bool], Any]


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
    report: ReportSection, folder: Path, settings: Resolved, resumed: bool, emit: Listener
) -> Iterator[Listener]:
    """Return a listener that sends events to the trackers inside a with-block.

    `folder`: the run's output. `emit`: receives a note about a tracker that fails. Raises ConfigError with
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
                f"{each} could not start: {error}",
                where="report.trackers",
                fix=f"correct this, or remove {each} from report.trackers",
            ) from error
        ids[each] = running[each].id
    if running:
        write_atomically(ids_path, json.dumps(ids).encode())

    def each_does(action: Callable[[Tracker], None]) -> None:
        for each, tracker in list(running.items()):
            try:
                with redirect_stdout(sys.stderr):
                    action(tracker)
            except Exception as error:
                del running[each]
                emit(Note(f"warning: {each} failed and gets no more events: {error}"))

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


def _tensorboard(
    report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None
) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    opened: list[Any] = []

    def at(step: int) -> Any:
        if not opened:  # purge_step hides values written after the resumed step
            opened.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step))
        return opened[0]

    def log(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            at(step).add_scalar(key, value, step)

    def picture(step: int, path: str) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            at(step).add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(failed: bool) -> None:
        for each in opened:
            each.close()

    return Tracker("tensorboard", log, picture, finish)


def _wandb(report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None) -> Tracker:
    import wandb

    entity, _, project = report.project.rpartition("/")
    id = id or uuid.uuid4().hex[:8]
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        entity=entity or None,
        project=project,
        name=name,
        id=id,
        resume="allow",
        dir=str(folder),
        config=dict(settings),
        tags=list(report.tags) or None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return Tracker(
        id,
        lambda step, values: run.log(values, step=step),  # W&B drops older steps, whose values are the same
        lambda step, path: run.log({"samples": wandb.Image(path)}, step=step),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def _mlflow(report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None) -> Tracker:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, resumed = MlflowClient(), id is not None
    if id is None:
        existing = client.get_experiment_by_name(report.project)
        experiment = existing.experiment_id if existing else client.create_experiment(report.project)
        run = client.create_run(experiment, run_name=name, tags=dict.fromkeys(report.tags, "true"))
        id = str(run.info.run_id)
        params = [Param(k, str(v)[:6000]) for k, v in settings.items()]
        for i in range(0, len(params), 100):  # the maximum per request
            client.log_batch(id, params=params[i : i + 100])
    else:
        client.set_terminated(id, "RUNNING")

    @functools.cache
    def last_step(key: str) -> int:
        """Return the last step of a metric that an earlier part of the run wrote."""
        history = client.get_metric_history(id, key) if resumed else []
        return max((m.step for m in history), default=-1)

    def log(step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        if new := [Metric(k, v, now, step) for k, v in values.items() if step > last_step(k)]:
            client.log_batch(id, metrics=new)

    return Tracker(
        id,
        log,
        lambda step, path: client.log_artifact(id, path, "samples"),
        lambda failed: client.set_terminated(id, "FAILED" if failed else "FINISHED"),
    )


def _trackio(report: ReportSection, name: str, folder: Path, settings: Mapping[str, Any], id: str | None) -> Tracker:
    import trackio

    resume = "allow" if id else "never"
    id = id or f"{name}-{uuid.uuid4().hex[:8]}"
    project = report.project.rpartition("/")[2]
    run = trackio.init(project=project, name=id, config=dict(settings), resume=resume, embed=False)
    return Tracker(
        id,
        lambda step, values: run.log(values, step=step),
        lambda step, path: run.log({"samples": trackio.Image(path)}, step=step),
        lambda failed: run.finish(),
    )


_TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
