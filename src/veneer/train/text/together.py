"""Runs on text that share a base, in one pass of it: rows of all beside one another, each under its own adapter.

    results = run_texts(configs)           one RunResult each, or the error that ended it

    loss of a pass = Σ over runs  Σ NLL of its rows / trained tokens of its step

No run's term holds another's parameters, so that one backward gives each the gradient that it would have alone; the
base, whose products are what a step costs, is gone through once. How rows find their adapter: ops/spans.py. What cannot
go beside others (DoRA, full copies, answers compared …) has a pass of its own in each step, and is no less right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from veneer.core.attach import Attachment
from veneer.core.targets import base_modules, expert_parameters
from veneer.errors import ConfigError, Interrupted, PreflightError, ResourceError, VeneerError, counted, gigabytes
from veneer.models.swap import report_of
from veneer.models.text.loss import rows_nll
from veneer.ops.cpu.sharing import shared
from veneer.ops.spans import Spans
from veneer.ops.transfer import sent
from veneer.train.checkpoint import seed_all, seeded_generator
from veneer.train.config.checks import check_group
from veneer.train.config.load import RunConfig
from veneer.train.config.text import TrainConfig
from veneer.train.devices import started
from veneer.train.events import Listener
from veneer.train.loop import Micro, StepDone, StepWanted, StopAsked, make_step, memory_errors, read_losses
from veneer.train.preflight import memory_finding
from veneer.train.run import Run, checked_data, dry_outcome, opened, steps_of_run
from veneer.train.text.batches import Batch
from veneer.train.text.save import RunResult
from veneer.train.text.task import AttachedText, TextPart, TextTask, attached_texts, cut_by_device, loaded_base
from veneer.train.together import Leave, Member, in_step, resume_points

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_STATE = 16
"""Bytes for each trained parameter: itself, its gradient and AdamW's two moments, float32."""


def run_texts(
    configs: Sequence[RunConfig],
    *,
    names: Sequence[str] | None = None,
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    listeners: Sequence[Listener | None] | None = None,
    base: TextBase | None = None,
    sources: Sequence[Mapping[str, Any] | None] | None = None,
    called: Sequence[str] | None = None,
    leave: Leave = lambda running: {},
    ended: Callable[[int, RunResult | VeneerError], None] = lambda place, outcome: None,
) -> list[RunResult | VeneerError]:
    """Trains an adapter for each configuration, all on one base and in one pass a step, and returns what came of each.

    `names`: what messages call them, by default their output folders. `listeners`, `sources`: one of each; `called`:
    what their checkpoints call them, by default their output folders, which then stay where they are; `leave`, `ended`:
    as `in_step` has them, by their places here; the rest as `run_text`. A run that fails is its error in the list, and
    leaves the others as they are. Raises ConfigError for configurations that cannot share a base, and
    Interrupted, with the state of all saved."""
    check_group(configs, [config.output.directory for config in configs] if names is None else names)
    texts = [config for config in configs if isinstance(config, TrainConfig)]  # which all are
    if started() > 1:
        raise ConfigError(
            "several configurations are trained in one pass by one process alone",
            fix="leave --devices out, or train one configuration at a time",
        )
    group: list[str] = []
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                opened(
                    config,
                    unit="tokens",
                    on_event=None if listeners is None else listeners[i],
                    sources=None if sources is None else sources[i],
                    resume=resume,
                    dry_run=dry_run,
                    force=force,
                    group=group,
                    name="" if called is None else called[i],
                )
            )
            for i, config in enumerate(texts)
        ]
        base = loaded_base(texts[0], base, runs[0])
        for note in base.notes:
            runs[0].note(note)
        results, parts, newest = _checked(runs, base)
        for place, outcome in results.items():
            ended(place, outcome)
        if parts:
            results |= _trained(parts, newest, leave, ended)
        return [results[place] for place in range(len(runs))]


