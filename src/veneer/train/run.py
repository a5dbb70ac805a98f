"""A training run on a text base, from configuration to a saved and proven adapter.

    result = train_text(config)                  result.adapter is the folder, in PEFT's format

load the base → rows → tokens → settings with their sources → preflight → attach → longest batch first → loop →
save → reload and compare logits → report. Everything before the loop happens on a dry run too, and leaves no file.
Where answers are compared with a reference, its log-probabilities are computed, or found, before step one.

    output/
      adapter_config.json, adapter_model.safetensors, veneer.json, README.md      the adapter
      report.html, log.jsonl                                                      how it came to be
      checkpoints/                                                                to resume from; may be deleted after
      cache/                                                                      preferences: the reference; as well
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.errors import ConfigError, DataError, Interrupted
from veneer.models.loss import text_loss
from veneer.models.speed import fast
from veneer.models.text import load_text
from veneer.train import checkpoint, loop
from veneer.train.batches import Batch, collate, plan_steps
from veneer.train.check_run import CACHE
from veneer.train.checkpoint import Progress
from veneer.train.encode import Encoded, Example, encode
from veneer.train.evaluate import score_examples
from veneer.train.events import Checked, Event, Listener, Note, Resolved
from veneer.train.loop import Micro, Score, Step
from veneer.train.pairs import Item, answer_rows, collate_items, items_of
from veneer.train.preference import Preference
from veneer.train.preflight import Report, preflight
from veneer.train.report import read_log
from veneer.train.rows import About, Row, data_digest, read_rows, split_rows
from veneer.train.running import NAME, Outcome, Running, newest_checkpoint, resolved, seed_all, watched
from veneer.train.save import prove, save_adapter, write_report
from veneer.train.schema import PREFERENCE_KEYS, TrainConfig
from veneer.using import load_adapter

if TYPE_CHECKING:
    from veneer.models.text import TextBase

__all__ = ["RunResult", "planned_steps", "train_text"]

_REFERENCE = "reference"
"""Beside the trained adapter: what it began as, where preferences are compared with that."""


@dataclass
class RunResult(Outcome):
    """What a run on text came to. `loss`, `validation`: nats per trained token, or of preferences the mean over pairs.
    `tokens_per_second`: training alone. `measured`: rewards and the rest (train.preference) on the held-out pairs, of
    the adapter that was kept; `measured_before`: before the first step."""

    tokens: int = 0
    trained_tokens: int = 0
    tokens_per_second: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
    measured_before: dict[str, float] = field(default_factory=dict)


@dataclass
class _Part:
    """Rows as they were read, and as tokens. `texts`: the rows that `encoded` is of: those, or of preferences each
    answer. `items`: what a step is made of: examples, or pairs of them."""

    rows: list[Row]
    texts: list[Row]
    encoded: Encoded
    items: Sequence[Example] | Sequence[Item]


@dataclass
class _Data:
    train: _Part
    held: _Part
    about: About


def train_text(
    config: TrainConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    on_event: Listener | None = None,
    base: TextBase | None = None,
    sources: Mapping[str, Any] | None = None,
) -> RunResult:
    """Trains one adapter as `config` says and returns what came out.

    `resume` goes on from the newest checkpoint in the output folder, on the CPU bit for bit as if the run had never
    stopped. `dry_run` stops after preflight and the longest batch, with no file written. `on_event` hears everything
    that happens; without it the run is shown in the terminal (stderr). `base`: one that is loaded already. `sources`:
    setting -> where it came from, as `load_config` gives it.

    Random generators, the base's mode and its modules are as before afterwards, after any error too. Raises
    PreflightError before step one for what would go wrong, TrainingError for a loss that is not finite,
    Interrupted on Ctrl-C with the state saved, ResourceError for a full disk or memory, and what reading
    configuration, base, data and checkpoints raises.
    """
    folder = Path(config.output.directory)
    with watched(folder, on_event, "tokens") as (tell, early):
        base = base or load_text(
            config.base.name, dtype=config.base.dtype, device=config.base.device, say=lambda line: tell(Note(line))
        )
        data = _read(config, base)
        start = _start(config, base)
        newest = newest_checkpoint(folder, resume, tell)
        report = _preflight(config, base, data, start, resume, newest)
        recompute, reason = _recompute(config, report)
        settings = resolved(config, sources, _settled(config, base, data, recompute, reason))
        tell(settings)
        tell(Checked(report.text(), report.to_dict(), report.markup()))
        report.raise_if_stopped()
        with _attached(config, base, start, recompute, tell) as attachment:
            preference = _preference(config, base, attachment, start)
            run = _Run(config, base, data, start, attachment, preference, folder, report, settings, tell, early)
            return run.dry() if dry_run else run.train(newest)


@dataclass
class _Run:
    """A run that is ready to begin: the adapter is attached and trainable, the preflight has passed."""

    config: TrainConfig
    base: TextBase
    data: _Data
    start: Adapter | None
    attachment: Attachment
    preference: Preference | None
    folder: Path
    report: Report
    settings: Resolved
    tell: Listener
    early: list[Event]

    def loss(self, batch: Batch) -> Tensor:
        device = self.base.device
        return text_loss(self.base.model, batch.input_ids.to(device), batch.lengths, batch.trained.to(device))

    def dry(self) -> RunResult:
        running = self._running()
        running.probe()
        steps = running.steps
        return RunResult(
            steps=len(steps), tokens=sum(s.tokens for s in steps), trained_tokens=sum(s.trained for s in steps),
            peak_memory_bytes=loop.peak_memory_bytes(), dry_run=True, preflight=self.report.to_dict(),
        )  # fmt: skip

    def train(self, newest: Path | None) -> RunResult:
        running = self._running()
        return running.train(newest, lambda progress, tell: self._finish(running, progress, tell))

    def _running(self) -> Running:
        config, preference = self.config, self.preference
        steps, ends = planned_steps(self.data.train.items, config, self.data.train.rows)
        held = self.data.held.items[: config.evaluation.rows]
        running = Running(
            config, self.folder, self.attachment.parameters(NAME), steps, ends, self.loss,
            _identity(config, self.base, self.data, self.start, len(steps)), self.tell, self.early,
            evaluate=self._scorer(held) if held else None,
        )  # fmt: skip
        if preference is not None:
            running.loss, running.before, running.numbers = preference.loss, preference.begin, preference.numbers
            # A run of few steps does not come to every pair.
            used = {id(item): item for step in steps for micro in step.micros for item in micro.make().items}
            running.begin = lambda progress, tell: self._know(preference, [*used.values(), *held], tell)
        return running

    def _know(self, preference: Preference, items: Sequence[Any], tell: Listener) -> None:
        """The reference's log-probabilities of every pair; a stop on the way keeps what is done."""
        try:
            preference.know(items, self.folder / CACHE / "reference.jsonl", lambda line: tell(Note(line)))
        except KeyboardInterrupt:
            raise Interrupted("stopped before step 1; what was computed of the reference is kept") from None

    def _scorer(self, examples: Sequence[Any]) -> Callable[[Callable[[], bool]], Score | None]:
        def score(interrupted: Callable[[], bool]) -> Score | None:
            if self.preference is not None:
                return self.preference.score(examples, interrupted=interrupted)
            return score_examples(
                self.base.model, examples, self.base.device, loss=text_loss, interrupted=interrupted,
                micro_tokens=self.config.batching.micro_tokens,
            )  # fmt: skip

        return score

    def _finish(self, running: Running, progress: Progress, tell: Listener) -> RunResult:
        """Keeps the best state, saves it, proves the file, and writes the report."""
        kept, validation = running.keep_best(progress, tell)
        result = RunResult(
            adapter=str(self.folder), steps=progress.step, tokens=progress.tokens,
            trained_tokens=progress.trained_tokens,
            tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
            peak_memory_bytes=loop.peak_memory_bytes(), loss=progress.loss,
            validation=validation, validation_before=progress.first_loss, kept_step=kept,
            stopped=progress.stopped, preflight=self.report.to_dict(),
            measured=_measured(self.folder, kept), measured_before=_measured(self.folder, 0),
        )  # fmt: skip
        trained = self.attachment.adapter(NAME)
        card = replace(
            trained.card, base=self.base.name, base_fingerprint=self.base.fingerprint, kind="text",
            data_digest=data_digest(self.data.train.rows), recipe=self.config.recipe(), metrics=_metrics(result),
            parents=[self.start.digest()] if self.start is not None else [],
        )  # fmt: skip
        self.base.model.eval()
        result.digest = save_adapter(replace(trained, card=card), self.folder, self.base)
        sentence = prove(self.attachment, NAME, self.folder, self.base, self.data.train.encoded.examples[0])
        tell(Note(sentence))
        result.report = write_report(self.folder, result, self.settings, self.base, progress.seconds)
        return result


