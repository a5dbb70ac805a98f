"""Checks of combinations of settings. Each check yields one message per problem.

`user_keys` contains the keys that the user set, as `section.key`. The checks read settings only, no files or
models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from urllib.parse import urlsplit

from veneer.core.adapter import check_strength
from veneer.errors import ConfigError, bullets, counted, shown
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.section import BASE_MODEL, changed_keys
from veneer.train.config.text import PREFERENCE_KEYS, TrainConfig, layer_indices, preference_formats


def text_problems(config: TrainConfig, user_keys: Collection[str]) -> Iterator[str]:
    """Yield the problems of a text configuration."""
    if not config.data.files("train"):
        yield "`data.train` is an empty list: name at least one file"
    yield from _held_out(config, "rows")
    if config.data.validation is not None or config.data.split == 0:
        yield from _unused(config, "data", "`data.split`", "split_seed")
    yield from _batching(config, user_keys)
    yield from _preference(config)
    yield from _reinforcement(config)
    yield from _distillation(config)
    yield from _kind(config)
    yield from _int8(config)
    named = [f"`adapter.{key}`" for key in changed_keys(config.adapter) if key not in ("start", "dropout")]
    if config.adapter.start is not None and named:
        yield f"{', '.join(named)} cannot be combined with `adapter.start`, which brings its own settings"
    yield from _run(config)


def image_problems(config: ImageTrainConfig, user_keys: Collection[str]) -> Iterator[str]:
    """Yield the problems of an image configuration.

    user_keys: the user's keys, without the keys of a preset."""
    yield from (_slider if config.slider.enabled else _pictures)(config, user_keys)
    yield from _samples_and_output(config)
    yield from _kind(config)
    yield from _run(config)


def _unused(config: TrainConfig | ImageTrainConfig, section: str, needs: str, *keys: str) -> Iterator[str]:
    """Yield a problem for each changed key of a section that has no effect without `needs`.

    keys: the keys to check; the default is all keys of the section."""
    for key in changed_keys(getattr(config, section)):
        if not keys or key in keys:
            yield _does_nothing(f"{section}.{key}", needs)


def _does_nothing(key: str, needs: str) -> str:
    return f"`{key}` needs {needs}; otherwise, the key has no effect"


def check_group(configs: Sequence[TrainConfig | ImageTrainConfig], names: Sequence[str]) -> None:
    """Raise ConfigError if the configurations cannot be trained in one pass.

    They need the same base and memory settings, and different output folders. The error lists the files
    (`names`) and keys."""
    problems: list[str] = []
    folders: dict[str, str] = {}
    first = configs[0].model_dump(mode="json")
    for config, name in zip(configs, names, strict=True):
        if isinstance(config, ImageTrainConfig):
            problems.append(f"{name} is an image configuration")
        elif len(configs) > 1 and config.sampling is not None:
            text = f"{name} samples completions, and the other runs would have to wait"
            problems.append(f"{config.sampling.named}: {text}")
        values = config.model_dump(mode="json")
        problems += [
            f"{section}.{key}: {value!r} in {names[0]}, {values[section].get(key)!r} in {name}"
            for section in ("base", "memory")
            for key, value in first[section].items()
            if values[section].get(key) != value
        ]
        folder = config.output.directory
        if folder in folders:
            problems.append(f"output.directory: {folder} in {folders[folder]} and in {name}")
        folders[folder] = name
    if problems:
        fix = "use the same base and memory settings and a separate output for each run, "
        fix += "or train them one after another"
        raise ConfigError(f"these configurations cannot be trained in one pass:\n{bullets(problems, None)}", fix=fix)


