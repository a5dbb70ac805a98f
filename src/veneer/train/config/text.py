"""The text training configuration: sections, keys, defaults and reasons.

config.image has the image training configuration, which shares some sections. `docs/reference/config.md` is
generated from this file (`reference`). This module does not depend on files, overrides, models or torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic import Field, PositiveInt

from veneer.ops.step_sizes import MICRO_TOKENS
from veneer.train.config.distillation import DistillationSection
from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.config.section import Section, setting

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec


_Decay = Annotated[float, Field(ge=0, lt=1)]
_SAMPLE_TOKENS, _SAMPLE_FROM = 40, 100
"""Maximum tokens of a card's sample completions, and minimum steps of a run that samples them."""


class BaseSection(Section):
    """The base model. `base: NAME` is short for `base: {name: NAME}`."""

    name: str = setting(..., "built-in name, hub id, folder or .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision of frozen weights", "bfloat16 for weights stored in 16 bits or fewer, otherwise float32"
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", "a GPU if present")
    quantize: Literal["nf4", "fp4", "int8", "keep"] | None = setting(
        None,
        "4- or 8-bit linear weights (QLoRA; nf4 with double quantization); keep: the quantized blocks of a GGUF file",
        "full precision",
    )


class TextBaseSection(BaseSection):
    """The base model. `base: NAME` is short for `base: {name: NAME}`."""

    compute: Literal["auto", "int8"] = setting(
        "auto",
        "arithmetic of products with frozen weights in training; int8: less exact (arXiv 2304.13013), but faster "
        "if `veneer doctor` shows a higher rate for int8",
        "the dtype of the weights",
    )


class PairsSection(Section):
    """Adapted modules, rank and initialization."""

    rank: int = setting(16, "LoRA rank", "enough for thousands of rows (LoRA Without Regret)", gt=0)
    alpha: float = setting(
        32.0, "scale is alpha / rank", "the best learning rate is then independent of rank (same study)", gt=0
    )
    targets: str | tuple[str, ...] = setting(
        "all-linear",
        "modules to adapt: names, .suffixes, globs, re:REGEX, or all-linear",
        "adapting only attention layers is worse (same study)",
    )
    exclude: tuple[str, ...] = setting((), "targets to leave out")
    layers: str | tuple[int, ...] | None = setting(None, "layers to adapt: indices, or ranges such as 0-3,28-29", "all")
    rank_pattern: dict[str, PositiveInt] = setting({}, "target: rank; the first match wins")
    alpha_pattern: dict[str, float] = setting({}, "target: alpha; the first match wins")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    dora: bool = setting(False, "also train magnitudes (DoRA, arXiv 2402.09353); a quarter slower")
    dropout: float = setting(0.0, "LoRA dropout", "no gain at this size; slower", ge=0, lt=1)
    init: Literal["zero-b", "gaussian", "pissa", "olora", "loftq"] = setting(
        "zero-b", "initialization; loftq: from the quantization error", "step 0 equals the base"
    )
    kind: Literal["lora", "loha", "lokr"] = setting(
        "lora", "LoRA, LoHa (arXiv 2108.06098) or LoKr (arXiv 2212.10650)", "read by most tools; fastest"
    )
    factor: int | None = setting(
        None,
        "lokr: size of the first factor; with a large rank the second factor is not decomposed",
        "nearly square, which makes the smallest file",
        gt=0,
    )
    decompose_both: bool = setting(
        False, "lokr: decompose the first factor too, if the rank is below half of its larger side"
    )

    def recipe_values(self) -> dict[str, Any]:
        """Return the settings for a recipe.

        `kind` is omitted for LoRA, because recipes written before other kinds existed do not have it."""
        form = {"kind", "factor", "decompose_both"} if self.kind == "lora" else set[str]()
        return self.model_dump(mode="json", exclude=form)

    def spec(self) -> LoraSpec:
        """Return the LoraSpec of these settings, with `layers` as indices."""
        from veneer.core.adapter import LoraSpec

        fields = LoraSpec.__dataclass_fields__
        values = {name: getattr(self, name) for name in type(self).model_fields if name in fields}
        values["layers"] = layer_indices(self.layers)
        return LoraSpec(**values)


class AdapterSection(PairsSection):
    """The trained adapter."""

    start: str | None = setting(
        None, "adapter to continue from (folder, file, library name), with its ranks, targets, scales", "a new adapter"
    )
    modules_to_save: tuple[str, ...] = setting((), "modules trained in full and saved as copies")
    token_rows: dict[str, tuple[int, ...]] = setting({}, "embedding module: ids of trained token rows")


class DataSection(Section):
    """Training rows, their format, and the tokens to train on."""

    train: str | tuple[str, ...] = setting(
        ..., "JSONL, JSON, CSV, TSV or Parquet files, globs, hub:ID@SPLIT, reasoning-gym:TASK@ROWS"
    )
    validation: str | tuple[str, ...] | None = setting(None, "held-out files")
    split: int | float | None = setting(
        None,
        "held-out rows: a number, or a share of `train`; 0 for none",
        "without `validation`, 5%, at most 500",
        ge=0,
    )
    split_seed: int | None = setting(None, "seed of `split`; equal seeds hold out equal rows", "`seed`", ge=0)
    format: Literal[
        "auto",
        "messages",
        "prompt-completion",
        "instruction",
        "sharegpt",
        "text",
        "preference",
        "openai-preference",
        "unpaired-preference",
        "prompt",
    ] = setting("auto", "format of the rows", "from the columns")
    columns: dict[str, str] = setting(
        {}, "maps veneer's columns to yours, such as {prompt: question, completion: answer}"
    )
    limit: int | None = setting(None, "use only the first rows", gt=0)
    chat_template: str = setting("auto", "auto, none, or a .jinja file", "the tokenizer's, as in inference")
    train_on: Literal["assistant", "last", "completion", "all"] = setting(
        "assistant",
        "trained tokens: all assistant turns, the last one, all turns after the last user turn, or all tokens",
        "training on questions wastes capacity",
    )
    max_length: int = setting(2048, "maximum tokens of a row", "covers most chat rows", gt=1)
    long_rows: Literal["refuse", "drop", "cut"] = setting(
        "refuse", "longer rows: stop, leave out, or cut (oldest prompt tokens, then the end)"
    )

    def files(self, split: Literal["train", "validation"]) -> tuple[str, ...]:
        value = getattr(self, split)
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)


