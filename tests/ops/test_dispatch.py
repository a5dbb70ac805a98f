"""Choice of an op's implementation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from veneer.errors import ConfigError
from veneer.ops import dispatch as module
from veneer.ops.cpu import compiled
from veneer.ops.cpu.implementations import IMPLEMENTATIONS
from veneer.ops.dispatch import HOMES, OPS, RULES, Implementation, choices, dispatch, override_ops, parse_overrides
from veneer.ops.profile import Profile

BF16 = torch.bfloat16


def test_every_op_has_a_choice_on_every_device() -> None:
    assert set(IMPLEMENTATIONS) <= set(OPS)
    assert set(RULES) <= set(OPS)
    for device in (*HOMES, "mps"):
        assert set(choices(device)) == set(OPS)
        assert all(one.name and one.reason for one in choices(device).values())


def test_a_device_without_implementations_runs_the_reference() -> None:
    x = torch.empty(2, 16, dtype=BF16, device="meta")
    assert all(dispatch(op, x) is None for op in OPS)
    assert {one.name for one in choices("meta").values()} == {"torch"}


def test_unsupported_input_runs_the_reference() -> None:
    x, w = torch.ones(3, 16, dtype=BF16), torch.ones(16, dtype=BF16)
    there = compiled.has("rms_norm")
    assert (dispatch("rms_norm", x, w) is not None) == there
    assert dispatch("rms_norm", x.float(), w.float()) is None
    assert dispatch("rms_norm", x.t(), w) is None
    assert choices("cpu")["rms_norm"].name == ("compiled" if there else "torch")


def test_torch_runs_without_kernels_and_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    found = choices("cpu")
    by_compiled = set(IMPLEMENTATIONS) - {"prepacked_linear", "product", "weight_layout"}  # these also use torch
    assert all(found[op].reason.startswith("no compiled kernels: ") for op in by_compiled)
    assert dispatch("rms_norm", torch.ones(3, 16, dtype=BF16), torch.ones(16, dtype=BF16)) is None


def _implementation(name: str, *others: Implementation, here: bool = True) -> Implementation:
    missing = "" if here else "gone"
    return Implementation(name, lambda x: here and x.ndim == 2, "matrices", lambda: missing, name, others)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Implementation]:
    """Replace the CPU's implementations with two fakes of one op; return the table."""
    made = {"gelu_tanh": _implementation("first", _implementation("second"))}
    monkeypatch.setattr(module, "implementations", lambda device: made if device == "cpu" else {})
    return made


def test_first_implementation_that_supports_the_input_runs(table: dict[str, Implementation]) -> None:
    assert dispatch("gelu_tanh", torch.empty(2, 2)) == "first"
    assert dispatch("gelu_tanh", torch.empty(2)) is None
    assert choices("cpu")["gelu_tanh"] == ("first, second", "the first that supports the input", "matrices")
    table["gelu_tanh"] = _implementation("first", _implementation("second"), here=False)
    assert dispatch("gelu_tanh", torch.empty(2, 2)) == "second"
    assert choices("cpu")["gelu_tanh"].name == "second"


def test_overrides_come_first(table: dict[str, Implementation]) -> None:
    for name, runs in (("second", "second"), ("torch", None)):
        with override_ops(gelu_tanh=name):
            assert dispatch("gelu_tanh", torch.empty(2, 2)) == runs
            assert choices("cpu")["gelu_tanh"][:2] == (name, "set by VENEER_OPS")
    assert dispatch("gelu_tanh", torch.empty(2, 2)) == "first"
    table["gelu_tanh"] = _implementation("first", _implementation("second"), here=False)
    with override_ops(gelu_tanh="first"):
        assert choices("cpu")["gelu_tanh"][:2] == ("second", "set to first by VENEER_OPS, which is missing here")


@pytest.mark.parametrize("name", ["secnd", ""])
def test_an_unknown_implementation_is_refused(table: dict[str, Implementation], name: str) -> None:
    with override_ops(gelu_tanh=name):
        for ask in (lambda: dispatch("gelu_tanh", torch.empty(2, 2)), lambda: choices("cpu")):
            with pytest.raises(ConfigError, match="no implementation of that name") as caught:
                ask()
            assert "first, second, torch" in str(caught.value)


def _profile(**gflops: float) -> Profile:
    rates: Mapping[str, Any] = {dtype: {"1024x1024x1024": rate} for dtype, rate in gflops.items()}
    return Profile("", "", 2, "", "", rates, 30.0, 0.0)


@pytest.mark.parametrize(("bfloat16", "kernel"), [(479.0, "panel_product"), (481.0, "amx_panel_product")])
def test_profile_decides_which_kernel_multiplies_panels(
    monkeypatch: pytest.MonkeyPatch, bfloat16: float, kernel: str
) -> None:
    both = Implementation("panel_product", lambda *_: True, "", lambda: "", "compiled")
    both = both._replace(alternatives=(both._replace(run="amx_panel_product", name="amx"),))
    monkeypatch.setattr(module, "implementations", lambda device: {"panel_linear": both})
    monkeypatch.setattr(module, "profile", lambda: _profile(float32=200.0, bfloat16=bfloat16))
    assert dispatch("panel_linear", torch.empty(0, dtype=BF16), 16) == kernel


@pytest.mark.parametrize(("int8", "chosen"), [(959.0, "compiled"), (961.0, "onednn")])
def test_profile_decides_which_kernel_multiplies_in_8_bits(
    monkeypatch: pytest.MonkeyPatch, int8: float, chosen: str
) -> None:
    monkeypatch.setattr(module, "profile", lambda: _profile(float32=200.0, int8=int8))
    here = module.implementations("cpu")["int8_linear"]
    everything = [each._replace(run=each.name, takes=lambda *_: True) for each in (here, *here.alternatives)]
    both = everything[0]._replace(alternatives=tuple(everything[1:]))
    monkeypatch.setattr(module, "implementations", lambda device: {"int8_linear": both})
    assert dispatch("int8_linear", torch.empty(1, 16, dtype=BF16)) == chosen


def test_only_float32_weights_are_prepacked() -> None:
    for dtype in (torch.float32, BF16):
        x, weight = torch.ones(4, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        run = dispatch("prepacked_linear", x, weight, None, True)
        assert run is None or dtype == torch.float32


def test_veneer_ops_is_read_word_by_word() -> None:
    assert parse_overrides("torch,rms_norm=compiled") == {"rms_norm": "compiled", "*": "torch"}
    assert parse_overrides("") == {}


@pytest.mark.parametrize("words", ["rms_nrm=torch", "rms_norm", "torch=x", "cpu", "listed"])
def test_unknown_words_of_veneer_ops_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=f"VENEER_OPS has {words}, which is neither"):
        parse_overrides(f"torch,{words}")


def test_veneer_ops_is_read_at_process_start() -> None:
    code = "import json; from veneer.ops import dispatch as d; print(json.dumps(d.choices('cpu')['dropout']))"
    environment = {"VENEER_OPS": "torch", "PYTHONPATH": ":".join(sys.path), "VENEER_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name, *_ = json.loads(done.stdout)
    assert name == "torch"
