"""Files with several adapters, pickles, and tensor files next to a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer.errors import AdapterError, UnsafeFileError
from veneer.formats.read import read

AT = "base_model.model.model.layers.{}.self_attn.q_proj"
R, ALPHA = 8, 32


def pair(layer: int, name: str = "", seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    own = f".{name}" if name else ""
    return {
        f"{AT.format(layer)}.lora_A{own}.weight": torch.randn(R, 16, generator=g),
        f"{AT.format(layer)}.lora_B{own}.weight": torch.randn(16, R, generator=g),
    }


def folder(path: Path, tensors: dict[str, Tensor], file: str = "adapter_model.safetensors") -> Path:
    path.mkdir()
    if file.endswith(".bin"):
        torch.save(tensors, path / file)
    else:
        save_file(tensors, path / file)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


SEVERAL = {
    "two on one module": {**pair(0, "a", 1), **pair(0, "b", 2)},
    "two on disjoint modules": {**pair(0, "a", 1), **pair(1, "b", 2)},
    "A of one and B of another": {
        **{k: t for k, t in pair(0, "a", 1).items() if "lora_A" in k},
        **{k: t for k, t in pair(0, "b", 2).items() if "lora_B" in k},
    },
}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("case", SEVERAL)
def test_two_adapters_in_one_file_are_refused_with_both_names(tmp_path, case, kind):
    if kind == "file":
        path = tmp_path / "both.safetensors"
        save_file(SEVERAL[case], path)
    else:
        path = folder(tmp_path / "a", SEVERAL[case])
    with pytest.raises(AdapterError) as caught:
        read(path)
    assert "holds 2 adapters: a (" in str(caught.value)


def test_named_and_unnamed_adapters_count_as_two(tmp_path):
    path = tmp_path / "both.safetensors"
    save_file({**pair(0), **pair(1, "b")}, path)
    with pytest.raises(AdapterError, match=r"\(no name\) \(2 tensors\), b \(2 tensors\)"):
        read(path)


def test_pickled_peft_folder_is_read_on_request(tmp_path):
    """Rank 8 and alpha 32 in the configuration give scale 4."""
    path = folder(tmp_path / "a", pair(0), "adapter_model.bin")
    with pytest.raises(UnsafeFileError) as caught:
        read(path)
    assert "--from-pickle" in str(caught.value)
    for given in (path, path / "adapter_model.bin"):
        found = read(given, from_pickle=True)
        assert [p.scale for p in found.adapter.pairs.values()] == [ALPHA / R]
        assert not any("the rank is used as alpha" in note for note in found.notes)


def test_renamed_tensor_file_uses_its_configuration(tmp_path):
    path = folder(tmp_path / "a", pair(0), "tickets-v2.safetensors") / "tickets-v2.safetensors"
    found = read(path)
    assert [p.scale for p in found.adapter.pairs.values()] == [ALPHA / R]
    assert any("next to adapter_config.json" in reason for reason in found.reasons)
    wrong = path.with_name("other.safetensors")
    save_file({k: t[:4] if "lora_A" in k else t[:, :4].contiguous() for k, t in pair(0).items()}, wrong)
    with pytest.raises(AdapterError, match="r says rank 8, the tensors have 4"):  # the config of another file
        read(wrong)


def test_torchtune_checkpoint_is_refused_with_a_fix(tmp_path):
    path = tmp_path / "adapter_0.safetensors"
    save_file({f"layers.0.attn.q_proj.lora_{half}.weight": torch.ones(2, 2) for half in "ab"}, path)
    with pytest.raises(AdapterError, match="torchtune's own checkpoint of an adapter: it does not hold alpha"):
        read(path)


def test_command_line_options_reach_the_reader(tmp_path, capsys):
    from tests.cli.run import run

    path = tmp_path / "alone.safetensors"
    save_file(pair(0), path)
    run(capsys, "adapter", "inspect", str(path), code=2)
    for command in (("inspect",), ("verify",), ("convert", "--to", "peft", "-o", str(tmp_path / "out"))):
        run(capsys, "adapter", command[0], str(path), *command[1:], "--alpha", "2")
    folder(tmp_path / "p", pair(0), "adapter_model.bin")
    for name in ("inspect", "verify"):
        run(capsys, "adapter", name, str(tmp_path / "p"), code=2)
        run(capsys, "adapter", name, str(tmp_path / "p"), "--from-pickle")
