"""Mixture-of-experts adapters in other tools' layouts become changes of fused expert weights.

The reference is a transformers model in float64 whose fused weights the test changes itself; if PEFT can load
the file, PEFT's outputs are a second reference.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GptOssConfig

from tests import families
from tests.edits import edit_json
from tests.formats import twins
from tests.formats.twins import our_outputs, outputs, peft_folder, peft_outputs
from veneer.errors import AdapterError
from veneer.formats import peft

HEAD = "base_model.model."
EXPERTS = {
    "mixtral": [f"model.layers.{n}.mlp.experts" for n in range(2)],
    "qwen3_moe": ["model.layers.1.mlp.experts"],
    "llama4": ["model.layers.1.feed_forward.experts"],
    "gpt_oss": [f"model.layers.{n}.mlp.experts" for n in range(2)],
}
R, SCALE = 3, 2.0
TARGETS = r".*\.experts\.(\d+\.)?(gate_proj|up_proj|down_proj)"


def model(name: str) -> nn.Module:
    """Return `twins.model(name)`, or a tiny gpt_oss.

    gpt_oss stores fused weights transposed, and interleaves gate and up."""
    if name != "gpt_oss":
        return twins.model(name)
    own = {"intermediate_size": 24, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    net = families.build(GptOssConfig(**(families.COMMON | own))).double().eval()
    net.config._experts_implementation = "eager"
    return net


def single_pairs(net: nn.Module, name: str, *, share: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B for every projection of every expert of `net`.

    `share`: an expert's gate and up projections use the same A."""
    g = torch.Generator().manual_seed(3)
    hidden, inner = net.config.hidden_size, net.config.intermediate_size
    inner = getattr(net.config, "moe_intermediate_size", inner) if name == "qwen3_moe" else inner
    out = {}
    for module in EXPERTS[name]:
        for e in range(4):
            first = None
            for leaf, (rows, into) in {
                "gate_proj": (inner, hidden),
                "up_proj": (inner, hidden),
                "down_proj": (hidden, inner),
            }.items():
                A = torch.randn(R, into, generator=g, dtype=torch.float64) / 4
                B = torch.randn(rows, R, generator=g, dtype=torch.float64) / 4
                if leaf == "gate_proj":
                    first = A
                elif leaf == "up_proj" and share:
                    A = first
                out[f"{module}.{e}.{leaf}"] = A, B
    return out


