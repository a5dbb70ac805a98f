"""What a training configuration holds: every section and key, its default, its meaning, and the reason for the default.

`TrainConfig` is the one for text; config.image has the one for pictures, of the same sections where both want the same.
`docs/reference/config.md` is made from this file (`reference`). Does not know files, overrides, models or torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from veneer.ops.step_sizes import MICRO_TOKENS
from veneer.train.config.distillation import DistillationSection
from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.config.section import Section, setting

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec


_SAMPLE_TOKENS, _SAMPLE_FROM = 40, 100
"""Of the answers that a card keeps, and the steps from which a run has a card that does."""


class BaseSection(Section):
    """Which model is trained on. `base: NAME` is short for `base: {name: NAME}`."""

    name: str = setting(..., "built-in name (smollm2-135m), hub id, directory or .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision of the frozen weights", "bfloat16 where the device computes it in hardware, else float32"
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", "a GPU if there is one")
    quantise: Literal["nf4", "fp4", "int8", "keep"] | None = setting(
        None,
        "frozen linear weights in 4 or 8 bits (QLoRA; nf4 with doubly quantised constants), or keep: GGUF's own blocks",
        "full precision, where it fits",
    )


class PairsSection(Section):
    """Which modules get a pair, of which rank, and how it starts."""

    rank: int = setting(
        16, "rank of every pair", "enough for thousands of rows (LoRA Without Regret: rank rarely limits)", gt=0
    )
    alpha: float = setting(
        32.0, "scale is alpha / rank", "alpha 32 makes the best learning rate independent of rank (same study)", gt=0
    )
    targets: str | tuple[str, ...] = setting(
        "all-linear",
        "modules that get a pair: names, .suffixes, globs, re:REGEX, or all-linear",
        "all linear layers and experts; attention alone loses even at equal size (LoRA Without Regret)",
    )
    exclude: tuple[str, ...] = setting((), "targets to leave out again")
    layers: str | tuple[int, ...] | None = setting(
        None, "blocks to train: a list of indices, or ranges as 0-3,28-29; nothing means all"
    )
    rank_pattern: dict[str, int] = setting({}, "target: rank, where it differs; the first match wins")
    alpha_pattern: dict[str, float] = setting({}, "target: alpha, where it differs; the first match wins")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    dora: bool = setting(False, "train magnitudes as well (arXiv 2402.09353); about a quarter slower")
    dropout: float = setting(
        0.0,
        "share of a pair's input zeroed while training",
        "no gain at this size, and the fast path needs none",
        ge=0,
        lt=1,
    )
    init: Literal["zero-b", "gaussian", "pissa", "olora", "loftq"] = setting(
        "zero-b", "how pairs start; loftq: with what quantising the base lost", "the base as it is, at step 0"
    )
    kind: Literal["lora", "loha", "lokr"] = setting(
        "lora",
        "form of the change: lora B·A, loha (B·A) ⊙ (B'·A') (arXiv 2108.06098), lokr a Kronecker product (arXiv "
        "2212.10650); where keys here say pair, these are meant too",
        "what most tools read, and the quickest",
    )
    factor: int | None = setting(
        None,
        "lokr: rows and columns of the first of its two factors; a large rank leaves the second whole",
        "as near to square as each size goes: the smallest file",
        gt=0,
    )
    decompose_both: bool = setting(False, "lokr: the first factor as two thin matrices too, where rank is below half")

    def recorded(self) -> dict[str, Any]:
        """What a recipe has of it: of plain pairs no kind, as runs before there were others."""
        form = {"kind", "factor", "decompose_both"} if self.kind == "lora" else set[str]()
        return self.model_dump(mode="json", exclude=form)

    def spec(self) -> LoraSpec:
        """The same as core's LoraSpec, with `layers` as indices."""
        from veneer.core.adapter import LoraSpec

        fields = LoraSpec.__dataclass_fields__
        values = {name: getattr(self, name) for name in type(self).model_fields if name in fields}
        values["layers"] = layer_indices(self.layers)
        return LoraSpec(**values)


