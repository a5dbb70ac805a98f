"""Reinforcement learning: sampled answers, their rewards, and the loss.

    a step   prompts → draw (`rollouts.Sampler`) → rewards (`train.rewards`) → advantages → loss (`policy_losses`)

Sampler and trainer are the same model: the sampler reads the pairs on the attachment, and with
`reinforcement.exact` the trainer's forward has the sampler's values (`models.text.replay`). The first update
after each sampling measures the mismatch token by token, and a run whose gap is above `reinforcement.gap`
stops before its optimizer moves. Logged for each step:

    reward, reward_NAME…               means over the answers with a reward; reward_failed: number without one
    constant_groups, constant_share    groups whose answers all have one reward: nothing is learned from them
    idle                               1 if no answer has an advantage, else 0
    cut_answers, cut_share             answers that ended at max_tokens
    answer_tokens, drawn_tokens        mean length, and number sampled for this step, 0 for a later update on
                                       the same answers; drawn_seconds: sampling time
    prompt_cached                      share of the prompts' tokens found in the KV cache
    gap_mean, gap_max, gap_share       |Δ log p| of the trained tokens; the share beyond 1%
    policy_lag                         optimizer steps since the adapter that the answers were sampled from
    drift                              mean |log p − log p at sampling|, if not 0
    kl, clipped, weight                means over these tokens, with a reference, a clip, a correction

Held-out prompts are answered greedily; their loss is minus the mean reward. A step's answers are a function
of the seed, the step and the adapter's values, so a resumed run samples the same answers; answers with
updates still to come are in the checkpoint.

With `reinforcement.one_step_off_policy` a thread samples the next answers during training on the current
ones, from a copy of the pairs as of the start of that training (`offpolicy`): the second answers come from
the same pairs as the first. Ratios are those of the current pairs to the copy. The copy is in the checkpoint,
so that its answers can be sampled again; the gap is measured on the first micro-batch of each sampling, whose
likelihood under the copy is recomputed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.errors import TrainingError, bullets, counted
from veneer.models.patching import without_dropout
from veneer.models.text.logprob_replay import replayed_logps
from veneer.models.text.loss import token_logps
from veneer.ops.attention import SharedRows
from veneer.ops.device_transfer import in_float64, sent
from veneer.train.loop import EvalResult, MetricMeans, Step
from veneer.train.rewards.reward import Answer, Judged, Rewards, reward_findings
from veneer.train.text.async_sampling import OffPolicyDraws
from veneer.train.text.batches import Batch
from veneer.train.text.conversations import Conversation, Conversing, said_so_far
from veneer.train.text.findings import Findings, answers_left_out, draw_summary
from veneer.train.text.policy_losses import (
    advantages,
    clipped,
    importance_weights,
    kl_estimates,
    length_factors,
    per_token,
    policy_ratios,
)
from veneer.train.text.prompts import (
    PolicyBatch,
    PromptItem,
    answers_micro,
    collate_shared,
    prompt_of,
    shared_groups,
)
from veneer.train.text.rollouts import CompletionRequest, Rollout, Sampler, SamplingParams, draw_seed, drawn_figures
from veneer.train.text.rows import Row
from veneer.train.text.sampler_mismatch import Gap

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase
    from veneer.train.config.text import TrainConfig


@dataclass(frozen=True)
class _JudgedRollout:
    """An answer to learn from.

    `row`: of its prompt. `worth`: its advantage. `reference`: log-probabilities of its tokens under the
    reference, if any."""

    rollout: Rollout
    row: int
    worth: float
    reference: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.rollout.prompt) + len(self.rollout.tokens)

    @property
    def size(self) -> tuple[tuple[int, ...], int]:
        """Its prompt, and its number of tokens."""
        return self.rollout.prompt, len(self.rollout.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rollout": self.rollout.to_dict(), "reference": list(self.reference)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> _JudgedRollout:
        rollout, reference = Rollout.from_dict(values["rollout"]), tuple(values["reference"])
        return cls(rollout, values["row"], values["worth"], reference)


@dataclass(frozen=True)
class _Draw:
    """Sampled answers and their rewards.

    `groups`: the row of each answer's prompt. `failed`: reasons of answers without a reward."""

    groups: list[int]
    drawn: list[Rollout]
    judged: Judged
    seconds: float
    failed: list[str]


