"""Distillation: the student learns the teacher's distribution on the student's own answers.

    a step   prompts → sample (`rollouts.Sampler`) → both models over the same answers → KL
             (`policy_losses.divergences`)

    L = 1/T Σ_t KL_t        T tokens of the step's answers; KL over the whole vocabulary, reverse or forward

The teacher runs in this process: an adapter on the same base, the base without adapter, or another base with
the same tokenizer. The teacher reads the same answers after its own prompt, which can contain additional
instructions (`distillation.system`). The student is trained to follow these instructions without having them
in its prompt. Sampler and trainer use the same model, and their mismatch (gap) is measured, as in
`reinforce`. New answers are sampled for every step, and answers are not stored in checkpoints. Logged for
each step:

    teacher_kl                         mean KL per token
    answer_tokens, drawn_…, cut_…, prompt_cached, gap_…      as in `reinforce`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.adapters.use import load_adapter
from veneer.errors import MismatchError
from veneer.models.patching import without_dropout
from veneer.models.text.base import load_text
from veneer.models.text.loss import compared_logits, head_logits, hidden_at
from veneer.ops.device_transfer import in_float64, sent
from veneer.train.checkpoint import seed_of
from veneer.train.config.section import BASE_MODEL
from veneer.train.loop import EvalResult, Step
from veneer.train.text.batches import Batch, collate
from veneer.train.text.policy_losses import divergences, length_factors, per_token
from veneer.train.text.prompts import (
    PolicyBatch,
    PromptItem,
    SampledTraining,
    answer_groups,
    completions_micro_batch,
    prompt_split,
    rollout_example,
    with_final_turn,
)
from veneer.train.text.rollouts import CompletionRequest, Rollout, Sampler, SamplingParams
from veneer.train.text.rows import Row

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase
    from veneer.train.config.distillation import DistillationSection
    from veneer.train.config.text import TrainConfig


@dataclass(frozen=True)
class Teacher:
    """A teacher in this process.

    name: the teacher's adapter on `attachment`; "" is the base without adapter. attachment: None if the
    teacher is a separate base."""

    base: TextBase
    attachment: Attachment | None = None
    name: str = ""

    def acting(self) -> AbstractContextManager[None]:
        if self.attachment is None:
            return nullcontext()
        return self.attachment.using(*([self.name] if self.name else []))


def open_teacher(
    section: DistillationSection, base: TextBase, attachment: Attachment, log: Callable[[str], None] = lambda line: None
) -> Teacher:
    """Load the configured teacher.

    Raises MismatchError if the teacher has another tokenizer or is an adapter of another base. Also raises
    loading errors."""
    if section.base is not None:
        teacher_base = load_text(section.base, dtype=base.dtype, device=base.device, say=log)
        _check_tokenizers(base, teacher_base)
        return Teacher(teacher_base)
    if section.teacher == BASE_MODEL:
        return Teacher(base, attachment)
    name = f"{section.teacher}, as the teacher"
    attachment.add(name, load_adapter(base, str(section.teacher)))
    return Teacher(base, attachment, name)


def _check_tokenizers(base: TextBase, teacher: TextBase) -> None:
    """Raise MismatchError if the two tokenizers differ in any token or id."""
    ours, theirs = (dict(each.tokenizer.get_vocab()) for each in (base, teacher))
    if ours == theirs:
        return
    apart = sorted(ours.keys() ^ theirs.keys()) or sorted(token for token in ours if ours[token] != theirs[token])
    text = f"the teacher has another tokenizer: {len(apart):,} tokens differ, for example {apart[0]!r}"
    fix = "use a teacher of the same model family; or train on answers of any teacher, written to a file with: "
    fix += "veneer data draw CONFIG.yaml rows.jsonl"
    raise MismatchError(text, where=f"distillation.base: {teacher.name}; student: {base.name}", fix=fix)


@dataclass(kw_only=True)
class Distillation(SampledTraining):
    """State of a distillation run."""

    teacher: Teacher

    def __post_init__(self) -> None:
        self.settings = self.config.distillation
        self.params = SamplingParams(self.settings.max_tokens, self.settings.temperature)

    def start_notes(self, prompts: Sequence[Any]) -> Iterator[str]:
        """Yield log lines about the teacher's prompts, before sampling."""
        if self.settings.system and prompts:
            saved = sum(len(item.teacher_ids) - len(item.ids) for item in prompts) / len(prompts)
            yield f"{saved:.0f} tokens per request are saved by training the instructions into the adapter"

    def sample_step(self, step: Step, number: int, rows: Sequence[Row], interrupted: Callable[[], bool]) -> Step | None:
        """Return step `number`, with newly sampled completions.

        rows: all rows of the split, indexed by `PromptItem.row`."""
        prompts = {item.row: item for micro in step.micros for item in micro.items}
        step_prompts = [prompts[row] for row in sorted(prompts)]
        sampled = self.sample(step_prompts, self.params, number, self.settings.group, interrupted)
        if sampled is None:
            return None
        owners, rollouts, self.sample_metrics = sampled
        weights = length_factors([len(r.logps) for r in rollouts], "batch", self.settings.max_tokens)
        micros = []
        for group in self._groups(owners, rollouts):
            answers, prompts_of = [rollouts[i] for i in group], [owners[i] for i in group]
            where = [rows[item.row].where for item in prompts_of]
            micros.append(completions_micro_batch(answers, where, partial(_batch, answers, prompts_of, weights[group])))
        return Step(tuple(micros), step.epoch)

    def _groups(self, owners: Sequence[PromptItem], rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Return the answers of each micro-batch, as indices.

        The length of an answer includes a prompt: the student's or the teacher's, whichever is longer."""
        prompts = [max(len(item.ids), len(item.teacher_ids)) for item in owners]
        return answer_groups([n + len(r.tokens) for n, r in zip(prompts, rollouts, strict=True)], self.config)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def loss(self, batch: PolicyBatch) -> Tensor:
        """Return Σ loss over the batch's completions; the training loop divides by their number."""
        kl, logps = self._compared(batch)
        self.metric_means.add(teacher_kl=kl.detach())
        if batch.old is not None:
            self.mismatch.add(logps, batch.old)
        return (per_token(batch.loss_weights.to(kl), batch.answers) * kl).sum()

    def _compared(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """Return the KL of each completion token, and the student's log p detached from the graph."""
        model, teacher = self.base.model, self.teacher
        teacher_batch = batch.teacher or batch
        with torch.no_grad(), without_dropout(teacher.base.model), teacher.acting():
            ids, positions = sent(teacher_batch.input_ids, teacher.base.device), _positions(teacher_batch, teacher.base)
            theirs = hidden_at(teacher.base.model, ids, teacher_batch.lengths, positions)
        ids, positions = sent(batch.input_ids, self.base.device), _positions(batch, self.base)
        targets = ids[positions + 1]

        def teacher_logits(part: slice) -> Tensor:
            with teacher.acting():
                return head_logits(teacher.base.model, theirs[part])

        def compare(ours: Tensor, theirs_part: Tensor, part: slice) -> Tensor:
            kl = divergences(ours, theirs_part, self.settings.divergence)
            logps = ours.detach().log_softmax(-1).gather(1, targets[part, None])[:, 0]
            return torch.stack([kl, logps], 1)

        hidden = hidden_at(model, ids, batch.lengths, positions)
        kl, logps = compared_logits(model, hidden, teacher_logits, compare).unbind(1)
        return kl, logps.detach()

    # -- held-out prompts ----------------------------------------------------------------------------------------------

    def score(
        self, prompts: Sequence[PromptItem], rows: Sequence[Row], interrupted: Callable[[], bool]
    ) -> EvalResult | None:
        """Return the mean KL per token of greedy completions. Return None once `interrupted()` is true."""
        sampled = self.sample(prompts, replace(self.params, temperature=0.0), 0, 1, interrupted)
        if sampled is None:
            return None
        owners, rollouts, figures = sampled
        total, tokens = 0.0, sum(len(r.logps) for r in rollouts)
        for group in self._groups(owners, rollouts):
            if interrupted():
                return None
            batch = _batch([rollouts[i] for i in group], [owners[i] for i in group], torch.ones(len(group)))
            with torch.no_grad(), without_dropout(self.base.model):
                total += float(in_float64(self._compared(batch)[0]).sum())
        metrics = {key: figures[key] for key in ("cut_share", "answer_tokens")}
        count = len(rollouts)
        return EvalResult(total / tokens * count, tokens, count, metrics, likelihood=False, units=count)


def _positions(batch: Batch, base: TextBase) -> Tensor:
    return sent(batch.trained.nonzero()[:, 0] - 1, base.device)


def _batch(answers: Sequence[Rollout], prompts: Sequence[PromptItem], weights: Tensor) -> PolicyBatch:
    batch = collate([rollout_example(r) for r in answers])
    of_teacher = [replace(r, prompt=item.teacher_ids or item.ids) for r, item in zip(answers, prompts, strict=True)]
    return PolicyBatch(
        **vars(batch),
        answers=[len(r.logps) for r in answers],
        advantage=torch.ones(len(answers)),
        loss_weights=weights,
        old=torch.tensor([x for r in answers for x in r.logps], dtype=torch.float64),
        fresh=True,
        teacher=None if of_teacher == answers else collate([rollout_example(r) for r in of_teacher]),
    )


# -- a teacher's completions as rows -----------------------------------------------------------------------------------


def teacher_rows(
    rows: Sequence[Row], config: TrainConfig, base: TextBase, sampler: Sampler, name: str = ""
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a teacher's completions as training rows, and a list of omitted prompts with reasons.

    A prompt is omitted if the prompt is longer than the teacher's context or if its completion was cut off.
    The rows do not contain the teacher's additional instructions.

    base: the teacher's base; name: the teacher's adapter on the sampler's attachment."""
    d = config.distillation
    dropping = config.model_copy(update={"data": config.data.model_copy(update={"long_rows": "drop"})})
    items, _ = prompt_split(rows, dropping, base)
    kept_rows = {item.row for item in items}
    omitted = [f"{row.where}: longer than the teacher's context" for i, row in enumerate(rows) if i not in kept_rows]
    how = SamplingParams(d.max_tokens, d.temperature)
    owners = [item for item in items for _ in range(d.group)]
    requests = [
        CompletionRequest(item.teacher_ids or item.ids, seed_of(config.seed, 0, item.row, i % d.group), how, name)
        for i, item in enumerate(owners)
    ]
    answer_rows = []
    for item, rollout in zip(owners, sampler.sample(requests) or [], strict=True):
        row = rows[item.row]
        if rollout.cut:
            omitted.append(f"{row.where}: its answer was cut at {d.max_tokens} tokens")
            continue
        prompt = with_final_turn(row)
        messages = [dict(message) for message in prompt.messages[: prompt.last_assistant()]]
        tools = {"tools": list(row.tools)} if row.tools else {}
        answer_rows.append({"messages": [*messages, {"role": "assistant", "content": rollout.text}]} | tools)
    return answer_rows, omitted
