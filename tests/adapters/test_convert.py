"""An adapter in another tool's layout, with what the layout needs to know of the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import gemma4
from tests.formats.twins import linear_pairs, our_outputs, random_adapter
from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from veneer.adapters.convert import convert_adapter
from veneer.adapters.inspect import inspect
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.read import read
from veneer.library.describe import describe_adapter


@pytest.mark.parametrize("to", ["tgi", "vllm"])
def test_layers_of_two_widths_are_exported_for_servers(tmp_path: Path, to: str) -> None:
    model = gemma4(vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    spec = LoraSpec(rank=3, alpha=6, targets=("q_proj", "o_proj", "mlp.down_proj"))
    adapter = random_adapter(create(model, spec, seed=0))
    peft.write_folder(adapter, tmp_path / "a", base=model)
    convert_adapter(tmp_path / "a", tmp_path / "out", to, base=str(tmp_path / "base"))
    got = our_outputs(model, read(tmp_path / "out").adapter)
    torch.testing.assert_close(got, our_outputs(model, adapter), rtol=1e-5, atol=1e-5)


def test_tgi_refuses_zeros_of_unknown_width(tmp_path: Path) -> None:
    model = gemma4(vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = create(model, LoraSpec(rank=3, alpha=6, targets=("q_proj",)), seed=0)
    some = {name: pair for name, pair in adapter.pairs.items() if ".3." not in name}
    peft.write_folder(replace(adapter, pairs=some), tmp_path / "a")
    with pytest.raises(AdapterError, match="layers have different widths"):
        convert_adapter(tmp_path / "a", tmp_path / "out", "tgi", base=str(tmp_path / "base"))


def test_our_tensor_file_alone_keeps_its_scale(tmp_path: Path) -> None:
    adapter = linear_pairs(["model.layers.0.self_attn.q_proj"], rank=2, scale=2.0)
    peft.write_folder(adapter, tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
    assert read(tmp_path / "alone.safetensors").adapter.digest() == adapter.digest()


def test_a_scale_that_no_file_states_is_asked_for(tmp_path: Path) -> None:
    adapter = linear_pairs(["model.layers.0.self_attn.q_proj"], rank=2, scale=2.0)
    peft.write_folder(adapter, tmp_path / "a")
    alone = tmp_path / "alone.safetensors"
    save_file(load_file(tmp_path / "a/adapter_model.safetensors"), alone)  # without metadata
    assert read(alone).assumed_scale
    assert inspect(str(alone))["verdict"]["assumed_scale"] == 1
    with pytest.raises(AdapterError, match="does not state the scale of 1 modules"):
        describe_adapter(alone)  # as the library adds it
    with pytest.raises(AdapterError, match="does not state the scale of 1 modules"):
        convert_adapter(alone, tmp_path / "out", "peft")
    convert_adapter(alone, tmp_path / "out", "peft", alpha=4.0)
    assert read(tmp_path / "out").adapter.digest() == adapter.digest()
