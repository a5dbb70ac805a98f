"""An adapter in another tool's layout, with what the layout needs to know of the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.families import gemma4
from tests.formats.twins import our_outputs, random_adapter
from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from veneer.adapters.convert import convert_adapter
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.read import read


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
