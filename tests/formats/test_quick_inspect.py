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

from tests import families
from tests.formats import layouts
from tests.formats.test_fuzz import CHANGES, MADE, VALUES, changed, fuzzing
from tests.formats.twins import linear_pairs, peft_folder
from veneer.adapters.inspect import inspect
from veneer.errors import VeneerError
from veneer.files.safetensors import encode_tensors, read_tensors
from veneer.formats import names, peft, topology
from veneer.formats.quick_inspect import LAYERS, inspect_plain

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


@pytest.mark.parametrize(
    ("dtype", "metadata"), [(torch.float32, {}), (torch.float16, SAID), (torch.bfloat16, SAID), (torch.float64, {})]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_seen_is_what_is_read(tmp_path, layout, dtype, metadata):
    tensors = {k: t.to(dtype) if t.ndim else t for k, t in LAYOUTS[layout]().tensors.items()}
    write(tmp_path / "x.safetensors", tensors, metadata)
    seen, whole = inspect_plain(tmp_path / "x.safetensors"), inspect(str(tmp_path / "x.safetensors"))
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
    if (seen := inspect_plain(tmp_path / "x.safetensors")) is not None:
        assert_same(seen, inspect(str(tmp_path / "x.safetensors")))


Q_V = ["q_proj", "v_proj"]
PATTERNS = {"rank_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 5}, "alpha_pattern": {r"layers\.1\..*": 7}}
SEEN: dict[str, dict[str, Any]] = {
    "plain": {"task_type": "CAUSAL_LM"},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 5, "lora_dropout": 0.25},
    "patterns": PATTERNS,
    "patterns with rslora": PATTERNS | {"use_rslora": True},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|down)_proj"},
    "every projection": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0.*"},
}
UNSEEN: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True}, "bias of the pair": {"lora_bias": True}, "full copies": {"modules_to_save": ["norm"]},
    "token rows": {"trainable_token_indices": [3, 5]}, "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head, with PEFT's copy of it": {"target_modules": ["lm_head", "q_proj"]},
    "idle target": {"target_modules": [*Q_V, "fc_in"]}, "idle pattern": {"rank_pattern": {"fc_in": 3}},
}  # fmt: skip


@pytest.mark.parametrize("case", [*SEEN, *UNSEEN])
def test_what_is_seen_of_a_peft_folder_is_what_is_read(tmp_path, case):
    peft_folder(families.mistral(), tmp_path / "a", **{"target_modules": Q_V} | (SEEN | UNSEEN)[case])
    seen, whole = inspect_plain(tmp_path / "a"), inspect(str(tmp_path / "a"))
    assert (seen is not None) == (case in SEEN)
    if seen is not None:
        assert_same(seen, whole)


@pytest.mark.parametrize("start", ["model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers"])
def test_what_is_seen_of_our_own_folder_is_what_is_read(tmp_path, start):
    """With its card; also in the folder of a run, which has it as `adapter`."""
    own = [f"{start}.{i}.attn.{p}_proj" for i in range(2) for p in "qv"]
    peft.write_folder(linear_pairs(own, rank=2), tmp_path / "run" / "adapter", base_name="a/base", base=own)
    seen, whole = inspect_plain(tmp_path / "run"), inspect(str(tmp_path / "run"))
    assert seen is not None
    assert seen["adapter"].endswith("adapter")
    assert_same(seen, whole)


def test_no_image_family_has_names_that_begin_as_a_language_models():
    """Which is why the families' tables are not asked for those."""
    for family in (*topology.families(), *topology.strangers()):
        texts = names.texts_of(family)
        assert texts
        assert not any(LAYERS.match(text.removeprefix("base_model.model.")) for text in texts)


@fuzzing
@given(CHANGES, st.dictionaries(st.integers(0, 60), VALUES, max_size=2))
def test_nothing_is_seen_of_a_folder_where_anything_is_to_be_said(tmp_path, how, settings):
    if not (tmp_path / "a").exists():
        peft_folder(families.llama3(), tmp_path / "a", target_modules=Q_V)
    tensors, metadata = read_tensors(tmp_path / "a" / peft.TENSOR_FILE)
    config = json.loads((tmp_path / "a" / peft.CONFIG_FILE).read_text())
    config |= {sorted(config)[i % len(config)]: value for i, value in settings.items()}
    (tmp_path / "b").mkdir(exist_ok=True)
    try:
        write(tmp_path / "b" / peft.TENSOR_FILE, changed(tensors, how), metadata)
    except VeneerError:
        return
    (tmp_path / "b" / peft.CONFIG_FILE).write_text(json.dumps(config))
    if (seen := inspect_plain(tmp_path / "b")) is not None:
        whole = inspect(str(tmp_path / "b"))
        assert whole["verdict"]["use"]
        assert not whole["notes"]
        assert_same(seen, whole)


def test_the_norm_of_what_cancels_is_exact(tmp_path):
    """B·A = 0 by ranks that undo each other."""
    (A,), (B,) = torch.randn(1, 1, 64), torch.randn(1, 64, 1)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{key}A.weight": torch.cat([A, A]), f"{key}B.weight": torch.cat([B, -B], dim=1)}
    write(tmp_path / peft.TENSOR_FILE, pair, {})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / peft.CONFIG_FILE).write_text(json.dumps(config))
    seen = inspect_plain(tmp_path)
    assert seen is not None
    assert seen["targets"]["q_proj"]["delta_norm"] < 1e-12


@pytest.mark.parametrize("folder", [False, True], ids=["file", "peft folder"])
def test_torch_is_not_loaded_to_look_at_a_plain_adapter(tmp_path, folder):
    place = tmp_path / "a" if folder else tmp_path / "x.safetensors"
    if folder:
        peft_folder(families.llama3(), place, target_modules=Q_V, **PATTERNS)
    else:
        write(place, layouts.kohya("sd15", original=False).tensors, SAID)
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
        asked = [sys.executable, "-c", code, str(place), *options]
        ran = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert ran.returncode == 0, ran.stderr
        if options:
            assert json.loads(ran.stdout)["verdict"]["use"] is True
        else:
            assert ran.stdout.startswith("read for use\n")