class AdapterSection(PairsSection):
    """What is trained: which modules get a pair, of which rank, and how it starts."""

    start: str | None = setting(
        None,
        "adapter to go on training: folder, file or library name, with its own ranks, targets and scales",
        "a new one, as the keys here say",
    )
    modules_to_save: tuple[str, ...] = setting(
        (), "modules trained in full, stored as copies in the adapter (large files)"
    )
    token_rows: dict[str, tuple[int, ...]] = setting({}, "embedding module: ids of the tokens whose rows are trained")


class DataSection(Section):
    """Where rows come from, what they look like, and which of their tokens are learned."""

    train: str | tuple[str, ...] = setting(
        ...,
        "JSONL, JSON, CSV, TSV or Parquet files, globs, a hub data set as hub:ID@SPLIT, or what a package makes: "
        "reasoning-gym:TASK@ROWS, verifiers:TASKSET@ROWS",
    )
    validation: str | tuple[str, ...] | None = setting(None, "rows never trained on, in files of their own")
    split: int | float | None = setting(
        None,
        "rows (whole number) or share (0 to 1) of `train` held out; 0 for none",
        "5% of the rows, at most 500, when no `validation` is given: without it over-fitting cannot be seen",
        ge=0,
    )
    split_seed: int | None = setting(
        None,
        "seed that chooses the rows `split` holds out; runs with the same value hold out the same rows",
        "`seed`",
        ge=0,
    )
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
    ] = setting("auto", "format of the rows", "found from the columns, and reported before the run starts")
    columns: dict[str, str] = setting({}, "our column name: yours, as {prompt: question, completion: answer}")
    limit: int | None = setting(None, "use only the first rows, up to this number", gt=0)
    chat_template: str = setting(
        "auto", "auto, none, or a .jinja file", "the tokenizer's own if it has one: what inference will use"
    )
    train_on: Literal["assistant", "last", "completion", "all"] = setting(
        "assistant",
        "learned tokens: every assistant turn, the last one, those after the last user turn, or all tokens",
        "answers with their end-of-turn token; learning the questions too wastes capacity",
    )
    max_length: int = setting(2048, "longest row, in tokens", "covers most chat rows at a known cost in memory", gt=1)
    long_rows: Literal["refuse", "drop", "cut"] = setting(
        "refuse",
        "what to do with longer rows: stop, leave them out, or cut (oldest prompt tokens first, then the end)",
        "nothing is dropped without being asked for",
    )
    untrained_rows: Literal["drop", "refuse"] = setting(
        "drop", "what to do with rows that have no token to learn", "nothing is learned from them; they are counted"
    )

    def files(self, which: Literal["train", "validation"]) -> tuple[str, ...]:
        value = getattr(self, which)
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)


