"""Reading a pickle returns its tensors and runs no code."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.errors import AdapterError, UnsafeFileError
from veneer.files.pickles import read_pickle
from veneer.files.safetensors import read_tensors

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)


def save(tmp_path: Path, value: Any, name: str = "x.bin", **how: Any) -> Path:
    torch.save(value, tmp_path / name, **how)
    return tmp_path / name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict(tmp_path, zipped):
    value = OrderedDict({"x.lora_up.weight": B, "x.lora_down.weight": torch.nn.Parameter(A), "x.alpha": 4})
    tensors, metadata = read_pickle(save(tmp_path, value, _use_new_zipfile_serialization=zipped))
    assert list(tensors) == ["x.alpha", "x.lora_down.weight", "x.lora_up.weight"]
    assert torch.equal(tensors["x.lora_down.weight"], A)
    assert not tensors["x.lora_down.weight"].requires_grad
    assert tensors["x.alpha"] == 4
    assert metadata == {}


def test_wrapped_state_dict_with_other_values(tmp_path):
    tensors, metadata = read_pickle(
        save(tmp_path, {"state_dict": {"a": A}, "epoch": 3, "name": "dog", "optimizer": {"b": B}})
    )
    assert list(tensors) == ["a"]
    assert metadata == {"epoch": "3", "name": "dog"}


def test_an_embedding_of_a1111(tmp_path):
    value = {"string_to_token": {"*": 265}, "string_to_param": {"*": A}, "name": "dog", "step": 100}
    value |= {"sd_checkpoint": None}
    tensors, metadata = read_pickle(save(tmp_path, value, "dog.pt"))
    assert list(tensors) == ["string_to_param.*"]
    assert metadata["string_to_token.*"] == "265"


def test_views_and_tied_tensors_are_read(tmp_path):
    tensors, _ = read_pickle(save(tmp_path, {"a": A.t(), "b": A, "c": A[1:]}))
    assert torch.equal(tensors["a"], A.t())
    assert tensors["a"].is_contiguous()
    assert torch.equal(tensors["c"], A[1:])


class Hostile:
    """An object that creates a file when pickle loads it."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_without_running_it(tmp_path, zipped):
    target = tmp_path / "made"
    path = save(tmp_path, {"a": A, "b": Hostile(target)}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeFileError, match="system") as caught:
        read_pickle(path)
    assert "No code of the file was run" in str(caught.value)
    assert not target.exists()
    torch.load(path, weights_only=False)  # proves that this file runs code
    assert target.exists()


def test_hostile_pickle_without_archive_is_refused(tmp_path):
    target = tmp_path / "made"
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Hostile(target)))
    with pytest.raises(AdapterError):
        read_pickle(tmp_path / "x.bin")
    assert not target.exists()


def test_pickles_are_refused_by_default(tmp_path):
    with pytest.raises(UnsafeFileError, match="pickle"):
        read_tensors(save(tmp_path, {"a": A}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "no tensors"),
        ({"epoch": 1}, "no tensors"),
        ({"a": A, "b": [1, 2]}, "'b': list is neither"),
        ({"../a": A}, "looks like a path"),
        ({"a": {"b": A}, "a.b": A}, "a second tensor"),
        ({"a": A.to_sparse()}, "plain tensor"),
        ({"a": torch.empty(2, 2, device="meta")}, "plain tensor"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "more values than the file holds"),
        ([A, B, A], "'': list is neither"),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": A}}}}}}}, "dict is neither"),
    ],
)
def test_files_that_are_not_adapters_are_named(tmp_path, value, words):
    with pytest.raises(AdapterError, match=words):
        read_pickle(save(tmp_path, value))


def test_an_archive_that_is_packed_or_damaged_is_refused(tmp_path):
    path = save(tmp_path, {"a": torch.zeros(1000)})
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    with pytest.raises(UnsafeFileError, match="unpacks to more"):
        read_pickle(tmp_path / "y.bin")
    for cut in (len(raw) // 2, 100, 3):
        path.write_bytes(raw[:cut])
        with pytest.raises(AdapterError):
            read_pickle(path)
    path.write_bytes(b"\x80\x02broken")
    with pytest.raises(AdapterError):
        read_pickle(path)
    path.write_bytes(b"<html>")
    with pytest.raises(AdapterError, match="not a pickle"):
        read_pickle(path)
    with pytest.raises(AdapterError, match="cannot read"):
        read_pickle(tmp_path / "none.bin")