# --- before the loop --------------------------------------------------------------------------------------------


def planned_steps(
    items: Sequence[Example] | Sequence[Item], config: TrainConfig, rows: Sequence[Row] = ()
) -> tuple[list[Step], list[int]]:
    """All steps of the run in order, and the numbers of the steps that end an epoch. Batches are made when needed."""
    make: Callable[[Any], Batch] = collate if config.preference.loss is None else collate_items

    def micro(indices: list[int]) -> Micro:
        chosen = [items[i] for i in indices]
        return Micro(
            tokens=sum(e.tokens for e in chosen), trained=sum(e.learned for e in chosen),
            rows=tuple(rows[e.row].where if rows else e.row for e in chosen), make=lambda: make(chosen),
            units=None if config.preference.loss is None else len(chosen),
        )  # fmt: skip

    total, epoch = config.schedule.steps, 0
    steps: list[Step] = []
    ends: list[int] = []
    while (epoch < config.epochs) if config.epochs is not None else (len(steps) < (total or 0)):
        plan = plan_steps([e.tokens for e in items], config.batching, seed=config.seed, epoch=epoch)
        for i, micros in enumerate(plan):
            steps.append(Step(tuple(micro(m) for m in micros), epoch + (i + 1) / len(plan)))
        ends.append(len(steps))
        epoch += 1
    if total is not None:
        steps = steps[:total]
    return steps, [end for end in ends if end <= len(steps)]