class PreferenceSection(Section):
    """Training on pairs of a better and a worse completion.

    Each row of a step is a pair or, for kto, a single completion. The reference model is the base, or the
    adapter in `adapter.start` as it was before training."""

    loss: Literal["dpo", "ipo", "orpo", "kto", "simpo"] | None = setting(
        None, "preference loss; kto also takes single judged answers"
    )
    beta: float | None = setting(
        None,
        "strength of the reference (dpo, ipo, kto), odds ratio weight (orpo), logprob scale (simpo)",
        "0.1; simpo 2, as in the papers",
        gt=0,
    )
    gamma: float | None = setting(None, "target margin (simpo)", "beta / 2", ge=0)
    label_smoothing: float = setting(0.0, "assumed share of swapped pairs (dpo, simpo)", ge=0, lt=0.5)
    length_normalized: bool | None = setting(None, "compare log-ratios per token (dpo, ipo)", "ipo true, dpo false")
    nll: float | None = setting(
        None,
        "weight of −log p(chosen) per token (dpo, ipo, orpo, simpo)",
        "orpo 1, otherwise 0; 1 helps dpo (arXiv 2404.19733)",
        ge=0,
    )
    desirable: float = setting(1.0, "weight of desirable answers (kto)", gt=0)
    undesirable: float = setting(1.0, "weight of undesirable answers (kto)", gt=0)

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss needs a reference model (see the class)."""
        return self.loss in ("dpo", "ipo", "kto")

    def with_defaults(self) -> PreferenceSection:
        """Return the settings, where each unset key that `loss` uses has the default for this loss."""
        is_simpo = self.loss == "simpo"
        beta = self.beta or (2.0 if is_simpo else 0.1)
        defaults = {"beta": beta, "gamma": beta / 2, "length_normalized": self.loss == "ipo"}
        defaults["nll"] = 1.0 if self.loss == "orpo" else 0.0
        unset = [key for key in defaults if getattr(self, key) is None and self.loss in PREFERENCE_KEYS[key]]
        return self.model_copy(update={key: defaults[key] for key in unset})


def preference_formats(loss: str) -> tuple[str, ...]:
    """Return the row formats that a preference loss accepts."""
    return ("preference", "openai-preference", *(("unpaired-preference",) if loss == "kto" else ()))


PREFERENCE_KEYS = {
    "beta": ("dpo", "ipo", "orpo", "kto", "simpo"),
    "gamma": ("simpo",),
    "label_smoothing": ("dpo", "simpo"),
    "length_normalized": ("dpo", "ipo"),
    "nll": ("dpo", "ipo", "orpo", "simpo"),
    "desirable": ("kto",),
    "undesirable": ("kto",),
}
"""Key of `preference` -> the losses that use the key."""


class BatchingSection(Section):
    """Size of a step (one optimizer update) and of a micro-batch (rows in memory at once)."""

    mode: Literal["bucket", "pack"] = setting(
        "bucket", "bucket: `rows` rows per step; pack: `tokens` tokens per step; neither pads", "equal row counts"
    )
    rows: int = setting(16, "rows per step in mode `bucket`", "large batches hurt LoRA (TRL advises below 32)", gt=0)
    tokens: int | None = setting(None, "tokens per step in mode `pack`", gt=0)
    micro_rows: int | None = setting(None, "maximum rows of a micro-batch; does not change the result", gt=0)
    micro_tokens: int | None = setting(
        None,
        "maximum tokens of a micro-batch; does not change the result",
        "CPU 2,048; GPU 2,048 to 16,384, by speed and memory",
        gt=0,
    )
    longest_first: bool = setting(True, "run the longest step first", "out-of-memory errors show at once")

    @property
    def at_once(self) -> int:
        """Return `micro_tokens`, or the minimum if the run has not yet chosen a value for the device."""
        return self.micro_tokens or MICRO_TOKENS


class OptimizerSection(Section):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adam", "adafactor", "sgd"] = setting(
        "adamw", "optimizer", "used by the studies cited below; an adapter's moments are small"
    )
    learning_rate: float = setting(
        2e-4, "peak learning rate; useful: 1e-4 to 1e-3", "as QLoRA; 10x full fine-tuning (LoRA Without Regret)", gt=0
    )
    betas: tuple[_Decay, _Decay] = setting((0.9, 0.999), "decay of moments (adam family)")
    eps: float = setting(1e-8, "denominator term (adam family)", gt=0)
    weight_decay: float = setting(0.0, "weight decay of the adapter", "decaying B undoes training", ge=0)
    loraplus_ratio: float = setting(1.0, "B's learning rate / A's (LoRA+, arXiv 2402.12354)", "plain LoRA", gt=0)
    clip: float | None = setting(1.0, "maximum gradient norm; null: no limit", "a single row cannot ruin a run", gt=0)


class ScheduleSection(Section):
    """Learning rate schedule and length of the run."""

    name: Literal["constant", "linear", "cosine"] = setting(
        "linear", "schedule after warm-up", "decay to zero reaches a lower loss"
    )
    warmup: int | float = setting(0.03, "warm-up steps, or share of all steps", "QLoRA's", ge=0)
    floor: float = setting(0.0, "final learning rate, as share of the peak", ge=0, le=1)
    epochs: int | None = setting(None, "epochs", "3 without `steps`; the best checkpoint is saved", gt=0)
    steps: int | None = setting(None, "optimizer steps, instead of epochs", gt=0)


class EvaluationSection(Section):
    """Scoring on the held-out split."""

    every: PositiveInt | Literal["epoch"] = setting("epoch", "steps between evaluations, or `epoch`")
    patience: int | None = setting(None, "stop after this many evaluations without improvement", "never", gt=0)
    rows: int | None = setting(None, "maximum held-out rows to score", "all", gt=0)
    at_start: bool = setting(True, "score the base before step one, as the baseline")
    keep: Literal["best", "last"] = setting("best", "save the adapter with the lowest held-out loss, or the last one")
    sample: int | None = setting(
        None,
        "maximum tokens of the card's sample answers to a held-out prompt; 0: none; only in runs on one device",
        f"{_SAMPLE_TOKENS} for runs of {_SAMPLE_FROM} steps or more, otherwise none",
        ge=0,
    )

    def sample_tokens(self, steps: int) -> int:
        """Return the maximum tokens of the card's sample completions for a run of `steps` steps."""
        default = _SAMPLE_TOKENS if steps >= _SAMPLE_FROM else 0
        return default if self.sample is None else self.sample


