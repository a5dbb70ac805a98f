"""Plan a text run: convert its configuration to the inputs of veneer.plan.

plan_of_config(config, device)              rows are counted, tokens estimated from characters
plan_of_config(config, device, rows=…)      with known numbers of rows and tokens, as from `planned_rows`
plan_of_run(config, base, items, …)         with the loaded base and its encoded rows: exact lengths
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from veneer.errors import DataError, counted
from veneer.ops.cpu.memory import unread_bytes
from veneer.ops.quantized import Quantized
from veneer.ops.step_sizes import MICRO_TOKENS
from veneer.plan.fit import fitting_micro_tokens, memory_after_base, usable_memory
from veneer.plan.image import ImageLoad
from veneer.plan.memory import CPU_LATER, FITS, Load, weight_bytes
from veneer.plan.plan import Plan, SamplingLoad, TrainingJob, image_plan, text_plan
from veneer.plan.serving import Traffic
from veneer.plan.shape import PairForm, TextShape, model_shape, pair_parameters, text_shape
from veneer.plan.tables import Device, base_config, device_for
from veneer.train.config.text import TrainConfig
from veneer.train.lazy import token_counts
from veneer.train.preflight import available_memory, computes_on, used_memory

if TYPE_CHECKING:
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.config.load import RunConfig

_CHARACTERS = 4
"""Characters per token if rows are not tokenized; approximately true for English."""
_MANY = 1024
"""Number of equally long rows that represent all rows of the data."""


def load_of(
    config: TrainConfig,
    lengths: Sequence[int] | npt.NDArray[np.int64],
    *,
    trained: float,
    dtype: str,
    checkpointing: bool,
    full_parameters: int = 0,
) -> Load:
    """Return the load of the run's largest micro-batch. `lengths`: tokens of every row."""
    from veneer.train.text.batches import plan_steps

    steps = plan_steps(lengths, config.batching, seed=config.seed, epoch=0)
    largest = steps.rows(int(steps.sums(np.asarray(lengths)).argmax())) if steps else []
    return Load(
        tuple(int(lengths[i]) for i in largest) or (1,),
        trained,
        micros=int(np.diff(steps.steps).max(initial=1)),
        rank=config.adapter.rank,
        spec=config.adapter.spec(),
        dtype=dtype,
        quantize=config.base.quantize,
        compute=config.base.compute,
        checkpointing=checkpointing,
        optimizer=config.optimizer.name,
        full=full_parameters,
        compared=config.distillation.teacher is not None,
    )


def with_micro_tokens(config: TrainConfig, tokens: int) -> TrainConfig:
    """Return the configuration with `batching.micro_tokens` set."""
    batching = config.batching.model_copy(update={"micro_tokens": tokens})
    return config.model_copy(update={"batching": batching})


def micro_tokens_of_run(config: TrainConfig, base: Any, free: int | None) -> int:
    """Return the micro-batch size in tokens that fits on the device of a run.

    The run is about to start, with `base` loaded. free: free bytes on the device; None to measure."""
    where = computes_on(base)
    if where.type != "cuda":
        return MICRO_TOKENS
    available, dtype = available_memory(config, where, free), str(base.dtype).removeprefix("torch.")
    shape, device = model_shape(base.model), device_for(where)
    return _micro_tokens(config, shape, device, available, dtype, base.quantized or None, loaded=True)


def _micro_tokens(
    config: TrainConfig,
    shape: TextShape,
    device: Device,
    available: int,
    dtype: str,
    quantize: str | None,
    loaded: bool = False,
) -> int:
    """Return the number of tokens in a micro-batch that fits in memory.

    All rows are assumed to have the maximum length, with all tokens trained.

    available: bytes that are available in addition to the base. loaded: as in `_teacher`."""
    on = config.memory.activation_checkpointing == "on"
    rows = [config.data.max_length] * _MANY
    available -= _teacher(config, shape, dtype, loaded)[1]

    def load(tokens: int) -> Load:
        return load_of(with_micro_tokens(config, tokens), rows, trained=1.0, dtype=dtype, checkpointing=on)

    return fitting_micro_tokens(shape, device, quantize, available, load)