def _trained(
    parts: Mapping[int, TextPart],
    newest: Mapping[int, Path | None],
    leave: Leave,
    ended: Callable[[int, RunResult | VeneerError], None],
) -> dict[int, RunResult | VeneerError]:
    """What came of each of these, by its place. `newest`: where it goes on."""
    _check_memory(list(parts.values()))
    results: dict[int, RunResult | VeneerError] = {}
    members: dict[int, Member[RunResult]] = {}
    asked = StopAsked()
    for part in parts.values():
        part.run.group.append(part.run.called)
    with attached_texts(list(parts.values())) as attached:
        tasks = dict(zip(parts, attached, strict=True))
        for place, task in tasks.items():
            report = parts[place].report
            try:
                task.act()
                task.check_base()
                if task.run.dry_run:
                    results[place] = dry_outcome(task.run, task, report)
                    continue
            except VeneerError as error:
                results[place] = _failed(task.run, error)
                task.run.group.remove(task.run.called)
                ended(place, results[place])
                continue
            members[place] = Member(task.run, task, steps_of_run(task.run, task, report, newest[place], asked))
        if members:
            make = Passes.of({place: tasks[place] for place in members}, asked)
            results |= in_step(members, make, asked, leave, ended)
    return results


def _failed(run: Run, error: VeneerError) -> VeneerError:
    if isinstance(error, Interrupted):
        raise error
    run.note(f"{error.what}; this run ends here, the others go on")
    return error


def _checked(
    runs: Sequence[Run], base: TextBase
) -> tuple[dict[int, RunResult | VeneerError], dict[int, TextPart], dict[int, Path | None]]:
    """By the runs' places: the errors of those that cannot begin, the data of the others, and where these go on."""
    errors: dict[int, RunResult | VeneerError] = {}
    parts: dict[int, TextPart] = {}
    newest: dict[int, Path | None] = {}
    points = resume_points(runs) if runs[0].resume else [None] * len(runs)
    taken = 0
    for place, (run, point) in enumerate(zip(runs, points, strict=True)):
        try:
            if isinstance(point, VeneerError):
                raise point
            if run.resume and point is None:
                run.note(f"there is no checkpoint in {run.folder}: the run starts from its beginning")
            assert isinstance(run.config, TrainConfig)
            task = TextTask(cut_by_device(run.config, base, run), base, taken)
            data, report = checked_data(run, task, point)
        except VeneerError as error:
            errors[place] = _failed(run, error)
            continue
        newest[place] = point
        parts[place] = TextPart(task, run, data, report, f"run {place + 1}")
        taken += _STATE * int(report.numbers.get("trainable", 0))
    return errors, parts, newest


def _check_memory(parts: Sequence[TextPart]) -> None:
    """PreflightError where the states of all, and what the largest pass keeps, do not fit beside the base. Each run's
    own preflight has looked at its own pass; with `force` it is a warning."""
    states = [_STATE * int(part.report.numbers.get("trainable", 0)) for part in parts]
    free: int | None = parts[0].report.numbers.get("memory_free")
    if free is None:
        return
    each, tokens, most = 0.0, 0, 0
    for part, state in zip(parts, states, strict=True):
        numbers = part.report.numbers
        again = part.task.recomputes(part.run.devices, part.report)[0]
        need, largest = numbers.get("memory_checkpointed" if again else "memory_needed"), numbers["largest_micro_batch"]
        if need is None or not largest:
            return
        each = max(each, (need - state) / largest)
        tokens, most = tokens + largest, max(most, largest, part.task.config.batching.at_once)
    needed = sum(states) + int(each * min(tokens, most))
    where = f"{gigabytes(sum(states))} of them for the states of {counted(len(parts), 'run')}"
    fix = "fewer configurations at once, or a lower batching.micro_tokens in all of them"
    found = memory_finding(needed, free, where, fix=fix, force=parts[0].run.force)
    if found.level == "stop":
        raise PreflightError(found.text, fix=found.fix)
    parts[0].run.note(f"together: {found.text}")


