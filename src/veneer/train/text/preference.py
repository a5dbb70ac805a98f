"""Preference training: the loss that the loop is given, and the numbers it measures.

    preference = Preference(settings, base, attachment, reference=())
    preference.know(items, path, say)        the reference's log-probabilities, once, before step one
    preference.loss(batch)                   Σ loss over the batch's pairs (kto: answers)
    preference.begin(step), .measured()      kto's reference point of the step; rewards and the rest for the log
    preference.score(items, …)               the same over held-out pairs

The reference is the same base with the adapter off, or with the adapter that the run goes on from, as it was: never a
second model. The formulas are in core.preference. What is measured, as means over the pairs:

    reward_chosen, reward_rejected    β·(log π − log π_ref); orpo and simpo have no reference: β·log π / |y|
    reward_margin, reward_accuracy    their difference, and the share of pairs where it is above 0
    logp_chosen, logp_rejected        log π, in nats: whether the chosen answers themselves become less likely
    tokens_chosen, tokens_rejected    lengths
    kl                                kto: z₀, and its accuracy is the share of answers on their side of it

k micro-batches equal one, and so do several devices: each loss is of one pair alone, and z₀ is of the whole step,
whatever its micro-batches. Passes without a gradient are dealt out among the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.models.shard import Call, call_whole
from veneer.models.text.loss import row_logps
from veneer.ops import preference as formulas
from veneer.train.config.text import PreferenceSection
from veneer.train.devices import ALONE, Devices
from veneer.train.loop import Means, Score, Step
from veneer.train.text.batches import collate, grouped
from veneer.train.text.encode import Example
from veneer.train.text.pairs import Answers, Item, mismatched
from veneer.train.text.reference import cached

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase

__all__ = ["Preference", "answer_logps"]


@dataclass
class Preference:
    """`reference`: the mix on the attachment that the policy is compared with; () for the base alone. `whose`: what
    distinguishes its log-probabilities from another reference's. `max_length`: of kto's mismatched rows."""

    settings: PreferenceSection
    base: TextBase
    attachment: Attachment
    reference: tuple[str, ...] = ()
    whose: str = ""
    micro_tokens: int = 2048
    max_length: int = 2048
    call: Call = call_whole
    devices: Devices = ALONE
    point: float = 0.0
    """kto's z₀ in the step that is under way."""
    seen: Means = field(default_factory=Means)

    def __post_init__(self) -> None:
        self.settings = self.settings.settled()

    @property
    def needs_reference(self) -> bool:
        return self.settings.loss in ("dpo", "ipo", "kto")

    def know(self, items: Sequence[Item], path: Path, say: Callable[[str], None] = lambda line: None) -> None:
        """Fills each item's `reference`, from the file at `path` where it is there, else computed and added to it."""
        if not self.needs_reference:
            return
        examples = [e for item in items for e in item.answers]
        found = iter(cached(examples, path, self.whose, self._reference_logps, say, self.devices))
        for item in items:
            item.reference = tuple(next(found) for _ in item.answers)

    def begin(self, step: Step) -> None:
        """Before each step: z₀ of all its items, in the rows' order: how the step is cut does not change it."""
        self.seen = Means()
        if self.settings.loss == "kto":
            items = [item for micro in step.micros for item in micro.make().items]
            self.point = self._point(sorted(items, key=lambda item: (item.row, not item.desirable)))

    def measured(self) -> Means:
        """Of this process's pairs since `begin`."""
        if self.settings.loss != "kto":
            return self.seen
        own = Means()
        own.add(kl=torch.tensor([self.point]))
        return Means.total([self.seen, own])

    def loss(self, batch: Answers) -> Tensor:
        """Σ loss over the items of the batch. Before `know` the reference is the policy itself, as at the start."""
        device = self.base.device
        ids, trained = batch.input_ids.to(device), batch.trained.to(device)
        return self.call(self._loss, ids, batch, trained)

    def _loss(self, ids: Tensor, batch: Answers, trained: Tensor) -> Tensor:
        logps = row_logps(self.base.model, ids, batch.lengths, trained)
        return self._losses(logps, batch.items, self.seen, self.point).sum()

    def score(self, items: Sequence[Item], *, interrupted: Callable[[], bool] = lambda: False) -> Score | None:
        """The mean loss over `items` and its numbers, in eval mode; None as soon as `interrupted()`. With several
        devices the first has it all, and the others an empty score."""
        point = self._point(items) if self.settings.loss == "kto" else 0.0
        logps = self._logps([e for item in items for e in item.answers], interrupted=interrupted)
        if logps is None:
            return None
        if not self.devices.first:
            return Score(0.0, 0, 0, likelihood=False, units=0)
        seen = Means()
        total = float(self._losses(torch.tensor(logps, device=self.base.device), items, seen, point).sum())
        extra = seen.values() | ({"kl": point} if self.settings.loss == "kto" else {})
        learned = sum(item.learned for item in items)
        return Score(total, learned, len(items), extra, likelihood=False, units=len(items))

    def _losses(self, logps: Tensor, items: Sequence[Item], seen: Means, point: float) -> Tensor:
        """(items,) from the log p of all answers, (Σ answers,)."""
        s, beta = self.settings, self.settings.beta or 0.0
        lengths = logps.new_tensor([e.learned for item in items for e in item.answers])
        known = [value for item in items for value in item.reference]
        ratios = logps - (logps.new_tensor(known) if known else logps.detach())
        if s.loss == "kto":
            desirable = torch.tensor([bool(item.desirable) for item in items], device=logps.device)
            losses = formulas.kto(ratios, desirable, point, beta=beta, weights=(s.desirable, s.undesirable))
            right = torch.where(desirable, ratios > point, ratios < point)
            seen.add(reward_accuracy=right)
            for name, which in (("chosen", desirable), ("rejected", ~desirable)):
                measured = {"reward": beta * ratios, "logp": logps, "tokens": lengths}
                seen.add(**{f"{key}_{name}": value[which] for key, value in measured.items()})
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
        good, bad = (w, l) if self.needs_reference else (mean_w, mean_l)
        seen.add(
            reward_chosen=beta * good, reward_rejected=beta * bad, reward_accuracy=good > bad, logp_chosen=chosen,
            logp_rejected=rejected, tokens_chosen=n_w, tokens_rejected=n_l,
        )  # fmt: skip
        return losses

    def _reference_logps(self, examples: Sequence[Example]) -> list[float]:
        with self.attachment.using(*self.reference):
            logps = self._logps(examples)
        assert logps is not None
        return logps

    def _logps(
        self, examples: Sequence[Example], interrupted: Callable[[], bool] = lambda: False
    ) -> list[float] | None:
        return answer_logps(
            self.base, examples, self.micro_tokens, interrupted=interrupted, call=self.call, devices=self.devices
        )

    def _point(self, items: Sequence[Item]) -> float:
        """z₀: the mismatched pairs change with every step, so that their reference is computed when it is needed."""
        examples = mismatched(items, self.max_length)
        policy = self._logps(examples)
        assert policy is not None
        ratios = torch.tensor(policy, dtype=torch.float64) - torch.tensor(
            self._reference_logps(examples), dtype=torch.float64
        )
        return float(formulas.kto_reference(ratios))


def answer_logps(
    base: TextBase,
    examples: Sequence[Example],
    micro_tokens: int,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    call: Call = call_whole,
    devices: Devices = ALONE,
) -> list[float] | None:
    """Σ log p of the trained tokens of each example, in eval mode and without gradient; None when `interrupted()` on
    any of the devices, which share the work and have all of it. The model is in its own mode again afterwards."""
    model = base.model
    groups = grouped([e.tokens for e in examples], micro_tokens)
    was_training, own, stopped = model.training, dict[int, float](), False
    model.eval()
    try:
        with torch.no_grad():
            for number, _ in devices.deal([sum(examples[i].tokens for i in group) for group in groups]):
                if stopped := interrupted():
                    break
                batch = collate([examples[i] for i in groups[number]])
                ids, trained = batch.input_ids.to(base.device), batch.trained.to(base.device)
                logps = call(row_logps, model, ids, batch.lengths, trained)
                own.update(zip(groups[number], logps.tolist(), strict=True))
    finally:
        model.train(was_training)
    parts = devices.gather(None if stopped else own)
    found = {i: value for part in parts if part is not None for i, value in part.items()}
    return None if None in parts else [found[i] for i in range(len(examples))]
