"""What a training configuration holds: every section and key, its default, its meaning, and the reason for the default.

`docs/reference/config.md` is made from this file (`reference`). Does not know files, overrides, models or torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec


__all__ = ["SECTIONS", "Section", "TrainConfig", "keys", "layer_indices", "reference", "why"]


def _key(default: Any, doc: str, why: str = "", **limits: Any) -> Any:
    """A field: default, one line of meaning, and the reason for the default where it is a choice."""
    return Field(default, description=doc, json_schema_extra={"why": why}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False)


class BaseSection(Section):
    """Which model is trained on. `base: NAME` is short for `base: {name: NAME}`."""

    name: str = _key(..., "built-in name (smollm2-135m), hub id, directory or .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "auto", "precision of the frozen weights", "bfloat16 where the device computes it in hardware, else float32"
    )
    device: str = _key("auto", "auto, cpu, cuda or cuda:N", "a GPU if there is one")


class AdapterSection(Section):
    """What is trained: which modules get a pair, of which rank, and how it starts."""

    rank: int = _key(
        16, "rank of every pair", "enough for thousands of rows (LoRA Without Regret: rank rarely limits)", gt=0
    )
    alpha: float = _key(
        32.0, "scale is alpha / rank", "alpha 32 makes the best learning rate independent of rank (same study)", gt=0
    )
    targets: str | tuple[str, ...] = _key(
        "all-linear",
        "modules that get a pair: names, .suffixes, globs, re:REGEX, or all-linear",
        "all linear layers and experts; attention alone loses even at equal size (LoRA Without Regret)",
    )
    exclude: tuple[str, ...] = _key((), "targets to leave out again")
    layers: str | tuple[int, ...] | None = _key(
        None, "blocks to train: a list of indices, or ranges as 0-3,28-29; nothing means all"
    )
    rank_pattern: dict[str, int] = _key({}, "target: rank, where it differs; the first match wins")
    alpha_pattern: dict[str, float] = _key({}, "target: alpha, where it differs; the first match wins")
    rslora: bool = _key(False, "scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    dora: bool = _key(False, "train magnitudes as well (arXiv 2402.09353); about a quarter slower")
    dropout: float = _key(
        0.0,
        "share of a pair's input zeroed while training",
        "no gain at this size, and the fast path needs none",
        ge=0,
        lt=1,
    )
    init: Literal["zero-b", "gaussian", "pissa", "olora"] = _key(
        "zero-b", "how pairs start", "the base as it is, at step 0"
    )
    modules_to_save: tuple[str, ...] = _key((), "modules trained whole, as copies in the adapter (large files)")
    token_rows: dict[str, tuple[int, ...]] = _key({}, "embedding module: token ids whose rows are trained alone")

    def spec(self) -> LoraSpec:
        """The same as core's LoraSpec, with `layers` as indices."""
        from veneer.core.adapter import LoraSpec

        values = {name: getattr(self, name) for name in type(self).model_fields}
        values["layers"] = layer_indices(self.layers)
        return LoraSpec(**values)


class DataSection(Section):
    """Where rows come from, what they look like, and which of their tokens are learned."""

    train: str | tuple[str, ...] = _key(
        ..., "JSONL, JSON, CSV, TSV or Parquet files, globs, or a hub data set as hub:ID@SPLIT"
    )
    validation: str | tuple[str, ...] | None = _key(None, "rows never trained on, in files of their own")
    split: int | float | None = _key(
        None,
        "rows (whole number) or share (0 to 1) of `train` held out; 0 for none",
        "5% of the rows, at most 500, when no `validation` is given: without it over-fitting cannot be seen",
        ge=0,
    )
    format: Literal["auto", "messages", "prompt-completion", "instruction", "sharegpt", "text"] = _key(
        "auto", "what a row looks like", "told by the columns, and said before the run starts"
    )
    columns: dict[str, str] = _key({}, "our column name: yours, as {prompt: question, completion: answer}")
    limit: int | None = _key(None, "use only so many rows, from the first", gt=0)
    chat_template: str = _key(
        "auto", "auto, none, or a .jinja file", "the tokenizer's own if it has one: what inference will use"
    )
    train_on: Literal["assistant", "last", "completion", "all"] = _key(
        "assistant",
        "learned tokens: every assistant turn, the last one, those after the last user turn, or all tokens",
        "answers with their end-of-turn token; learning the questions too wastes capacity",
    )
    max_length: int = _key(2048, "longest row, in tokens", "covers most chat rows at a known memory cost", gt=1)
    long_rows: Literal["refuse", "drop", "cut"] = _key(
        "refuse",
        "what to do with longer rows: stop, leave them out, or cut (oldest prompt tokens first, then the end)",
        "nothing is lost without being asked",
    )
    untrained_rows: Literal["drop", "refuse"] = _key(
        "drop", "what to do with rows that have no token to learn", "they teach nothing; they are counted"
    )

    def files(self, which: Literal["train", "validation"]) -> tuple[str, ...]:
        value = getattr(self, which)
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)


