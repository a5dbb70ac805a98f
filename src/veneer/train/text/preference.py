"""Preference training: the items that a loss compares, their reference, and the loss.

    rows    → answer_rows           a pair as two ordinary rows, chosen and rejected, for `encode_rows`
    encoded → preference_items      the examples as pairs again; for KTO, single completions with their labels
    items   → collate_items         the completions concatenated in one batch
              mismatched_examples   KTO: prompts with the completions of other prompts

    preference = Preference(config, base, attachment)
    preference.load_reference(items, log)    computes the reference's log-probabilities, before the first step
    preference.loss(batch)                   Σ loss over the batch's pairs (kto: completions)
    preference.begin(step), .metrics()       computes kto's reference point of the step; values for the log
    preference.score(items, …)               loss and metrics over held-out pairs

The reference is never a second model: it is the same base with the adapter off, or with the adapter that the
run started from. The formulas are in ops.loss. Metrics, as means over the pairs:

    reward_chosen, reward_rejected    β·(log π − log π_ref); orpo and simpo have no reference: β·log π / |y|
    reward_margin, reward_accuracy    reward_chosen − reward_rejected; share of pairs with a margin above 0
    logp_chosen, logp_rejected        log π, in nats: shows whether the chosen completions become less likely
    tokens_chosen, tokens_rejected    lengths
    kl                                kto: z₀; reward_accuracy: share of completions on the correct side of z₀

The result does not depend on the number of micro-batches or devices, because each loss depends on one pair
only, and z₀ on the whole step. Forward passes without gradients are distributed over the devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from veneer.errors import counted
from veneer.models.patching import without_dropout
from veneer.models.shard import CallWithWeights, call_unsharded
from veneer.models.text.loss import row_logps
from veneer.ops import loss as formulas
from veneer.ops.device_transfer import sent
from veneer.train.config.text import TrainConfig
from veneer.train.devices import ALONE, Devices
from veneer.train.lazy import token_counts
from veneer.train.loop import EvalResult, MetricMeans, Step, Stop
from veneer.train.text.batches import Batch, collate, grouped
from veneer.train.text.encode import TOKEN_BITS, EncodedRows, Example, vocabulary_of
from veneer.train.text.rows import Row, unlearned

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase


@dataclass
class Item:
    """A (chosen, rejected) pair, or one completion with its label `desirable`.

    row: index of the item's row. reference: log p of each completion under the reference model; empty if not
    yet computed, or if the loss has no reference."""

    answers: tuple[Example, ...]
    row: int
    desirable: bool | None = None
    reference: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(e.tokens for e in self.answers)

    @property
    def trained_tokens(self) -> int:
        return sum(e.trained_tokens for e in self.answers)


@dataclass
class AnswerBatch(Batch):
    """The completions of several items, in order. The completions of a pair are consecutive."""

    items: list[Item]


_CHUNK = 256
"""Number of completions between two log messages about the reference."""


def answer_rows(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """Return each completion as a row, and the index of its original row.

    The prompt of a pair is the messages that both completions begin with. The prompt is not trained on, even
    if it contains assistant messages."""
    out: list[Row] = []
    owners: list[int] = []
    for i, row in enumerate(rows):
        ends = [row.messages, row.rejected] if row.rejected else [row.messages]
        shared = row.shared() if row.rejected else 0
        for messages in ends:
            answer = (*unlearned(messages[:shared]), *messages[shared:])
            out.append(replace(row, messages=answer, rejected=(), label=None))
            owners.append(i)
    return out, owners


def preference_items(
    encoded: EncodedRows, rows: Sequence[Row], owners: Sequence[int], *, paired: bool
) -> tuple[list[Item], EncodedRows]:
    """Return the items in row order, and `encoded` with the remaining examples.

    rows, owners: the preference rows, and the second result of `answer_rows`. paired: if true, makes one item
    from each pair, and drops a completion if the other completion of the pair was dropped (counted as
    `partners`). If false, makes one item from each completion."""
    first = {i: at for at, i in reversed(list(enumerate(owners)))}  # for a pair, the position of the chosen completion
    by_row: dict[int, list[Example]] = {}
    for example in encoded.examples:
        by_row.setdefault(owners[example.row], []).append(example)
    counts = replace(encoded.counts, first_rows=dict(encoded.counts.first_rows))
    items: list[Item] = []
    for i, answers in by_row.items():
        row = rows[i]
        if not paired:
            judged = [row.label if row.label is not None else e.row == first[i] for e in answers]
            items += [Item((e,), i, good) for e, good in zip(answers, judged, strict=True)]
        elif len(answers) < 2:
            counts.add("partners", row.where)
        else:
            chosen, rejected = answers
            if {chosen.row, rejected.row} & encoded.cut_rows:
                chosen, rejected = _with_shorter_prompt(chosen, rejected)
            if chosen.prompt != rejected.prompt:
                counts.add("other_prompts", row.where)
            items.append(Item((chosen, rejected), i))
    examples = [e for item in items for e in item.answers]
    counts.used = len(examples)
    counts.tokens, counts.trained_tokens = (int(numbers.sum()) for numbers in token_counts(examples))
    bos, ends = encoded.renderer.tokenizer.bos_token_id, list(encoded.end_ids)
    counts.ended = sum(bool(np.isin(e.coded[e.coded < 0] & TOKEN_BITS, ends).any()) for e in examples)
    counts.unbegun = sum(int(e.coded[0]) != bos for e in examples)
    vocabulary = vocabulary_of(e.coded for e in examples)
    return items, replace(encoded, examples=examples, counts=counts, vocabulary=vocabulary)


def _with_shorter_prompt(a: Example, b: Example) -> tuple[Example, Example]:
    """Return both examples with the same prompt, if one prompt is a truncation of the other.

    The longer prompt is replaced with the shorter one."""
    short = min(a.prompt, b.prompt, key=len)

    def after(example: Example) -> Example:
        prompt = example.prompt
        kept_first = 1 if prompt[0] == short[0] else 0  # truncation keeps a begin-of-text token
        dropped = len(prompt) - len(short)
        if not dropped or prompt[kept_first + dropped :] != short[kept_first:]:
            return example
        ids = short + example.input_ids[len(prompt) :]
        return Example(ids, [False] * len(short) + example.trained[len(prompt) :], example.row)

    return after(a), after(b)


def collate_items(items: Sequence[Item]) -> AnswerBatch:
    return AnswerBatch(**vars(collate([e for item in items for e in item.answers])), items=list(items))


def mismatched_examples(items: Sequence[Item], max_length: int) -> list[Example]:
    """Return each item's prompt with the completion of the next item that has another prompt.

    The order is cyclic. The end of a completion is cut so that an example has at most `max_length` tokens.
    The result is empty if all prompts are equal."""
    out: list[Example] = []
    firsts = [item.answers[0] for item in items]
    prompts = [e.prompt for e in firsts]
    for i, prompt in enumerate(prompts):
        candidates = (firsts[(i + k) % len(firsts)] for k in range(1, len(firsts)))
        partner = next((e for e in candidates if e.prompt != prompt), None)
        if partner is not None and len(prompt) < max_length:
            start = len(partner.prompt)
            ids = [*prompt, *partner.input_ids[start:]][:max_length]
            out.append(Example(ids, [False] * len(prompt) + partner.trained[start : start + len(ids) - len(prompt)], i))
    return out


@dataclass
class Preference:
    """The preference loss of a run.

    start: the adapter that the run continues from. If the loss has a reference, `start` is attached a second
    time under `name`, as the reference."""

    config: TrainConfig
    base: TextBase
    attachment: Attachment
    start: Adapter | None = None
    name: str = "reference"
    call: CallWithWeights = call_unsharded
    devices: Devices = ALONE
    point: float = 0.0
    """kto's z₀ in the current step."""
    metric_means: MetricMeans = field(default_factory=MetricMeans)

    def __post_init__(self) -> None:
        self.settings = self.config.preference.with_defaults()
        self.reference: tuple[str, ...] = ()
        if self.start is not None and self.settings.needs_reference:
            self.attachment.add(self.name, self.start)
            self.reference = (self.name,)

    def load_reference(self, items: Sequence[Item], log: Callable[[str], None] = lambda line: None) -> None:
        """Compute `reference` of each item. Equal completions are computed once."""
        if not self.settings.needs_reference:
            return
        start = self.start.digest() if self.start is not None else "base"
        run = f"{self.base.fingerprint}|{self.base.quantized}|{self.base.dtype}|{start}"
        examples = {_digest(run, example): example for item in items for example in item.answers}
        # Longest first, so that a shortage of memory shows immediately; the order does not depend on the row
        # order.
        order = sorted(examples, key=lambda key: (-examples[key].tokens, key))
        logps: dict[str, float] = {}
        for at in range(0, len(order), _CHUNK):
            chunk = order[at : at + _CHUNK]
            logps |= zip(chunk, self._reference_logps([examples[key] for key in chunk]), strict=True)
            log(f"reference: log-probabilities of {len(logps):,} of {counted(len(order), 'answer')}")
        for item in items:
            item.reference = tuple(logps[_digest(run, example)] for example in item.answers)

    def begin(self, step: Step) -> None:
        """Compute z₀ from all items of the step.

        The items are sorted by row, so that z₀ does not depend on the micro-batches."""
        self.metric_means = MetricMeans()
        if self.settings.loss == "kto":
            items = [item for micro in step.micros for item in micro.items]
            self.point = self._point(sorted(items, key=lambda item: (item.row, not item.desirable)))

    def metrics(self) -> MetricMeans:
        """Return the metrics of this process's pairs since `begin`."""
        if self.settings.loss != "kto":
            return self.metric_means
        point = MetricMeans()
        point.add(kl=torch.tensor([self.point]))
        return MetricMeans.total([self.metric_means, point])

    def loss(self, batch: AnswerBatch) -> Tensor:
        """Return Σ loss over the items of the batch.

        Before `load_reference`, the policy itself is the reference."""
        device = self.base.device
        return self.call(self._loss, sent(batch.input_ids, device), batch, batch.trained)

    def _loss(self, ids: Tensor, batch: AnswerBatch, trained: Tensor) -> Tensor:
        logps = row_logps(self.base.model, ids, batch.lengths, trained)
        return self._losses(logps, batch.items, self.metric_means, self.point).sum()

    def score(self, items: Sequence[Item], *, interrupted: Stop = lambda: False) -> EvalResult | None:
        """Return the mean loss and the metrics over `items`, in eval mode; None once `interrupted()` is true.

        With several devices, the first device returns the whole result, the others an empty result."""
        point = self._point(items) if self.settings.loss == "kto" else 0.0
        logps = self._logps([e for item in items for e in item.answers], interrupted)
        if logps is None:
            return None
        if not self.devices.first:
            return EvalResult(0.0, 0, 0, likelihood=False, units=0)
        means = MetricMeans()
        total = float(self._losses(torch.tensor(logps, device=self.base.device), items, means, point).sum())
        metrics = means.values() | ({"kl": point} if self.settings.loss == "kto" else {})
        trained_tokens = sum(item.trained_tokens for item in items)
        return EvalResult(total, trained_tokens, len(items), metrics, likelihood=False, units=len(items))

    def _losses(self, logps: Tensor, items: Sequence[Item], means: MetricMeans, point: float) -> Tensor:
        """Return the loss of each item: (items,).

        logps: log p of each completion of the items, (completions,)."""
        s, beta = self.settings, self.settings.beta or 0.0
        lengths = logps.new_tensor([e.trained_tokens for item in items for e in item.answers])
        references = [value for item in items for value in item.reference]
        ratios = logps - (logps.new_tensor(references) if references else logps.detach())
        if s.loss == "kto":
            desirable = torch.tensor([bool(item.desirable) for item in items], device=logps.device)
            losses = formulas.kto(ratios, desirable, point, beta=beta, weights=(s.desirable, s.undesirable))
            right = torch.where(desirable, ratios > point, ratios < point)
            means.add(reward_accuracy=right)
            for name, selected in (("chosen", desirable), ("rejected", ~desirable)):
                values = {"reward": beta * ratios, "logp": logps, "tokens": lengths}
                means.add(**{f"{key}_{name}": value[selected] for key, value in values.items()})
            return losses
        (chosen, rejected), (w, l) = logps.view(-1, 2).unbind(1), ratios.view(-1, 2).unbind(1)
        n_w, n_l = lengths.view(-1, 2).unbind(1)
        mean_w, mean_l = chosen / n_w, rejected / n_l
        if s.length_normalized:
            w, l = w / n_w, l / n_l
        match s.loss:
            case "dpo":
                losses = formulas.dpo(w, l, beta=beta, smoothing=s.label_smoothing)
            case "ipo":
                losses = formulas.ipo(w, l, beta=beta)
            case "orpo":
                losses = formulas.orpo(mean_w, mean_l, beta=beta)
            case _:
                gamma, smoothing = s.gamma or 0.0, s.label_smoothing
                losses = formulas.simpo(mean_w, mean_l, beta=beta, gamma=gamma, smoothing=smoothing)
        if s.nll:
            losses = losses - s.nll * mean_w
        good, bad = (w, l) if self.settings.needs_reference else (mean_w, mean_l)
        means.add(
            reward_chosen=beta * good,
            reward_rejected=beta * bad,
            reward_accuracy=good > bad,
            logp_chosen=chosen,
            logp_rejected=rejected,
            tokens_chosen=n_w,
            tokens_rejected=n_l,
        )
        return losses

    def _reference_logps(self, examples: Sequence[Example]) -> list[float]:
        with self.attachment.using(*self.reference):
            logps = self._logps(examples)
        assert logps is not None
        return logps

    def _logps(self, examples: Sequence[Example], interrupted: Stop = lambda: False) -> list[float] | None:
        micro_tokens = self.config.batching.at_once
        return answer_logps(self.base, examples, micro_tokens, interrupted, self.call, self.devices)

    def _point(self, items: Sequence[Item]) -> float:
        """Return z₀.

        The mismatched pairs differ in every step, so their reference log-probabilities are not cached."""
        examples = mismatched_examples(items, self.config.data.max_length)
        policy = self._logps(examples)
        assert policy is not None
        reference = torch.tensor(self._reference_logps(examples), dtype=torch.float64)
        return float(formulas.kto_reference(torch.tensor(policy, dtype=torch.float64) - reference))


