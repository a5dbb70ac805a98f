"""Hostile files are refused quickly, by name, and without running their code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.formats.hostile import FILES, MARK, write
from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import product_of
from veneer.core.merge import pair_matrix
from veneer.errors import AdapterError
from veneer.files.safetensors import encode_tensors, read_header, read_tensors
from veneer.formats.gguf import read_gguf, write_gguf
from veneer.formats.keys import split_key
from veneer.formats.module_tensors import read_module
from veneer.formats.tensors import read_adapter_tensors

MUCH = 16 << 20
"""Limit of the peak memory in bytes while a file is read."""


def read(path: Path) -> None:
    """Read a whole adapter file: its container, selected by the suffix, then every module."""
    if path.suffix == ".gguf":
        read_gguf(path)
        return
    tensors, _ = read_adapter_tensors(path, from_pickle=True)
    leaves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        module, suffix = split_key(key) or (key, "")
        leaves[module][suffix] = value
    for module, parts in leaves.items():
        leaf = read_module(parts, where=module)
        if sum(value.numel() for value in parts.values()) < 1000:  # unless it is large, compute ΔW too
            if leaf.pair is not None:
                pair_matrix(leaf.pair)
            for delta in leaf.deltas.values():
                if delta.form != "gain":
                    assert product_of(delta).shape == delta.shape


@pytest.fixture(scope="module", autouse=True)
def _load_lazy_torch_modules() -> None:
    """Make torch import its lazy parts first; the first meta tensor takes about 70 MB."""
    read_module({"diff": torch.ones(2)}, where="x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    write(path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_is_refused_with_its_reason(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError) as caught:
            read(folder / name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert FILES[name][1] in str(caught.value)
    assert caught.value.where
    assert peak < MUCH
    assert time.monotonic() - started < 20
    assert not (folder / MARK).exists()


def test_a_pipe_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    for action in (read_header, read_tensors):
        with pytest.raises(AdapterError, match="a pipe"):
            action(tmp_path / "x.safetensors")


PAIR = {"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.zeros(4, 2)}
GOOD = b"".join(encode_tensors(PAIR, {"ss_network_dim": "2"}))


@pytest.fixture(scope="module")
def good_gguf(folder: Path) -> bytes:
    pair = Pair(torch.ones(2, 4), torch.zeros(4, 2), 0.5)
    write_gguf(
        Adapter(pairs={"model.layers.0.self_attn.v_proj": pair}), folder / "good.gguf", architecture="qwen2", name="n"
    )
    return (folder / "good.gguf").read_bytes()


def saved() -> bytes:
    out = io.BytesIO()
    torch.save(PAIR, out)
    return out.getvalue()


numbers = st.sampled_from([0, 1, 2, 7, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 47, 1 << 60, (1 << 63) - 1, (1 << 64) - 1])
changes = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, 1 << 16), st.integers(0, 255)),
        st.tuples(st.just("number"), st.integers(0, 1 << 16), numbers),
        st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.integers(1, 40)),
        st.tuples(st.just("insert"), st.integers(0, 1 << 16), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=5,
)


def mutated(good: bytes, how: list[tuple[str, int, int]], header: int) -> bytes:
    """Return `good` with bytes replaced, deleted and inserted in its first `header` bytes."""
    raw = bytearray(good)
    for kind, at, value in how:
        place = at % max(1, min(header, len(raw)))
        if kind == "byte" and raw:
            raw[place] = value
        elif kind == "number":
            raw[place : place + 8] = struct.pack("<Q", value)
        elif kind == "cut":
            del raw[at % max(1, len(raw)) :][:value]
            del raw[place : place + value]
        else:
            raw[place:place] = bytes([value])
    return bytes(raw)


def reads_or_refuses(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with contextlib.suppress(AdapterError):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MUCH, peak


fuzzing = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzing
@given(changes)
def test_mutated_header_is_read_or_refused_within_memory_limit(tmp_path, how):
    reads_or_refuses(tmp_path / "x.safetensors", mutated(GOOD, how, 8 + int.from_bytes(GOOD[:8], "little")))


@fuzzing
@given(
    st.dictionaries(
        st.sampled_from(
            ["a.lora_down.weight", "a.lora_up.weight", "a.alpha", "a.lora_mid.weight", "a.dora_scale", "b.diff"]
        ),
        st.tuples(st.lists(st.integers(0, 3) | numbers, max_size=4), st.integers(0, 64), st.integers(0, 64)),
        max_size=4,
    ),
    st.integers(0, 64),
)
def test_random_header_is_read_or_refused_within_memory_limit(tmp_path, entries, size):
    table = {n: {"dtype": "F32", "shape": s, "data_offsets": [b, e]} for n, (s, b, e) in entries.items()}
    text = json.dumps(table).encode()
    reads_or_refuses(tmp_path / "x.safetensors", struct.pack("<Q", len(text)) + text + bytes(size))


@fuzzing
@given(changes)
def test_mutated_gguf_is_read_or_refused_within_memory_limit(tmp_path, good_gguf, how):
    reads_or_refuses(tmp_path / "x.gguf", mutated(good_gguf, how, len(good_gguf)))


@settings(fuzzing, max_examples=100)
@given(changes)
def test_mutated_pickle_is_read_or_refused_within_memory_limit(tmp_path, how):
    good = saved()
    reads_or_refuses(tmp_path / "x.pt", mutated(good, how, len(good)))
