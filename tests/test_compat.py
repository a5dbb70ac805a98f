"""Internals of other libraries: the installed version has them, or an error names the missing one."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from veneer.compat import TORCH, Internals, MissingInternalError, varlen_attention
from veneer.errors import VeneerError


def test_installed_torch_has_every_internal() -> None:
    TORCH.check()


def test_versions_equal_those_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    bounds = {r.removeprefix("torch").replace(" ", "") for r in every if re.match(r"torch[<>=~ ]", r)}
    assert bounds == {TORCH.versions}


def test_a_missing_internal_of_torch_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch._softmax_backward_data"
    TORCH(name)
    fresh = Internals(TORCH.library, TORCH.versions, TORCH.names)
    monkeypatch.delattr(name)
    with pytest.raises(MissingInternalError) as caught:
        fresh(name)
    said = str(caught.value)
    assert f"torch {version('torch')} has no {name}" in said
    assert f"veneer {version('veneer')}" in said
    assert f"pip install 'torch{TORCH.versions}'" in said
    assert isinstance(caught.value, VeneerError)
    with pytest.raises(MissingInternalError):
        fresh.check()


def test_unlisted_internal_is_a_key_error() -> None:
    assert callable(TORCH("torch._disable_dynamo"))
    with pytest.raises(KeyError, match="not among the listed internals"):
        TORCH("torch.nothing_that_is_listed")
    assert torch.__version__


def test_varlen_attention_needs_all_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's function has no parameters for scale, window and grouped heads."""

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
        raise AssertionError("not to be called")

    def newer(query, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        return query

    module = types.ModuleType("torch.nn.attention.varlen")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for given, wanted in ((of_2_10, None), (newer, newer)):
        module.varlen_attn = given  # type: ignore[attr-defined]
        varlen_attention.cache_clear()
        assert varlen_attention() is wanted
    varlen_attention.cache_clear()
    monkeypatch.setitem(sys.modules, module.__name__, None)
    assert varlen_attention() is None
    varlen_attention.cache_clear()
