"""Which implementation of an op runs is decided in one place, and can be asked for."""

from __future__ import annotations

import pytest
import torch

from veneer.ops import choice
from veneer.ops.choice import HOMES, OPS, choices, chosen
from veneer.ops.cpu import compiled
from veneer.ops.cpu.implementations import IMPLEMENTATIONS


def test_every_implementation_is_of_a_known_op_and_every_op_has_an_answer() -> None:
    assert set(IMPLEMENTATIONS) <= set(OPS)
    for device in (*HOMES, "cuda", "mps"):
        told = choices(device)
        assert set(told) == set(OPS)
        assert all(told.values())


def test_a_device_without_implementations_runs_the_reference() -> None:
    x = torch.empty(2, 16, dtype=torch.bfloat16, device="meta")
    assert all(chosen(op, x) is None for op in OPS)
    assert set(choices("meta").values()) == {"torch: meta has no implementation of its own"}


def test_what_the_kernels_do_not_take_runs_the_reference() -> None:
    x, w = torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    there = compiled.has("rms_norm")
    assert (chosen("rms_norm", x, w) is not None) == there
    assert chosen("rms_norm", x.float(), w.float()) is None
    assert chosen("rms_norm", x.t(), w) is None
    assert choices("cpu")["rms_norm"].startswith("veneer.ops.cpu" if there else "torch: ")


def test_without_compiled_kernels_it_is_torch_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    assert all(line.startswith("torch: no compiled kernels: ") for line in choices("cpu").values())
    assert chosen("rms_norm", torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)) is None


def test_a_device_may_bring_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = choice.Implementation(lambda x: x, lambda x: x.ndim == 2, "matrices", lambda: "")
    monkeypatch.setattr(choice, "_implementations", lambda device: {"gelu_tanh": own} if device == "meta" else {})
    monkeypatch.setitem(HOMES, "meta", "a module")
    assert chosen("gelu_tanh", torch.empty(2, 2, device="meta")) is own.run
    assert chosen("gelu_tanh", torch.empty(2, device="meta")) is None
    assert choices("meta")["gelu_tanh"] == "a module for matrices, torch for all else"
