"""Optimizers by name, LoRA+ parameter groups, and schedules as functions of the step."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from veneer.train.config.text import ScheduleSection
from veneer.train.optim import Schedule, make_optimizer


def _pair(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {
        "m.A": nn.Parameter(torch.ones(2, 3, dtype=dtype)),
        "m.B": nn.Parameter(torch.ones(4, 2, dtype=dtype)),
        "m.magnitude": nn.Parameter(torch.ones(4, dtype=dtype)),
    }


def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    for p in parameters.values():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_every_optimizer_updates_every_parameter(name: str) -> None:
    parameters = _pair()
    optimizer = make_optimizer(parameters, name=name, learning_rate=0.1)
    _step(optimizer, parameters)
    assert all((p != 1).all() and p.isfinite().all() for p in parameters.values())


def test_lora_plus_multiplies_updates_of_b_by_the_ratio() -> None:
    parameters = _pair()
    optimizer = make_optimizer(parameters, name="sgd", learning_rate=0.01, loraplus_ratio=16.0)
    _step(optimizer, parameters)
    torch.testing.assert_close(parameters["m.A"].detach(), torch.full((2, 3), 1 - 0.01 * 0.5))
    torch.testing.assert_close(parameters["m.B"].detach(), torch.full((4, 2), 1 - 16 * 0.01 * 0.5))
    torch.testing.assert_close(parameters["m.magnitude"].detach(), torch.full((4,), 1 - 0.01 * 0.5))


def test_adamw_equals_the_formula_in_float64() -> None:
    """Compares with the formula of Loshchilov & Hutter. Weight decay applies to matrices, not to magnitudes."""
    parameters = _pair(torch.float64)
    lr, b1, b2, decay, eps = 0.01, 0.9, 0.95, 0.1, 1e-8
    optimizer = make_optimizer(parameters, learning_rate=lr, betas=(b1, b2), weight_decay=decay, eps=eps)
    for _ in range(3):
        _step(optimizer, parameters)
    for name, p in parameters.items():
        value = m = v = 0.0
        value = 1.0
        for t in range(1, 4):
            value *= 1 - lr * (decay if p.ndim == 2 else 0)
            m, v = b1 * m + (1 - b1) * 0.5, b2 * v + (1 - b2) * 0.25
            value -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
        torch.testing.assert_close(p.detach(), torch.full_like(p, value)), name


@settings(deadline=None)
@given(
    name=st.sampled_from(get_args(ScheduleSection.model_fields["name"].annotation)),
    steps=st.integers(1, 300),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 400)),
    floor=st.floats(0, 1),
)
def test_schedules_rise_then_never_rise_again(name: str, steps: int, warmup: float, floor: float) -> None:
    schedule = Schedule.create(name, steps, warmup, floor)
    factors = [schedule.factor(s) for s in range(1, steps + 1)]
    w = schedule.warmup
    assert all(0 < f <= 1 for f in factors) or floor == 0
    assert all(f >= 0 for f in factors)
    assert factors[:w] == sorted(factors[:w])
    after = factors[w:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    if w < steps:
        assert after[0] == pytest.approx(1.0)
    assert all(f >= floor - 1e-9 for f in after)


def test_schedule_factors_equal_calculations_by_hand() -> None:
    assert [Schedule.create("linear", 4).factor(s) for s in (1, 2, 3, 4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [Schedule.create("cosine", 4).factor(s) for s in (1, 3)] == pytest.approx([1, 0.5])
    assert [Schedule.create("constant", 4, 2).factor(s) for s in (1, 2, 3, 4)] == pytest.approx([0.5, 1, 1, 1])
    assert Schedule.create("linear", 100, 0.03).warmup == 3
    assert Schedule.create("linear", 10, 0.03).warmup == 1


def test_schedule_scales_each_group_by_the_same_factor() -> None:
    optimizer = make_optimizer(_pair(), learning_rate=0.1, loraplus_ratio=4.0)
    assert Schedule.create("linear", 2).apply(optimizer, 2) == pytest.approx(0.05)
    assert sorted({round(g["lr"], 9) for g in optimizer.param_groups}) == pytest.approx([0.05, 0.2])