class CheckpointSection(Section):
    """Checkpoints to resume from."""

    every: PositiveInt | Literal["epoch"] = setting(100, "steps between checkpoints, or `epoch`")
    keep: int = setting(2, "newest checkpoints to keep, besides the best", gt=0)
    adapters: bool = setting(False, "save a loadable adapter in each checkpoint; jobs add it to the library")


class MemorySection(Section):
    """Memory limits and trade-offs."""

    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto", "recompute activations: less memory, a fifth to a third slower", "off if memory allows"
    )
    limit_gb: float | None = setting(None, "memory limit in GB", "free memory", gt=0)
    shard: bool = setting(False, "split frozen weights over devices (FSDP2); slower")
    keep_dequantized_gb: float | None = setting(
        None, "memory for dequantized weights between uses; 0: none", "as planned", ge=0
    )
    keep_packed_gb: float | None = setting(
        None, "memory for prepacked weights on a CPU, if faster; 0: none", "as planned", ge=0
    )


class OutputSection(Section):
    """The output folder. `output: DIR` is short for `output: {directory: DIR}`."""

    directory: str = setting(..., "folder for adapter, checkpoints, log, report")


class ReportSection(Section):
    """Experiment trackers, in addition to the log and the report."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = setting((), "experiment trackers; each is an extra")
    project: str = setting("veneer", "W&B project; `team/project` sets the entity", min_length=1)
    name: str | None = setting(None, "run name", "the output folder's")
    tags: tuple[str, ...] = setting((), "run tags")


class TrainConfig(Section):
    """The text training configuration.

    `base.name`, `data.train` and `output.directory` are required."""

    base: TextBaseSection
    data: DataSection
    output: OutputSection
    adapter: AdapterSection = AdapterSection()
    preference: PreferenceSection = PreferenceSection()
    reinforcement: ReinforcementSection = ReinforcementSection()
    distillation: DistillationSection = DistillationSection()
    batching: BatchingSection = BatchingSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    memory: MemorySection = MemorySection()
    report: ReportSection = ReportSection()
    seed: int = setting(0, "seed of initialization, data order and dropout", ge=0)

    @property
    def split_seed(self) -> int:
        """Return the seed that selects the held-out rows."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @property
    def epochs(self) -> int | None:
        """Return the number of epochs, or None if `schedule.steps` is set."""
        return None if self.schedule.steps is not None else self.schedule.epochs or 3

    @property
    def steps(self) -> int | None:
        """Return the number of optimizer steps, or None if the number of epochs is set."""
        return self.schedule.steps

    @property
    def sampling(self) -> ReinforcementSection | DistillationSection | None:
        """Return the section of a run that samples completions, or None for other runs."""
        if self.distillation.teacher is not None:
            return self.distillation
        return self.reinforcement if self.reinforcement.loss is not None else None

    def recipe(self) -> dict[str, Any]:
        """Return the settings for a card, without the output and report sections.

        Paths are reduced to file names."""
        unused = {"preference"} if self.preference.loss is None else set[str]()
        unused |= {"reinforcement"} if self.reinforcement.loss is None else set()
        unused |= {"distillation"} if self.distillation.teacher is None else set()
        recipe = self.model_dump(mode="json", exclude={"output", "report", *unused})
        recipe["adapter"] = self.adapter.recipe_values()
        if self.base.compute == "auto":  # recipes written before this key existed do not have it
            del recipe["base"]["compute"]
        paths = [(recipe["data"], ("train", "validation", "chat_template")), (recipe["base"], ("name",))]
        paths += [(recipe["adapter"], ("start",)), (recipe.get("distillation", {}), ("teacher", "base"))]
        paths += [(reward, ("file", "model")) for reward in recipe.get("reinforcement", {}).get("rewards", ())]
        for settings, keys in paths:
            settings |= {key: file_names(settings[key]) for key in keys if key in settings}
        return recipe