class BatchingSection(Section):
    """How rows become steps (one optimizer update each) and micro-batches (what is in memory at once)."""

    mode: Literal["bucket", "pack"] = _key(
        "bucket",
        "bucket: a step is so many random rows; pack: so many tokens. Never any padding or cross-talk in either",
        "the same number of rows in each step, whatever their length",
    )
    rows: int = _key(16, "rows per step (bucket)", "LoRA loses with large batches (TRL's guide: stay under 32)", gt=0)
    tokens: int | None = _key(None, "tokens per step (pack)", gt=0)
    micro_rows: int | None = _key(None, "most rows in a micro-batch; changes memory and speed, never the result", gt=0)
    micro_tokens: int = _key(
        2048,
        "most tokens in a micro-batch (a longer row is one of its own); changes memory and speed, never the result",
        "products are as fast as they get from about this size",
        gt=0,
    )
    longest_first: bool = _key(
        True, "run the step with the longest row first", "if memory is short the run stops at once, not after hours"
    )


class OptimizerSection(Section):
    """How weights move."""

    name: Literal["adamw", "adam", "nadam", "radam", "adamax", "rmsprop", "adafactor", "sgd"] = _key(
        "adamw", "optimizer, from torch", "what the evidence below was measured with"
    )
    learning_rate: float = _key(
        2e-4,
        "peak learning rate; LoRA's useful window is 1e-4 to 1e-3",
        "QLoRA's value; LoRA wants 10x full fine-tuning's (LoRA Without Regret)",
        gt=0,
    )
    betas: tuple[float, float] = _key((0.9, 0.999), "decay of the two moments (adam family)")
    eps: float = _key(1e-8, "added to the denominator (adam family, rmsprop)", gt=0)
    momentum: float = _key(0.0, "momentum (sgd, rmsprop)", ge=0, lt=1)
    weight_decay: float = _key(0.0, "weight decay on the pairs", "pulling B to zero only undoes the tune", ge=0)
    loraplus_ratio: float = _key(1.0, "learning rate of B over that of A (LoRA+, arXiv 2402.12354)", "plain LoRA", gt=0)
    clip: float | None = _key(
        1.0, "largest gradient norm; nothing means no clipping", "one odd row cannot wreck a run", gt=0
    )


class ScheduleSection(Section):
    """How the learning rate changes and when the run ends."""

    name: Literal["constant", "linear", "cosine"] = _key(
        "linear", "shape after warm-up", "decay to zero ends lower than constant"
    )
    warmup: int | float = _key(
        0.03, "warm-up in steps (whole number) or as a share of all steps", "QLoRA's value", ge=0
    )
    floor: float = _key(0.0, "learning rate at the end, as a share of the peak", ge=0, le=1)
    epochs: int | None = _key(
        None, "times over the data", "3 when `steps` is not given; the best checkpoint is kept", gt=0
    )
    steps: int | None = _key(None, "optimizer steps, instead of epochs", gt=0)


class EvaluationSection(Section):
    """When the held-out rows are scored."""

    every: int | Literal["epoch"] = _key("epoch", "steps between evaluations, or `epoch`")
    patience: int | None = _key(None, "stop after so many evaluations without a better loss; nothing means never", gt=0)
    rows: int | None = _key(None, "score at most so many held-out rows; nothing means all", gt=0)
    at_start: bool = _key(True, "score the base before step one", "the number every later one is compared with")


class CheckpointSection(Section):
    """What is kept to resume from."""

    every: int | Literal["epoch"] = _key(
        100, "steps between checkpoints, or `epoch`", "small files: adapter and optimizer only"
    )
    keep: int = _key(2, "newest checkpoints kept, beside the best", gt=0)


class MemorySection(Section):
    """What may be used, and what is given up for it."""

    activation_checkpointing: Literal["auto", "on", "off"] = _key(
        "auto",
        "recompute activations in the backward pass: less memory, a fifth to a third slower",
        "off when memory allows",
    )
    limit_gb: float | None = _key(None, "memory this run may use, in GB; nothing means what is free", gt=0)


