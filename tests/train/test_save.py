"""What is said of a run at its end."""

from __future__ import annotations

from veneer.train.save import predicted_and_actual


def test_what_came_is_set_beside_what_was_said() -> None:
    numbers = {"predicted_peak_bytes": 2_000_000_000, "predicted_seconds": 100.0}
    said = predicted_and_actual(numbers, 2_200_000_000, 80.0)
    assert said == "peak memory 2.20 GB, 2.00 predicted (+10%); training 80 s, 2 min predicted (-20%)"
    assert predicted_and_actual({}, 1, 1.0) == ""
