"""Train an adapter on a text base, from configuration to a verified adapter.

    result = run_text(config)                    result.adapter is the folder, in PEFT's format

load the base → rows → tokens → settings with their sources → preflight → attach → longest batch first → loop
→ save → reload and compare logits → report. A dry run performs all steps before the loop, and writes no file.
If the loss compares completions with a reference, the reference's log-probabilities are computed before the
first step.

    output/
      adapter_config.json, adapter_model.safetensors, veneer.json, README.md      the adapter
      report.html, log.jsonl                                                      report and log of the run
      checkpoints/                                      needed to resume; can be deleted after the run
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.adapters.use import load_adapter
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.core.selection import span_problem
from veneer.core.targets import base_modules, base_of
from veneer.errors import ConfigError, Interrupted, PreflightError, VeneerError, bullets
from veneer.formats import peft
from veneer.models.patching import fast_report, without_dropout
from veneer.models.shard import CallWithWeights, Sharded, blocks, call_unsharded, local_bytes, shard, whole_bytes
from veneer.models.text.base import load_text
from veneer.models.text.fast import fast, weights_together
from veneer.models.text.loss import text_loss
from veneer.ops.device_transfer import sent
from veneer.train.checkpoint import Progress, seed_all
from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.config.text import TrainConfig
from veneer.train.devices import Devices
from veneer.train.events import TOKEN_ACCURACY, Listener, Note
from veneer.train.inspect import inspect_run
from veneer.train.lazy import token_counts
from veneer.train.loop import EvalResult, Learner, MetricMeans, Step, Stop, sender
from veneer.train.planning import micro_tokens_of_run, sampled_at_once, with_micro_tokens
from veneer.train.preflight import Report, computes_on, free_memory, recomputes
from veneer.train.report.log import read_log, size
from veneer.train.report.page import Page
from veneer.train.rewards.build import build_rewards, local_judge_models
from veneer.train.run import NAME, Run, Task, carry_out, newest_checkpoint, opened, raise_if_stopped, recipe_of
from veneer.train.save import Outcome, prove
from veneer.train.text.batches import Batch
from veneer.train.text.data import TextData, planned_steps, read_data
from veneer.train.text.distill import Distillation, open_teacher
from veneer.train.text.evaluate import score_examples
from veneer.train.text.int8 import use_int8
from veneer.train.text.preference import Preference
from veneer.train.text.preflight import TextSubject, data_findings
from veneer.train.text.reinforce import Reinforcement, sampled_judge
from veneer.train.text.rollouts import MakeSampler, SamplerSettings
from veneer.train.text.sampler_servers import sampler_servers
from veneer.train.text.save import RunResult, sample_answers, sample_prompt, text_metrics, text_report, write_adapter

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.models.text.base import TextBase


def run_text(
    config: TrainConfig,
    *,
    resume: bool = False,
    allow_other_machine: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Listener | None = None,
    base: TextBase | None = None,
    sources: Mapping[str, Any] | None = None,
    sampler: MakeSampler | None = None,
) -> RunResult:
    """Train one adapter with `config` and return the result.

    resume: continue from the newest checkpoint in the output folder; on a CPU, the result is bit-for-bit the
        result of an uninterrupted run
    allow_other_machine: resume even if this machine runs an op with another implementation than the
        checkpoint's machine, which changes the last bits
    dry_run: stop after preflight and the longest batch, and write no file
    force: only warn if the plan says that the run does not fit in memory
    on_event: called with every event; by default, events are shown in the terminal (stderr)
    base: a base that is already loaded
    sources: setting -> its origin, from `load_config`
    sampler: makes the sampler, for a run that samples completions

    In processes started by torchrun or similar tools, each process takes one device and a share of every step
    (train.devices). Only the first process reports and writes. All processes return the same numbers.

    Restores the random generators and the base's mode and modules, even after an error. Raises PreflightError
    before step one for predictable failures, TrainingError for a loss that is not finite, Interrupted on
    Ctrl-C after saving the state, ResourceError if disk or memory is full, and the errors of the functions
    that read the configuration, base, data and checkpoints."""
    with opened(
        config,
        unit="tokens",
        on_event=on_event,
        lockstep=config.memory.shard,
        sources=sources,
        resume=resume,
        allow_other_machine=allow_other_machine,
        dry_run=dry_run,
        force=force,
    ) as run:
        base = loaded_base(config, base, run)
        for note in base.notes:
            run.note(note)
        config = with_device_micro_tokens(config, base, run)
        text = checked_text(run, config, base, newest_checkpoint(run), sampler=sampler)
        with attached_texts([text]) as (attached,):
            return carry_out(run, attached.task, text.report, text.newest)


def loaded_base(config: TrainConfig, base: TextBase | None, run: Run) -> TextBase:
    """Load the base on the device of this process.

    Weights that will be sharded are read later, unless they cannot be read in parts or the adapter is
    initialized from them; then they are loaded to the CPU now."""
    sharded = config.memory.shard and run.devices.count > 1
    if base is not None:
        if sharded:
            text = "sharding cannot be undone, and this base belongs to the caller"
            raise ConfigError(text, where="memory.shard", fix="omit base=, so that the run loads its own")
        return base
    run.fetch(config.base.name)
    adapter = config.adapter
    of_values = adapter.dora or adapter.init not in ("zero-b", "gaussian")
    of_values = of_values or bool(adapter.modules_to_save or adapter.token_rows or adapter.start)
    if sharded and of_values:
        run.note("each process reads all weights, because the adapter is initialized from them")
    return load_text(
        config.base.name,
        dtype=config.base.dtype,
        device="cpu" if sharded and of_values else run.devices.device,
        quantize=config.base.quantize,
        say=run.note,
        parts=1 if not sharded or of_values else run.devices.count,
    )


def with_device_micro_tokens(config: TrainConfig, base: TextBase, run: Run) -> TrainConfig:
    """Return the configuration with the same `batching.micro_tokens` set on every process."""
    if config.batching.micro_tokens is not None:
        return config
    free = _free_memory(base, run.devices)
    return with_micro_tokens(config, min(run.devices.gather(micro_tokens_of_run(config, base, free))))


def _free_memory(base: TextBase, devices: Devices) -> int | None:
    """Return the free memory in bytes for this process, or None on a single device (measured later)."""
    if devices.count == 1:
        return None
    device = torch.device(devices.device)
    free = free_memory(device)
    if device.type == "cpu":  # all processes on a machine share its memory
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", devices.count))
    if base.device != device or base.unread is not None:  # the base is moved to the device later, in parts
        free -= whole_bytes(base.model) // devices.count
    return free


@dataclass(frozen=True)
class TextRun:
    """A text run whose data has been read and checked.

    `recompute`: whether activations are recomputed, and why. `newest`: the checkpoint to resume from. `name`:
    the name of the run's adapter on the attachment. `sampler`: makes the sampler, if the run learns from
    sampled answers (`reinforcement.loss`, `distillation.teacher`)."""

    config: TrainConfig
    base: TextBase
    run: Run
    data: TextData
    report: Report
    recompute: tuple[bool, str]
    newest: Path | None
    name: str
    sampler: MakeSampler | None


def checked_text(
    run: Run,
    config: TrainConfig,
    base: TextBase,
    newest: Path | None,
    *,
    name: str = NAME,
    taken: int = 0,
    sampler: MakeSampler | None = None,
) -> TextRun:
    """Read the data, and run all checks that leave the base unchanged.

    newest: the checkpoint to resume from. taken: bytes that other runs on the same base will use.

    Raises DataError, PreflightError."""
    data = _read(run, config, base)
    if config.adapter.start is not None:
        # The adapter to continue from, in float32 like all trained adapter weights.
        loaded = load_adapter(base, config.adapter.start)
        wide = loaded.collapsed().mapped(lambda t: t.float() if t.is_floating_point() else t)
        data = replace(data, start=replace(wide, dropout=config.adapter.dropout))
    free = max(0, free_memory(computes_on(base)) - taken) if taken else _free_memory(base, run.devices)
    report = inspect_run(
        config,
        base,
        data,
        resume=run.resume,
        previous=recipe_of(newest),
        free_memory=free,
        devices=run.devices.count,
        force=run.force,
    )
    needed, free = (report.numbers.get(key) for key in ("memory_needed", "memory_free"))
    own = recomputes(config.memory.activation_checkpointing, needed, free)
    recompute = run.devices.gather(own)[0]  # the first process decides
    text = TextRun(config, base, run, data, report, recompute, newest, name, sampler)
    run.emit_checks(report, _decided_settings(text))
    raise_if_stopped(run, report)
    return text


def _read(run: Run, config: TrainConfig, base: TextBase) -> TextData:
    """Read the data. Before a large file is tokenized, check a sample of its rows.

    The processes of a machine share the tokens, so only the first of them tokenizes a large file."""

    def check(sample: TextData, rows: int) -> None:
        first = f"in a sample of {len(sample.train.rows):,} of {rows:,} rows: "
        subject = TextSubject(base=base, config=config, data=sample)
        found = (f for f in data_findings(subject) if f.check != "held out" and f.level != "ok")
        report = Report([replace(finding, text=first + finding.text) for finding in found])
        run.note(report.text() or f"{first}no problem found")
        report.raise_if_stopped()

    if run.devices.count > 1 and run.devices.local == 0:
        read_data(config, base, say=run.note, on_sample=check)
    run.devices.gather(None)
    return read_data(config, base, say=run.note, on_sample=check)


def _decided_settings(text: TextRun) -> Iterator[tuple[str, Any, str]]:
    """Yield each setting that was `auto` or unset, with its value and the reason."""
    config, base, run, data, report = text.config, text.base, text.run, text.data, text.report
    devices = run.devices
    if config.base.dtype == "auto":
        yield "base.dtype", str(base.dtype).removeprefix("torch."), base.dtype_reason
    if config.base.device == "auto":
        device = devices.device if devices.count > 1 else str(base.device)
        yield "base.device", device, "a GPU if there is one"
    if config.data.format == "auto" and data.metadata is not None:
        yield "data.format", data.metadata.format, data.metadata.why
    if config.data.split is None and config.data.validation is None:
        yield "data.split", len(data.held_out.rows), "5% of the rows, at most 500; none below 20 rows"
    if config.schedule.epochs is None and config.schedule.steps is None:
        because = "3 if neither epochs nor steps are set; the best checkpoint is saved"
        yield "schedule.epochs", config.epochs, because
    if base.quantized and config.memory.keep_dequantized_gb is None:
        because = "on a GPU, as much as fits in the planned memory; on a CPU, dequantizing costs almost nothing"
        yield "memory.keep_dequantized_gb", int(report.numbers.get("kept_dequantized", 0)) / 1e9, because
    if run.config.batching != config.batching:  # `with_device_micro_tokens` has set it
        because = "a size that is fast on this device and fits in its memory"
        yield "batching.micro_tokens", config.batching.at_once, because
    if config.memory.keep_packed_gb is None:
        because = "weights that are clearly faster when prepacked, as far as they fit in the planned memory"
        packed = sum(int(report.numbers.get(key, 0)) for key in ("kept_packed", "drawer_packed"))
        yield "memory.keep_packed_gb", packed / 1e9, because
    if config.memory.activation_checkpointing == "auto":
        yield "memory.activation_checkpointing", "on" if text.recompute[0] else "off", text.recompute[1]
    for name, section in (("preference", config.preference), ("reinforcement", config.reinforcement)):
        for key, value in section.with_defaults():
            if section.loss is not None and value is not None and getattr(section, key) is None:
                yield f"{name}.{key}", value, f"what {section.loss} takes"


@contextmanager
def attached_texts(texts: Sequence[TextRun]) -> Iterator[list[AttachedText]]:
    """Attach the runs' adapters to their common base, and select the first adapter.

    Inside the with-block, the base is in training mode on its fast paths, and sharded if configured. At the
    end, everything except the sharding is undone."""
    first = texts[0]
    config, base, run = first.config, first.base, first.run
    model, devices = base.model, run.devices
    sharded = config.memory.shard and devices.count > 1
    recompute = any(text.recompute[0] for text in texts)
    keep, pack = (
        min(int(text.report.numbers.get(key, 0)) for text in texts) for key in ("kept_dequantized", "kept_packed")
    )
    with ExitStack() as undo:
        attachment = undo.enter_context(attach(model))
        fresh = {text.name: _fresh_adapter(text) for text in texts}
        for name in list(fresh):
            attachment.add(name, fresh.pop(name), trainable=True)  # copies the adapter
        attachment.use(first.name)
        undo.callback(model.train, model.training)
        model.train()
        # must precede the fusion of weights by `fast`
        sampled_texts = [undo.enter_context(_open_sampled(text, attachment)) for text in texts]
        if recompute:
            undo.callback(model.activation_checkpointing_disable)
            recompute_activations(model)
        call: CallWithWeights = call_unsharded
        parted: Sharded | None = None
        if sharded:
            total, device = whole_bytes(model), torch.device(devices.device)
            call = parted = shard(model, blocks(model), device, base.unread, weights_together(model))
            for adapter in attachment.adapters.values():
                adapter.move(device)
            local = local_bytes(model)
            read_note = "" if base.unread is None else f", after reading {size(base.unread.bytes_read)}"
            run.note(f"sharded over {devices.count} devices: this one holds {size(local)} of {size(total)}{read_note}")
            texts = [replace(text, base=replace(base, device=device)) for text in texts]
        how = undo.enter_context(fast(model, keep=0 if sharded else keep, pack=pack, sharded=parted))
        run.note(how.summary())
        attached = [AttachedText(text, attachment, call) for text in texts]
        for each, sampled in zip(attached, sampled_texts, strict=True):
            each.task = _task_of(each, sampled)
        if config.base.compute == "int8":
            parameters = list(attachment.parameters(attached[0].name).values())
            batches = [micro.make() for micro in attached[0].steps[0].micros]
            run.note(use_int8(base, attached[0].call, parameters, batches, first.report))
        yield attached


def _fresh_adapter(text: TextRun) -> Adapter:
    """Return the initial adapter: a new adapter, or the adapter that the run continues from."""
    seed_all(text.config.seed)
    if text.data.start is not None:
        return text.data.start
    base, config = text.base, text.config
    return create(base.model, config.adapter.spec(), seed=config.seed, original=base.original)


@contextmanager
def _open_sampled(text: TextRun, attachment: Attachment) -> Iterator[Reinforcement | Distillation | None]:
    """Yield a run's reinforcement or distillation with its sampler; None if the run does not sample.

    The reference of reinforcement is the base without adapter, or the adapter that the run started from."""
    r = text.config.sampling
    if r is None:
        yield None
        return
    if text.sampler is None:
        message = f"{r.named} needs a sampler"
        raise ConfigError(message, where=r.named, fix="train with `veneer train` or veneer.train_text")
    judges = local_judge_models(r.rewards) if isinstance(r, ReinforcementSection) else set()
    longest = max(int(token_counts(split.items)[0].max(initial=0)) for split in (text.data.train, text.data.held_out))
    context = 0 if judges else longest  # the length of the judges' prompts is not limited
    exact = isinstance(r, ReinforcementSection) and r.exact
    pack = int(text.report.numbers.get("drawer_packed", 0))
    rows = sampled_at_once(text.config, len(text.data.held_out.items[: text.config.evaluation.rows]))
    settings = SamplerSettings(rows=rows, context=context, pack_bytes=pack, exact=exact)
    with ExitStack() as opened:
        sampler = opened.enter_context(text.sampler(text.base, attachment, settings))
        if problems := sampler.problems(text.name):
            message = f"completions cannot be sampled from this adapter:\n{bullets(problems)}"
            fix = "train pairs of linear layers only, without adapter.modules_to_save, token_rows, kind"
            raise PreflightError(message, where="adapter", fix=fix)
        shared: dict[str, Any] = {"config": text.config, "base": text.base, "name": text.name, "sampler": sampler}
        if isinstance(r, ReinforcementSection):
            if r.samplers and not text.run.dry_run:
                if text.run.devices.count > 1:
                    raise ConfigError("samplers support only one training process", where="reinforcement.samplers")
                servers = sampler_servers(text.config, text.base, attachment, text.name)
                shared["servers"] = opened.enter_context(servers)
            ask = sampled_judge(text.base, attachment, sampler, judges) if judges else None
            rewards = opened.enter_context(build_rewards(r.rewards, ask=ask, most_failed=r.most_failed))
            reference = ""
            if text.data.start is not None and r.kl:
                reference = f"{text.name}, before training"
                attachment.add(reference, text.data.start)
            yield Reinforcement(**shared, attachment=attachment, rewards=rewards, reference=reference)
        else:
            teacher = open_teacher(r, text.base, attachment, text.run.note)
            if teacher.base.context < longest:
                label = f"the teacher's context is {teacher.base.context}; prompts with answers have up to {longest}"
                raise PreflightError(label, where="distillation.base", fix="lower data.max_length")
            yield Distillation(**shared, teacher=teacher)


def recompute_activations(model: Any) -> None:
    """Make layers store only their inputs, and recompute the rest when needed.

    Raises ConfigError if the model does not support checkpointing."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        text = f"this base cannot recompute activations: {error}"
        where = "memory.activation_checkpointing"
        raise ConfigError(text, where=where, fix="turn it off, and lower batching.micro_rows") from error


