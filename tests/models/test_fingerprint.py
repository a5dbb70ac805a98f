"""The fingerprint changes only if the model's computation changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.edits import edit_json
from tests.families import FAMILIES
from tests.tiny_base import tiny_base_dir
from veneer.models import fingerprint as module
from veneer.models.fingerprint import file_sha256, fingerprint, shaping_fields
from veneer.models.home import veneer_home
from veneer.models.text.base import read_base_config


def print_of(base: Path) -> str:
    return fingerprint(base, read_base_config(base))


def _copy(base: Path, name: str) -> Path:
    return Path(shutil.copytree(base, base.parent / name))


def test_fingerprint_ignores_sharding_order_and_metadata(tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    first = print_of(base)
    assert first.startswith("sha256:")
    assert len(first) == 71

    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert print_of(tmp_path / "again") == first
    assert print_of(tmp_path / "sharded") == first

    relabelled = _copy(base, "relabelled")
    tensors = load_file(relabelled / "model.safetensors")
    save_file(dict(reversed(tensors.items())), relabelled / "model.safetensors", metadata={"author": "somebody"})
    edit_json(
        relabelled / "config.json",
        eos_token_id=7,
        use_cache=False,
        _name_or_path="x",
        transformers_version="4.1",
        dtype="bfloat16",
    )
    assert print_of(relabelled) == first


def test_stored_tied_head_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    twice = _copy(base, "twice")
    tensors = load_file(twice / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, twice / "model.safetensors")
    assert print_of(twice) == print_of(base)


def _tensors(base: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")


KEYS = [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]


@pytest.mark.parametrize(
    "change",
    [
        lambda base: edit_json(base / "config.json", rms_norm_eps=1e-5),
        lambda base: edit_json(base / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
        lambda base: edit_json(base / "config.json", num_attention_heads=2),
        lambda base: edit_json(base / "config.json", hidden_act="gelu"),
        lambda base: _tensors(base, lambda t: t["model.norm.weight"][3:4].add_(1e-3)),
        lambda base: _tensors(base, lambda t: t.update({KEYS[0]: t[KEYS[1]], KEYS[1]: t[KEYS[0]]})),
    ],
    ids=["norm", "positions", "heads", "activation", "one weight", "names of two weights"],
)
def test_computing_fields_change_the_fingerprint(tmp_path: Path, change: Callable[[Path], None]) -> None:
    base = tiny_base_dir(tmp_path)
    other = _copy(base, "other")
    change(other)
    assert print_of(other) != print_of(base)


def test_digests_are_cached_until_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, reads = tiny_base_dir(tmp_path), []
    real = module.digests
    monkeypatch.setattr(module, "digests", lambda table: reads.append(1) or real(table))
    first = print_of(base)
    assert print_of(base) == first
    assert len(reads) == 1
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors")
    assert print_of(base) != first
    assert len(reads) == 2


def test_damaged_cache_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    base = tiny_base_dir(tmp_path)
    first = print_of(base)
    (cache,) = (veneer_home() / "fingerprints").iterdir()
    for text in ["", "{}", "[1]", '{"version": 1, "files": 3}']:
        cache.write_text(text)
        assert print_of(base) == first


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_shaping_fields_that_survive_json(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]().config
    config.save_pretrained(tmp_path)
    fields = shaping_fields(config)
    assert fields["model_type"] == config.model_type
    assert fields["hidden_size"] == 32
    assert shaping_fields(read_base_config(tmp_path)) == json.loads(json.dumps(fields)) == fields


def test_default_fields_do_not_change_the_fingerprint() -> None:
    bare, spelt_out = LlamaConfig(hidden_size=64), LlamaConfig(hidden_size=64, rms_norm_eps=1e-6, attention_bias=False)
    assert shaping_fields(bare) == shaping_fields(spelt_out)
    as_float32 = float(torch.tensor(1e-5))
    assert shaping_fields(LlamaConfig(rms_norm_eps=as_float32)) == shaping_fields(LlamaConfig(rms_norm_eps=1e-5))


def test_file_hash_is_cached_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the size stays the same, the modification time reveals the change."""
    file, reads, real = tmp_path / "one.safetensors", [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: reads.append(1) or real(*given))
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    file.write_bytes(b"first")
    assert file_sha256(file) == file_sha256(file) == hashlib.sha256(b"first").hexdigest()
    assert len(reads) == 1
    (cache,) = (veneer_home() / "fingerprints").glob("*.sha256.json")
    kept = cache.read_text()
    for text in ["", "{}", "[1]", kept.replace('"sha256"', '"sha"')]:
        cache.write_text(text)
        assert file_sha256(file) == hashlib.sha256(b"first").hexdigest()
        assert cache.read_text() == kept
    file.write_bytes(b"other")
    os.utime(file, ns=(1, 1))
    assert file_sha256(file) == hashlib.sha256(b"other").hexdigest()
