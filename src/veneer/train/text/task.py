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

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.adapters.use import load_adapter
from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.errors import ConfigError, Interrupted, PreflightError
from veneer.models.shard import CallWithWeights, blocks, call_whole, held_bytes, shard
from veneer.models.sources import find_base
from veneer.models.swap import without_dropout
from veneer.models.text.base import load_text
from veneer.models.text.fast import fast
from veneer.models.text.loss import text_loss
from veneer.train import checkpoint, loop
from veneer.train.check_run import CACHE
from veneer.train.checkpoint import Progress, seed_all
from veneer.train.config.text import PREFERENCE_KEYS, TrainConfig
from veneer.train.devices import Devices, joined
from veneer.train.estimate import free_memory
from veneer.train.events import Checked, Event, Listener, Note, Resolved, silent
from veneer.train.loop import Score
from veneer.train.planning import was_predicted
from veneer.train.preflight import Report, preflight
from veneer.train.report.log import read_log, size
from veneer.train.running import NAME, Outcome, Running, newest_checkpoint, resolved, watched
from veneer.train.save import prove, save_adapter, write_report
from veneer.train.text.batches import Batch
from veneer.train.text.data import Data, planned_steps, read_data
from veneer.train.text.evaluate import score_examples
from veneer.train.text.preference import Preference
from veneer.train.text.rows import data_digest

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

__all__ = ["RunResult", "train_text"]

_LOOKED_AT = 1024
"""Tokens of the first rows by which a base is told from one that is broken."""
_OVER_CHANCE = 2.0
"""Nats a token: a base with random weights is a little worse than a uniform guess, and may be trained."""
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


def train_text(
    config: TrainConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Listener | None = None,
    base: TextBase | None = None,
    sources: Mapping[str, Any] | None = None,
) -> RunResult:
    """Trains one adapter as `config` says and returns what came out.

    `resume` goes on from the newest checkpoint in the output folder, on the CPU bit for bit as if the run had never
    stopped. `dry_run` stops after preflight and the longest batch, with no file written. `force`: a run that does not
    fit by its plan is tried with a warning. `on_event` hears everything that happens; without it the run is shown in
    the terminal (stderr). `base`: one that is loaded already. `sources`: setting -> where it came from, as
    `load_config` gives it.

    In processes that torchrun or the like started, each takes a device and a share of every step (train.devices); only
    the first is heard, and writes. All return the same numbers.

    Random generators, the base's mode and its modules are as before afterwards, after any error too. Raises
    PreflightError before step one for what would go wrong, TrainingError for a loss that is not finite,
    Interrupted on Ctrl-C with the state saved, ResourceError for a full disk or memory, and what reading
    configuration, base, data and checkpoints raises.
    """
    folder = Path(config.output.directory)
    with (
        joined(config.base.device, lockstep=config.memory.shard) as devices,
        watched(folder, on_event if devices.first else silent, "tokens") as (tell, early),
    ):
        base = _loaded(config, base, devices, tell)
        for note in base.notes:
            tell(Note(note))
        data = read_data(config, base)
        start = _start(config, base)
        newest = newest_checkpoint(folder, resume, tell)
        report = _preflight(config, base, data, start, resume, newest, devices, force)
        recompute, reason = devices.gather(_recompute(config, report))[0]
        keep = int(report.numbers.get("kept_dequantised", 0))
        settings = resolved(config, sources, _settled(config, base, data, recompute, reason, keep, devices))
        tell(settings)
        tell(Checked(report.text(), report.to_dict(), report.markup()))
        report.raise_if_stopped()
        devices.gather(None)  # nobody writes before everybody has looked
        with _attached(config, base, start, recompute, keep, devices, tell) as (attachment, base, call):
            preference = _preference(config, base, attachment, start, call, devices)
            run = _Run(
                config, base, data, start, attachment, call, preference, folder, report, settings, tell, early, devices
            )
            run.check_base(force)
            return run.dry() if dry_run else run.train(newest)