class AttachedText:
    """A text run with its adapter attached to the base.

    call: calls a function that needs the model's weights, whether or not they are sharded. task: the task to
    run."""

    task: Task[RunResult]

    def __init__(self, text: TextRun, attachment: Attachment, call: CallWithWeights) -> None:
        self.config, self.base, self.run, self.data, self.name = text.config, text.base, text.run, text.data, text.name
        self.attachment, self.call = attachment, call
        self.steps = planned_steps(self.data.train.items, self.config, self.data.train.rows, self.run.devices.count)
        self.held_out: Sequence[Any] = self.data.held_out.items[: self.config.evaluation.rows]
        self.likelihood = Likelihood(self)

    def learner(
        self, loss: Callable[[Any], Tensor], score: Callable[[Stop], EvalResult | None], **more: Any
    ) -> Learner:
        options = {"send": sender(self.base.device), "activate": self.activate, **more}
        return Learner(self.attachment.parameters(self.name), loss, score=score if self.held_out else None, **options)

    def make_task(self, learner: Learner, **more: Any) -> Task[RunResult]:
        base, data = self.base, self.data
        identity = {
            "base": {"fingerprint": base.fingerprint, "dtype": str(base.dtype)},
            "data": {"training rows": data.train.digest, "held-out rows": data.held_out.digest},
        } | ({"start": data.start.digest()} if data.start is not None else {})
        packed, tokens = fast_report(base.model).prepack_budget.most, self.config.batching.at_once
        environment = {"tokens of a micro-batch": tokens, "bytes of prepacked weights": packed}
        return Task(
            learner=learner,
            steps=self.steps,
            ends=self.steps.ends,
            result=self.result,
            save=self.save,
            write=self.write,
            prove=self.prove,
            report=self.report,
            identity=identity,
            environment=environment,
            **more,
        )

    def activate(self) -> None:
        self.attachment.use(self.name)

    def why_alone(self) -> str:
        """Return why the run's rows cannot share a pass with other runs, or ""."""
        if self.config.preference.loss is not None:
            return "its loss compares answers"
        if self.config.sampling is not None:
            return "its completions are sampled"
        adapter, model = self.attachment.adapters[self.name], self.base.model
        head = base_of(model.get_output_embeddings())
        if any(module is head and name in adapter.pairs for name, module in base_modules(model)):
            return "it changes the head"
        return span_problem(adapter)

    def result(self, outcome: Outcome, progress: Progress) -> RunResult:
        """Return the result.

        Unless the loss is a likelihood, the result includes the metrics of the saved step and of step 0."""
        result = RunResult(
            **vars(outcome),
            tokens=progress.tokens,
            learned_tokens=progress.trained_tokens,
            tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        )
        if outcome.dry_run or (self.config.preference.loss is None and self.config.sampling is None):
            return result
        by_step = {r["step"]: dict(r["extra"]) for r in self.logged("evaluated")}
        by_step = self.run.devices.gather(by_step)[0]
        return replace(result, measured=by_step.get(result.kept_step, {}), measured_before=by_step.get(0, {}))

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the run's log records of one event type; [] except on the first process."""
        log = read_log(self.run.folder / "log.jsonl") if self.run.devices.first else []
        return [record for record in log if record.get("event") == event]

    def save(self, result: RunResult, progress: Progress, emit: Listener) -> RunResult:
        adapter = self._carded(text_metrics(result))
        if sample := adapter.card.extra.get("sample"):
            adapter.card.extra = {**adapter.card.extra, "sample": {**sample, **self._answers(sample, emit)}}
        digest = write_adapter(adapter, self.run.folder, self.base)
        return replace(result, adapter=str(self.run.folder), digest=digest)

    def _answers(self, sample: Mapping[str, Any], emit: Listener) -> dict[str, str]:
        """Return completions of the card's prompt, or {} if the card should show none.

        The card shows none if several devices train, because a completion would need all of them, or if the
        prompt is a training row, because its completion would not show what was learned."""
        tokens = self.config.evaluation.sample_tokens(len(self.steps))
        if not tokens or self.run.devices.count > 1 or not sample_prompt(self.data.held_out.rows):
            return {}
        try:
            return sample_answers(self.base, self.attachment, self.name, sample["messages"], tokens)
        except VeneerError as error:
            emit(Note(f"the card has no sample answers: {error.what}"))
            return {}

    def write(self, folder: Path, progress: Progress) -> None:
        write_adapter(self._carded(progress.metrics()), folder, self.base)

    def _carded(self, metrics: dict[str, Any]) -> Adapter:
        base, data, trained = self.base, self.data, self.attachment.adapter(self.name)
        card = replace(
            trained.card,
            base=base.name,
            base_fingerprint=base.fingerprint,
            kind="text",
            data_digest=data.train.digest,
            recipe=self.config.recipe(),
            metrics=metrics,
            parents=[data.start.digest()] if data.start is not None else [],
        )
        sample = (
            {}
            if self.config.evaluation.sample == 0
            else sample_prompt(itertools.chain(data.held_out.rows, data.train.rows))
        )
        if sample:
            card.extra = {**card.extra, "sample": sample}
        return replace(trained, card=card)

    def prove(self) -> str:
        base, folder = self.base, self.run.folder
        ids = torch.tensor([self.data.train.encoded.examples[0].input_ids], device=base.device)

        def logits() -> Tensor:
            out: Tensor = base.model(input_ids=ids, use_cache=False).logits
            return out

        def proven() -> str:
            # PiSSA and OLoRA are written with twice the rank, which adds one rounding in the base's dtype per
            # layer.
            rewritten = any(pair.origin is not None for pair in self.attachment.adapters[self.name].pairs.values())
            return prove(
                self.attachment,
                self.name,
                peft.read_folder(folder, base.model),
                logits,
                path=folder,
                noun="logits",
                rounding=64 * torch.finfo(base.dtype).eps if rewritten else 0.0,
            )

        with without_dropout(base.model):
            return self.call(proven)

    def report(self, result: RunResult, progress: Progress) -> Page:
        preference, d, r = self.config.preference.loss, self.config.distillation, self.config.reinforcement.loss
        loss = "nats per trained token"
        if preference is not None:
            loss = f"{preference}, mean over {'answers' if preference == 'kto' else 'pairs'}"
        elif d.teacher is not None:
            loss = f"{d.divergence} KL from the teacher, nats per token"
        elif r is not None:
            loss = f"{r}, mean over completions; held out: minus the mean reward"
        return text_report(result, self.run.folder, self.base, progress.seconds, loss)