def file_names(value: Any) -> Any:
    """Return the last part of an absolute path, also in lists; return other values unchanged."""
    if isinstance(value, list):
        return [file_names(v) for v in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def layer_indices(layers: str | Iterable[int] | None) -> tuple[int, ...] | None:
    """Return layers as indices: `"0-3,28"` -> (0, 1, 2, 3, 28).

    A list becomes a tuple, and None (all blocks) remains None. Raises ValueError."""
    if layers is None or not isinstance(layers, str):
        return None if layers is None else tuple(layers)
    indices: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(part)
        indices += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(indices))


def sections(config: type[Section] = TrainConfig) -> dict[str, type[Section]]:
    """Return the sections of a configuration by name."""
    return {
        name: f.annotation
        for name, f in config.model_fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
    }


SECTIONS = sections()


def config_keys(config: type[Section] = TrainConfig) -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    """Yield every `section.key` in the order of the reference page.

    Keys outside of sections are last."""
    models = sections(config)
    for name, model in models.items():
        for key, f in model.model_fields.items():
            yield f"{name}.{key}", f
    for name, f in config.model_fields.items():
        if name not in models:
            yield name, f


def why(f: pydantic.fields.FieldInfo) -> str:
    """Return the reason for a field's default, or ""."""
    schema_extra = f.json_schema_extra
    return str(schema_extra.get("why", "")) if isinstance(schema_extra, dict) else ""


