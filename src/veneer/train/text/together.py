"""Train several text runs on one base, in one pass of the base, each row with its run's adapter.

    results = run_texts(configs)           one RunResult per run, or the error that ended the run

    loss of a pass = Σ over runs  Σ NLL of its rows / trained tokens of its step

The loss term of a run does not depend on the parameters of other runs, so one backward pass gives each run
the same gradient as a separate pass. The base, which has most of a step's cost, runs once.
ops/lora_segments.py maps rows to adapters. A run that cannot share a pass (DoRA, full copies, preferences …)
has a separate pass in each step, with the same results.

Each run has its own parameters, optimizer, schedule, evaluations and files. All runs take step k together. If
a run fails or ends, the other runs continue. When a checkpoint of one run is due, all runs write one, so a
killed group resumes bit for bit (`resume_points`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.core.attach import Attachment
from veneer.core.targets import base_modules, expert_parameters
from veneer.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    PreflightError,
    ResourceError,
    VeneerError,
    counted,
    gigabytes,
)
from veneer.models.patching import fast_report
from veneer.models.text.loss import rows_nll
from veneer.ops.cpu.sharing import shared
from veneer.ops.device_transfer import sent
from veneer.ops.lora_segments import LoraSegments
from veneer.train import checkpoint
from veneer.train.checkpoint import seed_all, seeded_generator
from veneer.train.config.checks import check_group
from veneer.train.config.load import RunConfig
from veneer.train.config.text import TrainConfig
from veneer.train.devices import process_count
from veneer.train.events import Listener, Note
from veneer.train.loop import Loop, Micro, StepResult, begin_step, memory_errors, read_losses, train, train_step
from veneer.train.preflight import memory_finding
from veneer.train.run import Run, dry_outcome, finished, opened
from veneer.train.run import started as started_run
from veneer.train.text.batches import Batch
from veneer.train.text.save import RunResult
from veneer.train.text.task import (
    AttachedText,
    TextRun,
    attached_texts,
    checked_text,
    loaded_base,
    with_device_micro_tokens,
)

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_STATE = 16
"""Bytes per trained parameter: the parameter, its gradient and AdamW's two moments, in float32."""


def run_texts(
    configs: Sequence[RunConfig],
    *,
    names: Sequence[str] | None = None,
    resume: bool = False,
    allow_other_machine: bool = False,
    dry_run: bool = False,
    force: bool = False,
    listeners: Sequence[Listener | None] | None = None,
    base: TextBase | None = None,
    sources: Sequence[Mapping[str, Any] | None] | None = None,
) -> list[RunResult | VeneerError]:
    """Train an adapter for each configuration on one base, in one pass per step, and return the results.

    names: the names of the runs in messages; the default is their output folders. listeners, sources: one per
    run. The other arguments are as in `run_text`.

    If a run fails, its result is the error; the other runs are not affected. Raises ConfigError for
    configurations that cannot share a base, and Interrupted after saving the state of every run."""
    check_group(configs, [config.output.directory for config in configs] if names is None else names)
    # all of them are text configurations, but their type does not say so
    texts = [config for config in configs if isinstance(config, TrainConfig)]
    if process_count() > 1:
        text = "several configurations in one pass need a single process"
        raise ConfigError(text, fix="leave --devices out, or train one configuration at a time")
    group: list[str] = []
    with ExitStack() as stack:
        runs: list[Run] = []
        options: dict[str, Any] = {"resume": resume, "dry_run": dry_run, "force": force, "group": group}
        options["allow_other_machine"] = allow_other_machine
        for i, config in enumerate(texts):
            listener, origins = listeners[i] if listeners else None, sources[i] if sources else None
            run = opened(config, unit="tokens", on_event=listener, sources=origins, **options)
            runs.append(stack.enter_context(run))
        base = loaded_base(texts[0], base, runs[0])
        for note in base.notes:
            runs[0].note(note)
        results, texts_by_index = _checked(runs, base)
        if texts_by_index:
            results |= _trained(texts_by_index)
        return [results[index] for index in range(len(runs))]


