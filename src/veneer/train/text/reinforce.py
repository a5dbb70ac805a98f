"""Reinforcement learning: sampled completions, their rewards, and the loss.

    a step   prompts → sample (`rollouts.Sampler`) → rewards (`train.rewards`) → advantages → loss
             (`policy_losses`)

Sampler and trainer are the same model. The sampler reads the adapter weights on the attachment, and with
`reinforcement.exact` the trainer's forward pass uses the sampler's values (`models.text.logprob_replay`). The
first update after each sampling compares the sampler's and the trainer's log-probability of each token. If the
mean difference (the gap) is above `reinforcement.gap`, the run stops before the optimizer step. Logged for each
step:

    reward, reward_NAME…               means over the completions that have a reward
    reward_failed                      number of completions without a reward
    constant_groups, constant_share    groups in which all rewards are equal, so that nothing is learned
    idle                               1 if no completion has an advantage, else 0
    cut_answers, cut_share             completions that ended at max_tokens
    answer_tokens                      mean length of the completions
    drawn_tokens, drawn_seconds        tokens sampled for this step, and sampling time; 0 for later updates on
                                       the same completions
    prompt_cached                      share of the prompt tokens found in the KV cache
    gap_mean, gap_max, gap_share       |Δ log p| of the trained tokens; share of tokens above 1%
    gap_kl                             estimate of the KL divergence of sampler and trainer
    policy_lag                         optimizer steps since the completions were sampled
    dropped_answers                    dropped answers of servers, which were requested again; if any
    drift                              mean |log p − log p at sampling|, if not 0
    kl, clipped, weight                means over the trained tokens; each is logged only if the loss has a
                                       reference, a clip or importance weights, respectively

With `reinforcement.samplers`, servers sample (`sampler_servers`). The trainer's own log-probabilities at the
first update then replace the sampler's in the ratio, and the loss is weighted by min(p trainer / p
sampler, importance_cap), which corrects for both the mismatch and the staleness: truncated importance sampling
as in TRL (`vllm_importance_sampling_correction`, trl/trainer/grpo_config.py), with the current policy as the
proximal one (AReaL, arXiv 2505.24298). With `reinforcement.staleness`, later steps are sampled while this
step trains.

Completions of held-out prompts are greedy, and their loss is the negative mean reward. A step's completions
are a function of the seed, the step and the adapter's values, so a resumed run samples the same completions.
Completions that later updates still need are part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.adapters.use import load_adapter
from veneer.errors import AdapterError, TrainingError, bullets, counted
from veneer.models.patching import without_dropout
from veneer.models.text.generate import rendered
from veneer.models.text.logprob_replay import replayed_logps
from veneer.models.text.loss import token_logps
from veneer.ops.attention import SharedRows
from veneer.ops.device_transfer import in_float64, sent
from veneer.train.config.section import BASE_MODEL
from veneer.train.loop import EvalResult, Step
from veneer.train.rewards.judge import AskModel, Question, Reply
from veneer.train.rewards.reward import Answer, Rewards, reward_findings
from veneer.train.text.batches import Batch
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
    SampledTraining,
    WaitForSamples,
    collate_shared,
    completions_micro_batch,
    shared_groups,
    with_final_turn,
)
from veneer.train.text.rollouts import CompletionRequest, Rollout, Sampler, SamplingParams
from veneer.train.text.rows import Row

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase
    from veneer.train.config.reinforcement import ReinforcementSection


@dataclass(frozen=True)
class _JudgedRollout:
    """A completion with its advantage.

    row: index of the prompt's row. reference: log p of the tokens under the reference, if any. first_logps: the
    trainer's log p of the tokens at the first update, if later updates need them."""

    rollout: Rollout
    row: int
    advantage: float
    reference: tuple[float, ...] = ()
    first_logps: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.rollout.prompt) + len(self.rollout.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rollout": self.rollout.to_dict(), "reference": list(self.reference)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> _JudgedRollout:
        rollout, reference = Rollout.from_dict(values["rollout"]), tuple(values["reference"])
        return cls(rollout, values["row"], values["advantage"], reference, values.get("first_logps", []))


@dataclass(kw_only=True)
class Reinforcement(SampledTraining):
    """State of a reinforcement learning run.

    `reference`: name of the reference adapter; "" for the base without adapter."""

    attachment: Attachment
    rewards: Rewards
    reference: str = ""
    first: int = 0
    """The step that the current completions were sampled for; 0 for none."""
    answers: list[_JudgedRollout] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Reasons why completions of the last sampling have no reward, most common first."""
    plan: Sequence[Step] = ()
    """All steps of the run, which determine the prompts to sample."""

    def __post_init__(self) -> None:
        s = self.settings = self.config.reinforcement.with_defaults()
        self.params = SamplingParams(s.max_tokens, s.temperature, s.top_p, grammar=s.grammar_text)
        self._warned: dict[str, str] = {}
        # step -> (step when its sampling began, (prompts, function that waits for their completions))
        self._ahead: dict[int, tuple[int, tuple[list[PromptItem], WaitForSamples]]] = {}
        if s.samplers:
            self.mismatch_fix = "check the samplers' dtype and --batch-invariant; lower reinforcement.staleness"
        elif not s.exact:
            self.mismatch_fix = "set reinforcement.exact=true"

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample_step(self, step: Step, number: int, rows: Sequence[Row], interrupted: Callable[[], bool]) -> Step | None:
        """Return step `number`. The first of every `updates` steps samples new completions.

        rows: all rows of the split, indexed by `PromptItem.row`."""
        update = (number - 1) % self.settings.updates
        if self.first != number - update:
            self._begin_ahead(number - update)
            if not self._sample_answers(rows, number - update, interrupted):
                return None
        if update:  # count the sampled tokens only at the first update
            lag = self.sample_metrics["policy_lag"] + 1
            self.sample_metrics |= {"drawn_tokens": 0.0, "drawn_seconds": 0.0, "policy_lag": lag}
        return self._step_of(step, rows, fresh=not update)

    def _begin_ahead(self, number: int) -> None:
        """Start sampling completions for step `number`, and for later steps within the staleness limit."""
        s = self.settings
        for first in range(number, min(number + s.staleness, len(self.plan)) + 1, s.updates):
            if first not in self._ahead:
                items = {item.row: item for micro in self.plan[first - 1].micros for item in micro.items}
                prompts = [items[row] for row in sorted(items)]
                self._ahead[first] = number, self.begin_sampling(prompts, self.params, first, s.group)

    def _sample_answers(self, rows: Sequence[Row], number: int, interrupted: Callable[[], bool]) -> bool:
        """Wait for the completions of step `number`, and judge them. Return False if interrupted."""
        s = self.settings
        began, (owners, wait) = self._ahead.pop(number)
        sampled = wait(interrupted)
        if sampled is None:
            return False
        rollouts, figures = sampled
        answers = _answers(rollouts, owners, rows)
        judged, groups = self.rewards.judge(answers), [item.row for item in owners]
        metrics = judged.logged() | reward_findings(judged, groups) | figures
        scored = [i for i, value in enumerate(judged.values) if value is not None]
        references = self._references([rollouts[i] for i in scored]) if s.kl else [()] * len(scored)
        values = torch.tensor([judged.values[i] for i in scored], dtype=torch.float64)
        gains = advantages(values, [groups[i] for i in scored], baseline=s.baseline or "none", scale=s.scale or "none")
        self.answers = [
            _JudgedRollout(rollouts[i], groups[i], float(w), reference)
            for i, w, reference in zip(scored, gains.tolist(), references, strict=True)
            if not (s.mask_cut and rollouts[i].cut)
        ]
        if not self.answers:
            text = f"none of the {len(rollouts)} completions of step {number} can be used: "
            text += f"{metrics['cut_answers']:.0f} are cut at max_tokens, {judged.failed} have no reward"
            fix = "raise reinforcement.max_tokens, or unset reinforcement.mask_cut"
            raise TrainingError(text, where="reinforcement", fix=fix)
        self.first, self.sample_metrics, self.failed = number, metrics, judged.why(answers)
        self.sample_metrics |= {"idle": float(not gains.any()), "policy_lag": float(number - began)}
        return True

    def _references(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """Return log p of each completion's tokens under the reference."""
        out: dict[int, tuple[float, ...]] = {}
        for group in shared_groups([(r.prompt, len(r.tokens)) for r in rollouts], self.config):
            batch, shared = collate_shared([rollouts[i] for i in group])
            with torch.no_grad(), without_dropout(self.base.model):
                logps = self._reference_logps(batch, shared).tolist()
            for i in group:
                n = len(rollouts[i].logps)
                out[i], logps = tuple(logps[:n]), logps[n:]
        return [out[i] for i in range(len(rollouts))]

    def _reference_logps(self, batch: Batch, shared: SharedRows) -> Tensor:
        if self.settings.exact:
            ids = sent(batch.input_ids, self.base.device)
            return self.sampler.replay(ids, batch.lengths, batch.trained, self.reference, shared).logps()
        with self.attachment.using(*([self.reference] if self.reference else [])):
            return self._own_logps(batch, shared)

    def _step_of(self, step: Step, rows: Sequence[Row], *, fresh: bool) -> Step:
        """Return the micro-batches of the current completions.

        Completions without a gradient are left out of the micro-batches, but the loss is still divided by the
        number of all completions."""
        s, answers = self.settings, self.answers
        weights = length_factors([len(a.rollout.logps) for a in answers], s.length or "answer", s.max_tokens)
        moving = [i for i, a in enumerate(answers) if a.advantage or s.kl]
        moving = moving or [min(range(len(answers)), key=lambda i: answers[i].tokens)]  # keep at least one completion
        # The training loop divides by the number of completions in the micro-batches.
        weights = weights * (len(moving) / len(answers))
        micros = []
        sizes = [(answers[i].rollout.prompt, len(answers[i].rollout.tokens)) for i in moving]
        for group in shared_groups(sizes, self.config):
            group_answers = [answers[moving[k]] for k in group]
            f = weights[[moving[k] for k in group]]
            where = [rows[a.row].where for a in group_answers]
            make = partial(_batch, group_answers, f, s, fresh)
            micros.append(completions_micro_batch([a.rollout for a in group_answers], where, make))
        return Step(tuple(micros), step.epoch)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def loss(self, batch: PolicyBatch) -> Tensor:
        """Return Σ loss over the batch's completions; the training loop divides by their number."""
        s = self.settings
        logps = in_float64(self._policy(batch))
        sampled = logps.detach() if batch.old is None else batch.old.to(logps)
        old = logps.detach() if batch.fresh and s.samplers else sampled
        if batch.remember is not None:
            batch.remember(old)
        advantage = per_token(batch.advantage.to(logps.device), batch.answers)
        ratios = policy_ratios(logps, old, batch.answers, level=s.ratio or "token")
        losses = clipped(ratios, advantage, s.clip_low, s.clip_high)
        if batch.sampling_logps is not None:
            weights = importance_weights(old, batch.sampling_logps.to(logps), s.importance_cap)
            losses = losses * weights
            self.metric_means.add(weight=weights)
        if batch.reference is not None:
            kl = kl_estimates(logps, batch.reference.to(logps))
            losses = losses + s.kl * kl
            self.metric_means.add(kl=kl)
        if batch.fresh and batch.old is not None:
            self.mismatch.add(logps, sampled)
        elif batch.old is not None:
            self.metric_means.add(drift=(logps.detach() - old).abs())
        if s.clip_low is not None and s.clip_high is not None and batch.old is not None:
            r = ratios.detach()
            below, above = (r < 1 - s.clip_low) & (advantage < 0), (r > 1 + s.clip_high) & (advantage > 0)
            self.metric_means.add(clipped=below | above)
        return (per_token(batch.loss_weights.to(logps.device), batch.answers) * losses).sum()

    def _policy(self, batch: PolicyBatch) -> Tensor:
        if not self.settings.exact:
            return self._own_logps(batch, batch.shared)
        ids = sent(batch.input_ids, self.base.device)
        replay = self.sampler.replay(ids, batch.lengths, batch.trained, self.name, batch.shared)
        return replayed_logps(self.base.model, ids, batch.lengths, batch.trained, replay, batch.shared)

    def _own_logps(self, batch: Batch, shared: SharedRows | None) -> Tensor:
        ids = sent(batch.input_ids, self.base.device)
        return token_logps(self.base.model, ids, batch.lengths, batch.trained, shared)

    def step_notes(self, number: int) -> Iterator[str]:
        """Yield warnings about step `number`, if completions were sampled for it.

        A warning that still holds at the next sampling is not repeated."""
        if number == self.first:
            yield from (f"step {number}, left out: {line}" for line in self.failed[:3])
            if len(self.failed) > 3:
                yield f"step {number}, left out: … and {len(self.failed) - 3} more"
            previous, self._warned = self._warned, sampling_warnings(self.settings, number, self.sample_metrics)
            yield from (text for name, text in self._warned.items() if name not in previous)

    # -- held-out prompts ----------------------------------------------------------------------------------------------

    def score(
        self, prompts: Sequence[PromptItem], rows: Sequence[Row], interrupted: Callable[[], bool]
    ) -> EvalResult | None:
        """Return the negative mean reward of greedy completions, as the loss.

        Returns None once `interrupted()` is true."""
        greedy = replace(self.params, temperature=0.0, top_p=1.0)
        sampled = self.sample(prompts, greedy, 0, 1, interrupted)
        if sampled is None:
            return None
        _, rollouts, figures = sampled
        answers = _answers(rollouts, prompts, rows)
        judged = self.rewards.judge(answers)
        values = [value for value in judged.values if value is not None]
        if not values:
            text = f"none of the {counted(len(answers), 'answer')} of held-out prompts could be scored:\n"
            text += f"{bullets(judged.why(answers), 5)}"
            raise TrainingError(text, fix="fix the reward, or hold out more prompts")
        metrics = judged.logged() | {key: figures[key] for key in ("cut_share", "answer_tokens")}
        tokens = int(figures["drawn_tokens"])
        return EvalResult(-sum(values), tokens, len(rollouts), metrics, likelihood=False, units=len(values))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def extra_state(self, step: int) -> dict[str, Any]:
        """Return the state to save: the completions that are needed for updates after `step`, if any."""
        if not self.first or step >= self.first + self.settings.updates - 1:
            return {}
        return {"first": self.first, "measured": self.sample_metrics, "answers": [a.to_dict() for a in self.answers]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self.first, self.sample_metrics = int(state["first"]), dict(state["measured"])
            self.answers = [_JudgedRollout.from_dict(values) for values in state["answers"]]


def _answers(rollouts: Sequence[Rollout], prompts: Sequence[PromptItem], rows: Sequence[Row]) -> list[Answer]:
    """Return the sampled completions as the `Answer`s that rewards score."""
    answers = []
    for rollout, item in zip(rollouts, prompts, strict=True):
        row = rows[item.row]
        end, columns = row.last_assistant(), dict(row.values)
        if end < len(row.messages):
            columns.setdefault("answer", row.messages[end]["content"])
        columns.setdefault("where", row.where)
        prompt = with_final_turn(row)
        messages = list(prompt.messages[: prompt.last_assistant()])
        answers.append(Answer(messages, rollout.text, columns, len(rollout.tokens)))
    return answers


def _batch(
    answers: Sequence[_JudgedRollout], weights: Tensor, settings: ReinforcementSection, fresh: bool
) -> PolicyBatch:
    batch, shared = collate_shared([a.rollout for a in answers])

    def numbers(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([x for row in values for x in row], dtype=torch.float64)

    def remember(logps: Tensor) -> None:
        for answer, own in zip(answers, logps.split([len(a.rollout.logps) for a in answers]), strict=True):
            answer.first_logps[:] = own.tolist()

    served = bool(settings.samplers)
    changed = served or any(a.rollout.sampling_logps != a.rollout.logps for a in answers)
    return PolicyBatch(
        **vars(batch),
        answers=[len(a.rollout.logps) for a in answers],
        advantage=torch.tensor([a.advantage for a in answers], dtype=torch.float64),
        loss_weights=weights,
        old=numbers([a.first_logps or a.rollout.logps for a in answers]),
        sampling_logps=numbers([a.rollout.sampling_logps for a in answers]) if changed else None,
        reference=numbers([a.reference for a in answers]) if answers[0].reference else None,
        fresh=fresh,
        shared=shared,
        remember=remember if served and fresh and settings.updates > 1 else None,
    )


# -- completions without a training signal -----------------------------------------------------------------------------

_EASIER = (
    "use easier prompts, add a reward for the format (kind: json_schema, regex), or start from an adapter that is "
    "sometimes right (adapter.start); if all completions are right already, use harder prompts"
)
_LONGER = "raise reinforcement.max_tokens, or reward short answers (kind: length)"
_MOST = 0.5
"""Share of truncated completions above which a warning is shown."""


def sampling_warnings(settings: ReinforcementSection, number: int, metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the warnings about the completions of step `number`, by name."""
    warnings = {}
    if metrics["idle"]:
        mean = f" ({metrics['reward']:.3f} on average)" if "reward" in metrics else ""
        compared = "to each prompt" if settings.baseline in ("group", "others") else "of the step"
        text = f"warning: nothing is learned from the rewards of step {number}: all completions {compared} have the "
        warnings["idle"] = text + f"same reward{mean}; {_EASIER}"
    if metrics["cut_share"] > _MOST:
        text = f"warning: {metrics['cut_share']:.0%} of the completions of step {number} are cut at "
        warnings["cut"] = text + f"{settings.max_tokens} tokens; {_LONGER}"
    return warnings


# -- a judge in this process -------------------------------------------------------------------------------------------


def sampled_judge(base: TextBase, attachment: Attachment, sampler: Sampler, models: Collection[str]) -> AskModel:
    """Attach the judges' adapters, and return the function that sends questions to the judges.

    The run's sampler generates the replies, so a judge needs no model of its own. `models`: adapters by name
    or folder, and `BASE_MODEL`. Raises AdapterError if an adapter is invalid or the sampler does not support
    it, and MismatchError if an adapter belongs to another base."""
    names = {BASE_MODEL: ""}
    for model in sorted(set(models) - {BASE_MODEL}):
        name = names[model] = f"{model}, as a judge"
        attachment.add(name, load_adapter(base, model))
        if problems := sampler.problems(name):
            message = f"completions cannot be sampled from {model}:\n{bullets(problems)}"
            raise AdapterError(message, where="reinforcement.rewards")

    def request(question: Question) -> CompletionRequest | Reply:
        text = rendered(base, question.messages)
        ids = tuple(base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) + question.tokens > base.context:
            text = f"the question ({len(ids)} tokens) and its answer ({question.tokens}) exceed the base's context"
            return Reply(error=text)
        how = SamplingParams(question.tokens, question.temperature, question.top_p, question.grammar)
        return CompletionRequest(ids, question.seed, how, names[question.model])

    def reply(rollout: Rollout) -> Reply:
        error = "" if rollout.cut or rollout.text.strip() else "the judge's reply is empty"
        return Reply(rollout.text, error, rollout.cut)

    def ask(questions: Sequence[Question], /) -> list[Reply]:
        requests = [request(question) for question in questions]
        rollouts = iter(sampler.sample([each for each in requests if isinstance(each, CompletionRequest)]) or ())
        return [reply(next(rollouts)) if isinstance(each, CompletionRequest) else each for each in requests]

    return ask
