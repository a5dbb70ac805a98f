"""The reasons and advice that `adapter inspect` and `adapter convert` print."""

from __future__ import annotations

import re

import pytest
import torch

from tests.cli.run import run
from tests.edits import edit_json
from tests.formats.image_adapters import pair_for
from tests.formats.twins import linear_pairs
from veneer.adapters.inspect import inspect
from veneer.core.adapter import Adapter
from veneer.core.forms import Delta
from veneer.errors import AdapterError
from veneer.files.safetensors import write_tensors
from veneer.formats import peft
from veneer.formats.convert import encode, write
from veneer.formats.read import read, read_state_dict
from veneer.formats.topology import families

SD15 = families()["sd15"]
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


KOHYA_Q = f"lora_unet_{TO_Q.removeprefix('unet.').replace('.', '_')}"


def pairs(*modules: str) -> Adapter:
    return Adapter({m: pair_for(SD15, m, rank=2) for m in modules})


REPORTED_TENSORS = [
    ({f"{KOHYA_Q}.lora_down.weight": torch.ones(2, 4)}, "without its partner"),
    ({f"lora_unet_nowhere.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}, "no module of"),
    ({f"{KOHYA_Q}.oft_blocks": torch.ones(2, 2, 2)}, "OFT"),
]


@pytest.mark.parametrize(("tensors", "why"), REPORTED_TENSORS)
def test_inspect_and_convert_report_the_same(tmp_path, capsys, tensors, why):
    write_tensors(tmp_path / "x.safetensors", tensors)
    told = []
    for command in (["inspect"], ["convert", "--to", "kohya", "-o", str(tmp_path / "y.safetensors")]):
        ran = run(capsys, "adapter", *command, str(tmp_path / "x.safetensors"), code=2)
        told.append(ran.err or ran.out)
    assert all(why in text for text in told), told
    assert "the file contains no adapter tensors" not in told[0]


def test_inspect_verdict_sets_the_exit_code(tmp_path, capsys):
    write(pairs(TO_Q), tmp_path / "good.safetensors", "kohya")
    good = run(capsys, "adapter", "inspect", str(tmp_path / "good.safetensors"))
    assert good.out.splitlines()[0] == "usable"
    tensors = {**encode(pairs(TO_Q), "kohya", family="sd15").tensors, "lora_unet_nowhere.diff": torch.ones(2)}
    write_tensors(tmp_path / "bad.safetensors", tensors)
    bad = run(capsys, "adapter", "inspect", str(tmp_path / "bad.safetensors"), code=2)
    assert bad.out.startswith(
        "refused: the adapter cannot be read completely (1 problem(s)):\n  - lora_unet_nowhere.diff"
    )
    assert "--allow-partial" in bad.out
    found = inspect(str(tmp_path / "bad.safetensors"))
    assert found["verdict"]["use"] is False
    assert "lora_unet_nowhere.diff" in found["verdict"]["why"]
    assert inspect(str(tmp_path / "good.safetensors"))["verdict"] == {"use": True, "why": "", "fix": ""}


def test_allow_partial_is_advised_only_if_useful():
    with pytest.raises(AdapterError) as refusal:
        read_state_dict({"x.lora_down.weight": torch.ones(2, 4)}, {})
    assert refusal.value.fix is None


def test_swapped_factors_of_a_peft_folder_are_named(tmp_path):
    peft.write_folder(linear_pairs(["a.q_proj"], rank=2, width=6), tmp_path / "a")
    swapped = {
        "base_model.model.a.q_proj.lora_A.weight": torch.ones(6, 2),
        "base_model.model.a.q_proj.lora_B.weight": torch.ones(2, 6),
    }
    write_tensors(tmp_path / "a" / peft.TENSOR_FILE, swapped)
    with pytest.raises(AdapterError, match=r"says rank 2, the tensors have 6 .*: A and B are swapped"):
        read(tmp_path / "a")


def gain(adapter: Adapter) -> Adapter:
    adapter.deltas["unet.conv_in.weight"] = Delta("gain", {"value": torch.ones(4)})
    return adapter


@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "comfyui", "vllm"])
@pytest.mark.parametrize(
    "adapter",
    [pairs(TO_Q), pairs(TO_Q, TEXT), gain(pairs(TO_Q)), gain(pairs(TO_Q, TEXT)),
     linear_pairs(["a.q_proj"])],
    ids=["one model", "two models", "a gain", "a gain and two models", "text"],
)  # fmt: skip
def test_advised_layout_can_hold_the_adapter(adapter, to):
    """Every layout that an error suggests can express the adapter; if it suggests none, no layout can."""
    try:
        encode(adapter, to)
        return
    except AdapterError as error:
        refusal = error
    advised = re.findall(r"\b(peft|kohya|diffusers|comfyui|vllm)\b", refusal.fix or "")
    assert ("no other layout" in (refusal.fix or "")) == (not advised)
    assert "--to" not in refusal.what
    for other in ("peft", "kohya", "diffusers", "comfyui", "vllm"):
        if other in advised:
            encode(adapter, other)
        elif other != to:
            with pytest.raises(AdapterError):
                encode(adapter, other)


def test_variants_are_named(tmp_path, capsys):
    lokr = Delta("kronecker", {"w1": torch.ones(2, 2), "w2": torch.ones(2, 3)}, (4, 6))
    write(Adapter(deltas={f"{TO_Q}.weight": lokr}), tmp_path / "x.safetensors", "kohya", family="sd15")
    assert inspect(str(tmp_path / "x.safetensors"))["variants"] == ["LoKr"]
    assert re.search(r"^variant +LoKr$", run(capsys, "adapter", "inspect", str(tmp_path / "x.safetensors")).out, re.M)


def test_a_configuration_of_a_million_entries_is_refused(tmp_path):
    peft.write_folder(linear_pairs(["a.q_proj"]), tmp_path / "a")
    edit_json(tmp_path / "a" / peft.CONFIG_FILE, **{f"k{i}": 0 for i in range(200_000)})
    with pytest.raises(AdapterError, match=r"200,0\d\d entries in the configuration"):
        read(tmp_path / "a")