@dataclass
class _Run:
    """A run that is ready to begin: the adapter is attached and trainable, the preflight has passed."""

    config: TrainConfig
    base: TextBase
    data: Data
    start: Adapter | None
    attachment: Attachment
    call: CallWithWeights
    preference: Preference | None
    folder: Path
    report: Report
    settings: Resolved
    tell: Listener
    early: list[Event]
    devices: Devices

    def loss(self, batch: Batch) -> Tensor:
        device = self.base.device
        ids, trained = batch.input_ids.to(device), batch.trained.to(device)
        return self.call(text_loss, self.base.model, ids, batch.lengths, trained)

    def check_base(self, force: bool) -> None:
        """PreflightError where what the run begins with predicts its rows worse than chance, all their tokens counted:
        whatever is wrong then, training against it teaches nothing. A warning with `force`."""
        rows, left = [], _LOOKED_AT
        for example in self.data.train.encoded.examples:
            rows.append(torch.tensor(example.input_ids[:left]))
            left -= len(rows[-1])
            if left < 2:
                break
        rows = [row for row in rows if len(row) > 1]
        lengths = [len(row) for row in rows]
        known = torch.cat([torch.arange(n) > 0 for n in lengths]) if rows else torch.tensor([])
        if not len(known):
            return
        device, vocabulary = self.base.device, self.base.model.get_input_embeddings().weight.shape[0]
        looked_at = loop.Micro(len(known), 0, tuple(range(len(rows))), lambda: None)
        with torch.no_grad(), without_dropout(self.base.model), loop.memory_errors(looked_at):
            nll = self.call(text_loss, self.base.model, torch.cat(rows).to(device), lengths, known.to(device))
        mean, chance = float(nll) / int(known.sum()), math.log(vocabulary)
        if mean <= chance + _OVER_CHANCE:
            return
        what = (
            f"the base predicts the rows worse than chance: {mean:.2f} nats a token, a uniform guess has {chance:.2f}"
        )
        if force:
            self.tell(Note(f"warning: {what}"))
            return
        raise PreflightError(
            what, where=self.base.name,
            fix="its weights or its tokenizer may be damaged or another base's, or veneer runs it wrongly (then "
            "`veneer eval` without adapters shows it too, and it is worth a report); --force trains all the same",
        )  # fmt: skip

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
        steps, ends = planned_steps(self.data.train.items, config, self.data.train.rows, self.devices.count)
        held = self.data.held.items[: config.evaluation.rows]
        running = Running(
            config, self.folder, self.attachment.parameters(NAME), steps, ends, self.loss,
            _identity(config, self.base, self.data, self.start, len(steps)), self.tell, self.early,
            evaluate=self._scorer(held) if held else None, devices=self.devices,
        )  # fmt: skip
        if preference is not None:
            running.loss, running.before, running.measured = preference.loss, preference.begin, preference.measured
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
                self.base.model, examples, self.base.device, loss=lambda *args: self.call(text_loss, *args),
                interrupted=interrupted, micro_tokens=self.config.batching.micro_tokens, devices=self.devices,
            )  # fmt: skip

        return score

    def _measured(self, step: int) -> dict[str, float]:
        """What the log has of an evaluation, which the first process alone has written."""
        return self.devices.gather(_measured(self.folder, step) if self.devices.first else {})[0]

    def _finish(self, running: Running, progress: Progress, tell: Listener) -> RunResult:
        """Puts the state that is kept in place, saves it, proves the file, and writes the report."""
        kept, validation = running.put_kept(progress, tell)
        result = RunResult(
            adapter=str(self.folder), steps=progress.step, tokens=progress.tokens,
            trained_tokens=progress.trained_tokens,
            tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
            peak_memory_bytes=loop.peak_memory_bytes(), loss=progress.loss,
            validation=validation, validation_before=progress.first_loss, kept_step=kept,
            stopped=progress.stopped, preflight=self.report.to_dict(),
            measured=self._measured(kept), measured_before=self._measured(0),
        )  # fmt: skip
        trained = self.attachment.adapter(NAME)
        card = replace(
            trained.card, base=self.base.name, base_fingerprint=self.base.fingerprint, kind="text",
            data_digest=data_digest(self.data.train.rows), recipe=self.config.recipe(), metrics=_metrics(result),
            parents=[self.start.digest()] if self.start is not None else [],
        )  # fmt: skip
        self.base.model.eval()
        if self.devices.first:
            result.digest = save_adapter(replace(trained, card=card), self.folder, self.base)
        result.digest = self.devices.gather(result.digest)[0]
        if self.devices.first or self.devices.lockstep:
            example = self.data.train.encoded.examples[0]
            tell(Note(self.call(prove, self.attachment, NAME, self.folder, self.base, example)))
        if predicted := was_predicted(self.report.numbers, result.peak_memory_bytes, progress.seconds):
            tell(Note(predicted))
        if self.devices.first:
            result.report = write_report(self.folder, result, self.settings, self.base, progress.seconds)
        result.report = self.devices.gather(result.report)[0]
        return result


