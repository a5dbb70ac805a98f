"""A training step of every family on a GPU that is not there: nothing waits, and the bytes are those of the plan."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES
from veneer.plan.memory import Load
from veneer.plan.tables import base_config, device_named
from veneer.train.traced import traced_training

GPU = device_named("h100-80gb")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_waits_for_nothing(family: str) -> None:
    config = FAMILIES[family]().config.to_dict()
    found = traced_training(config, Load((24, 24, 17), trained=0.5, rank=4), GPU)
    assert not found.waits
    assert "rows without padding" in found.ways
    assert found.trace.at_peak["weights"] > 0
    assert found.trace.at_peak["optimizer"] >= 2 * found.trace.at_peak["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("meta-llama/Llama-3.1-8B", Load((600,) * 3)),
        ("meta-llama/Llama-3.1-8B", Load((2048,) * 8, checkpointing=True)),
        ("meta-llama/Llama-3.1-70B", Load((600,) * 3, quantise="nf4")),
    ],
)
def test_at_true_size_counted_and_traced_agree(name: str, load: Load) -> None:
    found = traced_training(base_config(name), load, GPU)
    assert not found.waits
    assert abs(found.off) < 0.05, (found.trace.at_peak, found.counted)