def sampled_at_once(config: TrainConfig, held_out: int) -> int:
    """Return the maximum number of completions that a run samples at once.

    This is the number of completions in a step, or `held_out` if that is larger, but at most `rows` of the
    sampling section."""
    r = config.sampling
    return 0 if r is None else min(r.rows, max(config.batching.rows * r.group, held_out))


def _teacher(config: TrainConfig, shape: TextShape, dtype: str, loaded: bool) -> tuple[TextShape | None, int]:
    """Return (shape, bytes) of the teacher that runs in this process, or (None, 0).

    The bytes are those of the teacher's base, or 0 if the teacher uses the base that is trained.

    shape, dtype: the shape and dtype of the base that is trained. loaded: whether the run is about to load the
    teacher. If so, the teacher's base can be in any location that a base can be loaded from.

    Raises ConfigError, BaseError for a teacher that cannot be found."""
    d = config.distillation
    if d.teacher is None:
        return None, 0
    if d.base is None:
        return shape, 0
    name: str | Path = d.base
    if loaded:
        from veneer.models.sources import base_outline

        name = base_outline(d.base) or name
    teacher = text_shape(base_fields(str(name)), d.base)
    return teacher, sum(weight_bytes(teacher, dtype, None))


def remaining_bytes(memory: Any, device: Device) -> int:
    """Return the bytes that a run needs in addition to the process and the loaded base."""
    return int(memory.beyond_base + (CPU_LATER if device.kind == "cpu" else 0))


def _job(config: TrainConfig, rows: int, tokens: float, held_out: int) -> TrainingJob:
    batching = config.batching
    batch = batching.rows if batching.mode == "bucket" else max(1, round((batching.tokens or 1) / max(1.0, tokens)))
    job = TrainingJob(rows, tokens, float(config.epochs or 1), batch, config.steps)
    every = config.evaluation.every
    times = job.passes if every == "epoch" else job.total_steps / int(every)
    scored = min(held_out, config.evaluation.rows or held_out)
    return replace(job, held_out=scored, evaluations=int(times) + config.evaluation.at_start)


def suggested_settings(plan: Plan) -> str:
    """Return the settings of the first change in `plan.changes` that needs only settings, or ""."""
    for change in plan.changes:
        if all("=" in setting for setting in change.settings):
            cut = any(setting.startswith("data.max_length=") for setting in change.settings)
            return ", ".join(change.settings) + (" with data.long_rows=cut or drop" if cut else "")
    return ""


def plan_of_config(
    config: RunConfig,
    device: Device,
    *,
    rows: int | None = None,
    tokens_per_row: float | None = None,
    longest: int | None = None,
    trained: float = 1.0,
    source_images: int | None = None,
    traffic: Traffic | None = None,
) -> Plan:
    """Return the plan of a configuration for `device`. Nothing needs to be downloaded for this plan.

    Numbers that are not given are counted in the data's files, with four characters per token. Raises
    ConfigError for a base whose config cannot be found, and DataError for missing data that must be counted.

    source_images: number of source images per image, used if `rows` is given."""
    if not isinstance(config, TrainConfig):
        return _plan_of_images(config, base_fields(config.base.name), device, rows, source_images or 0)
    fields = base_fields(config.base.name)
    shape = text_shape(fields, config.base.name)
    dtype, quantize = _planned_dtype(config, fields), config.base.quantize
    if config.batching.micro_tokens is None:
        spare = memory_after_base(shape, device, dtype, quantize)
        config = with_micro_tokens(config, _micro_tokens(config, shape, device, spare, dtype, quantize))
    answer = 0 if config.sampling is None else config.sampling.max_tokens
    notes: tuple[str, ...] = ()
    lengths = list[int]()
    if rows is None or tokens_per_row is None:
        lengths = _estimated_lengths(config)
        notes = (f"tokens estimated as one per {_CHARACTERS} characters; set --tokens-per-row to the exact number",)
    rows = rows or len(lengths)
    if tokens_per_row is not None:
        lengths = [round(tokens_per_row)] * min(rows, _MANY)
    mean = (tokens_per_row or sum(lengths) / max(1, len(lengths))) + answer
    if longest is not None:
        lengths = [longest, *lengths[1:]]
    lengths = [min(n + answer, config.data.max_length) for n in lengths]
    on = config.memory.activation_checkpointing == "on"
    load = {"trained": trained, "dtype": dtype, "checkpointing": on}
    options: dict[str, Any] = {"available": usable_memory(device), "traffic": traffic, "notes": notes}
    return _plan_of_rows(config, shape, device, rows, mean, lengths, load, **options)