def _held_out(config: TrainConfig | ImageTrainConfig, noun: str) -> Iterator[str]:
    """Check the settings of held-out rows or images."""
    data = config.data
    if data.validation is not None and data.split:
        yield f"`data.validation` and `data.split` both hold {noun} out: keep one"
    if isinstance(data.split, float) and data.split >= 1:
        yield f"`data.split: {data.split}` is a share and must be below 1; an integer counts {noun}"
    if config.evaluation.patience is not None and data.validation is None and data.split == 0:
        yield f"`evaluation.patience` needs held-out {noun}: give `data.validation` or `data.split`"


def _batching(config: TrainConfig, user_keys: Collection[str]) -> Iterator[str]:
    batching = config.batching
    if batching.mode == "bucket":
        yield from _unused(config, "batching", "`batching.mode: pack`", "tokens")
        return
    if batching.tokens is None:
        yield "`batching.mode: pack` needs `batching.tokens`, the number of tokens per step (for example 8192)"
    if "batching.rows" in user_keys:
        yield _does_nothing("batching.rows", "`batching.mode: bucket`")


def _preference(config: TrainConfig) -> Iterator[str]:
    loss, data = config.preference.loss, config.data
    if loss is None:
        yield from _unused(config, "preference", "`preference.loss` (dpo, ipo, orpo, kto or simpo)")
        if data.format in preference_formats("kto"):
            yield f"`data.format: {data.format}` needs `preference.loss`, for example dpo"
        return
    for key in changed_keys(config.preference):
        if key != "loss" and loss not in PREFERENCE_KEYS[key]:
            yield f"`preference.{key}` is not used by {loss}; it belongs to {', '.join(PREFERENCE_KEYS[key])}"
    formats = preference_formats(loss)
    if data.format not in ("auto", *formats):
        takes = " or ".join(f"`{name}`" for name in formats)
        yield f"`data.format: {data.format}` has no answers that {loss} can compare: use {takes}"
    if data.train_on == "all":
        yield "`data.train_on: all` would compare the prompts as well; leave it at `assistant`"
    if loss == "kto" and config.batching.mode == "bucket" and config.batching.rows < 2:
        yield "kto estimates its reference point from other prompts of the batch; set `batching.rows` to 2 or more"


def _reinforcement(config: TrainConfig) -> Iterator[str]:
    r, data = config.reinforcement, config.data
    if r.loss is None:
        yield from _unused(config, "reinforcement", "`reinforcement.loss` (as grpo)")
        if data.format == "prompt" and config.sampling is None:
            yield "`data.format: prompt` has no answers to train on; set `reinforcement.loss` to sample completions"
        return
    if config.preference.loss is not None:
        yield "`reinforcement.loss` and `preference.loss` exclude each other: keep one"
    if not r.rewards:
        yield "`reinforcement.rewards` is empty: name at least one, for example - {kind: exact_match}"
    if r.group == 1 and r.with_defaults().baseline in ("group", "others"):
        text = f"`reinforcement.group: 1` gives {r.loss} no other completion to compare with: set 2 or more, or "
        text += "`reinforcement.baseline: batch`"
        yield text
    if not r.samplers:
        yield from _unused(config, "reinforcement", "`reinforcement.samplers`", "publish", "staleness")
    for url in map(urlsplit, r.samplers):
        if url.scheme not in ("http", "https") or not url.hostname or url.query or "@" in url.netloc:
            yield f"`reinforcement.samplers`: {shown(url.hostname)} is not a URL like http://host:8000, without a key"
    if r.staleness % r.updates:
        yield f"`reinforcement.staleness: {r.staleness}` must be a multiple of `reinforcement.updates: {r.updates}`"
    if len(r.grammar) > 1:
        yield f"`reinforcement.grammar` has {len(r.grammar)} kinds, but a completion can match only one"
    yield from _sampling(config)