def _read(config: TrainConfig, base: TextBase) -> _Data:
    loss = config.preference.loss
    formats = {"preference", "unpaired-preference"} if loss == "kto" else {"preference"} if loss else None
    options: dict[str, Any] = {"format": config.data.format, "columns": config.data.columns, "formats": formats}
    rows, about = read_rows(config.data.files("train"), limit=config.data.limit, **options)
    if config.data.validation is not None:
        held_rows, _ = read_rows(config.data.files("validation"), **options)
    else:
        rows, held_rows = split_rows(rows, config.data.split, seed=config.seed)
    if loss is None and (pairs := [row for row in (*rows, *held_rows) if row.rejected]):
        raise DataError(
            "these rows have a chosen and a rejected answer, and the run would look only at the chosen ones",
            where=pairs[0].where,
            fix="preference.loss=dpo learns from both; for the chosen ones alone give rows with prompt and completion",
        )
    return _Data(_part(rows, config, base), _part(held_rows, config, base), about)


def _part(rows: list[Row], config: TrainConfig, base: TextBase) -> _Part:
    if config.preference.loss is None:
        encoded = encode(rows, base.tokenizer, config.data)
        return _Part(rows, rows, encoded, encoded.examples)
    texts, owners = answer_rows(rows)
    encoded = encode(texts, base.tokenizer, config.data)
    items, encoded = items_of(encoded, rows, owners, paired=config.preference.loss != "kto")
    return _Part(rows, texts, encoded, items)


def _start(config: TrainConfig, base: TextBase) -> Adapter | None:
    """The adapter that the run goes on from, in the precision that pairs are trained in."""
    if config.adapter.start is None:
        return None
    loaded = load_adapter(base, config.adapter.start)
    wide = loaded.collapsed().mapped(lambda t: t.float() if t.is_floating_point() else t)
    return replace(wide, dropout=config.adapter.dropout)


def _preference(
    config: TrainConfig, base: TextBase, attachment: Attachment, start: Adapter | None
) -> Preference | None:  # fmt: skip
    """What compares answers, with its reference: the base alone, or beside the trained adapter the one it began as."""
    if config.preference.loss is None:
        return None
    whose = f"{base.fingerprint}|{base.dtype}|{start.digest() if start is not None else 'base'}"
    preference = Preference(
        config.preference, base, attachment, whose=whose, micro_tokens=config.batching.micro_tokens,
        max_length=config.data.max_length,
    )  # fmt: skip
    if start is not None and preference.needs_reference:
        attachment.add(_REFERENCE, start)
        preference.reference = (_REFERENCE,)
    return preference


def _preflight(
    config: TrainConfig, base: TextBase, data: _Data, start: Adapter | None, resume: bool, newest: Path | None
) -> Report:
    previous = checkpoint.read_state(newest).get("about", {}).get("recipe") if newest is not None else None
    train, held = data.train, data.held
    return preflight(
        base, config, train.texts, train.encoded, held_out_rows=held.texts,
        held_out=held.encoded if held.rows else None,
        about=data.about, items=train.items, start=start, resume=resume, previous=previous,
    )  # fmt: skip


