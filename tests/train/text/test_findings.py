"""What a run that draws its answers says at its end: how much of it taught nothing, and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.text.findings import Findings, draw_summary

REWARDS = ({"kind": "exact_match"}, {"kind": "length", "most": 8})


def drawn(loss: str = "grpo") -> ReinforcementSection:
    return ReinforcementSection(loss=loss, group=8, max_tokens=48, rewards=REWARDS).settled()  # type: ignore[arg-type]


def step(**own: float) -> dict[str, float]:
    none = dict.fromkeys(("constant_groups", "cut_answers", "cut_share", "reward_failed", "idle"), 0.0)
    return {**none, "drawn_tokens": 640.0, "groups": 4.0, "reward": 0.5, **own}


def test_a_run_without_findings_says_nothing() -> None:
    assert list(draw_summary(drawn(), [step(), step()])) == []
    assert list(draw_summary(drawn(), [])) == []
    assert list(Findings(drawn()).of_step(1, step())) == []


def test_a_few_are_counted_and_many_are_a_warning_with_what_to_do() -> None:
    later = step(drawn_tokens=0.0, constant_groups=4.0, cut_answers=32.0)  # a later update of the same draw
    few = list(draw_summary(drawn(), [step(constant_groups=1.0, cut_answers=2.0, reward_failed=3.0), later, step()]))
    groups, cut, failed = few
    assert groups.startswith("of 8 groups of answers 1 (12%)")
    assert cut == "of 64 answers 2 (3%) were cut at 48 tokens"
    assert failed.startswith("of 64 answers 3 could not be judged")
    many = step(constant_groups=4.0, cut_answers=20.0, idle=1.0)
    groups, cut = draw_summary(drawn(), [many, step()] + [many] * 2)
    assert groups.startswith("warning: of 16 groups of answers 12 (75%)")
    assert "all of a step's in 3 of 4" in groups
    assert "adapter.start" in groups
    assert cut.startswith("warning: of 128 answers 60 (47%)")
    assert "raise reinforcement.max_tokens" in cut


def test_groups_that_are_compared_with_others_teach_and_a_reward_that_moves_nothing_is_named() -> None:
    steps = [step(constant_groups=4.0, constant_length=1.0), step(constant_length=1.0, constant_exact_match=1.0)]
    (told,) = draw_summary(drawn("reinforce"), steps)
    assert told.startswith("the reward length was the same within each group")


@pytest.mark.parametrize("found", [{"idle": 1.0}, {"cut_share": 0.75}], ids=str)
def test_it_is_said_at_the_first_second_and_fourth_in_a_row(found: dict[str, Any]) -> None:
    findings, told = Findings(drawn()), []
    for number in range(1, 9):
        now = step() if number == 7 else step(**found)
        told += [number] * len(list(findings.of_step(number, now)))
    assert told == [1, 2, 4, 8]  # the eighth is the first after one that was well
