"""Conversion with information from the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import gemma4
from tests.formats.twins import linear_pairs, our_outputs, random_adapter
from tests.tiny_base import VOCAB_SIZE
from veneer.adapters.convert import convert_adapter
from veneer.adapters.inspect import inspect
from veneer.adapters.mix import mix_adapters
from veneer.adapters.use import load_adapter, read_adapter
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.read import read
from veneer.library.describe_files import describe_adapter
from veneer.serve.fleet.mixes import servable


def test_layers_of_two_widths_are_exported_for_vllm(tmp_path: Path) -> None:
    model = gemma4(vocab_size=VOCAB_SIZE)
    spec = LoraSpec(rank=3, alpha=6, targets=("q_proj", "o_proj", "mlp.down_proj"))
    adapter = random_adapter(create(model, spec, seed=0))
    peft.write_folder(adapter, tmp_path / "a", base=model)
    convert_adapter(tmp_path / "a", tmp_path / "out", "vllm")
    got = our_outputs(model, read(tmp_path / "out").adapter)
    torch.testing.assert_close(got, our_outputs(model, adapter), rtol=1e-5, atol=1e-5)


def test_our_tensor_file_alone_keeps_its_scale(tmp_path: Path) -> None:
    adapter = linear_pairs(["model.layers.0.self_attn.q_proj"], rank=2, scale=2.0)
    peft.write_folder(adapter, tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
    assert read(tmp_path / "alone.safetensors").adapter.digest() == adapter.digest()


def without_scale(folder: Path) -> Path:
    """Write a PEFT adapter's tensors to a file without its alpha, and return the file's path."""
    adapter = linear_pairs(["model.layers.0.self_attn.q_proj"], rank=2, scale=2.0)
    peft.write_folder(adapter, folder / "a")
    save_file(load_file(folder / "a/adapter_model.safetensors"), folder / "alone.safetensors")
    return folder / "alone.safetensors"


def test_unstated_scale_is_refused(tmp_path: Path) -> None:
    alone = without_scale(tmp_path)
    with pytest.raises(AdapterError, match=r"does not state the scale .* of 1 module,") as caught:
        convert_adapter(alone, tmp_path / "out", "peft")
    with pytest.raises(AdapterError, match="does not state the scale"):
        convert_adapter(alone, tmp_path / "out", "peft", allow_partial=True)
    bare = {k.removeprefix("base_model.model."): t for k, t in load_file(alone).items()}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(AdapterError, match="does not state the scale"):
        read(tmp_path / "bare.safetensors")
    assert "veneer adapter convert FILE --alpha N --to peft -o FOLDER" in str(caught.value)
    convert_adapter(alone, tmp_path / "out", "peft", alpha=4.0)
    assert read(tmp_path / "out").adapter.digest() == read(tmp_path / "a").adapter.digest()
    with pytest.raises(AdapterError, match="alpha 4 is given, but the adapter's files contain an alpha"):
        convert_adapter(tmp_path / "a", tmp_path / "again", "kohya", alpha=4.0)


def test_every_use_refuses_a_scale_that_no_file_states(tmp_path: Path) -> None:
    alone = str(without_scale(tmp_path))
    uses = (
        lambda: describe_adapter(Path(alone)),  # called when the library adds the file
        lambda: read_adapter(alone),
        lambda: mix_adapters([alone], tmp_path / "mixed"),
        lambda: load_adapter(Bare(), alone),
        lambda: servable([(Path(alone), 1.0)], "a", tmp_path / "served"),
    )
    for use in uses:
        with pytest.raises(AdapterError, match="does not state the scale"):
            use()
    assert load_adapter(Bare(), alone, alpha=4.0).digest() == read_adapter(tmp_path / "a").adapter.digest()


class Bare:
    """A stand-in for a base; its model has no modules."""

    name = short_name = "bare"
    fingerprint = ""
    family = "llama"
    model = torch.nn.Module()


def test_inspect_reads_a_file_without_scale_and_says_so(tmp_path: Path) -> None:
    found = inspect(str(without_scale(tmp_path)))
    assert (found["verdict"]["use"], found["assumed_scale"], found["pairs"]) == (False, 1, 1)
    assert "--alpha" in found["verdict"]["fix"]
    given = inspect(str(tmp_path / "alone.safetensors"), alpha=4.0)
    assert (given["verdict"]["use"], given["scales"]) == (True, {"2": 1})