def _task_of(a: AttachedText, sampled: Reinforcement | Distillation | None) -> Task[RunResult]:
    if sampled is not None:
        return _sampled_task(a, sampled)
    if a.config.preference.loss is not None:
        return _preference_task(a)
    likelihood = a.likelihood
    begin, metrics = likelihood.begin_step, likelihood.metrics
    return a.make_task(a.learner(likelihood.loss, likelihood.score, begin_step=begin, metrics=metrics))


class Likelihood:
    """The likelihood loss of the rows' targets, and the token accuracy."""

    def __init__(self, text: AttachedText) -> None:
        self.text = text
        self._right: list[Tensor] = []
        self._seen = 0

    def begin_step(self, step: Step) -> None:
        self._right, self._seen = [], 0

    def loss(self, batch: Batch) -> Tensor:
        """Return Σ NLL over the trained tokens.

        The batch is on the CPU, so reading it does not wait for a device."""
        base = self.text.base
        right = torch.empty(batch.trained_tokens, dtype=torch.bool, device=base.device)
        ids = sent(batch.input_ids, base.device)
        nll = self.text.call(text_loss, base.model, ids, batch.lengths, batch.trained, right)
        self.add_accuracy(right)
        return nll

    def add_accuracy(self, right: Tensor) -> None:
        """Add this step's tokens to the token accuracy.

        right: for each token in the loss, whether the model ranks it first."""
        self._right.append(right.sum())
        self._seen += len(right)

    def metrics(self) -> MetricMeans:
        if not self._seen:
            return MetricMeans()
        right = float(torch.stack(self._right).sum())  # one synchronization per step
        return MetricMeans({TOKEN_ACCURACY: right}, {TOKEN_ACCURACY: self._seen})

    def score(self, stop: Stop) -> EvalResult | None:
        text = self.text
        return score_examples(
            text.base.model,
            text.held_out,
            text.base.device,
            loss=lambda *args: text.call(text_loss, *args),
            interrupted=stop,
            micro_tokens=text.config.batching.at_once,
            devices=text.run.devices,
        )


