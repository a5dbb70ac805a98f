"""Plan a text run: from its configuration to the inputs of veneer.plan.

plan_of_run(config, base, …) with the loaded base and encoded rows: exact lengths
plan_of_config(config, …)    without them: rows are counted, tokens estimated from characters
rows_as_planned(config, …)   the arguments of plan_of_config for rows already read
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from veneer.errors import DataError, counted
from veneer.ops.cpu.memory import unread_bytes
from veneer.ops.quantized import Quantized
from veneer.ops.step_sizes import MICRO_TOKENS
from veneer.plan.fit import fitting_micro_tokens, memory_after_base, usable_memory
from veneer.plan.image import ImageLoad
from veneer.plan.memory import CPU_LATER, FITS, Load, weight_bytes
from veneer.plan.plan import (
    Plan,
    SamplingLoad,
    TrainingJob,
    image_plan,
    text_plan,
    with_sampling,
    with_teacher,
)
from veneer.plan.serving import Traffic
from veneer.plan.shape import PairForm, TextShape, model_shape, pair_parameters, text_shape
from veneer.plan.tables import Device, base_config, device_here
from veneer.plan.time import rates_of
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.text import TrainConfig
from veneer.train.preflight import available_memory, computes_on, used_memory

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.config.load import RunConfig

_CHARACTERS = 4
"""Characters per token if nothing is tokenized: about right for English."""
_MANY = 1024
"""Number of rows of one length that represent all rows."""


def load_of(
    config: TrainConfig,
    lengths: Sequence[int],
    *,
    trained: float,
    dtype: str,
    checkpointing: bool,
    full_parameters: int = 0,
) -> Load:
    """Return the largest micro-batch of the run. `lengths`: tokens of every row."""
    from veneer.train.text.batches import plan_steps

    steps = plan_steps(list(lengths), config.batching, seed=config.seed, epoch=0)
    micros = [[lengths[i] for i in micro] for step in steps for micro in step]
    return Load(
        tuple(max(micros, key=sum, default=[1])),
        trained,
        micros=max((len(step) for step in steps), default=1),
        rank=config.adapter.rank,
        spec=_special_spec(config),
        dtype=dtype,
        quantize=config.base.quantize,
        checkpointing=checkpointing,
        optimizer=config.optimizer.name,
        full=full_parameters,
        inputs_on_host=checkpointing and config.memory.offload_activations,
        compared=config.distillation.teacher is not None and config.distillation.url is None,
    )


def _special_spec(config: TrainConfig) -> LoraSpec | None:
    """Return the spec of pairs, unless they are LoRA of one rank on every linear.

    Also returned if the pairs are initialized from a part of the base."""
    a = config.adapter
    is_special = a.exclude or a.rank_pattern or a.layers is not None or a.dora or a.init in ("pissa", "olora")
    is_special = is_special or a.kind != "lora"
    return a.spec() if is_special or a.targets != "all-linear" else None


def with_micro_tokens(config: TrainConfig, tokens: int) -> TrainConfig:
    """Return the configuration with `batching.micro_tokens`."""
    batching = config.batching.model_copy(update={"micro_tokens": tokens})
    return config.model_copy(update={"batching": batching})


def micro_tokens_of_run(config: TrainConfig, base: Any, free: int | None) -> int:
    """Return the micro-batch size in tokens of a run about to start, for its device.

    `free`: free bytes there; None: measured."""
    where = computes_on(base)
    if where.type != "cuda":
        return MICRO_TOKENS
    shape = model_shape(base.model)
    device = device_here(where)
    dtype = str(base.dtype).removeprefix("torch.")
    available = available_memory(config, where, free) - _teacher(config, shape, dtype, find_base=True).extra_bytes
    return _micro_tokens_of(config, shape, device, available, dtype, base.quantized or None)


def _micro_tokens_of(
    config: TrainConfig, shape: TextShape, device: Device, available: int, dtype: str, quantize: str | None
) -> int:
    """Compute with rows of maximum length whose tokens are all learned."""
    on = config.memory.recomputing == "on"
    rows = [config.data.max_length] * _MANY

    def load(tokens: int) -> Load:
        return load_of(with_micro_tokens(config, tokens), rows, trained=1.0, dtype=dtype, checkpointing=on)

    return fitting_micro_tokens(shape, device, quantize, available, load)


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
    """Return the plan of a run about to start.

    `items`: the contents of a step. `trainable`: parameters. `held_out`: rows. `available`: free bytes, besides
    the memory in use."""

    sampling, config, items = config, _on_completions(config), [*items] * _completions_per_prompt(config)
    lengths = [item.tokens for item in items]
    tokens = sum(lengths)
    shape = model_shape(base.model)
    weight = next(base.model.parameters())
    where = computes_on(base)
    device = device_here(where)
    dtype = str(getattr(base, "dtype", weight.dtype)).removeprefix("torch.")
    pairs = pair_parameters(shape, _special_spec(config), rank=config.adapter.rank)
    load = load_of(
        config,
        lengths,
        trained=sum(item.trained_tokens for item in items) / max(1, tokens),
        checkpointing=checkpointing,
        dtype=dtype,
        full_parameters=max(0, trainable - pairs),
    )
    job = _job(config, len(items), tokens / max(1, len(items)), held_out)
    rates, process = rates_of(device, dtype), None
    if device.kind == "cpu":  # libraries and rows are in memory already: their size is known
        weights = sum(weight_bytes(shape, dtype, load.quantize))
        weights -= sum(unread_bytes(weight) for weight in base.model.parameters() if not isinstance(weight, Quantized))
        process = max(FITS["cpu", "text"].process, used_memory(where) - weights + CPU_LATER)
    memory = text_plan("", shape, load, device, rates, job, process=process, available=1 << 62).memory
    teacher = _teacher(config, shape, dtype, find_base=True)
    sampled = _sampling_load(sampling, job, max(lengths, default=1))
    limit = available + memory.peak - remaining_bytes(memory, device) - _other_bytes(sampled, teacher, shape, dtype)
    plan = text_plan(config.base.name, shape, load, device, rates, job, process=process, available=limit)
    return _with_sampling(plan, sampled, shape, load, device, teacher)


def sampled_at_once(config: TrainConfig, held_out: int) -> int:
    """Return the maximum number of answers that a run samples at once.

    All answers of a step, or one to each of `held_out` prompts."""
    r = config.sampling
    return 0 if r is None else min(r.rows, max(config.batching.rows * r.group, held_out))


def _completions_per_prompt(config: TrainConfig) -> int:
    return 1 if config.sampling is None else config.sampling.group


def _on_completions(config: TrainConfig) -> TrainConfig:
    """Return the configuration of a run whose rows are its sampled answers."""
    r, schedule = config.sampling, config.schedule
    if r is None:
        return config
    batching = config.batching.model_copy(update={"rows": config.batching.rows * r.group})
    if config.epochs is not None:
        schedule = schedule.model_copy(update={"epochs": config.epochs * r.updates})
    return config.model_copy(update={"batching": batching, "schedule": schedule})


def _sampling_load(config: TrainConfig, job: TrainingJob, longest: int) -> SamplingLoad | None:
    """Return what a run samples, or None.

    `longest`: tokens of a prompt and its answer."""
    r = config.sampling
    if r is None:
        return None
    total = math.ceil(job.total_steps / r.updates) * job.batch + job.held_out * job.evaluations
    prompt = max(1, longest - r.max_tokens)
    return SamplingLoad(prompt, r.max_tokens, r.group, sampled_at_once(config, job.held_out), total)


def _other_bytes(sampled: SamplingLoad | None, teacher: _Teacher, shape: TextShape, dtype: str) -> int:
    """Return the bytes of the KV cache of sampling and of a teacher's own base."""
    return teacher.extra_bytes + (0 if sampled is None else sampled.cache(shape, dtype))


