"""Warnings about completions that give no training signal.

    findings = Findings(settings)        `settings`: the run's resolved `reinforcement`
    findings.of_step(3, measured)        warnings of a step: no completion has an advantage, or most are cut
    draw_summary(settings, steps)        counts over all steps, and advice

A condition that holds at every step is reported at the first, second, fourth … of the consecutive steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.train.config.reinforcement import ReinforcementSection

_EASIER = (
    "take easier prompts, add a reward for the form that some answers reach (kind: json_schema, regex), or begin at an "
    "adapter that is right sometimes (adapter.start); where all answers are right already, take harder prompts"
)
_LONGER = "raise reinforcement.max_tokens, or reward short answers (kind: length)"
_MOST = 0.5
"""Share of a step's completions, or of a run's groups, above which to give advice."""
_MANY_CUT = 0.1
"""The same for truncated completions over the whole run."""
_NAMED = 3
"""Maximum lines about the dropped completions of a step."""


def answers_left_out(number: int, failed: Sequence[str]) -> Iterator[str]:
    """Yield why completions of step `number` were dropped, with their rows.

    They could not be scored, or the teacher did not read their tokens."""
    yield from (f"step {number}, left out: {line}" for line in failed[:_NAMED])
    if len(failed) > _NAMED:
        yield f"step {number}, left out: … and {len(failed) - _NAMED} more"


@dataclass
class Findings:
    """Warnings of a run. `in_a_row`: consecutive steps with a condition, by condition."""

    settings: ReinforcementSection
    in_a_row: dict[str, int] = field(default_factory=dict)

    def of_step(self, number: int, measured: Mapping[str, float]) -> Iterator[str]:
        """Yield the warnings of a step. `measured`: metrics of its completions."""
        if self._said("idle", bool(measured["idle"])):
            worth = f" ({measured['reward']:.3f} on average)" if "reward" in measured else ""
            compared = "to each prompt" if self.settings.baseline in ("group", "others") else "of the step"
            yield (
                f"warning: nothing is learned from the rewards of step {number}: all answers {compared} are worth the "
                f"same{worth}{self._row('idle')}; {_EASIER}"
            )
        if self._said("cut", measured["cut_share"] > _MOST):
            yield (
                f"warning: {measured['cut_share']:.0%} of the answers of step {number} are cut at "
                f"{self.settings.max_tokens} tokens{self._row('cut')}; {_LONGER}"
            )

    def _said(self, what: str, found: bool) -> bool:
        count = self.in_a_row[what] = self.in_a_row.get(what, 0) + 1 if found else 0
        return count > 0 and count & (count - 1) == 0

    def _row(self, what: str) -> str:
        count = self.in_a_row[what]
        return f", {count} draws in a row" if count > 1 else ""


def draw_summary(settings: ReinforcementSection, steps: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Yield the summary of a run; nothing if there is nothing to report.

    `steps`: the metrics of each step."""
    draws = [found for found in steps if found.get("drawn_tokens")]
    groups, constant, cut, failed = (
        round(sum(found.get(key, 0.0) for found in draws))
        for key in ("groups", "constant_groups", "cut_answers", "reward_failed")
    )
    idle, answers = sum(bool(found.get("idle")) for found in draws), groups * settings.group
    if constant and settings.baseline in ("group", "others"):
        text = (
            f"of {groups:,} groups of answers {constant:,} ({constant / groups:.0%}) were worth the same throughout, "
            f"and taught nothing; that was all of a step's in {idle:,} of {len(draws):,}"
        )
        yield f"warning: {text}: {_EASIER}" if constant > _MOST * groups else text
    elif idle:
        yield f"all answers of a step were worth the same in {idle:,} of {len(draws):,}: {_EASIER}"
    for reward in settings.rewards if len(settings.rewards) > 1 else ():
        if draws and all(found.get(f"constant_{reward.called}") for found in draws):
            yield f"the reward {reward.called} was the same within each group, in every draw: it moved nothing"
    if cut:
        text = f"of {answers:,} answers {cut:,} ({cut / answers:.0%}) were cut at {settings.max_tokens} tokens"
        yield f"warning: {text}: {_LONGER}" if cut > _MANY_CUT * answers else text
    if failed:
        yield f"of {answers:,} answers {failed:,} could not be judged, and were left out"