def _distillation(config: TrainConfig) -> Iterator[str]:
    d = config.distillation
    if d.teacher is None:
        yield from _unused(config, "distillation", "`distillation.teacher` (an adapter, or base)")
        return
    other_losses = {"reinforcement.loss": config.reinforcement.loss, "preference.loss": config.preference.loss}
    for key in (key for key, loss in other_losses.items() if loss is not None):
        yield f"`distillation.teacher` and `{key}` exclude each other: keep one"
    if d.base is not None and d.teacher != BASE_MODEL:
        yield "`distillation.base` is a teacher without adapters: give `distillation.teacher: base`"
    if d.teacher == BASE_MODEL and d.base is None and not d.system and config.adapter.start is None:
        text = "`distillation.teacher: base` predicts the same as a new adapter, so there is nothing to learn: "
        text += "set `distillation.system`, `distillation.base`, or `adapter.start`"
        yield text
    yield from _sampling(config)


def _sampling(config: TrainConfig) -> Iterator[str]:
    """Check the settings of a run that samples completions."""
    data = config.data
    if data.format not in ("auto", *PROMPT_FORMATS):
        yield f"`data.format: {data.format}` has no prompts to sample completions for"
    if config.adapter.dropout:
        yield "`adapter.dropout` would train a different model than the one that samples completions: set it to 0"
    if config.batching.mode != "bucket":
        yield "`batching.mode: pack` counts tokens, but lengths of completions are unknown; use `batching.rows`"
    if config.memory.shard:
        yield "`memory.shard`: completions are sampled by one process with the full base"


def _kind(config: TrainConfig | ImageTrainConfig) -> Iterator[str]:
    """Check for keys that do not apply to the adapter kind."""
    kind = config.adapter.kind
    if kind != "lokr":
        yield from _unused(config, "adapter", "`adapter.kind: lokr`", "factor", "decompose_both")
    if kind == "lora":
        return
    of_lora = ("dora", "init", "dropout", "modules_to_save", "token_rows")
    yield from _unused(config, "adapter", "`adapter.kind: lora`", *of_lora)
    yield from _unused(config, "optimizer", "A and B, which only `adapter.kind: lora` has", "loraplus_ratio")
    if isinstance(config, ImageTrainConfig) and config.output.layout == "diffusers":
        yield f"`adapter.kind: {kind}` cannot be saved in the diffusers layout: set `output.layout` to kohya or peft"


def _int8(config: TrainConfig) -> Iterator[str]:
    """Check for settings that int8 products do not support."""
    if config.base.compute != "int8":
        return
    if config.base.quantize is not None:
        yield "`base.compute: int8` multiplies by its own 8-bit copies of the weights: remove `base.quantize`"
    if config.memory.shard:
        yield "`base.compute: int8` does not support sharded weights: remove `memory.shard`"
    if config.preference.loss is not None or config.sampling is not None:
        text = "`base.compute: int8` supports only likelihood losses: others compare two models' log-probabilities, "
        yield text + "one of which would be computed in 16 bits"


def _pictures(config: ImageTrainConfig, user_keys: Collection[str]) -> Iterator[str]:
    data = config.data
    if not data.folders:
        yield "`data.pictures` is required: name at least one folder of pictures, or a slider's two prompts"
    yield from _held_out(config, "pictures")
    if data.class_count > 0 and data.class_prompt is None:
        text = f"`data.class_count: {data.class_count}` needs `data.class_prompt`, what the class pictures show "
        text += "(for example: a photo of a dog)"
        yield text
    if data.class_folder is None and not data.class_count:
        yield from _unused(config, "data", "class pictures (`data.class_folder` or `data.class_count`)", "class_prompt")
    for key in type(config.slider).model_fields:
        if f"slider.{key}" in user_keys and key not in ("positive", "negative"):
            yield _does_nothing(f"slider.{key}", "`slider.positive` and `slider.negative`")