def _with_sampling(
    plan: Plan, sampled: SamplingLoad | None, shape: TextShape, load: Load, device: Device, teacher: _Teacher
) -> Plan:
    if sampled is None:
        return plan
    plan = with_sampling(plan, shape, load, device, sampled)
    if teacher.shape is None:
        return plan
    # as loaded: it is not quantized, whatever the trained base is
    plain = replace(load, quantize=None if teacher.extra_bytes else load.quantize)
    return with_teacher(plan, teacher.shape, plain, device, sampled, teacher.extra_bytes)


class _Teacher(NamedTuple):
    """A teacher in this process; None for none. `extra_bytes`: bytes of a base of its own."""

    shape: TextShape | None
    extra_bytes: int = 0


def _teacher(config: TrainConfig, shape: TextShape, dtype: str, *, find_base: bool = False) -> _Teacher:
    """Return the teacher of a run on a base of `shape`, in the base's dtype.

    `find_base`: for a run that is about to load the teacher, wherever it is found. Raises ConfigError, BaseError
    for a teacher that cannot be found."""
    d = config.distillation
    if d.teacher is None or d.url is not None:
        return _Teacher(None)
    if d.base is None:
        return _Teacher(shape)
    name: str | Path = d.base
    if find_base:
        from veneer.models.sources import base_outline

        name = base_outline(d.base) or name
    teacher = text_shape(base_fields(str(name)), d.base)
    return _Teacher(teacher, sum(weight_bytes(teacher, dtype, None)))


