"""What is said of answers that were drawn and teach nothing: in the steps where it happens, and at a run's end in all.

    findings = Findings(settings)        `settings`: the run's `reinforcement`, settled
    findings.of_step(3, measured)        warnings of a step: no answer has an advantage, or most of them are cut
    draw_summary(settings, steps)        all steps' numbers -> counts, and what to do about them

A run in which something happens at every step says it at the first, the second, the fourth … of them in a row.
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
"""Share of a step's answers, or of a run's groups, above which something is to be done about it."""
_MANY_CUT = 0.1
"""The same for answers that were cut, over the whole run."""
_NAMED = 3
"""Lines about answers of a step that are left out."""


def answers_left_out(number: int, failed: Sequence[str]) -> Iterator[str]:
    """Of answers of step `number` that nobody could judge, or whose tokens no teacher read: why, with their rows."""
    yield from (f"step {number}, left out: {line}" for line in failed[:_NAMED])
    if len(failed) > _NAMED:
        yield f"step {number}, left out: … and {len(failed) - _NAMED} more"


@dataclass
class Findings:
    """`in_a_row`: draws until now, by what was found in each of them."""

    settings: ReinforcementSection
    in_a_row: dict[str, int] = field(default_factory=dict)

    def of_step(self, number: int, measured: Mapping[str, float]) -> Iterator[str]:
        """`measured`: what was found of the answers that were drawn for step `number`."""
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
    """`steps`: what each step of a run has measured. Says nothing where nothing was found."""
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