def _trained(texts: Mapping[int, TextRun]) -> dict[int, RunResult | VeneerError]:
    """Train the runs, and return their results by index."""
    _check_memory(list(texts.values()))
    results: dict[int, RunResult | VeneerError] = {}
    members: dict[Loop, int] = {}
    for text in texts.values():
        text.run.group.append(text.run.name)
    with ExitStack() as stack:
        attached = dict(zip(texts, stack.enter_context(attached_texts(list(texts.values()))), strict=True))
        logs = {index: stack.enter_context(ExitStack()) for index in attached}

        def end(index: int, outcome: RunResult | VeneerError) -> None:
            logs[index].close()
            run = texts[index].run
            run.group.remove(run.name)
            results[index] = outcome

        def end_loop(loop: Loop, error: VeneerError | None) -> None:
            index = members[loop]
            text = texts[index]
            try:
                if error is not None:
                    raise error
                outcome = finished(text.run, attached[index].task, text.report, loop)
            except VeneerError as raised:
                end(index, _failed(text.run, raised))
            else:
                end(index, outcome)

        for index, each in attached.items():
            text = texts[index]
            try:
                each.activate()
                if text.run.dry_run:
                    results[index] = dry_outcome(text.run, each.task, text.report)
                else:
                    members[logs[index].enter_context(started_run(text.run, each.task, text.newest))] = index
            except VeneerError as error:
                end(index, _failed(text.run, error))
        if members:
            compute = SharedPasses.create({loop: attached[index] for loop, index in members.items()})
            train(list(members), compute, on_end=end_loop)
    return results


def _failed(run: Run, error: VeneerError) -> VeneerError:
    if isinstance(error, Interrupted):
        raise error
    run.note(f"{error.what}; this run stops, the others continue")
    return error


def _checked(runs: Sequence[Run], base: TextBase) -> tuple[dict[int, RunResult | VeneerError], dict[int, TextRun]]:
    """Check every run; return the errors of failed runs, and the other runs, by index."""
    errors: dict[int, RunResult | VeneerError] = {}
    texts: dict[int, TextRun] = {}
    points = resume_points(runs) if runs[0].resume else [None] * len(runs)
    taken = 0
    for index, (run, point) in enumerate(zip(runs, points, strict=True)):
        try:
            if isinstance(point, VeneerError):
                raise point
            if run.resume and point is None:
                run.note(f"there is no checkpoint in {run.folder}: the run starts from its beginning")
            assert isinstance(run.config, TrainConfig)
            config, name = with_device_micro_tokens(run.config, base, run), f"run {index + 1}"
            texts[index] = checked_text(run, config, base, point, name=name, taken=taken)
        except VeneerError as error:
            errors[index] = _failed(run, error)
            continue
        taken += _STATE * int(texts[index].report.numbers.get("trainable", 0))
    return errors, texts


def _check_memory(texts: Sequence[TextRun]) -> None:
    """Raise PreflightError if the states of all runs and the largest pass do not fit in memory.

    With `force`, only warns. Preflight has checked each run only separately."""
    free: int | None = texts[0].report.numbers.get("memory_free")
    if free is None:
        return
    states, each, tokens, most = 0, 0.0, 0, 0
    for text in texts:
        numbers = text.report.numbers
        state = _STATE * int(numbers.get("trainable", 0))
        need = numbers.get("memory_checkpointed" if text.recompute[0] else "memory_needed")
        largest = numbers["largest_micro_batch"]
        if need is None or not largest:
            return
        each = max(each, (need - state) / largest)
        states, tokens, most = states + state, tokens + largest, max(most, largest, text.config.batching.at_once)
    needed = states + int(each * min(tokens, most))
    runs = counted(len(texts), "run")
    where = f"{gigabytes(states)} of the needed memory is for parameters, gradients and optimizer states of {runs}"
    fix = "train fewer configurations at once, or lower batching.micro_tokens in all of them"
    finding = memory_finding(needed, free, where, fix=fix, force=texts[0].run.force)
    if finding.level == "stop":
        raise PreflightError(finding.text, fix=finding.fix)
    texts[0].run.note(f"together: {finding.text}")


