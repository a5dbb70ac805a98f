"""GGUF files are bases like any other: dequantised, plain, with their tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_base import tiny_base_dir, tiny_tokenizer
from tests.tiny_gguf import tiny_gguf
from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import BaseError
from veneer.models.generate import complete
from veneer.models.text import load_text

IDS = torch.randint(3, 384, (2, 20), generator=torch.Generator().manual_seed(0))


def test_float32_weights_load_exactly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    base = load_text(str(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(base.model(IDS).logits, model(IDS).logits)
    assert base.dtype == torch.float32
    assert any("GGUF" in note for note in base.notes)


def test_quantised_weights_are_plain_tensors_near_the_original(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf", quantised=True)
    base = load_text(str(tmp_path / "tiny.gguf"), dtype="float32")
    theirs, ours = model.state_dict(), base.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        largest = theirs[name].abs().max()
        bound = largest / 127 / 2 + largest / 2048  # Q8_0: steps of a 127th of the largest of 32, itself in float16
        assert (tensor - theirs[name]).abs().max() <= bound, name


def test_it_generates_carries_adapters_and_can_be_saved(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", quantised=True)
    base = load_text(str(tmp_path / "tiny.gguf"), dtype="float32")
    assert base.has_chat_template
    assert base.tokenizer.convert_ids_to_tokens(base.end_of_turn_id) == "<|im_end|>"
    text = "naïve 🙂 invoice"
    assert base.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert complete(base, [[{"role": "user", "content": "hi"}]], max_new_tokens=3)
    with attach(base.model) as attachment:
        attachment.add("a", create(base.model, LoraSpec(rank=2), seed=0), trainable=True)
        attachment.use("a")
        base.model(IDS).logits.sum().backward()
        assert all(p.grad is not None for p in attachment.parameters("a").values())
    base.model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(IDS).logits, base.model(IDS).logits)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tiny_gguf(tmp_path / "tiny.gguf")
    tiny_gguf(tmp_path / "a" / "other-name.gguf")
    tiny_gguf(tmp_path / "q8.gguf", quantised=True)
    plain, moved, q8 = (load_text(str(tmp_path / n)) for n in ["tiny.gguf", "a/other-name.gguf", "q8.gguf"])
    assert plain.fingerprint == moved.fingerprint != q8.fingerprint


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    tiny_gguf(tmp_path / "d" / "x.gguf")
    assert load_text(str(tmp_path / "d")).directory == tmp_path / "d" / "x.gguf"


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file)
    whole = file.read_bytes()
    for keep in (len(whole) - 50, len(whole) // 2, 200, 30):
        file.write_bytes(whole[:keep])
        with pytest.raises(BaseError, match="cut short"):
            load_text(str(file))


def test_a_directory_and_a_gguf_of_one_model_share_their_shape(tmp_path: Path) -> None:
    from veneer.models.fingerprint import shaping_fields
    from veneer.models.text import read_config

    tiny_gguf(tmp_path / "tiny.gguf")
    one, other = read_config(tmp_path / "tiny.gguf"), read_config(tiny_base_dir(tmp_path))
    assert shaping_fields(one) == shaping_fields(other)
