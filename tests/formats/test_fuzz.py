"""Every reader turns a fuzzed file into an adapter, or raises a VeneerError."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.families import llama3
from tests.formats import layouts
from tests.formats.twins import peft_folder
from veneer.adapters.inspect import inspect, verify_adapter
from veneer.errors import VeneerError
from veneer.files.safetensors import encode_tensors
from veneer.formats import convert, peft
from veneer.formats.card import CARD_FILE
from veneer.formats.peft_config import FIELDS, IGNORED, UNSUPPORTED
from veneer.formats.read import read
from veneer.formats.structure import structure_of
from veneer.formats.topology import families

LONG = int(os.environ.get("VENEER_FUZZ", "1"))
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
fuzzing = settings(max_examples=40 * LONG, deadline=None, suppress_health_check=SLOW)


def few(layout: layouts.Layout, n: int = 8) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the first n modules of a layout, and its metadata."""
    return dict(list(layout.tensors.items())[: 3 * n]), layout.metadata


def loha() -> tuple[dict[str, Tensor], dict[str, str]]:
    name = "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {f"{name}.hada_w{n}_{ab}": torch.ones((4, 2) if ab == "a" else (2, 4)) for n in "12" for ab in "ab"}
    other = {f"{name[:-1]}k.lokr_w1": torch.ones(2, 2), f"{name[:-1]}k.lokr_w2": torch.ones(2, 2)}
    return parts | other | {f"{name}.alpha": torch.tensor(1.0)}, {}


def configured() -> tuple[dict[str, Tensor], dict[str, str]]:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 6), f"{name}.lora_B.weight": torch.ones(4, 2)}
    return pair, {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {}})}


SPLIT = {"ss_network_args": '{"split_qkv": "True"}'}
TEXT = {f"model.layers.0.q_proj.lora_{ab}.weight": torch.ones(s) for ab, s in (("A", (2, 4)), ("B", (4, 2)))}
MADE: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "kohya sdxl": lambda: few(layouts.kohya("sdxl", original=True)),
    "kohya flux, split": lambda: (few(layouts.kohya("flux1", original=True))[0], SPLIT),
    "diffusers sd3": lambda: few(layouts.dotted("sd3", "transformer.", original=False, naming="peft")),
    "comfyui qwen": lambda: few(layouts.dotted("qwen-image", "diffusion_model.", original=True, naming="peft")),
    "text": lambda: (TEXT, {}),
    "lycoris": loha,
    "diffusers with settings": configured,
}