def plan_of_run(
    config: TrainConfig,
    base: Any,
    items: Sequence[Any],
    *,
    trainable: int,
    held_out: int,
    checkpointing: bool,
    available: int,
) -> Plan:
    """Return the plan of a text run that is about to start, with `base` loaded.

    items: the encoded rows of a step. trainable: number of trainable parameters. held_out: number of held-out
    rows. checkpointing: whether activations are recomputed. available: bytes that are free in addition to the
    memory in use."""
    shape, where, dtype = model_shape(base.model), computes_on(base), str(base.dtype).removeprefix("torch.")
    device, (lengths, targets) = device_for(where), token_counts(items)
    weights, process = sum(weight_bytes(shape, dtype, config.base.quantize)), FITS[device.kind, "text"].process
    if device.kind == "cpu":
        # the libraries and rows are already in memory, so their size can be measured
        unread = sum(unread_bytes(w) for w in base.model.parameters() if not isinstance(w, Quantized))
        process = max(process, used_memory(where) - (weights - unread) + CPU_LATER)
        available -= CPU_LATER
    trained = int(targets.sum()) / max(1, int(lengths.sum()))
    full = max(0, trainable - pair_parameters(shape, config.adapter.spec()))
    load = {"trained": trained, "dtype": dtype, "checkpointing": checkpointing, "full_parameters": full}
    options: dict[str, Any] = {"held_out": held_out, "loaded": True, "process": process}
    options["available"] = available + weights + process
    mean = int(lengths.sum()) / max(1, len(items))
    return _plan_of_rows(config, shape, device, len(items), mean, lengths, load, **options)


def _plan_of_rows(
    config: TrainConfig,
    shape: TextShape,
    device: Device,
    rows: int,
    tokens: float,
    lengths: Sequence[int] | npt.NDArray[np.int64],
    load: Mapping[str, Any],
    held_out: int = 0,
    loaded: bool = False,
    **options: Any,
) -> Plan:
    """Return the plan of a text run on `rows` rows of `tokens` tokens on average.

    lengths: tokens of every row, or of a sample of the rows. load: arguments of `load_of`. loaded: as in
    `_teacher`. options: of `text_plan`."""
    r, steps, sampled = config.sampling, config, None
    if r is not None:  # the optimizer steps are taken on completions
        batching = config.batching.model_copy(update={"rows": config.batching.rows * r.group})
        schedule = config.schedule
        if config.epochs is not None:
            schedule = schedule.model_copy(update={"epochs": config.epochs * r.updates})
        steps = config.model_copy(update={"batching": batching, "schedule": schedule})
        lengths, rows = [*map(int, lengths)] * r.group, rows * r.group
    job = _job(steps, rows, tokens, held_out)
    if r is not None:
        total = math.ceil(job.total_steps / r.updates) * job.batch + job.held_out * job.evaluations
        prompt, together = max(1, max(lengths, default=1) - r.max_tokens), sampled_at_once(config, job.held_out)
        teacher = _teacher(config, shape, load["dtype"], loaded)
        sampled = SamplingLoad(prompt, r.max_tokens, r.group, together, total, *teacher)
    largest = load_of(steps, lengths, **load)
    return text_plan(config.base.name, shape, largest, device, job, sampled=sampled, **options)


