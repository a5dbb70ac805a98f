"""There and back again: every ordered pair of layouts that can express an adapter gives it back, for every family."""

from __future__ import annotations

import tempfile
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.image_adapters import one_of_each_kind, pair_for, random_adapter, same_changes
from veneer.core.adapter import Adapter
from veneer.formats.convert import write
from veneer.formats.read import read
from veneer.formats.topology import families

FAMILIES = list(families())
LAYOUTS = ("kohya", "comfyui", "diffusers")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def through(adapter: Adapter, layouts: tuple[str, ...], family: str, folder) -> Adapter:
    for i, to in enumerate(layouts):
        out = folder / f"{i}{to}{'' if to == 'peft' else '.safetensors'}"
        write(adapter, out, to, family=family)
        adapter = read(out).adapter
    return adapter


@pytest.mark.parametrize(("there", "back"), list(combinations((*LAYOUTS, "peft"), 2)))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_denoisers_adapter_comes_back(name, there, back, tmp_path):
    """There, back, and there again: of each two layouts in both orders."""
    family = families()[name]
    adapter = random_adapter(family, lambda m: m.startswith(family.denoiser))
    assert len(adapter.pairs) > 10
    same_changes(through(adapter, (there, back, there), name, tmp_path), adapter)


@pytest.mark.parametrize(("there", "back"), [("kohya", "comfyui"), ("comfyui", "kohya")])
@pytest.mark.parametrize("name", [n for n in FAMILIES if len(families()[n].components) > 1])
def test_text_encoders_come_back_too(name, there, back, tmp_path):
    adapter = random_adapter(families()[name])
    assert {m.partition(".")[0] for m in adapter.pairs} == set(families()[name].components)
    same_changes(through(adapter, (there, back, there), name, tmp_path), adapter)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_module_is_enough_to_know_the_family_again(name, tmp_path):
    """Many names are in several families, with the halves of their rows in one order or the other."""
    family = families()[name]
    for i, module in enumerate(m for m in one_of_each_kind(family) if m.startswith(family.denoiser)):
        written = write(
            Adapter({module: pair_for(family, module)}), tmp_path / f"{i}.safetensors", "kohya", family=name
        )
        assert read(written.path).family == name, module


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_part_of_any_family_comes_back(data):
    """Any modules, ranks and scales, A shared or not, in any dtype, through any two layouts and back to the first.
    A file of joined parts with scales that differ holds float32, and is right to its last place."""
    family = families()[data.draw(st.sampled_from(FAMILIES))]
    kinds = [m for m in one_of_each_kind(family) if m.startswith(family.denoiser)]
    dtype = data.draw(st.sampled_from(DTYPES))
    pairs = {}
    for module in data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8, unique=True)):
        rank, shared = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
        scale = data.draw(st.sampled_from([1.0, 0.5, 1 / 3, 3.0, 1e-3, 7.7]))
        kernel = "conv" if family.modules[module] == "conv" else ""
        pairs[module] = pair_for(family, module, rank, scale, f"A {rank} {kernel and module}" if shared else "")
    adapter = Adapter(pairs).mapped(lambda t: t.to(dtype))
    there, back = data.draw(st.sampled_from(list(permutations((*LAYOUTS, "peft"), 2))))
    with tempfile.TemporaryDirectory() as folder:
        same_changes(through(adapter, (there, back, there), family.name, Path(folder)), adapter)
