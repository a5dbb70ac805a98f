"""Prompts of a run that samples completions, and the planned steps.

    items, encoded = prompt_split(rows, config, base)   rows → prompt tokens
    steps = planned_rollouts(items, config, rows)       per rollout: `batching.rows` prompts, `updates` steps

A planned step has the largest possible size: every completion has the maximum length. When the step runs, the
planned completions are replaced by sampled ones (`train.text.reinforce`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.ops.attention import SharedRows
from veneer.train.checkpoint import seed_of
from veneer.train.config.text import TrainConfig
from veneer.train.loop import LazySteps, MetricMeans, Micro, Step, Stop
from veneer.train.text.batches import Batch, collate, grouped, step_rows
from veneer.train.text.encode import Counts, EncodedRows, Example, refuse_rows, vocabulary_of
from veneer.train.text.render import Renderer
from veneer.train.text.rollouts import (
    CompletionRequest,
    Rollout,
    Sampler,
    SamplerMismatch,
    SamplingParams,
    sampling_metrics,
)
from veneer.train.text.rows import Row

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase


WaitForSamples = Callable[[Stop], tuple[list[Rollout], dict[str, float]] | None]
"""Returns completions with the metrics of their sampling, or None if interrupted."""


@dataclass(frozen=True)
class PromptItem:
    """A prompt.

    row: index of the prompt's row. most: maximum number of tokens of a completion. teacher_ids: the teacher's
    prompt, if `distillation.system` is set."""

    ids: tuple[int, ...]
    row: int
    most: int
    teacher_ids: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Return the maximum number of tokens of the prompt (the teacher's, if longer) and its completion."""
        return max(len(self.ids), len(self.teacher_ids)) + self.most

    @property
    def trained_tokens(self) -> int:
        return self.most


@dataclass
class PolicyBatch(Batch):
    """Prompts with their completions, T completion tokens in total.

    answers: number of tokens of each completion
    advantage: advantage of each completion
    loss_weights: weight of each completion's token losses
    old: (T,) log p of each token when it was sampled; None if absent
    sampling_logps: (T,) log p in the distribution that the tokens were sampled from; None if absent
    reference: (T,) log p under the reference; None if absent
    fresh: whether no step has trained on the completions yet
    remember: called with the trainer's log p of each token if later updates need it
    teacher: the same completions after the teacher's prompt; None if the teacher has the same prompt
    shared: set if completions share the tokens of their prompt; `input_ids` and `trained` then contain each
        prompt once"""

    answers: list[int]
    advantage: Tensor
    loss_weights: Tensor
    old: Tensor | None = None
    sampling_logps: Tensor | None = None
    reference: Tensor | None = None
    fresh: bool = False
    teacher: Batch | None = None
    shared: SharedRows | None = None
    remember: Callable[[Tensor], None] | None = None


def with_final_turn(row: Row) -> Row:
    """Return the row with an assistant turn at the end; append an empty turn if there is none."""
    if row.messages and row.messages[-1]["role"] == "assistant":
        return row
    return replace(row, messages=(*row.messages, {"role": "assistant", "content": ""}))


def prompt_split(rows: Sequence[Row], config: TrainConfig, base: TextBase) -> tuple[list[PromptItem], EncodedRows]:
    """Return the rows' prompts, in the form that the model reads at inference.

    A prompt that leaves no space for a completion is refused or dropped, depending on `data.long_rows`. In
    distillation, the teacher's prompt must leave space too. Raises DataError, with a list of refused rows."""
    section, data = config.sampling, config.data
    assert section is not None
    renderer = Renderer(base.tokenizer, data.chat_template)
    limit = min(data.max_length, base.context)
    items: list[PromptItem] = []
    counts = Counts(rows=len(rows))
    bad: list[str] = []
    long: list[str] = []
    for i, row in enumerate(rows):
        try:
            ids = _tokens(base, renderer, with_final_turn(row))
            read = _with_system(with_final_turn(row), config.distillation.system, renderer)
            teacher_ids = _tokens(base, renderer, read)
        except ValueError as error:
            bad.append(f"{row.where}: {error}")
            continue
        longest = max(len(ids), len(teacher_ids))
        counts.longest = max(counts.longest, longest)
        if not ids:
            bad.append(f"{row.where}: the prompt is empty")
        elif longest + section.max_tokens > limit:
            long.append(f"{row.where}: {longest} prompt tokens and up to {section.max_tokens} completion tokens")
            counts.add("long_dropped", row.where)
        else:
            items.append(PromptItem(ids, i, section.max_tokens, teacher_ids if config.distillation.system else ()))
    refuse_rows(bad, len(rows), "cannot be used as prompts", "correct those rows")
    if data.long_rows == "refuse":
        fix = f"shorten the prompts, lower {section.named}.max_tokens, raise data.max_length, or drop them with "
        fix += "data.long_rows=drop"
        refuse_rows(long, len(rows), f"leave no space for a completion in {limit} tokens", fix)
    examples = [Example(list(item.ids), [False] * len(item.ids), item.row) for item in items]
    counts.used, counts.tokens = len(items), sum(len(item.ids) for item in items)
    counts.trained_tokens = section.max_tokens * len(items)
    counts.unbegun = sum(item.ids[0] != base.tokenizer.bos_token_id for item in items)
    vocabulary, chat = vocabulary_of(e.coded for e in examples), renderer.template is not None
    return items, EncodedRows(examples, counts, renderer, set(base.stop_ids), chat, set(), vocabulary)


