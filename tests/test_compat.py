"""Internals of other libraries: present in the installed version, or named in an error."""

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
from veneer.models.compat_diffusers import DIFFUSERS
from veneer.models.compat_transformers import TRANSFORMERS

LISTS = {"torch": TORCH, "transformers": TRANSFORMERS, "diffusers": DIFFUSERS}


@pytest.mark.parametrize("library", LISTS)
def test_installed_version_has_every_internal(library: str) -> None:
    pytest.importorskip(library)
    LISTS[library].check()


@pytest.mark.parametrize("library", LISTS)
def test_versions_equal_those_of_pyproject(library: str) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    bounds = {r.removeprefix(library).replace(" ", "") for r in every if re.match(rf"{library}[<>=~ ]", r)}
    assert bounds == {LISTS[library].versions}


@pytest.mark.parametrize(
    ("internals", "name"),
    [
        (TORCH, "torch._softmax_backward_data"),
        (TRANSFORMERS, "transformers.masking_utils.sdpa_mask"),
        (DIFFUSERS, "diffusers.models.attention_processor.AttnProcessor2_0"),
    ],
)
def test_missing_internal_is_named_with_its_version(
    internals: Internals, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(internals.library)
    Internals(internals.library, internals.versions, internals.names)(name)
    fresh = Internals(internals.library, internals.versions, internals.names)
    owner, _, key = name.rpartition(".")
    monkeypatch.delattr(f"{owner}.{key}")
    with pytest.raises(MissingInternalError) as caught:
        fresh(name)
    said = str(caught.value)
    assert f"{internals.library} {version(internals.library)} has no {name}" in said
    assert f"veneer {version('veneer')}" in said
    assert f"pip install '{internals.library}{internals.versions}'" in said
    assert isinstance(caught.value, VeneerError)
    with pytest.raises(MissingInternalError):
        fresh.check()


def test_attention_without_its_internal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving's hook into transformers' attention."""
    from veneer.models import compat_transformers as compat
    from veneer.models.text.attention import divert_attention

    monkeypatch.setattr(compat, "registered", set())
    monkeypatch.setattr(compat, "TRANSFORMERS", Internals("transformers", TRANSFORMERS.versions, TRANSFORMERS.names))
    monkeypatch.delattr("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS")
    model = types.SimpleNamespace(config=types.SimpleNamespace(_attn_implementation="sdpa"))
    with pytest.raises(MissingInternalError, match=r"has no transformers\.modeling_utils\.ALL_ATTENTION_FUNCTIONS"):
        divert_attention(model)


def test_unlisted_internal_is_a_key_error() -> None:
    assert callable(TORCH("torch._disable_dynamo"))
    with pytest.raises(KeyError, match="in no list"):
        TORCH("torch.nothing_that_is_listed")
    assert torch.__version__


def test_varlen_attention_needs_all_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's function lacks the scale, the window and grouped heads."""

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