# --- before the loop --------------------------------------------------------------------------------------------


def _loaded(config: TrainConfig, base: TextBase | None, devices: Devices, tell: Listener) -> TextBase:
    """The base, on this process's device; on the CPU where it is going to be sharded."""

    def say(line: str) -> None:
        tell(Note(line))

    sharded = config.memory.shard and devices.count > 1
    if base is not None:
        if sharded:
            raise ConfigError(
                "a base that is sharded cannot be made whole again, and this one is the caller's",
                where="memory.shard",
                fix="let the run load it: leave base= out",
            )
        return base
    if devices.count > 1 and devices.local == 0:  # one process of a machine fetches what is not there yet
        find_base(config.base.name, say=say)
    devices.gather(None)
    return load_text(
        config.base.name, dtype=config.base.dtype, device="cpu" if sharded else devices.device,
        quantise=config.base.quantise, say=say,
    )  # fmt: skip


def _start(config: TrainConfig, base: TextBase) -> Adapter | None:
    """The adapter that the run goes on from, in the precision that pairs are trained in."""
    if config.adapter.start is None:
        return None
    loaded = load_adapter(base, config.adapter.start)
    wide = loaded.collapsed().mapped(lambda t: t.float() if t.is_floating_point() else t)
    return replace(wide, dropout=config.adapter.dropout)


def _preference(
    config: TrainConfig,
    base: TextBase,
    attachment: Attachment,
    start: Adapter | None,
    call: CallWithWeights,
    devices: Devices,
) -> Preference | None:
    """What compares answers, with its reference: the base alone, or beside the trained adapter the one it began as."""
    if config.preference.loss is None:
        return None
    whose = f"{base.fingerprint}|{base.quantised}|{base.dtype}|{start.digest() if start is not None else 'base'}"
    preference = Preference(
        config.preference, base, attachment, whose=whose, micro_tokens=config.batching.micro_tokens,
        max_length=config.data.max_length, call=call, devices=devices,
    )  # fmt: skip
    if start is not None and preference.needs_reference:
        attachment.add(_REFERENCE, start)
        preference.reference = (_REFERENCE,)
    return preference


def _preflight(
    config: TrainConfig, base: TextBase, data: Data, start: Adapter | None, resume: bool, newest: Path | None,
    devices: Devices, force: bool,
) -> Report:  # fmt: skip
    previous = checkpoint.read_state(newest).get("about", {}).get("recipe") if newest is not None else None
    train, held, free = data.train, data.held, None
    if devices.count > 1:
        device = torch.device(devices.device)
        free = free_memory(device)
        if device.type == "cpu":  # whose memory the processes of a machine share
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", devices.count))
        elif base.device != device:  # the base comes there later, in parts
            free -= held_bytes(base.model) // devices.count
    return preflight(
        base, config, train.texts, train.encoded, held_out_rows=held.texts,
        held_out=held.encoded if held.rows else None,
        about=data.about, items=train.items, start=start, resume=resume, previous=previous, free_memory=free,
        devices=devices.count, force=force,
    )  # fmt: skip