def _tokens(base: TextBase, renderer: Renderer, row: Row) -> tuple[int, ...]:
    """Return the tokens of a row's prompt; special tokens come from the chat template or the tokenizer."""
    text, chat = renderer.prompt(row), renderer.template is not None
    return tuple(base.tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])


def _with_system(row: Row, system: str, renderer: Renderer) -> Row:
    """Return the row with the text `system` before its prompt, for the teacher."""
    if not system:
        return row
    if renderer.template is None:
        return Row("prompt-completion", ({"role": "user", "content": f"{system}\n\n{renderer.prompt(row)}"},))
    messages = list(row.messages)
    if messages[0]["role"] == "system":
        system = f"{system}\n\n{messages.pop(0)['content']}"
    return replace(row, messages=({"role": "system", "content": system}, *messages))


def rollout_example(rollout: Rollout) -> Example:
    """Return a prompt with its completion. The sampled tokens are the targets."""
    trained = [False] * len(rollout.prompt) + [True] * len(rollout.tokens)
    return Example([*rollout.prompt, *rollout.tokens], trained, 0)


def completions_micro_batch(
    answers: Sequence[Rollout], where: Sequence[str], make_batch: Callable[[], PolicyBatch]
) -> Micro:
    """Return a micro-batch of completions. `where`: the location of each completion's row."""
    return Micro(
        tokens=sum(len(r.prompt) + len(r.tokens) for r in answers),
        trained=sum(len(r.logps) for r in answers),
        rows=tuple(dict.fromkeys(where)),
        make=make_batch,
        units=len(answers),
    )


