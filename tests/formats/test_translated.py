"""Adapters from mlx-lm and Tinker folders give the outputs of the tools' formulas, computed in float64.

PEFT's outputs are compared with the formulas too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.twins import model, our_outputs, outputs, peft_outputs
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.read import read

R, SCALE = 3, 2.5
Pairs = dict[str, tuple[Tensor, Tensor]]


def pairs_of(shapes: dict[str, tuple[int, ...]]) -> Pairs:
    """Return random pairs by module, for weights (out, in) or (experts, out, in).

    A: (…, r, in), B: (…, out, r)"""
    g = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) / 4  # noqa: E731
    return {n: (draw(*s[:-2], R, s[-1]), draw(*s[:-1], R)) for n, s in shapes.items()}


def by_hand(name: str, pairs: Pairs, scale: float = SCALE) -> Tensor:
    """Return a base's outputs after adding s·B·A to its weights.

    Names of experts' projections are transformers' names before fusing."""
    net = model(name)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        for at, (A, B) in pairs.items():
            module, _, leaf = at.rpartition(".")
            if ".experts" not in at:
                weights[f"{at}.weight"] += scale * B @ A
            elif leaf == "down_proj":
                weights[f"{module}.down_proj"] += scale * B @ A
            else:
                fused = weights[f"{module}.gate_up_proj"]
                half = fused.shape[1] // 2
                fused[:, :half] += scale * B @ A if leaf == "gate_proj" else 0
                fused[:, half:] += scale * B @ A if leaf == "up_proj" else 0
    return outputs(net)


def written(path: Path, file: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.mkdir()
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / file)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


# -- mlx-lm ------------------------------------------------------------------------------------------------------------


def mlx(path: Path, pairs: Pairs, more: dict[str, Tensor] | None = None, **config: Any) -> Path:
    tensors = dict(more or {})
    for name, (A, B) in pairs.items():
        name = name.replace(".experts.", ".switch_mlp.")
        tensors[f"{name}.lora_a"] = A if A.ndim == 3 else A.t()
        tensors[f"{name}.lora_b"] = B if B.ndim == 3 else B.t()
    settings = {"fine_tune_type": "lora", "model": "mlx-community/Llama-3.2-1B-Instruct-4bit", "num_layers": 16}
    settings |= {"batch_size": 4, "lora_parameters": {"rank": R, "scale": SCALE, "dropout": 0.0}}
    return written(path, "adapters.safetensors", tensors, settings | config)


LINEAR = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}
EXPERTS: dict[str, tuple[int, ...]] = {
    "model.layers.1.self_attn.q_proj": (32, 32),
    **{f"model.layers.1.mlp.experts.{n}": (4, 24, 32) for n in ("gate_proj", "up_proj")},
    "model.layers.1.mlp.experts.down_proj": (4, 32, 24),
    "model.layers.1.mlp.gate": (4, 32),
}


def test_mlx_lm_folder_is_recognized_and_read(tmp_path: Path) -> None:
    pairs, net = pairs_of(LINEAR), model("llama3")
    found = read(mlx(tmp_path / "a", pairs), base=net)
    assert found.format == "mlx"
    assert found.adapter.card.base == "mlx-community/Llama-3.2-1B-Instruct-4bit"
    want = by_hand("llama3", pairs)
    torch.testing.assert_close(our_outputs(net, found.adapter), want, rtol=1e-9, atol=1e-9)
    peft.write_folder(found.adapter, tmp_path / "b", base=net)
    torch.testing.assert_close(peft_outputs(model("llama3"), tmp_path / "b"), want, rtol=1e-9, atol=1e-9)


def test_mlx_lm_dora_equals_pefts(tmp_path: Path) -> None:
    pairs, net = pairs_of(LINEAR), model("llama3")
    m = {n: net.get_parameter(f"{n}.weight").norm(dim=1).detach() * 1.2 for n in pairs}
    path = mlx(tmp_path / "a", pairs, {f"{n}.m": t for n, t in m.items()}, fine_tune_type="dora")
    hand = model("llama3")
    with torch.no_grad():
        for n, (A, B) in pairs.items():
            weight = hand.get_parameter(f"{n}.weight")
            adapted = weight + SCALE * B @ A
            weight.copy_((m[n] / adapted.norm(dim=1))[:, None] * adapted)
    got = our_outputs(net, peft.read_folder(path, net))
    torch.testing.assert_close(got, outputs(hand), rtol=1e-9, atol=1e-9)


def test_mlx_lm_experts_change_fused_weights(tmp_path: Path) -> None:
    pairs, net = pairs_of(EXPERTS), model("qwen3_moe")
    got = our_outputs(net, peft.read_folder(mlx(tmp_path / "a", pairs), net))
    torch.testing.assert_close(got, by_hand("qwen3_moe", pairs), rtol=1e-9, atol=1e-9)


AMBIGUOUS_FOLDERS = [
    ({"fine_tune_type": "full"}, "full weights instead of an adapter's pairs"),
    ({"lora_parameters": {"rank": R}}, "lora_parameters.scale = None: a number is expected"),
    ({"lora_parameters": {"rank": "8", "scale": 1}}, "lora_parameters.rank = 8: expected an integer"),
    ({"lora_layers": 16, "lora_parameters": {"rank": R, "scale": 10.0, "alpha": 16}}, "by scale·alpha/rank, later"),
]


@pytest.mark.parametrize(("change", "say"), AMBIGUOUS_FOLDERS)
def test_ambiguous_mlx_lm_settings_are_refused(tmp_path: Path, change: dict[str, Any], say: str) -> None:
    with pytest.raises(AdapterError, match=say):
        read(mlx(tmp_path / "a", pairs_of(LINEAR), **change))
    with pytest.raises(AdapterError, match="also applies it to a tied head"):
        read(mlx(tmp_path / "b", pairs_of({"model.embed_tokens": (32, 160)})))


def test_alpha_is_ignored_as_in_mlx_lm(tmp_path: Path) -> None:
    path = mlx(tmp_path / "a", pairs_of(LINEAR), lora_parameters={"rank": R, "scale": SCALE, "alpha": 16})
    assert {p.scale for p in read(path).adapter.pairs.values()} == {SCALE}


# -- Tinker ------------------------------------------------------------------------------------------------------------


def tinker(path: Path, pairs: Pairs, **config: Any) -> Path:
    names = {"lm_head": "model.unembed_tokens"}
    experts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = {}
    for name, own in pairs.items():
        start, _, leaf = name.rpartition(".")
        name = f"{start}.{experts[leaf]}" if ".experts" in start else names.get(name, name)
        for half, tensor in zip("AB", own, strict=True):
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = tensor
    return written(path, "adapter_model.safetensors", tensors, {"r": R, "lora_alpha": SCALE * R} | config)


@pytest.mark.parametrize("config", [{}, {"peft_type": "LORA", "target_modules": "all-linear", "bias": "none"}])
def test_tinker_archive_is_recognized_and_read(tmp_path: Path, config: dict[str, Any]) -> None:
    pairs, net = pairs_of({**EXPERTS, "lm_head": (160, 32)}), model("qwen3_moe")
    found = read(tinker(tmp_path / "a", pairs, **config), base=net)
    assert found.format == "tinker"
    torch.testing.assert_close(our_outputs(net, found.adapter), by_hand("qwen3_moe", pairs), rtol=1e-9, atol=1e-9)
    assert read(tmp_path / "a").format == "tinker"  # the base is not needed to detect the format


def test_tinker_gpt_oss_attention_gets_transformers_names(tmp_path: Path) -> None:
    pairs = pairs_of({"model.layers.0.attn.q_proj": (32, 32), "model.layers.0.attn.o_proj": (32, 32)})
    got = read(tinker(tmp_path / "a", pairs), base=model("gpt_oss")).adapter
    assert set(got.pairs) == {n.replace("attn", "self_attn") for n in pairs}
    settings = {"peft_type": "LORA", "target_modules": ["q_proj", "o_proj"]}
    assert set(read(tinker(tmp_path / "b", pairs, **settings)).adapter.pairs) == set(
        pairs
    )  # PEFT's names do not change


def test_tinker_split_qwen_3_5_projection_is_fused(tmp_path: Path) -> None:
    at = "model.layers.0.linear_attn.in_proj_"
    pairs = pairs_of({f"{at}q": (16, 32), f"{at}k": (16, 32), f"{at}v": (24, 32), f"{at}z": (24, 32)})
    got = read(tinker(tmp_path / "a", pairs)).adapter
    joined = torch.cat([SCALE * pairs[f"{at}{n}"][1] @ pairs[f"{at}{n}"][0] for n in "qkv"])
    pair = got.pairs[f"{at}qkv"]
    torch.testing.assert_close(pair.scale * pair.B @ pair.A, joined, rtol=1e-12, atol=1e-12)
    assert got.pairs[f"{at}z"].scale == pytest.approx(SCALE)
    del pairs[f"{at}k"]
    with pytest.raises(AdapterError, match="one projection of the base, but the file has"):
        read(tinker(tmp_path / "b", pairs))