TEXTS = [
    "", "{", "null", "[]", "{}", "1e999", "NaN", "None", "-1", "0", "true", "[[1]]", '["a"]', "[" * 100_000,
    '{"a":' * 50_000, '{"split_qkv": "True"}', "\x1b]0;x\x07", "\u202e", '"\\ud800"', "9" * 5000, '{"unet.r": {}}',
    '{".": 1}', '{"unet.r": "x"}', '[{"subsets": 3}]',
]  # fmt: skip
texts = st.sampled_from(TEXTS) | st.text(max_size=12)
KEY_NAMES = """ss_network_args ss_network_dim ss_network_alpha lora_adapter_metadata modelspec.architecture ss_v2
ss_datasets ss_tag_frequency ss_dataset_dirs veneer.card ss_training_finished_at unet <word> modelspec.trigger_phrase
sshs_model_hash sshs_legacy_hash modelspec.hash_sha256 ss_base_model_version"""
KEYS = st.sampled_from(KEY_NAMES.split())
SHAPES = st.sampled_from(
    [(), (1,), (2,), (0,), (1, 1), (2, 4), (4, 2), (2, 2, 1, 1), (2, 4, 3, 3), (0, 4), (1, 2, 3, 4, 5)]
)
DTYPE_NAMES = "float32 float64 bfloat16 float8_e4m3fn float8_e5m2 int64 bool complex64 uint8"
DTYPES = st.sampled_from([getattr(torch, name) for name in DTYPE_NAMES.split()])
SUFFIX_NAMES = """alpha lora_down.weight lora_up.weight lora_mid.weight lora_A.weight lora_B.weight lora_B.bias
dora_scale lora_magnitude_vector hada_w1_a hada_t1 lokr_w1 lokr_w2_a lokr_t2 diff diff_b w_norm weight on_input scale
bias_indices bias_values bias_size lora_embedding_A scalar reshape_weight set_weight lora_A.default.weight
token_adapter.trainable_tokens_delta base_layer.bias"""
SUFFIXES = st.sampled_from(SUFFIX_NAMES.split())
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("shape"), st.integers(0, 99), SHAPES),
        st.tuples(st.just("dtype"), st.integers(0, 99), DTYPES),
        st.tuples(st.just("drop"), st.integers(0, 99), st.none()),
        st.tuples(st.just("suffix"), st.integers(0, 99), SUFFIXES),
        st.tuples(st.just("add"), st.integers(0, 99), st.tuples(SUFFIXES, SHAPES)),
        st.tuples(st.just("name"), st.integers(0, 99), st.text("abc._:0<>", min_size=1, max_size=9)),
        st.tuples(st.just("all dtypes"), st.just(0), DTYPES),
    ),
    max_size=4,
)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to another dtype; values become imaginary if that dtype is complex."""
    out = (tensor.real if tensor.is_complex() else tensor).to(dtype)
    return out * 1j if dtype.is_complex else out


def changed(tensors: dict[str, Tensor], how: list[tuple[str, int, Any]]) -> dict[str, Tensor]:
    out = dict(tensors)
    for kind, at, value in how:
        if not out:
            return out
        key = sorted(out)[at % len(out)]
        module = key.rpartition(".")[0] if key.endswith("alpha") else key.rsplit(".", 2)[0]
        if kind == "shape":
            out[key] = torch.ones(value, dtype=out[key].dtype)
        elif kind == "dtype":
            out[key] = cast(out[key], value)
        elif kind == "drop":
            del out[key]
        elif kind == "suffix":
            out[f"{module}.{value}"] = out.pop(key)
        elif kind == "add":
            out[f"{module}.{value[0]}"] = torch.ones(value[1])
        elif kind == "name":
            out[value] = out.pop(key)
        else:
            out = {k: cast(t, value) for k, t in out.items()}
    return out


def exercise(path: Path, **how: Any) -> None:
    """Inspect, verify and read the file, then encode the result in all layouts that are tested."""
    for action in (inspect, verify_adapter):
        with contextlib.suppress(VeneerError):
            action(str(path))
    reading = None
    for partial in (True, False):
        with contextlib.suppress(VeneerError):
            reading = read(path, allow_partial=partial, **how)
    for to in ("peft", "kohya", "comfyui", "diffusers") if reading else ():
        with contextlib.suppress(VeneerError):
            convert.encode(reading.adapter, to, family=reading.family if to != "peft" else None)


@fuzzing
@given(st.sampled_from(sorted(MADE)), CHANGES, st.dictionaries(KEYS, texts, max_size=2))
def test_a_file(tmp_path, made, how, metadata):
    tensors, own = MADE[made]()
    try:
        chunks = encode_tensors(changed(tensors, how), own | metadata)
    except (VeneerError, UnicodeEncodeError):  # for names that no file can contain
        return
    (tmp_path / "x.safetensors").write_bytes(b"".join(chunks))
    exercise(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "a"
    config = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "trainable_token_indices": [1, 2]}
    peft_folder(llama3(), path, **config)
    return path


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 99),
    st.floats(),
    st.text("qv_proj.*(+[", max_size=9),
    st.lists(st.text("qv_proj.", max_size=7) | st.integers(-1, 4), max_size=3),
    st.dictionaries(st.text("qv_proj.*(", max_size=7), st.integers(-1, 9) | st.text(max_size=3), max_size=2),
)


@fuzzing
@given(CHANGES, st.dictionaries(st.integers(0, 200), VALUES, max_size=3), st.booleans(), texts)
def test_a_peft_folder(tmp_path, folder, how, settings_, with_base, card):
    from veneer.files.safetensors import read_tensors

    tensors, metadata = read_tensors(folder / peft.TENSOR_FILE)
    config = json.loads((folder / peft.CONFIG_FILE).read_text())
    names = sorted({*config, *FIELDS, *IGNORED, *UNSUPPORTED, "a_new_key"})
    config |= {names[i % len(names)]: value for i, value in settings_.items()}
    try:
        chunks = encode_tensors(changed(tensors, how), metadata)
    except VeneerError:
        return
    (tmp_path / peft.TENSOR_FILE).write_bytes(b"".join(chunks))
    (tmp_path / peft.CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / CARD_FILE).write_text(card.encode("utf-8", "replace").decode())
    exercise(tmp_path)
    if with_base:
        with contextlib.suppress(VeneerError):
            read(tmp_path, base=OUTLINE)


OUTLINE = structure_of(llama3())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
def test_pairs_in_eight_bits_are_converted_exactly(tmp_path, dtype, to):
    family = families()["sdxl"]
    tensors = {
        k: t.to(dtype) if t.ndim else t for k, t in few(layouts.kohya("sdxl", original=True, alpha=1.0))[0].items()
    }
    (tmp_path / "x.safetensors").write_bytes(b"".join(encode_tensors(tensors)))
    reading = read(tmp_path / "x.safetensors")
    assert any("stored in 8 bits" in note for note in reading.notes)
    convert.write(reading.adapter, tmp_path / "y.safetensors", to, family=family.name)
    back = read(tmp_path / "y.safetensors").adapter
    for name, pair in reading.adapter.pairs.items():
        assert torch.equal(pair.A, back.pairs[name].A)
        assert torch.equal(pair.B, back.pairs[name].B)
    narrow = next(k for k in tensors if k.endswith("lora_down.weight"))
    assert any(torch.equal(p.A.double(), tensors[narrow].double()) for p in reading.adapter.pairs.values())