class PreferenceSection(Section):
    """Learning from pairs of a better and a worse answer; without a `loss`, the run is an ordinary supervised one.

    A step counts pairs (kto: answers) as rows. The reference is the base, or `adapter.start` as it was."""

    loss: Literal["dpo", "ipo", "orpo", "kto", "simpo"] | None = setting(
        None, "how chosen and rejected answers are compared; kto also takes single answers with a judgement"
    )
    beta: float | None = setting(
        None,
        "cost of moving away from the reference (dpo, ipo, kto); weight of the odds ratio (orpo); scale of mean "
        "log-probabilities (simpo)",
        "0.1, as the papers and TRL; simpo 2, its paper's",
        gt=0,
    )
    gamma: float | None = setting(
        None, "margin that a pair should have (simpo)", "half of beta: its paper's search over gamma / beta", ge=0
    )
    label_smoothing: float = setting(
        0.0, "assumed share of pairs whose labels are swapped (dpo, simpo)", "labels are trusted", ge=0, lt=0.5
    )
    length_normalized: bool | None = setting(
        None,
        "compare log-ratios for each token instead of whole answers (dpo, ipo)",
        "ipo yes, as its authors' results; dpo no, as its paper",
    )
    nll: float | None = setting(
        None,
        "weight of −log p of the chosen answer, for each token, added to the loss (dpo, ipo, orpo, simpo)",
        "orpo 1, which is its paper's; else 0. 1 keeps dpo's chosen answers likely (arXiv 2404.19733)",
        ge=0,
    )
    desirable: float = setting(1.0, "weight of desirable answers (kto)", "as TRL", gt=0)
    undesirable: float = setting(
        1.0, "weight of undesirable answers (kto)", "as TRL; for unequal numbers see the preflight", gt=0
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares answers with the base, or with the unchanged `adapter.start`."""
        return self.loss in ("dpo", "ipo", "kto")

    def settled(self) -> PreferenceSection:
        """The same settings with every None replaced by the default of `loss`."""
        beta = self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1
        return self.model_copy(
            update={
                "beta": beta,
                "gamma": self.gamma if self.gamma is not None else beta / 2 if self.loss == "simpo" else 0.0,
                "length_normalized": (self.loss == "ipo" if self.length_normalized is None else self.length_normalized),
                "nll": self.nll if self.nll is not None else 1.0 if self.loss == "orpo" else 0.0,
            }
        )


def preference_formats(loss: str) -> tuple[str, ...]:
    """The formats of rows that a loss of preferences can learn from."""
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
"""Which losses each key of `preference` belongs to."""


class BatchingSection(Section):
    """How rows become steps (one optimizer update each) and micro-batches (what is in memory at once)."""

    mode: Literal["bucket", "pack"] = setting(
        "bucket",
        "bucket: a step is so many random rows; pack: so many tokens. Never any padding or cross-talk in either",
        "the same number of rows in each step, whatever their length",
    )
    rows: int = setting(
        16, "rows per step (bucket)", "LoRA loses with large batches (TRL's guide: stay under 32)", gt=0
    )
    tokens: int | None = setting(None, "tokens per step (pack)", gt=0)
    micro_rows: int | None = setting(
        None, "most rows in a micro-batch; changes memory and speed, never the result", gt=0
    )
    micro_tokens: int | None = setting(
        None,
        "most tokens in a micro-batch (a longer row is one of its own); changes memory and speed, never the result",
        "2,048 on a CPU; on a GPU as many as make its products faster (2,048 to 16,384) and fit",
        gt=0,
    )
    longest_first: bool = setting(
        True, "run the step with the longest row first", "if memory is short the run stops at once, not after hours"
    )

    @property
    def at_once(self) -> int:
        """`micro_tokens`; before a run has settled it by its device, the least that it may become."""
        return self.micro_tokens or MICRO_TOKENS


class OptimizerSection(Section):
    """How weights move."""

    name: Literal[
        "adamw",
        "adam",
        "nadam",
        "radam",
        "adamax",
        "rmsprop",
        "adafactor",
        "sgd",
        "adamw-8bit",
        "paged-adamw",
        "paged-adamw-8bit",
    ] = setting(
        "adamw",
        "optimizer, from torch; the 8-bit and paged ones from bitsandbytes, on CUDA",
        "what the evidence below was measured with",
    )
    learning_rate: float = setting(
        2e-4,
        "peak learning rate; LoRA's useful window is 1e-4 to 1e-3",
        "QLoRA's value; LoRA wants 10x full fine-tuning's (LoRA Without Regret)",
        gt=0,
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "decay of the two moments (adam family)")
    eps: float = setting(1e-8, "added to the denominator (adam family, rmsprop)", gt=0)
    momentum: float = setting(0.0, "momentum (sgd, rmsprop)", ge=0, lt=1)
    weight_decay: float = setting(0.0, "weight decay on the pairs", "pulling B towards zero undoes the training", ge=0)
    loraplus_ratio: float = setting(
        1.0, "learning rate of B over that of A (LoRA+, arXiv 2402.12354)", "plain LoRA", gt=0
    )
    clip: float | None = setting(
        1.0, "largest gradient norm; nothing means no clipping", "one unusual row cannot ruin a run", gt=0
    )


class ScheduleSection(Section):
    """How the learning rate changes and when the run ends."""

    name: Literal["constant", "linear", "cosine"] = setting(
        "linear", "shape after warm-up", "decay to zero ends lower than constant"
    )
    warmup: int | float = setting(
        0.03, "warm-up in steps (whole number) or as a share of all steps", "QLoRA's value", ge=0
    )
    floor: float = setting(0.0, "learning rate at the end, as a share of the peak", ge=0, le=1)
    epochs: int | None = setting(
        None, "times over the data", "3 when `steps` is not given; the best checkpoint is kept", gt=0
    )
    steps: int | None = setting(None, "optimizer steps, instead of epochs", gt=0)


class EvaluationSection(Section):
    """When the held-out rows are scored."""

    every: int | Literal["epoch"] = setting("epoch", "steps between evaluations, or `epoch`")
    patience: int | None = setting(
        None, "stop after this many evaluations without a better loss; nothing means never", gt=0
    )
    rows: int | None = setting(None, "score at most this many held-out rows; nothing means all", gt=0)
    at_start: bool = setting(True, "score the base before step one", "the number every later one is compared with")
    keep: Literal["best", "last"] = setting("best", "save the adapter of the lowest held-out loss, or the last one")
    sample: int | None = setting(
        None,
        "maximum tokens of the base's and the adapter's answers to one held-out prompt, saved with the prompt in the "
        "card; 0: save neither. Needs a run on one device",
        f"{_SAMPLE_TOKENS} for runs of {_SAMPLE_FROM} steps or more, else none",
        ge=0,
    )

    def sampled(self, steps: int) -> int:
        """How many tokens of answers the card of a run of so many steps keeps."""
        given = _SAMPLE_TOKENS if steps >= _SAMPLE_FROM else 0
        return given if self.sample is None else self.sample


class CheckpointSection(Section):
    """Checkpoints, from which a run can be resumed."""

    every: int | Literal["epoch"] = setting(
        100, "steps between checkpoints, or `epoch`", "small files: adapter and optimizer only"
    )
    keep: int = setting(2, "newest checkpoints kept, beside the best", gt=0)
    adapters: bool = setting(
        False,
        "beside each checkpoint its adapter in its own format, in `adapter`, for use while the run goes on; of a job "
        "each is put into the library at once",
    )


class MemorySection(Section):
    """How much memory may be used, and what is traded for it."""

    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        "recompute activations in the backward pass: less memory, a fifth to a third slower",
        "off when memory allows",
    )
    offload_activations: bool = setting(
        False,
        "on a GPU, with recomputing: what layers are recomputed from waits in the CPU's memory, copied on a stream of "
        "its own",
        "for long rows and large micro-batches; the link to the card has to keep up",
    )
    limit_gb: float | None = setting(None, "memory this run may use, in GB; nothing means what is free", gt=0)
    shard: bool = setting(
        False,
        "with several devices: each keeps a part of the frozen weights (FSDP2) and gathers a layer for its turn",
        "slower; for bases that do not fit on one device",
    )
    keep_dequantised_gb: float | None = setting(
        None,
        "memory for dequantised weights of a quantised base, kept between uses; 0 dequantises at each use",
        "what the plan finds room for",
        ge=0,
    )
    keep_packed_gb: float | None = setting(
        None,
        "memory for frozen weights kept a second time on a CPU, in the order of their products, where those are "
        "measured faster so; 0 keeps none",
        "what they take, where the plan finds room for it",
        ge=0,
    )

    @property
    def recomputing(self) -> Literal["auto", "on", "off"]:
        """`activation_checkpointing`, which is on where its activations are to be offloaded."""
        return "on" if self.offload_activations else self.activation_checkpointing


class OutputSection(Section):
    """Where the run writes. `output: DIR` is short for `output: {directory: DIR}`."""

    directory: str = setting(..., "folder for the adapter, checkpoints, log and report")


class ReportSection(Section):
    """Who else is told of the run, beside its log and report in the output folder."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = setting(
        (), "scalars and sample sheets go there too; each is an extra of that name"
    )
    project: str = setting(
        "veneer",
        "W&B's and Trackio's project, MLflow's experiment; `team/project` names W&B's entity too",
        min_length=1,
    )
    name: str | None = setting(None, "the run's name there; nothing means the output folder's")
    tags: tuple[str, ...] = setting((), "tags of the run, where there are such")


