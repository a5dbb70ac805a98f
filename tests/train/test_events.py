"""Text for a step or an evaluation: its loss, or the rewards of its completions."""

from __future__ import annotations

from veneer.train.events import measure_text, validation_text


def test_loss_is_shown_if_there_are_no_rewards() -> None:
    assert measure_text(-1e-9, {}) == "loss 0.0000"
    assert (
        measure_text(1.25, {"reward_accuracy": 0.5, "reward_margin": 1.0}) == "loss 1.2500"
    )  # metrics like those of preference runs
    assert validation_text(1.25, False) == "validation loss 1.2500"


def test_rewards_are_shown_instead_of_the_loss() -> None:
    judged = {"reward_failed": 1.0, "cut_share": 0.0}
    parts = {"reward_fields": 0.5, "reward_fields_team": 1.0}
    assert measure_text(0.0, {"reward": 0.25, **parts, **judged}) == "reward 0.250 (fields 0.500, fields_team 1.000)"
    assert measure_text(0.0, {"reward": 0.5, "reward_fields": 0.5, **judged}) == "reward 0.500"
    assert measure_text(0.0, judged) == "no reward"
    assert validation_text(-0.8, True) == "validation reward 0.800"
    assert validation_text(0.25, True) == "validation reward -0.250"
