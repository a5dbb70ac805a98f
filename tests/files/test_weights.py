"""Weight files are checked by reading only their headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_base import tiny_base_dir
from veneer.errors import BaseError
from veneer.files.weights import stored_dtype, tensor_table, weight_files


def test_table_names_every_tensor_with_its_bytes(tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    stored = load_file(base / "model.safetensors")
    table = tensor_table(base)
    assert [t.name for t in table] == sorted(stored)
    for entry in table:
        tensor = stored[entry.name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.elements == tensor.numel()
        raw = entry.file.read_bytes()[entry.start : entry.start + entry.size]
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert stored_dtype(table) == "F32"


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _lying(file: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 16]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_cut, "truncated"),
        (_lying, r"the header is inconsistent(.|\n)*'w'"),
        (lambda f: f.write_bytes(b""), "the file is empty"),
        (lambda f: f.write_bytes(b"\xff" * 4000), "truncated or damaged"),
        (lambda f: f.write_bytes((2**60).to_bytes(8, "little") + b"{}"), "truncated or damaged"),
        (lambda f: f.write_bytes((6).to_bytes(8, "little") + b"[1, 2]"), "not a safetensors file"),
        (
            lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "Git LFS pointer",
        ),
        (lambda f: f.write_text("<!DOCTYPE html><html><body>Not found</body></html>"), "web page"),
        (lambda f: f.write_bytes(b"PK\x03\x04" + bytes(200)), "pickle"),
        (lambda f: f.unlink(), "no weights"),
    ],
)
def test_damaged_file_error_names_the_file(tmp_path: Path, spoil, says: str) -> None:
    base = tiny_base_dir(tmp_path)
    spoil(base / "model.safetensors")
    with pytest.raises(BaseError, match=says) as caught:
        tensor_table(base)
    assert str(base) in (caught.value.where or "")
    assert "adapter" not in str(caught.value)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseError, match=r"1 of 2 weight files are missing: model-2\.safetensors"):
        weight_files(base)


def test_an_index_cannot_point_outside_of_its_base(tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(BaseError, match="missing"):
        weight_files(base)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(BaseError, match="pickles"):
        weight_files(base)


def test_invalid_gguf_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(BaseError, match="not GGUF"):
        tensor_table(file)
    file.write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(BaseError, match="truncated GGUF file"):
        tensor_table(file)