def by_hand(name: str, pairs: dict[str, tuple[Tensor, Tensor]], scale: float = SCALE) -> Tensor:
    """Return a base's outputs after adding each s·B·A to its fused expert weights."""
    net = model(name)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        for at, (A, B) in pairs.items():
            module, e, leaf = at.rsplit(".", 2)
            fused = weights[f"{module}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][int(e)]
            across = fused if name in ("mixtral", "qwen3_moe") else fused.t()  # (out, in)
            if leaf != "down_proj":
                part = 0 if leaf == "gate_proj" else 1
                half = len(across) // 2
                across = across[part::2] if name == "gpt_oss" else across[part * half : (part + 1) * half]
            across += scale * B @ A
    return outputs(net)


def folder(path: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(
        {HEAD + k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()},
        path / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": SCALE * R, "peft_version": "0.18.0", **config}
    settings.setdefault("target_modules", TARGETS)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def flat(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {f"{n}.lora_{half}.weight": t for n, own in pairs.items() for half, t in zip("AB", own, strict=True)}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_per_expert_pairs_change_fused_experts(tmp_path, name, share):
    """transformers 4, Megatron and Tinker use names such as experts.N.gate_proj."""
    net = model(name)
    pairs = single_pairs(net, name, share=share)
    got = peft.load_folder(folder(tmp_path / "a", flat(pairs)), net)
    torch.testing.assert_close(our_outputs(net, got.adapter), by_hand(name, pairs), rtol=1e-9, atol=1e-9)
    assert {p.rank for n, p in got.adapter.pairs.items() if n.endswith("gate_up_proj")} == {R if share else 2 * R}
    assert any("single experts" in note for note in got.notes)
    peft.write_folder(got.adapter, tmp_path / "b", base=net)
    torch.testing.assert_close(
        our_outputs(net, peft.read_folder(tmp_path / "b", net)), by_hand(name, pairs), rtol=1e-9, atol=1e-9
    )


def test_peft_loads_the_same_file_with_equal_outputs(tmp_path):
    net = model("qwen3_moe")
    pairs = single_pairs(net, "qwen3_moe")
    path = folder(tmp_path / "a", flat(pairs), target_modules=TARGETS)
    torch.testing.assert_close(
        peft_outputs(model("qwen3_moe"), path), by_hand("qwen3_moe", pairs), rtol=1e-9, atol=1e-9
    )


def packed(pairs: dict[str, tuple[Tensor, Tensor]], layout: str) -> dict[str, Tensor]:
    """Return the pairs under another tool's names.

    Layout "shared": the pairs must have one A for gate and up, and one B for down, common to all experts."""
    out: dict[str, Tensor] = {}
    for module in dict.fromkeys(n.rsplit(".", 2)[0] for n in pairs):
        own = {
            leaf: [torch.stack([pairs[f"{module}.{e}.{leaf}"][half] for e in range(4)]) for half in (0, 1)]
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        for leaf, (A, B) in own.items():
            for half, stack in (("A", A), ("B", B)):
                one = layout == "shared" and (half == "B") == (leaf == "down_proj")
                if layout == "packed" or one:
                    out[f"{module}.{leaf}.lora_{half}.weight"] = stack[:1] if one else stack
                else:
                    for e in range(4):
                        out[f"{module}.{e}.{leaf}.lora_{half}.weight"] = stack[e]
    return out


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_packed_layouts_become_one_pair_per_expert(tmp_path, name, layout):
    """Covers both layouts of Megatron Bridge.

    "packed": the tensors of all experts are stacked; "shared": all experts also share one factor per pair."""
    net = model(name)
    pairs = single_pairs(net, name)
    if layout == "shared":
        for module in EXPERTS[name]:
            first = {leaf: pairs[f"{module}.0.{leaf}"] for leaf in ("gate_proj", "down_proj")}
            for e in range(4):
                for leaf in ("gate_proj", "up_proj"):
                    pairs[f"{module}.{e}.{leaf}"] = first["gate_proj"][0], pairs[f"{module}.{e}.{leaf}"][1]
                at = f"{module}.{e}.down_proj"
                pairs[at] = pairs[at][0], first["down_proj"][1]
    got = peft.load_folder(folder(tmp_path / "a", packed(pairs, layout)), net)
    torch.testing.assert_close(our_outputs(net, got.adapter), by_hand(name, pairs), rtol=1e-9, atol=1e-9)
    assert any("read as one pair per expert" in note for note in got.notes)


def test_missing_experts_and_unequal_scales_are_exact(tmp_path):
    """Some experts have no pair, and one pair has another rank and scale."""
    net = model("mixtral")
    pairs = {n: p for n, p in single_pairs(net, "mixtral").items() if ".2." not in n and not n.endswith("3.gate_proj")}
    odd = "model.layers.0.mlp.experts.1.up_proj"
    pairs[odd] = pairs[odd][0][:1], pairs[odd][1][:, :1]
    path = folder(tmp_path / "a", flat(pairs), rank_pattern={odd: 1})
    # The odd pair has rank 1, so its scale is 6 instead of 2: multiply its B by 3.
    by = {n: (A, B * 3 if n == odd else B) for n, (A, B) in pairs.items()}
    got = our_outputs(net, peft.read_folder(path, net))
    torch.testing.assert_close(got, by_hand("mixtral", by), rtol=1e-9, atol=1e-9)


def test_experts_that_cannot_be_fused_are_refused(tmp_path):
    net = model("mixtral")
    pairs = single_pairs(net, "mixtral")
    at = "model.layers.0.mlp.experts"
    with pytest.raises(AdapterError, match="pairs of experts 0 to 9, but there are 4"):
        peft.read_folder(folder(tmp_path / "a", flat({**pairs, f"{at}.9.up_proj": pairs[f"{at}.0.up_proj"]})), net)
    dora = flat(pairs) | {f"{n}.lora_magnitude_vector": torch.ones(len(B)) for n, (_, B) in pairs.items()}
    with pytest.raises(AdapterError, match="DoRA on single experts"):
        peft.read_folder(folder(tmp_path / "b", dora, use_dora=True), net)
    tensors = packed(pairs, "packed")
    tensors[f"{at}.up_proj.lora_A.weight"] = tensors[f"{at}.up_proj.lora_A.weight"][:3]
    with pytest.raises(AdapterError, match="the number of experts is unknown"):
        peft.read_folder(folder(tmp_path / "c", tensors), net)


def test_experts_stay_separate_without_a_base(tmp_path):
    pairs = single_pairs(model("mixtral"), "mixtral")
    found = peft.load_folder(folder(tmp_path / "a", flat(pairs)))
    assert set(found.adapter.pairs) == set(pairs)
    assert any("they are fused if the base fuses its experts" in note for note in found.notes)


# -- Unsloth -----------------------------------------------------------------------------------------------------------

MARKS = {
    "fixed": {"auto_mapping": {"unsloth_fixed": True, "base_model_class": "MixtralForCausalLM"}},
    "base": {"base_model_name_or_path": "unsloth/Mixtral-8x7B"},
}


def grouped(path: Path, **config: object) -> Path:
    """Regroup B's columns by expert, as Unsloth did before 2026-09-17.

    Also adds `config` to the folder's configuration."""
    tensors = load_file(path / "adapter_model.safetensors")
    for key in [k for k in tensors if ".experts." in k and k.endswith("lora_B.weight")]:
        tensors[key] = tensors[key].unflatten(1, (R, 4)).transpose(1, 2).flatten(1).contiguous()
    save_file(tensors, path / "adapter_model.safetensors")
    edit_json(path / "adapter_config.json", **config)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Tensor]:
    path = tmp_path_factory.mktemp("unsloth") / "a"
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    want = peft_folder(model("mixtral"), path, target_modules=["q_proj"], target_parameters=parameters, r=R)
    return path, want


def copy(made: tuple[Path, Tensor], to: Path) -> Path:
    return Path(shutil.copytree(made[0], to))


def test_unsloth_layout_in_config_is_used(made, tmp_path):
    net = model("mixtral")
    old = grouped(copy(made, tmp_path / "a"), lora_B_layout="grouped_by_expert", **MARKS["fixed"])
    torch.testing.assert_close(our_outputs(net, peft.read_folder(old, net)), made[1], rtol=1e-9, atol=1e-9)
    new = copy(made, tmp_path / "b")
    edit_json(new / "adapter_config.json", lora_B_layout="rank_major", **MARKS["fixed"])
    torch.testing.assert_close(our_outputs(net, peft.read_folder(new, net)), made[1], rtol=1e-9, atol=1e-9)
    with pytest.raises(AdapterError, match="grouped_by_expert or rank_major is expected"):
        peft.read_folder(grouped(copy(made, tmp_path / "c"), lora_B_layout="columns"), net)


@pytest.mark.parametrize("marks", MARKS)
def test_unsloth_file_without_layout_is_refused(made, tmp_path, marks):
    net = model("mixtral")
    path = grouped(copy(made, tmp_path / "a"), **MARKS[marks])
    with pytest.raises(AdapterError, match='"lora_B_layout": "grouped_by_expert" if that Unsloth trained it'):
        peft.read_folder(path, net)
    told = peft.read_folder(grouped(copy(made, tmp_path / "c"), lora_B_layout="grouped_by_expert", **MARKS[marks]), net)
    torch.testing.assert_close(our_outputs(net, told), made[1], rtol=1e-9, atol=1e-9)
    peft.write_folder(told, tmp_path / "b", base=net)
    torch.testing.assert_close(our_outputs(net, peft.read_folder(tmp_path / "b", net)), made[1], rtol=1e-9, atol=1e-9)
    config = tmp_path / "b" / "adapter_config.json"
    assert json.loads(config.read_text()).get("lora_B_layout") == ("rank_major" if marks == "base" else None)
    edit_json(config, "lora_B_layout")  # remove the key, because PEFT warns about unknown keys
    torch.testing.assert_close(peft_outputs(model("mixtral"), tmp_path / "b"), made[1], rtol=1e-9, atol=1e-9)


# -- routers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_all_linear_on_experts_includes_the_router(tmp_path, name, with_base):
    """PEFT expands "all-linear" to target_parameters that include the router's weight."""
    want = peft_folder(model(name), tmp_path / "a", target_modules="all-linear", r=R)
    assert "gate.weight" in json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_parameters"]
    net = model(name)
    base = net if with_base else None
    got = peft.read_folder(tmp_path / "a", base)
    torch.testing.assert_close(our_outputs(net, got), want, rtol=1e-9, atol=1e-9)
    for pair in [p for n, p in got.pairs.items() if n.endswith(".gate")]:  # give the router another scale and rank
        pair.scale, pair.A, pair.B = 0.25, pair.A[:1], pair.B[:, :1]
    want = our_outputs(net, got)
    peft.write_folder(got, tmp_path / "b", base=base)
    torch.testing.assert_close(peft_outputs(model(name), tmp_path / "b"), want, rtol=1e-9, atol=1e-9)
    assert not any("no effect" in note for note in peft.load_folder(tmp_path / "b", base).notes)


def test_router_without_experts_is_written_as_a_parameter(tmp_path):
    want = peft_folder(model("gpt_oss"), tmp_path / "a", target_modules=["q_proj"], target_parameters=["router.weight"])
    got = peft.read_folder(tmp_path / "a")
    torch.testing.assert_close(our_outputs(model("gpt_oss"), got), want, rtol=1e-9, atol=1e-9)
    peft.write_folder(got, tmp_path / "b")
    torch.testing.assert_close(peft_outputs(model("gpt_oss"), tmp_path / "b"), want, rtol=1e-9, atol=1e-9)


def test_transformers_4_mixtral_files_include_the_router(tmp_path):
    g = torch.Generator().manual_seed(4)
    to = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    pairs = single_pairs(model("mixtral"), "mixtral")
    for layer in range(2):
        A, B = (torch.randn(*shape, generator=g, dtype=torch.float64) / 4 for shape in ((R, 32), (4, R)))
        pairs[f"model.layers.{layer}.mlp.gate"] = A, B
    old = {}
    for name, pair in pairs.items():
        start, _, leaf = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
        old[f"{start}.{to.get(leaf, leaf)}"] = pair
    path = folder(tmp_path / "a", flat(old), target_modules=["gate", *to.values()])
    net = model("mixtral")
    got = our_outputs(net, peft.read_folder(path, net))
    torch.testing.assert_close(got, peft_outputs(model("mixtral"), path), rtol=1e-9, atol=1e-9)


def test_unmatched_target_modules_are_only_noted(tmp_path):
    """With target_parameters, PEFT only warns if target_modules matches nothing."""
    settings = {"target_modules": ["no_such"], "target_parameters": ["experts.down_proj"]}
    want = peft_folder(model("gpt_oss"), tmp_path / "a", **settings)
    net = model("gpt_oss")
    for base in (net, None):
        got = peft.load_folder(tmp_path / "a", base)
        torch.testing.assert_close(our_outputs(net, got.adapter), want, rtol=1e-9, atol=1e-9)
        assert any("'no_such'" in note and "no effect" in note for note in got.notes)


def test_selected_router_without_tensors_is_refused(tmp_path):
    peft_folder(model("mixtral"), tmp_path / "a", target_modules="all-linear", r=R)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "1.mlp.gate." not in k}, file)
    with pytest.raises(AdapterError, match=r"1\.mlp\.gate\.weight: target_parameters selects this parameter"):
        peft.read_folder(tmp_path / "a", model("mixtral"))
