"""Adapters in every file format are checked for NaN and infinity."""

from __future__ import annotations

import pytest
import torch

from veneer.errors import AdapterError, UnsafeFileError
from veneer.files.safetensors import read_tensors, write_tensors
from veneer.formats.tensors import read_adapter_tensors


def test_every_non_finite_tensor_is_listed(tmp_path):
    tensors = {"good": torch.ones(3), "nan": torch.tensor([1.0, float("nan")]), "inf": torch.full((2, 2), float("inf"))}
    tensors["half"] = torch.tensor([float("-inf")], dtype=torch.bfloat16)
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterError, match="3 tensor") as caught:
        read_adapter_tensors(tmp_path / "a.safetensors")
    for words in ("nan (2,): 1 of 2", "inf (2, 2): 4 of 4", "half (1,): 1 of 1"):
        assert words in str(caught.value)
    assert "good" not in str(caught.value)
    assert set(read_tensors(tmp_path / "a.safetensors")[0]) == set(tensors)


def test_pickle_is_read_on_request_and_checked(tmp_path):
    torch.save({"a": torch.tensor([1.0, 2.0])}, tmp_path / "good.bin")
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "bad.bin")
    assert read_adapter_tensors(tmp_path / "good.bin", from_pickle=True)[0]["a"].tolist() == [1.0, 2.0]
    with pytest.raises(UnsafeFileError, match="pickle"):
        read_adapter_tensors(tmp_path / "good.bin")
    with pytest.raises(AdapterError, match="NaN or infinity"):
        read_adapter_tensors(tmp_path / "bad.bin", from_pickle=True)
