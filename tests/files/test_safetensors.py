"""safetensors: invalid files are refused before tensors are read, and writes are atomic."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import struct
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.errors import AdapterError, ResourceError, UnsafeFileError
from veneer.files import safetensors as container
from veneer.files.atomic import atomic_write
from veneer.files.safetensors import encode_tensors, read_header, read_tensors, strict_json, write_tensors


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets,
    }


def refuse(path: Path, content: bytes, kind: type[AdapterError], *words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(kind) as caught:
        read_tensors(path)
    for word in words:
        assert word in str(caught.value)
    assert str(path) in str(caught.value)


ALL_DTYPES = sorted((getattr(torch, name) for name in container.STORED_DTYPES.values()), key=str)


def test_files_are_interchangeable_with_safetensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{str(d).removeprefix('torch.')}": (torch.randn(3, 5, generator=generator) * 3).abs().to(d)
        for d in ALL_DTYPES
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    theirs, metadata = read_tensors(tmp_path / "theirs.safetensors")
    assert metadata == {"format": "pt"}
    assert list(theirs) == sorted(tensors)
    ours = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        for other in (theirs[name], ours[name]):
            assert other.dtype == tensor.dtype
            assert other.shape == tensor.shape
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(4)})
    before = path.read_bytes()
    tensors, _ = read_tensors(path)
    tensors["a"].zero_()
    assert path.read_bytes() == before


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    value = torch.arange(3, dtype=torch.float32)
    data = b"\x07" + bytes(value.view(torch.uint8).tolist())
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (3,), (1, 13))}
    (tmp_path / "a.safetensors").write_bytes(raw(header, data))
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")[0]["b"], value)


def test_bytes_do_not_depend_on_strides_or_order():
    a, b = torch.randn(4, 6), torch.randn(3)
    one = b"".join(encode_tensors({"a": a.T, "b": b}))
    two = b"".join(encode_tensors({"b": b, "a": a.T.contiguous()}))
    assert one == two


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"  <!DOCTYPE html><html>", AdapterError, ["web page", "raw file"]),
        (b"Entry not found\n", AdapterError, ["text", "Entry not found"]),
        (pickle.dumps({"a": list(range(100))}), UnsafeFileError, ["pickle", "safetensors"]),
        (raw({}, length=1 << 62), UnsafeFileError, ["claims", "truncated"]),
        (raw({}, length=200), UnsafeFileError, ["claims 200 bytes"]),
        (raw(b'{"a\xff": 1}'), UnsafeFileError, ["not valid JSON"]),
        (raw(b'{"a": NaN}'), UnsafeFileError, ["NaN is not JSON"]),
        (raw({"a": [1]}), UnsafeFileError, ["exactly dtype, shape and data_offsets"]),
        (raw({"a": entry() | {"more": 1}}, b"\0" * 8), UnsafeFileError, ["exactly dtype"]),
        (raw({"a": entry(7)}, b"\0" * 8), UnsafeFileError, ["'7'"]),
        (raw({"a": entry(shape=[True, 2])}, b"\0" * 8), UnsafeFileError, ["shape"]),
        (raw({"a": entry(shape=[2.0])}, b"\0" * 8), UnsafeFileError, ["shape"]),
        (raw({"a": entry(shape=[1] * 60 + [2])}, b"\0" * 8), UnsafeFileError, ["at most 16"]),
        (raw({"a": entry(shape=[3])}, b"\0" * 8), UnsafeFileError, ["needs 12 bytes", "give 8"]),
        (raw({"a": entry(offsets=[0, 8, 8])}, b"\0" * 8), UnsafeFileError, ["data_offsets"]),
        (raw({"a": entry()}, b"\0" * 9), UnsafeFileError, ["1 bytes after the last"]),
        (raw({"a\\b": entry()}, b"\0" * 8), UnsafeFileError, ["looks like a path"]),
        (raw({"": entry()}, b"\0" * 8), UnsafeFileError, ["1 to 1024"]),
        (raw(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}", b"\0" * 8), UnsafeFileError, ["not Unicode"]),
    ],
)
def test_other_file_formats_are_named_and_refused(tmp_path, content, kind, words):
    """tests/formats/test_hostile.py tests many more headers, with a limit on memory."""
    refuse(tmp_path / "adapter_model.safetensors", content, kind, *words)


@pytest.mark.parametrize("name", ["adapter_model.bin", "a.pt", "a.PTH", "a.ckpt", "a.pkl"])
def test_pickle_suffixes_are_refused_whatever_is_in_them(tmp_path, name):
    refuse(tmp_path / name, b"".join(encode_tensors({"a": torch.ones(2)})), UnsafeFileError, "pickle")


def test_a_missing_file_and_a_folder_are_adapter_errors(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(AdapterError, match="cannot read"):
            read_header(path)


def test_a_header_is_read_without_the_data(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2, 3, dtype=torch.bfloat16)}, {"k": "v"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"k": "v"}
    assert (header.entries["a"].dtype, header.entries["a"].shape) == (torch.bfloat16, (2, 3))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(-2, 5) | st.integers(2**58, 2**66) | json_values
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*container.STORED_DTYPES, "F4", ""]) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | json_values, max_size=4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers, data=st.binary(max_size=40), lie=st.none() | st.integers(0, 2**64 - 1))
def test_fuzzed_header_raises_only_adapter_errors(tmp_path, header, data, lie):
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(raw(header, data, length=lie))
    try:
        tensors, _ = read_tensors(path)
    except AdapterError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == len(data)


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_strict_json_raises_only_adapter_errors(text):
    with contextlib.suppress(AdapterError):
        strict_json(text, where="x")


REAL_WRITE = os.write


class Full:
    """A disk that accepts `room` bytes and is then full."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, fd: int, view: memoryview) -> int:
        n = min(len(view), self.room)
        if n == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= n
        return REAL_WRITE(fd, view[:n])