class _Base(Protocol):
    @property
    def model(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...


class _Sharer(Protocol):
    """What a pass asks of a run on the base it shares: as `AttachedText` has it."""

    name: str
    attachment: Attachment

    @property
    def base(self) -> _Base: ...
    def act(self) -> None: ...
    def saw(self, right: Tensor) -> None: ...


@dataclass(frozen=True)
class Passes:
    """Makes the steps of runs on one base. `joined`: which of them go beside one another. `most`: tokens of a pass."""

    tasks: Mapping[int, _Sharer]
    joined: frozenset[int]
    most: int
    asked: StopAsked

    @classmethod
    def of(cls, tasks: Mapping[int, AttachedText], asked: StopAsked) -> Passes:
        """Says what has passes of its own, and why."""
        first = next(iter(tasks.values()))
        together = why_apart(first.base.model)
        joined = set()
        for place, task in tasks.items():
            why = together or task.why_alone()
            if not why:
                joined.add(place)
            elif len(tasks) > 1:
                task.run.note(f"its rows have a pass of their own in each step: {why}")
        if len(joined) > 1:
            first.run.note(f"{counted(len(joined), 'run')} in one pass of the base")
        return cls(tasks, frozenset(joined), max(task.config.batching.at_once for task in tasks.values()), asked)

    def __call__(self, wanted: Mapping[int, StepWanted]) -> dict[int, StepDone | VeneerError | None]:
        beside = {place: want for place, want in wanted.items() if place in self.joined}
        made: dict[int, StepDone | VeneerError | None] = {}
        if len(beside) > 1:
            made |= self._together(beside)
        for place, want in wanted.items():
            if place not in made:
                self.tasks[place].act()
                try:
                    made[place] = make_step(want)
                except VeneerError as error:
                    made[place] = error
        return made

    def _together(self, wanted: Mapping[int, StepWanted]) -> dict[int, StepDone | VeneerError | None]:
        nlls: dict[int, dict[int, torch.Tensor]] = {place: {} for place in wanted}
        tokens = dict.fromkeys(wanted, 0)
        for want in wanted.values():
            want.begin()
        began = time.perf_counter()
        for members in self._cut(wanted):
            if self.asked():
                return dict.fromkeys(wanted)
            micros = [wanted[place].micros[index] for place, index in members]
            rows = tuple(row for micro in micros for row in micro.rows)
            try:
                with shared(), memory_errors(Micro(sum(micro.tokens for micro in micros), 0, rows, lambda: None)):
                    found = self._pass(wanted, members)
            except ResourceError as error:  # whose rows they are is nothing that the others are told
                return dict.fromkeys(wanted, ResourceError(error.what, where="a pass of several runs", fix=error.fix))
            for (place, index), micro, nll in zip(members, micros, found, strict=True):
                nlls[place][index] = nll
                tokens[place] += micro.tokens
        losses = {place: read_losses(own) for place, own in nlls.items()}
        each = (time.perf_counter() - began) / max(1, sum(tokens.values()))
        return {place: want.done(losses[place], each * tokens[place]) for place, want in wanted.items()}

    def _cut(self, wanted: Mapping[int, StepWanted]) -> Iterator[list[tuple[int, int]]]:
        """(run, its micro-batch) of each pass: all first ones, all second ones, …, cut before `most` tokens."""
        order = sorted((index, place) for place, want in wanted.items() for index in range(len(want.micros)))
        own: list[tuple[int, int]] = []
        tokens = 0
        for index, place in order:
            more = wanted[place].micros[index].tokens
            if own and tokens + more > self.most:
                yield own
                own, tokens = [], 0
            own.append((place, index))
            tokens += more
        yield own

    def _pass(self, wanted: Mapping[int, StepWanted], members: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Forward and backward of these micro-batches; Σ NLL of each."""
        first = self.tasks[members[0][0]]
        batches: list[Batch] = [
            wanted[place].batch(index, range(index + 1, len(wanted[place].micros))) for place, index in members
        ]
        seeds = [wanted[place].seed(index) for place, index in members]
        seed_all(*seeds[0])
        tokens, kept = [batch.tokens for batch in batches], [batch.trained_tokens for batch in batches]
        spans = Spans(tokens, kept, [seeded_generator(*seed) for seed in seeds])
        first.attachment.use_spans([self.tasks[place].name for place, _ in members], spans)
        device = first.base.device
        right = torch.empty(sum(kept), dtype=torch.bool, device=device)
        nll = rows_nll(
            first.base.model,
            torch.cat([sent(batch.input_ids, device) for batch in batches]),
            [length for batch in batches for length in batch.lengths],
            torch.cat([batch.trained for batch in batches]),
            spans=spans,
            right=right,
        )
        for (place, _), part in zip(members, right.split(kept), strict=True):
            self.tasks[place].saw(part)
        sums = [part.sum() for part in nll.split(kept)]
        counts = [wanted[place].step.counted for place, _ in members]
        torch.stack([own / count for own, count in zip(sums, counts, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
        return [own.detach() for own in sums]


def why_apart(model: nn.Module) -> str:
    """Why rows of several runs cannot go through a base beside one another, within `fast`; "" where they can."""
    if not report_of(model).rows:
        return "this base takes padded rows alone"
    for name, module in base_modules(model):
        if expert_parameters(module) or ".experts." in name:
            return f"{name} mixes the tokens of all rows by expert"
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"{name} drops in training, for all rows at once"
    return ""