class TrainConfig(Section):
    """All of it. `base.name`, `data.train` and `output.directory` must be given."""

    base: BaseSection
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
    seed: int = setting(0, "fixes initialisation, data order and dropout", ge=0)

    @property
    def split_seed(self) -> int:
        """The seed that chooses the held-out rows."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @property
    def epochs(self) -> int | None:
        """Times over the data, or None when `schedule.steps` decides."""
        return None if self.schedule.steps is not None else self.schedule.epochs or 3

    @property
    def steps(self) -> int | None:
        """Optimizer steps, or None when epochs decide."""
        return self.schedule.steps

    @property
    def drawn(self) -> ReinforcementSection | DistillationSection | None:
        """The section by which answers are drawn to the rows' prompts, where they are."""
        if self.distillation.teacher is not None:
            return self.distillation
        return self.reinforcement if self.reinforcement.loss is not None else None

    def recipe(self) -> dict[str, Any]:
        """What a card records: everything but where the run writes, with paths reduced to file names."""
        recipe = self.model_dump(mode="json", exclude={"output", "report"}) | {"adapter": self.adapter.recorded()}
        for key in ("train", "validation", "chat_template"):
            value = recipe["data"][key]
            recipe["data"][key] = [file_name(v) for v in value] if isinstance(value, list) else file_name(value)
        recipe["base"]["name"] = file_name(recipe["base"]["name"])
        recipe["adapter"]["start"] = file_name(recipe["adapter"]["start"])
        if self.preference.loss is None:
            del recipe["preference"]
        if self.distillation.teacher is None:
            del recipe["distillation"]
        else:
            for key in ("teacher", "base"):
                recipe["distillation"][key] = file_name(recipe["distillation"][key])
        if self.reinforcement.loss is None:
            del recipe["reinforcement"]
        else:
            own = recipe["reinforcement"]
            own["environment"] = file_name(own["environment"])
            for reward in own["rewards"]:
                reward |= {key: file_name(reward[key]) for key in ("file", "model") if key in reward}
        return recipe