def _recompute(config: TrainConfig, report: Report) -> tuple[bool, str]:
    """Whether activations are recomputed in the backward pass, and why.

    auto: on when what the plan counts with all activations kept is above 90% of the free memory."""
    mode = config.memory.activation_checkpointing
    if mode != "auto":
        return mode == "on", ""
    need, free = report.numbers.get("memory_needed"), report.numbers.get("memory_free")
    if need is None or free is None:
        return False, "the memory it needs is not known"
    on = need > 0.9 * free
    return on, f"about {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; on above 90%"


def _settled(
    config: TrainConfig, base: TextBase, data: Data, recompute: bool, reason: str, keep: int, devices: Devices
) -> Iterator[tuple[str, Any, str]]:
    """What was `auto` or left open, as it is now, with the reason."""
    if config.base.dtype == "auto":
        yield "base.dtype", str(base.dtype).removeprefix("torch."), base.dtype_reason
    if config.base.device == "auto":
        yield "base.device", devices.device if devices.count > 1 else str(base.device), "a GPU if there is one"
    if config.data.format == "auto":
        yield "data.format", data.about.format, data.about.why
    if config.data.split is None and config.data.validation is None:
        yield "data.split", len(data.held.rows), "5% of the rows, at most 500; none below 20 rows"
    if config.schedule.epochs is None and config.schedule.steps is None:
        because = "3 when neither epochs nor steps are given; the best one is kept"
        yield "schedule.epochs", config.epochs, because
    if base.quantised and config.memory.keep_dequantised_gb is None:
        because = "what the plan finds room for on a GPU; on a CPU dequantising costs next to nothing"
        yield "memory.keep_dequantised_gb", keep / 1e9, because
    if config.memory.activation_checkpointing == "auto":
        yield "memory.activation_checkpointing", "on" if recompute else "off", reason
    if config.preference.loss is not None:
        settled = config.preference.settled()
        for key, losses in PREFERENCE_KEYS.items():
            if getattr(config.preference, key) is None and config.preference.loss in losses:
                yield f"preference.{key}", getattr(settled, key), f"what {config.preference.loss} takes"


def _identity(
    config: TrainConfig, base: TextBase, data: Data, start: Adapter | None, steps: int
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
    config: TrainConfig,
    base: TextBase,
    start: Adapter | None,
    recompute: bool,
    keep: int,
    devices: Devices,
    tell: Listener,
) -> Iterator[tuple[Attachment, TextBase, CallWithWeights]]:
    """The fresh adapter (or `start`) on the base, selected and trainable, the base in training mode on its fast paths,
    and sharded where that is asked for; then what the model is called through. All but the sharding is undone at the
    end."""
    model = base.model
    sharded = config.memory.shard and devices.count > 1
    with ExitStack() as undo:
        attachment = undo.enter_context(attach(model))
        seed_all(config.seed)
        fresh = start
        if fresh is None:
            fresh = create(model, config.adapter.spec(), seed=config.seed, original=base.original)
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
        tell(Note(undo.enter_context(fast(model, hold=not sharded, keep=0 if sharded else keep)).summary()))
        if not sharded:
            yield attachment, base, call_whole
            return
        whole, device = held_bytes(model), torch.device(devices.device)
        call = shard(model, blocks(model), device)
        attachment.adapters[NAME].move(device)
        tell(Note(f"sharded over {devices.count} devices: this one holds {size(held_bytes(model))} of {size(whole)}"))
        yield attachment, replace(base, device=device), call
