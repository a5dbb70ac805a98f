"""LoHa and LoKr folders: PEFT loads veneer's folders, and veneer loads PEFT's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from tests.attached import attached
from tests.core.test_loha_lokr import NAMES, WAYS, Sums, inputs
from tests.edits import edit_json
from tests.families import llama3
from tests.formats.twins import randomise
from veneer.core import Adapter, LoraSpec, Pair, create
from veneer.core.forms import product_of
from veneer.errors import AdapterError
from veneer.formats import convert
from veneer.formats.peft import load_folder, read_folder, write_folder
from veneer.formats.read import read, read_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.arange(12)[None]


def drawn(model: nn.Module, spec: LoraSpec, dtype: torch.dtype = torch.float32) -> Adapter:
    g = torch.Generator().manual_seed(1)
    made = create(model, spec, seed=0, dtype=dtype)
    return made.mapped(lambda t: 0.3 * torch.randn(t.shape, generator=g, dtype=dtype))


def outputs(model: nn.Module, adapter: Adapter, *given: Tensor, **named: Tensor) -> Any:
    with attached(model, adapter), torch.no_grad():
        return model(*given, **named)


LYCORIS_SPECS = [
    LoraSpec(rank=4, alpha=8, kind="loha"),
    LoraSpec(rank=4, kind="loha", targets=("q_proj", "down_proj"), rank_pattern={"q_proj": 2}),
    LoraSpec(rank=4, kind="lokr"),
    LoraSpec(rank=2, kind="lokr", decompose_both=True),
    LoraSpec(rank=4, alpha=2, kind="lokr", factor=4, layers=(1,)),
    LoraSpec(rank=1000, kind="lokr", factor=2, alpha_pattern={"q_proj": 7.0}),
]


@pytest.mark.parametrize("spec", LYCORIS_SPECS)
def test_peft_loads_written_folders_with_equal_outputs(spec: LoraSpec, tmp_path: Path) -> None:
    model = llama3().eval()
    adapter = drawn(model, spec)
    report = write_folder(adapter, tmp_path, base=model)
    assert read_folder(tmp_path, model).digest() == report.digest == adapter.digest()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
    torch.testing.assert_close(outputs(model, adapter, input_ids=TOKENS).logits, expected)
    torch.testing.assert_close(outputs(model, read(tmp_path).adapter, input_ids=TOKENS).logits, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cores", [False, True])
def test_peft_folders_read_with_the_same_outputs(way: str, cores: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, spec, given = Sums(), dict(WAYS[way]), inputs(torch.float32)
    both, factor = spec.get("decompose_both", False), spec.get("factor") or -1
    common: dict[str, Any] = {"r": spec["rank"], "alpha": 3, "alpha_pattern": {"conv": 5}, "init_weights": False}
    common |= {"target_modules": list(NAMES), "use_effective_conv2d": cores}
    config = (
        peft.LoHaConfig(**common)
        if spec["kind"] == "loha"
        else peft.LoKrConfig(**common, decompose_both=both, decompose_factor=factor)
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    adapter = read_folder(tmp_path, model)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, adapter, *given), theirs(*given))
    again = tmp_path / "again"
    write_folder(adapter, again, base=model)
    torch.testing.assert_close(outputs(model, read_folder(again, model), *given), outputs(model, adapter, *given))
    assert json.loads((again / "adapter_config.json").read_text())["peft_type"] == spec["kind"].upper()


def test_adapters_that_peft_cannot_express_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"line": nn.Conv1d(8, 12, 3), "lin": nn.Linear(24, 36)})
    adapter = drawn(model, LoraSpec(rank=2, kind="lokr", targets=("line",)))
    with pytest.raises(AdapterError, match="a full second factor of a 1-d convolution"):
        write_folder(adapter, tmp_path / "a", base=model)
    one = drawn(model, LoraSpec(rank=2, kind="lokr", targets=("lin",)))
    one.deltas["lin.weight"].magnitude = torch.ones(36)
    with pytest.raises(AdapterError, match="without DoRA; write kohya"):
        write_folder(one, tmp_path / "a", base=model)
    mixed = drawn(model, LoraSpec(rank=2, kind="loha", targets=("lin",)))
    mixed.pairs["line"] = Pair(torch.zeros(2, 8, 3), torch.zeros(12, 2, 1), 1.0, "conv")
    with pytest.raises(AdapterError, match="hadamard delta"):
        write_folder(mixed, tmp_path / "a", base=model)
    assert not (tmp_path / "a").exists()


DAMAGES = [
    ({"alpha": "8"}, "- alpha = '8': a number is expected"),
    ({"r": 0}, "r = '0': an integer of at least 1"),
    ({"rank_pattern": [3]}, "a mapping from module names to numbers"),
    ({"rank_pattern": {"q_proj": 2.5}}, "an integer of at least 1"),
    ({"alpha_pattern": {"(": 3}}, "is not a regular expression"),
    ({"wormhole": 7}, "wormhole = '7' is not understood"),
]


@pytest.mark.parametrize(("change", "say"), DAMAGES)
def test_error_names_the_damaged_setting(change: dict[str, Any], say: str, tmp_path: Path) -> None:
    model = llama3()
    write_folder(drawn(model, LoraSpec(rank=2, kind="loha")), tmp_path, base=model)
    edit_json(tmp_path / "adapter_config.json", **change)
    with pytest.raises(AdapterError, match=say):
        load_folder(tmp_path, model)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_lokr_of_fused_projections_keep_separate_names(to: str) -> None:
    """kohya's layout fuses FLUX's q, k and v, but three LoKr cannot be fused.

    So the three are written separately, under LyCORIS's names."""
    g = torch.Generator().manual_seed(0)
    names = [f"transformer.transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
    model = nn.Module()
    made = {"": model}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            at, above = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if at not in made:
                made[at] = nn.Linear(48, 48, bias=False) if at == name else nn.Module()
                made[above].add_module(parts[depth - 1], made[at])
    adapter = create(model, LoraSpec(rank=2, kind="lokr", factor=4, targets=tuple(names)), seed=0)
    adapter = adapter.mapped(lambda t: torch.randn(t.shape, generator=g))
    written = convert.encode(adapter, to, family="flux1")
    assert "lycoris_transformer_blocks_0_attn_to_q.lokr_w1" in written.tensors
    assert any(
        key.endswith("proj.lokr_w1") for key in written.tensors
    )  # to_out.0 is not fused in the original, so it gets the original's name, img_attn.proj
    back = read_state_dict(written.tensors, written.metadata).adapter
    for name, delta in adapter.deltas.items():
        torch.testing.assert_close(product_of(back.deltas[name]), product_of(delta))


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_full_copies_with_loha_and_lokr_match_peft(kind: str, task: str, tmp_path: Path) -> None:
    """`modules_to_save` is set by the user, or extended by PEFT for the task."""
    torch.manual_seed(0)
    model = llama3(tie_word_embeddings=False)
    if task == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
    common: dict[str, Any] = {"r": 4, "alpha": 3, "target_modules": ["q_proj", "down_proj"], "init_weights": False}
    own = ["model.norm"] if task == "SEQ_CLS" else ["lm_head"]
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), getattr(peft, kind)(**common, modules_to_save=own, task_type=task)
    )
    randomise(wrapped)
    wrapped.eval().save_pretrained(tmp_path / "a")
    with torch.no_grad():
        want = wrapped(input_ids=TOKENS).logits
    model.eval()
    adapter = read_folder(tmp_path / "a", model)
    assert set(adapter.modules) == ({"model.norm", "score"} if task == "SEQ_CLS" else {"lm_head"})
    torch.testing.assert_close(outputs(model, adapter, input_ids=TOKENS).logits, want)
    write_folder(adapter, tmp_path / "b", base=model, task_type=task)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=TOKENS).logits, want)


def test_unexplained_tensors_are_named_in_the_error(tmp_path: Path) -> None:
    model = llama3()
    write_folder(drawn(model, LoraSpec(rank=2, kind="loha")), tmp_path, base=model)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight \(32,\): nothing in the config accounts"):
        read_folder(tmp_path, model)