def default_source(f: pydantic.fields.FieldInfo) -> str:
    """Return the origin of a field's default as text."""
    return f"default ({why(f)})" if why(f) else "default"


def reference(
    config: type[Section] = TrainConfig,
    made_by: str = "python -m veneer.train.config.text > docs/reference/config.md",
    title: str = "Configuration",
) -> str:
    """Return the reference page with every key, generated from the fields.

    A test compares docs/reference/config.md with the page."""
    out = [
        f"# {title}",
        "",
        f"Written by `{made_by}`.",
        "Set keys in the file or as `veneer train CONFIG.yaml section.key=value …` (values are YAML).",
        "Paths are relative to the file's folder; in overrides, to the current folder.",
        "",
    ]
    for name, model in sections(config).items():
        out += [f"## {name}", "", " ".join((model.__doc__ or "").split()), ""]
        of_text = set() if config is TrainConfig else {*_rows(SECTIONS.get(name, Section)).values()}
        rows = _rows(model)
        if shared := ", ".join(f"`{key}`" for key, row in rows.items() if row in of_text):
            out += [f"Same as for [text](config.md#{name}): {shared}.", ""]
        if own := [row for row in rows.values() if row not in of_text]:
            out += ["| key: default | type | meaning |", "| --- | --- | --- |", *own, ""]
    for name, f in config_keys(config):
        if "." not in name:
            out += [f"## {name}", "", f"{_key(name, f)} ({_kind(f)}): {f.description}.", ""]
    return "\n".join(out)


def _rows(model: type[Section]) -> dict[str, str]:
    """Return the table row of each key of a section."""
    rows = {}
    for key, f in model.model_fields.items():
        label = "Default" if f.default in (None, "auto") else "Reason"
        meaning = f"{f.description}. {label}: {why(f)}" if why(f) else str(f.description)
        meaning = meaning.replace("|", "\\|")
        rows[key] = f"| {_key(key, f)} | {_kind(f)} | {meaning} |"
    return rows


def _kind(f: pydantic.fields.FieldInfo) -> str:
    """Return the types of a key in YAML's terms. null is omitted if it is the default."""

    def names(annotation: Any) -> Iterator[str]:
        origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
        if origin is Literal:
            yield from (f"`{value}`" for value in arguments)
        elif origin in (Union, UnionType):
            for argument in arguments:
                yield from names(argument)
        elif origin is Annotated:  # PositiveInt
            yield from names(arguments[0])
        elif origin is not NoneType or f.default is not None:
            yield {tuple: "list", NoneType: "null"}.get(origin) or origin.__name__

    return ", ".join(dict.fromkeys(names(f.annotation)))


def _key(key: str, f: pydantic.fields.FieldInfo) -> str:
    """Return the key with its default, as YAML."""
    if f.is_required():
        return f"`{key}`, required"
    value = list(f.default) if isinstance(f.default, tuple) else f.default
    words = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, str) and value.startswith("#"):
        default = f'"{value}"'
    else:
        default = words[value] if value is None or value == "" or isinstance(value, bool) else str(value)
    return f"`{key}: {default}`"


if __name__ == "__main__":
    print(reference(), end="")