def file_name(value: str | None) -> str | None:
    """The last part of an absolute path; anything else as it is."""
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


def sections(config: type[Section] = TrainConfig) -> dict[str, type[Section]]:
    """The sections of a configuration by name."""
    return {
        name: f.annotation
        for name, f in config.model_fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
    }


SECTIONS = sections()


def config_keys(config: type[Section] = TrainConfig) -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    """Every `section.key`, in the order of the reference page, then the keys that are in no section."""
    own = sections(config)
    for name, model in own.items():
        for key, f in model.model_fields.items():
            yield f"{name}.{key}", f
    for name, f in config.model_fields.items():
        if name not in own:
            yield name, f


def why(f: pydantic.fields.FieldInfo) -> str:
    """The reason for a field's default, or nothing."""
    extra = f.json_schema_extra
    return str(extra.get("why", "")) if isinstance(extra, dict) else ""


def reference(
    config: type[Section] = TrainConfig,
    made_by: str = "python -m veneer.train.config.text > docs/reference/config.md",
    title: str = "Configuration",
) -> str:
    """The reference page of every key, made from the fields (docs/reference/config.md; a test compares them)."""
    out = [
        f"# {title}",
        "",
        f"Made from the configuration's fields by `{made_by}`.",
        "Given as `veneer train CONFIG.yaml section.key=value …`; a value after `=` is read as YAML.",
        "Paths in the file are relative to the file's folder, paths in overrides to the current folder.",
        "An unknown key, a value of the wrong kind or an impossible combination is an error that lists them all.",
        "",
    ]
    for name, model in sections(config).items():
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
    for name, f in config_keys(config):
        if "." not in name:
            value = "nothing" if f.default is None else f.default
            out += [f"## {name}", "", f"`{name}: {value}` ({_kind(f.annotation)}): {f.description}.", ""]
    return "\n".join(out)


def _kind(annotation: Any) -> str:
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    literals = re.findall(r"Literal\[([^\]]*)\]", text)
    text = re.sub(r"(typing\.)?Literal\[[^\]]*\]", "LITERAL", text)
    text = re.sub(r"typing\.Optional\[(.*)\]", r"\1 | None", text)
    text = re.sub(r"typing\.Union\[(.*)\]", lambda m: m[1].replace(", ", " | "), text)
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
    return " or ".join(dict.fromkeys(parts))


def _default(f: pydantic.fields.FieldInfo) -> str:
    if f.is_required():
        return "required"
    value = f.default
    if value is None or value == () or value == {}:
        return "nothing"
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    print(reference(), end="")
