"""A plain file is looked at without torch, and what is said of it is what reading it whole says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.formats import layouts
from tests.formats.test_fuzz import CHANGES, MADE, changed, fuzzing
from veneer.errors import VeneerError
from veneer.formats.container import encode_tensors
from veneer.formats.glance import glance
from veneer.inspecting import inspect

LAYOUTS = {
    "kohya sd15": lambda: layouts.kohya("sd15", original=False, alpha=1.5, te={"text_encoder": "lora_te"}),
    "kohya sdxl": lambda: layouts.kohya("sdxl", original=True, only="middle_block"),
    "kohya qwen": lambda: layouts.kohya("qwen-image", original=False, only="blocks.1."),
    "comfyui z-image": lambda: layouts.dotted("z-image", "diffusion_model.", original=True, naming="peft"),
    "diffusers flux": lambda: layouts.dotted("flux1", "transformer.", original=False, naming="peft"),
    "diffusers sd3": lambda: layouts.dotted("sd3", "transformer.", original=False, naming="default", alpha=3.0),
    "old diffusers": lambda: layouts.dotted("sd15", "unet.", original=False, naming="linear_layer", only=("attn1",)),
}
SAID = {
    "ss_network_dim": "2", "ss_output_name": "name", "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.trigger_phrase": "a word", "ss_learning_rate": "1e-4",
}  # fmt: skip


def write(path: Any, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.write_bytes(b"".join(encode_tensors(tensors, metadata)))


def assert_same(seen: dict[str, Any], whole: dict[str, Any]) -> None:
    """Equal, norms to float64's accuracy."""
    for found in (seen, whole):
        found["norms"] = {leaf: group.pop("delta_norm") for leaf, group in found["targets"].items()}
    norms = seen.pop("norms"), whole.pop("norms")
    assert seen == whole
    assert norms[0].keys() == norms[1].keys()
    assert all(math.isclose(norms[0][leaf], norms[1][leaf], rel_tol=1e-9, abs_tol=1e-12) for leaf in norms[0])


@pytest.mark.parametrize("metadata", [{}, SAID], ids=["bare", "said"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_seen_is_what_is_read(tmp_path, layout, dtype, metadata):
    tensors = {k: t.to(dtype) if t.ndim else t for k, t in LAYOUTS[layout]().tensors.items()}
    write(tmp_path / "x.safetensors", tensors, metadata)
    seen, whole = glance(tmp_path / "x.safetensors"), inspect(str(tmp_path / "x.safetensors"))
    if layout in ("kohya sd15", "kohya qwen", "diffusers sd3", "old diffusers"):
        assert seen is not None
    if seen is not None:
        assert_same(seen, whole)


@fuzzing
@given(st.sampled_from(sorted(MADE)), CHANGES)
def test_nothing_is_seen_where_anything_is_to_be_said(tmp_path, made, how):
    """Whatever is changed: what is seen is what is read for use, or nothing is."""
    tensors, metadata = MADE[made]()
    try:
        write(tmp_path / "x.safetensors", changed(tensors, how), metadata)
    except VeneerError:
        return
    if (seen := glance(tmp_path / "x.safetensors")) is not None:
        assert_same(seen, inspect(str(tmp_path / "x.safetensors")))


def test_torch_is_not_loaded_to_look_at_a_plain_file(tmp_path):
    write(tmp_path / "x.safetensors", layouts.kohya("sd15", original=False).tensors, SAID)
    code = """
import sys
from veneer.cli.main import main
try:
    main(["adapter", "inspect", sys.argv[1], *sys.argv[2:]])
except SystemExit as end:
    assert not end.code
heavy = {"torch", "transformers", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    for options in ([], ["--json"]):
        asked = [sys.executable, "-c", code, str(tmp_path / "x.safetensors"), *options]
        ran = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert ran.returncode == 0, ran.stderr
        if options:
            assert json.loads(ran.stdout)["verdict"]["use"] is True
        else:
            assert ran.stdout.startswith("read for use\n")