def answer_logps(
    base: TextBase,
    examples: Sequence[Example],
    micro_tokens: int,
    interrupted: Stop = lambda: False,
    call: CallWithWeights = call_unsharded,
    devices: Devices = ALONE,
) -> list[float] | None:
    """Return Σ log p of the trained tokens of each example.

    Runs in eval mode without gradients, and restores the model's mode. Returns None once `interrupted()` is
    true on any device. The devices share the work, and all return the whole result."""
    model = base.model
    groups = grouped([e.tokens for e in examples], micro_tokens)
    local_logps, stopped = dict[int, float](), False
    with torch.no_grad(), without_dropout(model):
        for number, _ in devices.deal([sum(examples[i].tokens for i in group) for group in groups]):
            if stopped := interrupted():
                break
            batch = collate([examples[i] for i in groups[number]])
            logps = call(row_logps, model, batch.input_ids.to(base.device), batch.lengths, batch.trained)
            local_logps.update(zip(groups[number], logps.tolist(), strict=True))
    parts = devices.gather(None if stopped else local_logps)
    logps_by_index = {i: value for part in parts if part is not None for i, value in part.items()}
    return None if None in parts else [logps_by_index[i] for i in range(len(examples))]


def _digest(run: str, example: Example) -> str:
    content = json.dumps([run, example.input_ids, [int(t) for t in example.trained]], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