@dataclass
class Reinforcement:
    """A run's reinforcement learning.

    `name`: of the trained adapter. `reference`: of the reference adapter, "" for the base without adapter.
    `conversing`: answers the model in multi-turn runs. `planned`: all steps of the run. `off_policy`: samples
    the next answers during training, if configured."""

    config: TrainConfig
    base: TextBase
    attachment: Attachment
    name: str
    sampler: Sampler
    rewards: Rewards
    reference: str = ""
    conversing: Conversing | None = None
    planned: Sequence[Step] = ()
    off_policy: OffPolicyDraws | None = None
    first: int = 0
    """The step that the current answers were sampled for; 0 for none."""
    answers: list[_JudgedRollout] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    """Measurements of the answers at sampling."""
    failed: list[str] = field(default_factory=list)
    """Answers of the last sampling that are left out, and why."""
    seen: MetricMeans = field(default_factory=MetricMeans)
    gap: Gap = field(default_factory=Gap)

    def __post_init__(self) -> None:
        s = self.settings = self.config.reinforcement.settled()
        self.findings = Findings(s)
        self.drawing = SamplingParams(s.max_tokens, s.temperature, s.top_p, grammar=s.grammar_text)

    # -- drawing -------------------------------------------------------------------------------------------------------

    def draw_step(self, step: Step, number: int, rows: Sequence[Row], interrupted: Callable[[], bool]) -> Step | None:
        """Return step `number` on answers sampled for it.

        `rows`: the rows of its prompts."""
        s, update = self.settings, (number - 1) % self.settings.updates
        first, following = number - update, number + s.updates
        made_at = first - 1 if self.off_policy is None else max(0, first - 1 - s.updates)
        if self.first != first:
            make = self._making(first, step, rows, interrupted)
            draw = make() if self.off_policy is None else self.off_policy.take(first, make)
            if draw is None:
                return None
            self._learn_from(draw, first, now=made_at == first - 1)
        self.measured["policy_lag"] = float(number - 1 - made_at)
        if update:  # measured once per sampling
            self.measured |= {"drawn_tokens": 0.0, "drawn_seconds": 0.0}
            self.measured = {key: value for key, value in self.measured.items() if not key.startswith("gap_")}
        elif self.off_policy is not None and following <= len(self.planned):
            make = self._making(following, self.planned[following - 1], rows, interrupted)
            self.off_policy.follow(following, make)
        return self._step_of(step, rows, fresh=number - 1 == made_at)

    def _making(
        self, number: int, step: Step, rows: Sequence[Row], interrupted: Callable[[], bool]
    ) -> Callable[[], _Draw | None]:
        """Return the function that samples for step `number`, as planned."""
        items, off = {item.row: item for micro in step.micros for item in micro.items}, self.off_policy
        prompts = [items[row] for row in sorted(items)]
        if off is None:
            return partial(self._draw, prompts, rows, number, self.name, interrupted)
        return partial(self._draw, prompts, rows, number, off.copy, lambda: off.ahead.ended or interrupted())

    def _draw(
        self,
        prompts: Sequence[PromptItem],
        rows: Sequence[Row],
        number: int,
        name: str,
        interrupted: Callable[[], bool],
    ) -> _Draw | None:
        s, seed = self.settings, self.config.seed
        owners = [item for item in prompts for _ in range(s.group)]
        asked = [
            CompletionRequest(item.ids, draw_seed(seed, number, item.row, i % s.group), self.drawing, name)
            for i, item in enumerate(owners)
        ]
        began = time.perf_counter()
        held = self._held(asked, [_unanswered(rows[item.row]) for item in owners], interrupted)
        if held is None:
            return None
        drawn, answers = held
        seconds = time.perf_counter() - began
        judged = self.rewards.judge(answers)
        return _Draw([item.row for item in owners], drawn, judged, seconds, judged.why(answers))

    def _learn_from(self, draw: _Draw, number: int, *, now: bool) -> None:
        """Make these the current answers. `now`: they come from the current adapter."""
        s, groups, drawn, judged = self.settings, draw.groups, draw.drawn, draw.judged
        self.failed = draw.failed
        found = judged.logged() | reward_findings(judged, groups) | drawn_figures(drawn, draw.seconds)
        known = [i for i, value in enumerate(judged.values) if value is not None]
        references = self._references([drawn[i] for i in known]) if s.kl else [()] * len(known)
        values = torch.tensor([judged.values[i] for i in known], dtype=torch.float64)
        if s.kl and s.kl_estimator == "k1":
            values -= s.kl * torch.tensor(
                [sum(drawn[i].logps) - sum(reference) for i, reference in zip(known, references, strict=True)],
                dtype=torch.float64,
            )
        worth = advantages(values, [groups[i] for i in known], baseline=s.baseline or "none", scale=s.scale or "none")
        answers = [
            _JudgedRollout(drawn[i], groups[i], float(w), reference)
            for i, w, reference in zip(known, worth.tolist(), references, strict=True)
            if not (s.mask_cut and drawn[i].cut)
        ]
        found["idle"] = float(not worth.any())
        if not answers:
            raise TrainingError(
                f"none of the {len(drawn)} answers of step {number} can be learned from",
                where=f"{found['cut_answers']:.0f} are cut at reinforcement.max_tokens, {judged.failed} have no reward",
                fix="raise reinforcement.max_tokens, or leave reinforcement.mask_cut out",
            )
        if self.off_policy is not None and not now:
            found |= self._gap_as_drawn(answers, self.off_policy.copy)
        self.first, self.answers, self.measured = number, answers, found

    def _gap_as_drawn(self, answers: Sequence[_JudgedRollout], name: str) -> dict[str, float]:
        """Return the gap of the first micro-batch, under the adapter it was sampled from."""
        drawn = [answers[i].rollout for i in shared_groups([a.size for a in answers], self.config)[0]]
        old, gap = torch.tensor([x for rollout in drawn for x in rollout.logps], dtype=torch.float64), Gap()
        gap.add(self._logps_under(name, drawn), old)
        return gap.checked(self.settings, self._gap_fix).values()

    def _held(
        self, asked: Sequence[CompletionRequest], prompts: Sequence[Answer], interrupted: Callable[[], bool]
    ) -> tuple[list[Rollout], list[Answer]] | None:
        """Return rollouts, and the answers or conversations that rewards judge.

        Conversations if there is an environment. None if interrupted."""
        if self.conversing is None:
            drawn = self.sampler.draw(asked, interrupted)
            held = None if drawn is None else [Conversation(rollout) for rollout in drawn]
        else:
            held = self.conversing.draw(asked, prompts, interrupted)
        if held is None:
            return None
        return [each.rollout for each in held], [said_so_far(p, each) for p, each in zip(prompts, held, strict=True)]

    def _references(self, drawn: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """Return log p of each answer's tokens under the reference."""
        out: dict[int, tuple[float, ...]] = {}
        for group in shared_groups([(r.prompt, len(r.tokens)) for r in drawn], self.config):
            parts = self._logps_under(self.reference, [drawn[i] for i in group]).tolist()
            for i in group:
                n = len(drawn[i].logps)
                out[i], parts = tuple(parts[:n]), parts[n:]
        return [out[i] for i in range(len(drawn))]

    def _logps_under(self, name: str, drawn: Sequence[Rollout]) -> Tensor:
        """Return log p of the answers' tokens, end to end, under another adapter.

        name: "" for the base without adapter."""
        batch, shared = collate_shared(drawn)
        ids = sent(batch.input_ids, self.base.device)
        with torch.no_grad(), without_dropout(self.base.model):
            if self.settings.exact:
                return self.sampler.replay(ids, batch.lengths, batch.trained, name, shared).logps()
            with self.attachment.using(*([name] if name else [])):
                return self._own_logps(batch, shared)

    def _step_of(self, step: Step, rows: Sequence[Row], *, fresh: bool) -> Step:
        """Return the micro-batches of the current answers.

        Answers without effect are left out of the micro-batches but counted."""
        s, answers = self.settings, self.answers
        factors = length_factors([len(a.rollout.logps) for a in answers], s.length or "answer", s.max_tokens)
        in_loss = bool(s.kl) and s.kl_estimator != "k1"
        moving = [i for i, a in enumerate(answers) if a.worth or in_loss]
        moving = moving or [min(range(len(answers)), key=lambda i: answers[i].tokens)]  # at least one token
        factors = factors * (len(moving) / len(answers))  # the loop divides by the number of answers it gets
        micros = []
        for group in shared_groups([answers[i].size for i in moving], self.config):
            own = [answers[moving[k]] for k in group]
            f = factors[[moving[k] for k in group]]
            where = [rows[a.row].where for a in own]
            micros.append(answers_micro([a.rollout for a in own], where, partial(_batch, own, f, fresh)))
        return Step(tuple(micros), step.epoch)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.seen, self.gap = MetricMeans(), Gap()

    def loss(self, batch: PolicyBatch) -> Tensor:
        """Return Σ loss over the batch's answers; the loop divides by their number."""
        s = self.settings
        logps = in_float64(self._policy(batch))
        old = logps.detach() if batch.old is None else batch.old.to(logps)
        worth = per_token(batch.worth.to(logps.device), batch.answers)
        ratios = policy_ratios(logps, old, batch.answers, level=s.ratio or "token")
        losses = clipped(ratios, worth, s.clip_low, s.clip_high)
        if batch.drawn is not None:
            weights = importance_weights(old, batch.drawn.to(logps), s.importance_cap)
            losses = losses * weights
            self.seen.add(weight=weights)
        if batch.reference is not None:
            kl = kl_estimates(logps, batch.reference.to(logps), s.kl_estimator)
            losses = losses if s.kl_estimator == "k1" else losses + s.kl * kl
            self.seen.add(kl=kl)
        if batch.fresh and batch.old is not None:
            self.gap.add(logps, old)
        elif batch.old is not None:
            self.seen.add(drift=(logps.detach() - old).abs())
        if s.clip_low is not None and s.clip_high is not None and batch.old is not None:
            r = ratios.detach()
            self.seen.add(clipped=((r < 1 - s.clip_low) & (worth < 0)) | ((r > 1 + s.clip_high) & (worth > 0)))
        return (per_token(batch.factors.to(logps.device), batch.answers) * losses).sum()

    def _policy(self, batch: PolicyBatch) -> Tensor:
        ids, model = sent(batch.input_ids, self.base.device), self.base.model
        if not self.settings.exact:
            return self._own_logps(batch, batch.shared)
        replay = self.sampler.replay(ids, batch.lengths, batch.trained, self.name, batch.shared)
        return replayed_logps(model, ids, batch.lengths, batch.trained, replay, batch.shared)

    def _own_logps(self, batch: Batch, shared: SharedRows | None) -> Tensor:
        ids = sent(batch.input_ids, self.base.device)
        return token_logps(self.base.model, ids, batch.lengths, batch.trained, shared)

    def means(self) -> MetricMeans:
        """Return the measurements since `begin`.

        Raises TrainingError if the sampler's model differs from the trained one."""
        gap = self.gap.checked(self.settings, self._gap_fix)
        return MetricMeans.total([self.seen, MetricMeans(dict(self.measured), dict.fromkeys(self.measured, 1)), gap])

    @property
    def _gap_fix(self) -> str:
        return "set reinforcement.exact=true" if not self.settings.exact else "this is worth a report"

    def said_after(self, number: int) -> Iterator[str]:
        """Yield warnings on step `number`, if answers were sampled for it."""
        if number == self.first:
            yield from answers_left_out(number, self.failed)
            yield from self.findings.of_step(number, self.measured)

    def said_last(self, steps: Sequence[Mapping[str, float]]) -> Iterator[str]:
        """Yield a summary of all steps' measurements."""
        return draw_summary(self.settings, steps)

    # -- held-out prompts ----------------------------------------------------------------------------------------------

    def score(
        self, prompts: Sequence[PromptItem], rows: Sequence[Row], interrupted: Callable[[], bool]
    ) -> EvalResult | None:
        """Return the mean reward of greedy answers; the loss is minus that.

        None once `interrupted()`."""
        if self.off_policy is not None:
            self.off_policy.ahead.settle()  # one sampling at a time
        greedy = replace(self.drawing, temperature=0.0, top_p=1.0)
        asked = [CompletionRequest(item.ids, 0, greedy, self.name) for item in prompts]
        held = self._held(asked, [_unanswered(rows[item.row]) for item in prompts], interrupted)
        if held is None:
            return None
        drawn, answers = held
        judged = self.rewards.judge(answers)
        values = [value for value in judged.values if value is not None]
        if not values:
            raise TrainingError(
                f"none of the {counted(len(answers), 'answer')} to held-out prompts could be judged:\n"
                f"{bullets(judged.why(answers), 5)}",
                fix="mend the reward, or hold out more prompts",
            )
        figures = drawn_figures(drawn, 0.0)
        extra = judged.logged() | {key: figures[key] for key in ("cut_share", "answer_tokens")}
        tokens = int(figures["drawn_tokens"])
        return EvalResult(-sum(values), tokens, len(drawn), extra, likelihood=False, units=len(values))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def kept(self, step: int) -> dict[str, Any]:
        """Return the answers with updates still to come after `step`."""
        if not self.first or step >= self.first + self.settings.updates - 1:
            return {}
        return {"first": self.first, "measured": self.measured, "answers": [a.to_dict() for a in self.answers]}

    def restore(self, kept: Mapping[str, Any]) -> None:
        if kept:
            self.first, self.measured = int(kept["first"]), dict(kept["measured"])
            self.answers = [_JudgedRollout.from_dict(values) for values in kept["answers"]]


def _unanswered(row: Row) -> Answer:
    """Return a prompt in the form that rewards read."""
    end = row.last_assistant()
    columns = dict(row.values)
    if end < len(row.messages):
        columns.setdefault("answer", row.messages[end]["content"])
    columns.setdefault("where", row.where)
    prompt = prompt_of(row)
    return Answer(
        list(prompt.messages[: prompt.last_assistant()]),
        "",
        columns,
        tools=[tool for tool in row.tools if isinstance(tool, Mapping)],
    )


def _batch(answers: Sequence[_JudgedRollout], factors: Tensor, fresh: bool) -> PolicyBatch:
    batch, shared = collate_shared([a.rollout for a in answers])

    def numbers(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([x for own in values for x in own], dtype=torch.float64)

    changed = any(a.rollout.drawn != a.rollout.logps for a in answers)
    return PolicyBatch(
        batch.input_ids,
        batch.lengths,
        batch.trained,
        [len(a.rollout.logps) for a in answers],
        torch.tensor([a.worth for a in answers], dtype=torch.float64),
        factors,
        numbers([a.rollout.logps for a in answers]),
        numbers([a.rollout.drawn for a in answers]) if changed else None,
        numbers([a.reference for a in answers]) if answers[0].reference else None,
        fresh,
        shared=shared,
    )
