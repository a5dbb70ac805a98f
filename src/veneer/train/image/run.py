"""Run a training configuration on an image base, with images or for a slider.

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
    allow_other_machine: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Listener | None = None,
    base: ImageBase | None = None,
    sources: Mapping[str, Any] | None = None,
) -> ImageResult:
    """Train one adapter with `config` and return the result.

    resume: continue from the newest checkpoint in the output folder; on a CPU, the result is bit for bit the
        same as without the interruption
    allow_other_machine: resume even if this machine runs an op with another implementation than the
        checkpoint's machine, which changes the last bits
    dry_run: stop after preflight and one step with the largest batch
    force: start a run that does not fit in memory, with a warning
    on_event: called with every event; the default shows the run in the terminal (stderr)
    base: a base that is already loaded; its encoders are then not freed
    sources: setting -> its origin, from `load_config`

    In processes started by torchrun or similar tools, each process uses one device and takes a share of every
    step (train.devices). Only the first process reports events, generates samples, and writes the adapter.

    The random generators, modules and weights of the base are restored at the end, even after an error.
    Raises DataError for unusable images, PreflightError before step one for predictable failures,
    TrainingError for a loss that is not finite, Interrupted on Ctrl-C after saving the state, and errors from
    loading the base and from checkpoints."""
    kind = PICTURES
    if config.slider.enabled:
        kind, config = SLIDER, slider_config(config)
    options: dict[str, Any] = {"resume": resume, "allow_other_machine": allow_other_machine}
    options |= {"dry_run": dry_run, "force": force, "sources": sources}
    with opened(config, unit="pictures", on_event=on_event, **options) as run:
        owns_base = base is None
        if base is None:
            run.fetch(config.base.name)
            dtype = config.base.dtype
            device = run.devices.device
            base = load_image(config.base.name, dtype=dtype, device=device, quantize=config.base.quantize, say=run.note)
        for note in base.notes:
            run.note(note)
        return train_images(ImageRun(run, config, base, owns_base, kind))