@dataclass(frozen=True)
class SharedPasses:
    """Computes the training steps of several runs on one base.

    members: the runs that share passes; other runs have separate passes. most: maximum tokens of a pass."""

    model: Any
    device: torch.device
    attachment: Attachment
    members: Mapping[Loop, AttachedText]
    most: int

    @classmethod
    def create(cls, texts: Mapping[Loop, AttachedText]) -> SharedPasses:
        """Create the shared passes; report which runs need separate passes, and why."""
        first = next(iter(texts.values()))
        together = reason_not_shared(first.base.model)
        members = {}
        for loop, text in texts.items():
            why = together or text.why_alone()
            if not why:
                members[loop] = text
            elif len(texts) > 1:
                loop.emit(Note(f"its rows need a separate pass in each step: {why}"))
        if len(members) > 1:
            next(iter(texts)).emit(Note(f"{counted(len(members), 'run')} in one pass of the base"))
        most = max(text.config.batching.at_once for text in texts.values())
        return cls(first.base.model, first.base.device, first.attachment, members, most)

    def __call__(self, loops: Sequence[Loop]) -> dict[Loop, StepResult | VeneerError | None]:
        if loops and loops[0].stop():
            return dict.fromkeys(loops)
        joined = [loop for loop in loops if loop in self.members]
        results = self._together(joined) if len(joined) > 1 else {}
        for loop in loops:
            if loop not in results:
                loop.learner.activate()
                try:
                    results[loop] = train_step(loop)
                except VeneerError as error:
                    results[loop] = error
        return results

    def _together(self, loops: Sequence[Loop]) -> dict[Loop, StepResult | VeneerError | None]:
        nlls: dict[Loop, dict[int, Tensor]] = {loop: {} for loop in loops}
        tokens = dict.fromkeys(loops, 0)
        for loop in loops:
            begin_step(loop)
        began = time.perf_counter()
        for parts in self._cut(loops):
            if loops[0].stop():
                return dict.fromkeys(loops)
            micros = [loop.micros[index] for loop, index in parts]
            rows = tuple(row for micro in micros for row in micro.rows)
            try:
                with shared(), memory_errors(Micro(sum(micro.tokens for micro in micros), 0, rows, lambda: None)):
                    sums = self._pass(parts)
            except ResourceError as error:  # omit row names, because a run's log must not name rows of another run
                return dict.fromkeys(loops, ResourceError(error.what, where="a pass of several runs", fix=error.fix))
            for (loop, index), micro, nll in zip(parts, micros, sums, strict=True):
                nlls[loop][index] = nll
                tokens[loop] += micro.tokens
        losses = {loop: read_losses(loop_nlls) for loop, loop_nlls in nlls.items()}
        each = (time.perf_counter() - began) / max(1, sum(tokens.values()))
        return {loop: loop.result(losses[loop], each * tokens[loop]) for loop in loops}

    def _cut(self, loops: Sequence[Loop]) -> Iterator[list[tuple[Loop, int]]]:
        """Yield the (run, micro-batch index) pairs of each pass.

        The first micro-batches of all runs come first, then all second micro-batches, and so on. A pass has
        at most `most` tokens, or a single micro-batch."""
        order = sorted((index, number) for number, loop in enumerate(loops) for index in range(len(loop.micros)))
        part: list[tuple[Loop, int]] = []
        tokens = 0
        for index, number in order:
            more = loops[number].micros[index].tokens
            if part and tokens + more > self.most:
                yield part
                part, tokens = [], 0
            part.append((loops[number], index))
            tokens += more
        yield part

    def _pass(self, parts: Sequence[tuple[Loop, int]]) -> list[Tensor]:
        """Run one forward and backward pass of these micro-batches, and return Σ NLL for each."""
        batches: list[Batch] = [loop.batch(index, range(index + 1, len(loop.micros))) for loop, index in parts]
        seeds = [loop.seed(index) for loop, index in parts]
        seed_all(*seeds[0])
        tokens, trained = [batch.tokens for batch in batches], [batch.trained_tokens for batch in batches]
        segments = LoraSegments(tokens, trained, [seeded_generator(*seed) for seed in seeds])
        self.attachment.use_spans([self.members[loop].name for loop, _ in parts], segments)
        right = torch.empty(sum(trained), dtype=torch.bool, device=self.device)
        nll = rows_nll(
            self.model,
            torch.cat([sent(batch.input_ids, self.device) for batch in batches]),
            [length for batch in batches for length in batch.lengths],
            torch.cat([batch.trained for batch in batches]),
            segments=segments,
            correct=right,
        )
        for (loop, _), part in zip(parts, right.split(trained), strict=True):
            self.members[loop].likelihood.add_accuracy(part)
        sums = [part.sum() for part in nll.split(trained)]
        losses = [loss / loop.step.divisor for loss, (loop, _) in zip(sums, parts, strict=True)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        return [loss.detach() for loss in sums]


def reason_not_shared(model: nn.Module) -> str:
    """Return why rows of several runs cannot share a pass of the base, or "".

    Must be called inside `fast`."""
    if not fast_report(model).rows:
        return "this base needs padded rows"
    for name, module in base_modules(model):
        if expert_parameters(module) or ".experts." in name:
            return f"{name} groups the tokens of all rows by expert"
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"{name} applies dropout in training, to all rows at once"
    return ""


def resume_points(runs: Sequence[Run]) -> list[Path | CheckpointError | None]:
    """Return the checkpoint that each run continues from; None to start from the beginning.

    Runs that were trained together continue from the last step for which all of them have a checkpoint. A run
    that had already finished at that step keeps its result. For a run that had failed before that step, the
    list has an error, because training this run now would change the last bits of the other runs' weights. A
    run that has only its first checkpoint starts from the beginning if another run of its group has no
    checkpoint."""
    have = {run.name: checkpoint.by_step(run.folder / "checkpoints") for run in runs}
    group: set[str] = set()
    last = -1
    for step in sorted({step for steps in have.values() for step in steps}, reverse=True):
        for name, steps in have.items():
            if step in steps and last < 0:
                companions = _companions(name, steps[step]) & have.keys()
                if all(step in have[companion] for companion in companions):
                    group, last = companions, step
    out: list[Path | CheckpointError | None] = []
    for run in runs:
        steps = have[run.name]
        newest = steps[max(steps)] if steps else None
        companions = set() if newest is None else _companions(run.name, newest) & have.keys()
        if run.name in group:
            out.append(steps[last])
        elif len(steps) == 1 and any(not have[companion] for companion in companions):
            out.append(None)
        elif newest is None or not companions & group or _has_ended(newest):
            out.append(newest)
        else:
            text = f"this run ended early, after step {max(steps)}; the runs trained with it are at step {last}"
            fix = "check its data or settings, and resume only this run: veneer train CONFIG.yaml --resume"
            out.append(CheckpointError(text, where=str(run.folder), fix=fix))
    return out


def _companions(name: str, path: Path) -> set[str]:
    """Return the names of the runs trained together with this run, including its own.

    name: the run's name. path: its checkpoint."""
    metadata = checkpoint.read_checkpoint(path).get("about", {})
    return {name, *metadata.get("together", [])}


def _has_ended(path: Path) -> bool:
    return checkpoint.read_checkpoint(path)["progress"]["stopped"] in ("finished", "early stopping")