def planned_rows(config: TrainConfig, items: Sequence[Any]) -> dict[str, Any]:
    """Return `rows`, `tokens_per_row`, `longest` and `trained` for `plan_of_config`.

    items: encoded rows. The lengths do not include completions, because the plan adds them."""
    answer = 0 if config.sampling is None else config.sampling.max_tokens
    tokens, trained = token_counts(items)
    return {
        "rows": len(tokens),
        "tokens_per_row": int((tokens - answer).sum()) / len(tokens),
        "longest": int(tokens.max()) - answer,
        "trained": max(0.001, int(trained.sum()) / int(tokens.sum())),
    }


def _planned_dtype(config: RunConfig, fields: Mapping[str, Any]) -> str:
    """Return the dtype of the base. "auto" keeps float32 weights, as `choose_dtype` does."""
    stored = fields.get("dtype") or fields.get("torch_dtype")
    automatic = "float32" if stored == "float32" else "bfloat16"
    return config.base.dtype if config.base.dtype != "auto" else automatic


def _plan_of_images(
    config: ImageTrainConfig, fields: Mapping[str, Any], device: Device, rows: int | None, source_images: int
) -> Plan:
    from veneer.train.image.pictures import count_pictures

    source_images, directions = source_images or len(config.data.source_folders), 1
    base_passes: float = 0 if config.loss.keep_guidance is None else 2
    notes: tuple[str, ...] = ()
    if config.slider.enabled:
        # base_passes: additional forward passes of the base per row
        rows, directions, base_passes = config.slider.scenes, 2, 1.5
        text = f"a slider: {counted(rows, 'scene')} that the base generates first, trained in both directions, "
        notes = (text + "with three forward passes of the base for both",)
    elif rows is None:
        try:
            rows, source_images = count_pictures(config.data)
        except DataError as error:
            raise DataError(error.what, where=error.where, fix=f"{error.fix}; or set --rows") from None
    batch = min(config.batching.rows, rows)
    at_once = config.batching.micro_rows or batch
    resolution = config.data.resolution or int(fields.get("picture", 1024))
    side = resolution if isinstance(resolution, int) else max(resolution)
    load = ImageLoad(
        at_once,
        side,
        side,
        micros=directions * -(-batch // at_once),
        rank=config.adapter.rank,
        dtype=_planned_dtype(config, fields),
        quantize=config.base.quantize,
        checkpointing=config.memory.activation_checkpointing == "on" or config.memory.offload_blocks > 0,
        targets=config.adapter.targets,
        base_passes=base_passes,
        before=source_images,
        form=PairForm.of(config.adapter.spec()),
        offload=config.memory.offload_blocks if device.kind == "cuda" else 0,
    )
    job = TrainingJob(rows, 1.0, directions * float(config.schedule.epochs or 1), directions * batch, config.steps)
    return image_plan(config.base.name, fields, load, device, job, notes=notes)


def base_fields(name: str) -> dict[str, Any]:
    """Return the config.json of a base, which can be packaged, in the veneer home, a folder, or in the table."""
    from veneer.models.builtin import packaged_folder
    from veneer.models.home import bases_home

    for folder in (packaged_folder(), bases_home()):
        if name.strip("./") and (folder / name).is_dir():
            return base_config(str(folder / name))
    return base_config(name)


def _estimated_lengths(config: TrainConfig) -> list[int]:
    from veneer.train.text.data import row_options
    from veneer.train.text.rows import read_rows

    try:
        rows, _ = read_rows(config.data.files("train"), limit=config.data.limit, **row_options(config))
    except DataError as error:
        raise DataError(error.what, where=error.where, fix="or set --rows and --tokens-per-row") from None

    def characters(row: Any) -> int:
        return len(row.text) + sum(len(str(m.get("content", ""))) + 20 for m in row.messages)

    return [max(2, characters(row) // _CHARACTERS) for row in rows]