def remaining_bytes(memory: Any, device: Device) -> int:
    """Return the bytes still to come after process and base are in memory."""
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
    """Return the first change expressible as settings, as text, or ""."""
    for change in plan.changes:
        if all("=" in setting for setting in change.settings):
            cut = any(setting.startswith("data.max_length=") for setting in change.settings)
            return ", ".join(change.settings) + (" with data.long_rows=cut or drop" if cut else "")
    return ""


# -- from the configuration alone --------------------------------------------------------------------------------------


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
    """Return the plan of a configuration whose base need not be downloaded.

    Missing arguments are counted in the data's files, with four characters per token. source_images: source images
    per image, for `rows` images. Raises ConfigError for
    a base whose config cannot be found, DataError for missing data that must be counted."""
    if not isinstance(config, TrainConfig):
        return _plan_of_images(config, base_fields(config.base.name), device, rows, source_images or 0)
    return _plan_of_text(config, device, rows, tokens_per_row, longest, trained, traffic)


def _plan_of_text(
    config: TrainConfig,
    device: Device,
    rows: int | None = None,
    tokens_per_row: float | None = None,
    longest: int | None = None,
    trained: float = 1.0,
    traffic: Traffic | None = None,
) -> Plan:
    shape = text_shape(base_fields(config.base.name), config.base.name)
    dtype = _planned_dtype(config)
    config = _with_planned_tokens(config, shape, device)
    notes: tuple[str, ...] = ()
    lengths: list[int] = []
    if rows is None or tokens_per_row is None:
        lengths = _estimated_lengths(config)
        notes = (f"tokens guessed from characters, {_CHARACTERS} to one; --tokens-per-row says it exactly",)
    rows = rows or len(lengths)
    mean = tokens_per_row or sum(lengths) / max(1, len(lengths))
    if tokens_per_row is not None:
        lengths = [round(tokens_per_row)] * min(rows, _MANY)
    if longest is not None:
        lengths = [longest, *lengths[1:]]
    sampling, config = config, _on_completions(config)
    if sampling.sampling is not None:
        most, each = sampling.sampling.max_tokens, sampling.sampling.group
        lengths, rows, mean = [n + most for n in lengths] * each, rows * each, mean + most
    lengths = [min(n, config.data.max_length) for n in lengths]
    rates = rates_of(device, dtype)
    load = load_of(config, lengths, trained=trained, dtype=dtype, checkpointing=config.memory.recomputing == "on")
    job, teacher = _job(config, rows, mean, 0), _teacher(config, shape, dtype)
    sampled = _sampling_load(sampling, job, max(lengths, default=1))
    available = usable_memory(device) - _other_bytes(sampled, teacher, shape, dtype)
    plan = text_plan(
        config.base.name, shape, load, device, rates, job, available=available, traffic=traffic, notes=notes
    )
    return _with_sampling(plan, sampled, shape, load, device, teacher)


