"""Loading a text base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.edits import edit_json
from tests.tiny_base import tiny_base_dir, tiny_tokenizer
from veneer.errors import BaseError, ConfigError, ResourceError
from veneer.models.description import describe_base
from veneer.models.text.base import end_of_turn, load_text

CPU = torch.device("cpu")


def test_directory_loads_frozen_with_the_weights_of_transformers(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    base = load_text(str(folder))
    assert base.directory == folder
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(base.model(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert base.tokenizer.convert_ids_to_tokens(base.end_of_turn_id) == "<|im_end|>"
    assert base.stop_ids == (base.end_of_turn_id,)
    assert base.context == 256
    assert base.notes == ()


# -- dtype -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"dtype": "float8"}, {"device": "abacus"}, {"device": "cuda:99"}])
def test_an_impossible_dtype_or_device_is_a_config_error(tmp_path: Path, setting: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        load_text(str(tiny_base_dir(tmp_path)), **setting)


# -- bases that are refused or noted -----------------------------------------------------------------------------------


def _without(base: Path, name: str) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors[name]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda b: _without(b, "model.norm.weight"),
            r"do not match the config \(1 problems\)[\s\S]*missing: model.norm",
        ),
        (lambda b: edit_json(b / "config.json", intermediate_size=40), "model of this base|misshapen"),
        (lambda b: edit_json(b / "config.json", model_type="oracle9"), "transformers"),
        (lambda b: edit_json(b / "config.json", model_type="t5"), "encoder-decoder"),
        (lambda b: (b / "config.json").write_text("{"), "config of this base"),
        (lambda b: (b / "tokenizer.json").unlink(), "tokenizer of this base"),
        (lambda b: edit_json(b / "config.json", vocab_size=100), "."),
    ],
)
def test_incomplete_base_error_names_its_path(tmp_path: Path, spoil, says: str) -> None:
    folder = tiny_base_dir(tmp_path)
    spoil(folder)
    with pytest.raises(BaseError, match=says) as caught:
        load_text(str(folder))
    assert str(folder) in str(caught.value)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    edit_json(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "evil.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(BaseError):
        load_text(str(folder))


def test_more_tokens_than_embedding_rows_is_refused(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(200)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BaseError, match="embedding"):
        load_text(str(folder))


def test_unused_stored_tensors_are_noted(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"vision.patch.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (note,) = load_text(str(folder)).notes
    assert "vision.patch.weight" in note


def test_too_little_memory_is_reported_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Tiny:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Tiny)
    with pytest.raises(ResourceError, match=r"needs .* GB"):
        load_text(str(tiny_base_dir(tmp_path)), device="cpu")


# -- errors ------------------------------------------------------------------------------------------------------------

FRAMES = {
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>{role}\n", "<end_of_turn>\n", "<end_of_turn>"),
    "newline first": ("<|{role}|>\n", "\n<|end|>\n", "<|end|>"),
    "no token": ("### {role}:\n", "\n\n", None),
    "nothing": ("{role}: ", "", None),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_end_of_turn_comes_from_the_template(frame: str) -> None:
    before, after, expected = FRAMES[frame]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|end|>"]})
    before = before.replace("{role}", "{{ m['role'] }}")
    tokenizer.chat_template = "{% for m in messages %}" + before + "{{ m['content'] }}" + after + "{% endfor %}"
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


def test_failing_or_missing_template_has_no_end_of_turn() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_generation_config_and_config_add_their_stops(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    edit_json(folder / "config.json", eos_token_id=[2, 9])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 2, 5000]}))
    base = load_text(str(folder))
    assert base.stop_ids == (2, 9, 11)  # end of turn comes first; 5000 is not in the vocabulary


def test_eos_ends_a_turn_without_template(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    (folder / "chat_template.jinja").unlink()
    base = load_text(str(folder))
    assert not base.has_chat_template
    assert base.end_of_turn_id == base.tokenizer.eos_token_id


def test_description_matches_loading(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    base, told = load_text(str(folder)), describe_base("tiny", folder)
    assert told["parameters"] == sum(p.numel() for p in base.model.parameters())
    assert told["fingerprint"] == base.fingerprint
    assert told["end_of_turn"] == "<|im_end|>"
    assert {"target": "q_proj", "count": 2, "in": 32, "out": 32} in told["linear_modules"]
    json.dumps(told)