def test_full_disk_leaves_the_old_file_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"old": torch.ones(3)})
    old = path.read_bytes()
    new = {"new": torch.ones(5), "other": torch.zeros(2)}
    total = sum(len(c) for c in encode_tensors(new))
    for room in range(total):
        monkeypatch.setattr(os, "write", Full(room).write)
        with pytest.raises(ResourceError, match="no room") as caught:
            write_tensors(path, new)
        assert "fix:" in str(caught.value)
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["a.safetensors"]
    monkeypatch.setattr(os, "write", Full(total).write)
    write_tensors(path, new)
    assert set(read_tensors(path)[0]) == {"new", "other"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("code", "kind"), [(errno.EDQUOT, ResourceError), (errno.EIO, AdapterError)])
def test_failed_commit_leaves_the_old_file(tmp_path, monkeypatch, step, code, kind):
    path = tmp_path / "a.bin.safetensors"
    write_tensors(path, {"old": torch.ones(3)})
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(kind):
        write_tensors(path, {"new": torch.ones(3)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def chunks():
        yield b"abc"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x", chunks())
    assert os.listdir(tmp_path) == []


def test_missing_folder_is_an_adapter_error(tmp_path):
    with pytest.raises(AdapterError, match="cannot write"):
        write_tensors(tmp_path / "no" / "x", {"a": torch.ones(1)})


def test_unreadable_names_are_not_written(tmp_path):
    for tensors in ({"../x": torch.ones(1)}, {"": torch.ones(1)}, {"q": torch.ones(1, dtype=torch.complex128)}):
        with pytest.raises(AdapterError, match="cannot hold"):
            write_tensors(tmp_path / "x", tensors)
    assert os.listdir(tmp_path) == []


def test_written_files_have_ordinary_permissions(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(1)})
    (tmp_path / "y").write_bytes(b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{" + b",".join(b'"t%d":' % i + EMPTY for i in range(1_000_000)) + b"}", "lists 1,000,000 tensors"),
        (b"{" + b",".join(b'"k%d":0' % i for i in range(600_000)) + b"}", "600,000 entries that are not tensors"),
        (b'{"__metadata__":{' + b",".join(b'"k%d":"v"' % i for i in range(600_000)) + b"}}", "entries that are no"),
        (b'{"__metadata__":{"a":"' + b"x" * (64 << 20) + b'"}}', "bytes of metadata"),
    ],
    ids=["a million empty tensors", "keys", "entries of metadata", "one long text"],
)
def test_excessive_counts_are_refused_before_parsing(tmp_path, header, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(header))
    began = time.process_time()
    with pytest.raises(UnsafeFileError, match=says):
        read_header(path)
    assert time.process_time() - began < 1.0


def test_quotes_in_metadata_are_not_counted_as_keys(tmp_path):
    """sd-scripts stores its tag counts as JSON text with a key per tag."""
    tags = json.dumps({f"tag {i}": i for i in range(50_000)})
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {"ss_tag_frequency": tags})
    assert read_header(path).metadata["ss_tag_frequency"] == tags