def planned_rows(config: TrainConfig, items: Sequence[Any]) -> dict[str, Any]:
    """Return `rows`, `tokens_per_row`, `longest` and `trained` for `plan_of_config`.

    items: the contents of a step. Lengths are those of prompts without answers, which the plan adds."""
    answer = 0 if config.sampling is None else config.sampling.max_tokens
    lengths, tokens = [item.tokens - answer for item in items], sum(item.tokens for item in items)
    return {
        "rows": len(lengths),
        "tokens_per_row": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "trained": max(0.001, sum(item.trained_tokens for item in items) / tokens),
    }


def _planned_dtype(config: TrainConfig) -> str:
    return config.base.dtype if config.base.dtype != "auto" else "bfloat16"


def _with_planned_tokens(config: TrainConfig, shape: TextShape, device: Device) -> TrainConfig:
    """Return the configuration with a planned micro-batch size, unless it sets one."""
    if config.batching.micro_tokens is not None:
        return config
    dtype, quantize = _planned_dtype(config), config.base.quantize
    available = memory_after_base(shape, device, dtype, quantize) - _teacher(config, shape, dtype).extra_bytes
    return with_micro_tokens(config, _micro_tokens_of(config, shape, device, available, dtype, quantize))


def _plan_of_images(
    config: ImageTrainConfig, fields: Mapping[str, Any], device: Device, rows: int | None, source_images: int
) -> Plan:
    from veneer.train.image.pictures import count_pictures

    source_images, directions = source_images or len(config.data.source_folders), 1
    base_passes: float = 0 if config.loss.keep_guidance is None else 2
    notes: tuple[str, ...] = ()
    if config.slider.enabled:
        rows, directions, base_passes = config.slider.scenes, 2, 1.5  # extra forward passes of the base, per row
        text = f"a slider: {counted(rows, 'scene')} that the base sampled first, training at both directions, "
        notes = (text + "three forwards of the base for both",)
    elif rows is None:
        try:
            rows, source_images = count_pictures(config.data)
        except DataError as error:
            raise DataError(error.what, where=error.where, fix=f"{error.fix}; or give --rows") from None
    batch = min(config.batching.rows, rows)
    at_once = config.batching.micro_rows or batch
    resolution = config.data.resolution or int(fields.get("picture", 1024))
    side = resolution if isinstance(resolution, int) else max(resolution)
    dtype = config.base.dtype if config.base.dtype != "auto" else "bfloat16"
    rates = rates_of(device, dtype)
    load = ImageLoad(
        at_once,
        side,
        side,
        micros=directions * -(-batch // at_once),
        rank=config.adapter.rank,
        dtype=dtype,
        quantize=config.base.quantize,
        checkpointing=config.memory.activation_checkpointing == "on" or config.memory.offload_blocks > 0,
        targets=config.adapter.targets,
        base_passes=base_passes,
        before=source_images,
        form=PairForm.of(config.adapter.spec()),
        offload=config.memory.offload_blocks if device.kind == "cuda" else 0,
    )
    job = TrainingJob(rows, 1.0, directions * float(config.schedule.epochs or 1), directions * batch, config.steps)
    return image_plan(config.base.name, fields, load, device, rates, job, notes=notes)


def base_fields(name: str) -> dict[str, Any]:
    """Return the config.json of a base.

    From the package, the veneer home, a folder, or the table."""
    from veneer.models.builtin import packaged_folder
    from veneer.models.home import bases_home

    for folder in (packaged_folder(), bases_home()):
        if name.strip("./") and (folder / name).is_dir():
            return base_config(str(folder / name))
    return base_config(name)


def _estimated_lengths(config: TrainConfig) -> list[int]:
    from veneer.train.text.rows import read_rows

    try:
        rows, _ = read_rows(
            config.data.files("train"),
            format=config.data.format,
            columns=config.data.columns,
            limit=config.data.limit,
            formats=None if config.sampling is None else PROMPT_FORMATS,
        )
    except DataError as error:
        raise DataError(error.what, where=error.where, fix="or give --rows and --tokens-per-row") from None

    def characters(row: Any) -> int:
        return len(row.text) + sum(len(str(m.get("content", ""))) + 20 for m in row.messages)

    return [max(2, characters(row) // _CHARACTERS) for row in rows]