def _preference_task(a: AttachedText) -> Task[RunResult]:
    """Return the task of a preference run.

    The loss is over pairs (for kto, over completions). The reference is the base without adapter, or the
    adapter that the run started from."""
    name = f"{a.name}, before training"
    preference = Preference(a.config, a.base, a.attachment, a.data.start, name, a.call, a.run.devices)

    def begin(progress: Progress, emit: Listener) -> None:
        """Compute the reference's log-probabilities of every pair that the run uses."""
        if a.run.dry_run:
            return
        # a short run does not use every pair
        used = {id(item): item for step in a.steps for micro in step.micros for item in micro.items}
        try:
            preference.load_reference([*used.values(), *a.held_out], lambda line: emit(Note(line)))
        except KeyboardInterrupt:
            raise Interrupted("stopped before step 1") from None

    learner = a.learner(
        preference.loss,
        lambda stop: preference.score(a.held_out, interrupted=stop),
        begin_step=preference.begin,
        metrics=preference.metrics,
    )
    return a.make_task(learner, begin=begin)


def _sampled_task(a: AttachedText, sampled: Reinforcement | Distillation) -> Task[RunResult]:
    """Return the task of a run with sampled answers, which are judged or compared with a teacher."""
    rows, emit = a.data.train.rows, a.run.emit
    if isinstance(sampled, Reinforcement):
        sampled.plan = a.steps

    def begin(progress: Progress, listener: Listener) -> None:
        nonlocal emit
        emit = listener
        if sampled.servers is not None:
            sampled.servers.say = lambda line: listener(Note(line))
        for line in sampled.start_notes(a.data.train.items):
            emit(Note(line))

    def end_step(number: int) -> None:
        for line in sampled.step_notes(number):
            emit(Note(line))

    learner = a.learner(
        sampled.loss,
        lambda stop: sampled.score(a.held_out, a.data.held_out.rows, stop),
        send=None,  # the next step's completions are not sampled yet
        make_step=lambda step, number, stop: sampled.sample_step(step, number, rows, stop),
        begin_step=lambda step: sampled.begin(),
        end_step=end_step,
        metrics=sampled.means,
    )
    return a.make_task(
        learner,
        begin=begin,
        extra_state=sampled.extra_state,
        restore=sampled.restore,
        rewarded=isinstance(sampled, Reinforcement),
    )