class OutputSection(Section):
    """Where the run writes. `output: DIR` is short for `output: {directory: DIR}`."""

    directory: str = _key(..., "folder for the adapter, checkpoints, log and report")


class TrainConfig(Section):
    """All of it. `base.name`, `data.train` and `output.directory` must be given."""

    base: BaseSection
    data: DataSection
    output: OutputSection
    adapter: AdapterSection = AdapterSection()
    batching: BatchingSection = BatchingSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    memory: MemorySection = MemorySection()
    seed: int = _key(0, "fixes initialisation, data order and dropout", ge=0)

    @property
    def epochs(self) -> int | None:
        """Times over the data, or None when `schedule.steps` decides."""
        return None if self.schedule.steps is not None else self.schedule.epochs or 3

    def recipe(self) -> dict[str, Any]:
        """What to write into a card: everything but the output folder, with paths reduced to file names."""
        recipe = self.model_dump(mode="json", exclude={"output"})
        for key in ("train", "validation", "chat_template"):
            value = recipe["data"][key]
            recipe["data"][key] = [_file_name(v) for v in value] if isinstance(value, list) else _file_name(value)
        recipe["base"]["name"] = _file_name(recipe["base"]["name"])
        return recipe


def _file_name(value: str | None) -> str | None:
    return os.path.basename(value) if value and os.path.isabs(value) else value


def layer_indices(layers: str | Iterable[int] | None) -> tuple[int, ...] | None:
    """`"0-3,28"` -> (0, 1, 2, 3, 28); a list as it is; None (all blocks) as None. Raises ValueError."""
    if layers is None or not isinstance(layers, str):
        return None if layers is None else tuple(layers)
    indices: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(part)
        indices += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(indices))


SECTIONS: dict[str, type[Section]] = {
    name: f.annotation
    for name, f in TrainConfig.model_fields.items()
    if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
}


def keys() -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    """Every `section.key`, in the order of the reference page."""
    for name, model in SECTIONS.items():
        for key, f in model.model_fields.items():
            yield f"{name}.{key}", f
    yield "seed", TrainConfig.model_fields["seed"]


def why(f: pydantic.fields.FieldInfo) -> str:
    """The reason for a field's default, or nothing."""
    extra = f.json_schema_extra
    return str(extra.get("why", "")) if isinstance(extra, dict) else ""


def reference() -> str:
    """The reference page of every key, made from the fields (docs/reference/config.md; a test compares them)."""
    out = [
        "# Configuration",
        "",
        "Made from the configuration's fields by `python -m veneer.train.schema > docs/reference/config.md`.",
        "Given as `veneer train CONFIG.yaml section.key=value …`; a value after `=` is read as YAML.",
        "Paths in the file are relative to the file's folder, paths in overrides to the current folder.",
        "An unknown key, a value of the wrong kind or an impossible combination is an error that lists them all.",
        "",
    ]
    for name, model in SECTIONS.items():
        out += [
            f"## {name}",
            "",
            " ".join((model.__doc__ or "").split()),
            "",
            "| key | kind | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for key, f in model.model_fields.items():
            reason = f". Default: {why(f)}" if why(f) else ""
            meaning = f"{f.description}{reason}".replace("|", "\\|")
            out.append(f"| `{key}` | {_kind(f.annotation)} | {_default(f)} | {meaning} |")
        out.append("")
    f = TrainConfig.model_fields["seed"]
    return "\n".join([*out, "## seed", "", f"`seed: {f.default}` (whole number): {f.description}.", ""])


def _kind(annotation: Any) -> str:
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    literals = re.findall(r"Literal\[([^\]]*)\]", text)
    text = re.sub(r"(typing\.)?Literal\[[^\]]*\]", "LITERAL", text)
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true/false", "NoneType": "nothing"}
    names |= {"None": "nothing", "LITERAL": ", ".join(f"`{v}`" for v in re.findall(r"'([^']*)'", " ".join(literals)))}
    parts = []
    for part in text.split(" | "):
        if part.startswith("tuple"):
            parts.append("list")
        elif part.startswith("dict"):
            parts.append("mapping")
        else:
            parts.append(names.get(part, part))
    return " or ".join(parts)


def _default(f: pydantic.fields.FieldInfo) -> str:
    if f.is_required():
        return "required"
    value = f.default
    if value is None or value == () or value == {}:
        return "nothing"
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    print(reference(), end="")
