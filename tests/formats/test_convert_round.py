"""Round trips through every layout that can express an adapter."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

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
def test_denoiser_adapters_survive_round_trips(name, there, back, tmp_path):
    """For each pair of layouts, converts to the first, to the second, and to the first again."""
    family = families()[name]
    adapter = random_adapter(family, lambda m: m.startswith(family.denoiser))
    assert len(adapter.pairs) > 10
    same_changes(through(adapter, (there, back, there), name, tmp_path), adapter)


@pytest.mark.parametrize(("there", "back"), [("kohya", "comfyui"), ("comfyui", "kohya")])
@pytest.mark.parametrize("name", [n for n in FAMILIES if len(families()[n].components) > 1])
def test_text_encoder_adapters_survive_round_trips(name, there, back, tmp_path):
    adapter = random_adapter(families()[name])
    assert {m.partition(".")[0] for m in adapter.pairs} == set(families()[name].components)
    same_changes(through(adapter, (there, back, there), name, tmp_path), adapter)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_found_from_one_module(name, tmp_path):
    """Several families share names, but differ in the order of the halves of a weight's rows."""
    family = families()[name]
    for i, module in enumerate(m for m in one_of_each_kind(family) if m.startswith(family.denoiser)):
        written = write(
            Adapter({module: pair_for(family, module)}), tmp_path / f"{i}.safetensors", "kohya", family=name
        )
        assert read(written.path).family == name, module
