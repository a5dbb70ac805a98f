"""Run a training configuration on an image base: pictures, or a slider.

result = run_images(config)                  result.adapter is the file (for peft: the folder)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.models.image.base import ImageBase, load_image
from veneer.train.config.image import ImageTrainConfig
from veneer.train.events import Listener
from veneer.train.image.save import ImageResult
from veneer.train.image.slider import SLIDER, slider_config
from veneer.train.image.task import PICTURES, ImageRun, train_images
from veneer.train.run import opened


def run_images(
    config: ImageTrainConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Listener | None = None,
    base: ImageBase | None = None,
    sources: Mapping[str, Any] | None = None,
) -> ImageResult:
    """Train one adapter from `config` and return the result.

    `resume` continues from the newest checkpoint in the output folder, on the CPU bit for bit as if the run
    had never stopped. `dry_run` stops after preflight and the largest batch. `force`: try a run that does not
    fit, with a warning. `on_event` receives all events; without it the run is shown in the terminal (stderr).
    `base`: a loaded base, whose encoders are then not freed. `sources`: setting -> its origin
    (`load_config`).

    In processes started by torchrun or similar, each takes a device and a share of every step
    (train.devices); only the first reports events, draws samples, and writes the adapter.

    Afterwards, also after an error, the random generators, modules and weights of the base are as before.
    Raises DataError for unusable pictures, PreflightError before step one for foreseeable failures,
    TrainingError for a loss that is not finite, Interrupted on Ctrl-C with the state saved, and the errors of
    the base and checkpoints."""
    kind = PICTURES
    if config.slider.enabled:
        kind, config = SLIDER, slider_config(config)
    with opened(
        config, unit="pictures", on_event=on_event, sources=sources, resume=resume, dry_run=dry_run, force=force
    ) as run:
        owns_base = base is None
        if base is None:
            run.fetch(config.base.name)
            base = load_image(
                config.base.name,
                dtype=config.base.dtype,
                device=run.devices.device,
                quantize=config.base.quantize,
                say=run.note,
            )
        for note in base.notes:
            run.note(note)
        return train_images(ImageRun(run, config, base, owns_base, kind))