def _slider(config: ImageTrainConfig, user_keys: Collection[str]) -> Iterator[str]:
    """Check a slider's prompts, and check for keys that need training images."""
    slider = config.slider
    for key, opposite in (("positive", "negative"), ("negative", "positive")):
        if getattr(slider, key) is None:
            yield f"`slider.{key}` is required with `slider.{opposite}`: a direction has two ends"
    first, second = ((end or "").lower().split() for end in (slider.positive, slider.negative))
    if first and first == second:
        yield "`slider.positive` and `slider.negative` are equal, so there is no direction between them"
    if not slider.strengths:
        yield "`slider.strengths` is empty: give at least one, for example [-1, 0, 1]"
    for strength in slider.strengths:
        try:
            check_strength("a column of the sample sheets", strength)
        except ConfigError as error:
            yield f"`slider.strengths`: {error.what}; give {error.fix}"
    if not isinstance(config.data.resolution, int | None):
        yield "`data.resolution` must be one number for a slider: the base generates the scenes at that size"
    of_pictures = {"loss.guidance", "loss.keep_guidance", "evaluation.patience", "preset"}
    of_pictures |= {key for key in user_keys if key.startswith("data.")} - {"data.resolution", "data.cache"}
    if idle := sorted(of_pictures & set(user_keys)):
        yield f"{', '.join(f'`{key}`' for key in idle)}: a slider trains without pictures; leave this out"
    if config.adapter.text_encoders:
        yield "`adapter.text_encoders` cannot be used with a slider, which trains the denoiser only; leave it out"


def _samples_and_output(config: ImageTrainConfig) -> Iterator[str]:
    output, memory, samples = config.output, config.memory, config.samples
    if not (samples.prompts or config.slider.target):  # without sample prompts, the slider's target is the prompt
        yield from _unused(config, "samples", "`samples.prompts`: prompts of the sample pictures", "every")
    if samples.before and len(samples.before) not in (1, len(samples.prompts)):
        prompt_count = counted(len(samples.prompts), "prompt")
        yield f"`samples.before`: {len(samples.before)} for {prompt_count}; give 1, or one per prompt"
    source_counts = {len(paths) for paths in samples.starts}
    if samples.before and (len(source_counts) > 1 or 0 in source_counts):
        yield "`samples.before`: every prompt needs the same number of source pictures, at least one"
    if samples.prompts and not samples.seeds:
        yield "`samples.seeds` is empty: give at least one"
    if output.layout == "peft" and config.adapter.text_encoders:
        yield "`output.layout: peft` supports the denoiser only; with `adapter.text_encoders` use diffusers or kohya"
    if memory.activation_checkpointing == "off":
        yield from _unused(config, "memory", "`memory.activation_checkpointing`", "offload_blocks")
    if config.base.quantize is not None and memory.offload_blocks > 0:
        yield "`base.quantize` and `memory.offload_blocks` exclude each other: quantized weights stay where they are"
    if output.name is not None and ("/" in output.name or "\\" in output.name):
        yield f"`output.name: {output.name}` must be a file name without folders"


def _run(config: TrainConfig | ImageTrainConfig) -> Iterator[str]:
    """Check settings that text and image runs share: schedule, layers."""
    schedule, adapter, warmup = config.schedule, config.adapter, config.schedule.warmup
    if schedule.epochs is not None and schedule.steps is not None:
        yield "`schedule.epochs` and `schedule.steps` both set the length of the run: keep one"
    if isinstance(warmup, float) and warmup >= 1:
        yield f"`schedule.warmup: {warmup}` is a share of all steps and must be below 1; an integer counts steps"
    elif schedule.steps is not None and warmup >= schedule.steps:
        yield f"`schedule.warmup: {warmup}` never ends within `schedule.steps: {schedule.steps}`"
    if not _are_blocks(adapter.layers):
        yield f"`adapter.layers: {adapter.layers}` is not a list of block numbers or ranges such as 0-3,28-29"


def _are_blocks(layers: str | tuple[int, ...] | None) -> bool:
    try:
        indices = layer_indices(layers)
    except ValueError:
        return False
    return indices is None or (bool(indices) and min(indices) >= 0)