def answer_groups(lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
    """Divide rows of these lengths into micro-batches of indices, longest rows first."""
    rows = config.batching.micro_rows or len(lengths)
    groups = grouped(lengths, config.batching.at_once)
    return [group[at : at + rows] for group in groups for at in range(0, len(group), rows)]


def shared_groups(answers: Sequence[tuple[tuple[int, ...], int]], config: TrainConfig) -> list[list[int]]:
    """Return micro-batches of completions, in which each prompt is computed once.

    A micro-batch is a list of indices, grouped by prompt and sorted from long to short, with at most
    `batching.at_once` tokens.

    answers: (prompt, completion tokens) of each completion."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(answers)), key=lambda i: (-len(answers[i][0]) - answers[i][1], i)):
        by_prompt.setdefault(answers[i][0], []).append(i)
    most, groups = config.batching.micro_rows or len(answers), [list[int]()]
    free = config.batching.at_once
    previous: tuple[int, ...] = ()
    for prompt, members in by_prompt.items():
        for i in members:
            takes = answers[i][1] + (0 if previous == prompt else len(prompt))
            if groups[-1] and (takes > free or len(groups[-1]) == most):
                groups.append([])
                free, takes = config.batching.at_once, answers[i][1] + len(prompt)
            groups[-1].append(i)
            free, previous = free - takes, prompt
    return groups


def collate_shared(rollouts: Sequence[Rollout]) -> tuple[Batch, SharedRows]:
    """Return a batch of prompts with completions that stores the tokens of each prompt only once.

    `Batch.lengths` are the lengths of the whole rows."""
    ids: list[int] = []
    trained: list[bool] = []
    positions: list[int] = []
    prompts: dict[tuple[int, ...], int] = {}

    def append(tokens: Sequence[int], mask: Sequence[bool]) -> int:
        ids.extend(tokens)
        trained.extend(mask)
        return len(ids) - len(tokens)

    for rollout in rollouts:
        n, m = len(rollout.prompt), len(rollout.tokens)
        if rollout.prompt not in prompts:
            prompts[rollout.prompt] = append(rollout.prompt, [False] * n)
        first, segment = prompts[rollout.prompt], append(rollout.tokens, [True] * m)
        positions += [*range(first, first + n), *range(segment, segment + m)]
    lengths = [len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts]
    return Batch(torch.tensor(ids), lengths, torch.tensor(trained)), SharedRows.from_indices(torch.tensor(positions))


def planned_rollouts(items: Sequence[PromptItem], config: TrainConfig, rows: Sequence[Row]) -> LazySteps:
    """Return all steps of the run in order, at their largest possible size."""
    r = config.sampling
    assert r is not None
    share_prompt = config.reinforcement.loss is not None  # in distillation, the teacher can have another prompt

    def micro(batch_items: list[PromptItem]) -> Micro:
        ids = [item.ids for item in batch_items]
        prompts = set(ids) if share_prompt else ids
        most = sum(item.most for item in batch_items)
        return Micro(
            tokens=sum(map(len, prompts)) + most,
            trained=most,
            rows=tuple(dict.fromkeys(rows[item.row].where for item in batch_items)),
            make=lambda: _longest_possible(batch_items, share_prompt),
            units=len(batch_items),
            items=tuple(batch_items),
        )

    def of_epoch(epoch: int) -> list[Step]:
        plan = step_rows([item.tokens for item in items], config.batching, seed=config.seed, epoch=epoch)
        steps = []
        for k, prompts in enumerate(plan):
            answers = [items[i] for i in prompts for _ in range(r.group)]
            if share_prompt:
                groups = shared_groups([(item.ids, item.most) for item in answers], config)
            else:
                groups = answer_groups([item.tokens for item in answers], config)
            micros = tuple(micro([answers[i] for i in group]) for group in groups)
            steps += [Step(micros, epoch + (k + (u + 1) / r.updates) / len(plan)) for u in range(r.updates)]
        return steps

    return LazySteps(of_epoch, epochs=config.epochs, steps=config.steps)


def _longest_possible(items: Sequence[PromptItem], share_prompt: bool) -> PolicyBatch:
    """Return a batch of completions of maximum length. The tokens of each prompt, repeated, fill its completion."""
    rollouts = []
    for item in items:
        completion = tuple(item.ids[i % len(item.ids)] for i in range(item.most))
        rollouts.append(Rollout(item.ids, completion, (0.0,) * item.most, (0.0,) * item.most, "", cut=True))
    batch, shared = (
        collate_shared(rollouts) if share_prompt else (collate([rollout_example(r) for r in rollouts]), None)
    )
    ones = torch.ones(len(items), dtype=torch.float64)
    return PolicyBatch(
        **vars(batch),
        answers=[item.most for item in items],
        advantage=ones,
        loss_weights=ones / max(1, items[0].most),
        shared=shared,
    )


# -- what reinforcement and distillation share ------------------------------------------------------------------------


@dataclass(kw_only=True)
class SampledTraining:
    """State of a run that samples the completions it trains on.

    name: the trained adapter's name. servers: `SamplerServers` that sample instead of `sampler`."""

    config: TrainConfig
    base: TextBase
    name: str
    sampler: Sampler
    servers: Any = None
    sample_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last sampling."""
    metric_means: MetricMeans = field(default_factory=MetricMeans)
    mismatch: SamplerMismatch = field(default_factory=SamplerMismatch)
    settings: Any = field(init=False)
    mismatch_fix: str = "please report this"

    def sample(
        self,
        prompts: Sequence[PromptItem],
        params: SamplingParams,
        number: int,
        group: int,
        interrupted: Callable[[], bool],
    ) -> tuple[list[PromptItem], list[Rollout], dict[str, float]] | None:
        """Sample `group` completions of each prompt for step `number`; return None if interrupted.

        Returns (the prompt of each completion, the completions, metrics of the sampling)."""
        owners, wait = self.begin_sampling(prompts, params, number, group)
        sampled = wait(interrupted)
        return None if sampled is None else (owners, *sampled)

    def begin_sampling(
        self, prompts: Sequence[PromptItem], params: SamplingParams, number: int, group: int
    ) -> tuple[list[PromptItem], WaitForSamples]:
        """Start sampling if servers sample. Return the prompt of each completion, and a function that waits."""
        owners = [item for item in prompts for _ in range(group)]
        requests = [
            CompletionRequest(item.ids, seed_of(self.config.seed, number, item.row, i % group), params, self.name)
            for i, item in enumerate(owners)
        ]
        if self.servers is not None:
            return owners, self.servers.begin(requests)

        def wait(interrupted: Stop) -> tuple[list[Rollout], dict[str, float]] | None:
            began = time.perf_counter()
            rollouts = self.sampler.sample(requests, interrupted)
            return None if rollouts is None else (rollouts, sampling_metrics(rollouts, time.perf_counter() - began))

        return owners, wait

    def start_notes(self, prompts: Sequence[Any]) -> Iterable[str]:
        """Return notes to show before the first step."""
        return ()

    def begin(self) -> None:
        self.metric_means, self.mismatch = MetricMeans(), SamplerMismatch()

    def means(self) -> MetricMeans:
        """Return the metrics since `begin`.

        Raises TrainingError if log-probabilities of the sampler and the trainer differ too much."""
        mismatch = self.mismatch.checked(self.settings, self.mismatch_fix)
        sampled = MetricMeans(dict(self.sample_metrics), dict.fromkeys(self.sample_metrics, 1))
        return MetricMeans.total([self.metric_means, sampled, mismatch])

    def step_notes(self, number: int) -> Iterable[str]:
        """Return notes to show after step `number`."""
        return ()

    def extra_state(self, step: int) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None: ...