def _recompute(config: TrainConfig, report: Report) -> tuple[bool, str]:
    """Whether activations are recomputed in the backward pass, and why.

    auto: on when the preflight's estimate with all activations kept is above 90% of the free memory."""
    mode = config.memory.activation_checkpointing
    if mode != "auto":
        return mode == "on", ""
    need, free = report.numbers.get("memory_needed"), report.numbers.get("memory_free")
    if need is None or free is None:
        return False, "the memory it needs is not known"
    on = need > 0.9 * free
    return on, f"about {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; on above 90%"


def _settled(
    config: TrainConfig, base: TextBase, data: _Data, recompute: bool, reason: str
) -> Iterator[tuple[str, Any, str]]:
    """What was `auto` or left open, as it is now, with the reason."""
    if config.base.dtype == "auto":
        yield "base.dtype", str(base.dtype).removeprefix("torch."), base.dtype_reason
    if config.base.device == "auto":
        yield "base.device", str(base.device), "a GPU if there is one"
    if config.data.format == "auto":
        yield "data.format", data.about.format, data.about.why
    if config.data.split is None and config.data.validation is None:
        yield "data.split", len(data.held.rows), "5% of the rows, at most 500; none below 20 rows"
    if config.schedule.epochs is None and config.schedule.steps is None:
        because = "3 when neither epochs nor steps are given; the best one is kept"
        yield "schedule.epochs", config.epochs, because
    if config.memory.activation_checkpointing == "auto":
        yield "memory.activation_checkpointing", "on" if recompute else "off", reason
    if config.preference.loss is not None:
        settled = config.preference.settled()
        for key, losses in PREFERENCE_KEYS.items():
            if getattr(config.preference, key) is None and config.preference.loss in losses:
                yield f"preference.{key}", getattr(settled, key), f"what {config.preference.loss} takes"


def _identity(
    config: TrainConfig, base: TextBase, data: _Data, start: Adapter | None, steps: int
) -> dict[str, Any]:  # fmt: skip
    """What must be the same when the run is resumed, beside the settings, which the preflight compares."""
    return {
        "base": {"fingerprint": base.fingerprint, "dtype": str(base.dtype)},
        "data": {"training rows": data_digest(data.train.rows), "held-out rows": data_digest(data.held.rows)},
        "seed": config.seed,
        "steps": steps,
    } | ({"start": start.digest()} if start is not None else {})


def _measured(folder: Path, step: int) -> dict[str, float]:
    """What the evaluation after `step` measured beside the loss."""
    records = read_log(folder / "log.jsonl")
    found = [r["extra"] for r in records if r.get("event") == "evaluated" and r.get("step") == step]
    return dict(found[-1]) if found else {}


def _metrics(result: RunResult) -> dict[str, Any]:
    kept = {
        "training_loss": result.loss, "validation_loss": result.validation,
        "validation_loss_before": result.validation_before, "kept_step": result.kept_step, "steps": result.steps,
        "tokens": result.tokens, "trained_tokens": result.trained_tokens,
        "tokens_per_second": round(result.tokens_per_second, 1), "peak_memory_bytes": result.peak_memory_bytes,
        "measured": result.measured or None,
    }  # fmt: skip
    return {key: value for key, value in kept.items() if value is not None}


@contextmanager
def _attached(
    config: TrainConfig, base: TextBase, start: Adapter | None, recompute: bool, tell: Listener
) -> Iterator[Attachment]:
    """The fresh adapter (or `start`) on the base, selected and trainable, the base in training mode on its fast paths;
    and all of it undone at the end."""
    model = base.model
    with ExitStack() as undo:
        attachment = undo.enter_context(attach(model))
        seed_all(config.seed)
        fresh = start if start is not None else create(model, config.adapter.spec(), seed=config.seed)
        attachment.add(NAME, fresh, trainable=True)
        attachment.use(NAME)
        undo.callback(model.train, model.training)
        model.train()
        if recompute:
            undo.callback(model.activation_checkpointing_disable)
            try:
                model.activation_checkpointing_enable({"use_reentrant": False})
            except ValueError as error:
                raise ConfigError(
                    f"this base cannot recompute activations: {error}",
                    where="memory.activation_checkpointing",
                    fix="set it to off, and batching.micro_rows lower",
                ) from error
        tell(Note(undo.enter_context(fast(model)).summary()))
        yield attachment
