"""PEFT and veneer read each other's folders with equal outputs, for every variant.

Outputs are compared in float64, so that rounding cannot hide a wrong scale, order or sign."""

from __future__ import annotations

import json

import pytest
import torch

from tests.formats.twins import model, our_outputs, outputs, peft_folder, peft_outputs, random_adapter
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.formats import peft

TOLERANCE = 1e-9
Q_V = ["q_proj", "v_proj"]
FUSED = ["experts.gate_up_proj", "experts.down_proj"]

FROM_PEFT = {
    "linear": ("llama3", {"target_modules": Q_V}),
    "every projection": ("llama3", {"target_modules": "all-linear"}),
    "a regular expression": ("llama3", {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "fused projections": ("phi3", {"target_modules": "all-linear"}),
    "gemma": ("gemma3", {"target_modules": "all-linear"}),
    "rslora": ("llama3", {"target_modules": Q_V, "use_rslora": True, "r": 6, "lora_alpha": 5}),
    "bias of the pair": ("llama3", {"target_modules": Q_V, "lora_bias": True}),
    "dropout": ("llama3", {"target_modules": Q_V, "lora_dropout": 0.3}),
    "rank pattern": ("llama3", {"target_modules": Q_V, "r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}}),
    "both patterns": (
        "llama3",
        {
            "target_modules": Q_V,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3, "q_proj": 5},
            "alpha_pattern": {r"layers\.1\..*": 7, "v_proj": 11},
        },
    ),
    "patterns with rslora": ("llama3", {"target_modules": Q_V, "rank_pattern": {"v_proj": 3}, "use_rslora": True}),
    "dora": ("llama3", {"target_modules": Q_V, "use_dora": True}),
    "dora with rslora": ("qwen3", {"target_modules": Q_V, "use_dora": True, "use_rslora": True}),
    "head": ("mistral", {"target_modules": ["lm_head", "q_proj"]}),
    "tied head": ("llama3", {"target_modules": ["lm_head"]}),
    "embedding": ("llama3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding of an untied base": ("mistral", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding and its tied head": ("llama3", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "v_proj"]}),
    "dora on an embedding": ("mistral", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "layers": ("llama3", {"target_modules": Q_V, "layers_to_transform": [1]}),
    "layers by pattern": ("llama3", {"target_modules": Q_V, "layers_to_transform": 0, "layers_pattern": "layers"}),
    "excluded": ("llama3", {"target_modules": Q_V, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded by regex": ("llama3", {"target_modules": Q_V, "exclude_modules": r".*layers\.0.*"}),
    "full copies": ("mistral", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "a block as a full copy": ("mistral", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "token rows": ("mistral", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 9]}),
    "token rows, tied": ("llama3", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}),
    "token rows by name": (
        "mistral",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 4]}},
    ),
    "bias that no module has": ("llama3", {"target_modules": Q_V, "bias": "all"}),
    "gaussian": ("llama3", {"target_modules": Q_V, "init_lora_weights": "gaussian"}),
    "convolutions": ("conv", {"target_modules": ["conv1", "conv2", "point", "out", "table"], "r": 3}),
    "dora on convolutions": ("conv", {"target_modules": ["conv1", "conv2", "point", "out"], "use_dora": True}),
    "mixtral experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": FUSED, "r": 3}),
    "mixtral, one parameter": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}),
    "mixtral, other parameter": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "mixtral experts, patterns": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": FUSED,
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"model.layers.1.mlp.experts.gate_up_proj": 3},
        },
    ),
    "qwen experts": ("qwen3_moe", {"target_modules": Q_V, "target_parameters": FUSED}),
    "llama 4 experts": ("llama4", {"target_modules": ["q_proj"], "target_parameters": FUSED, "r": 3}),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_peft_folders_round_trip_with_equal_outputs(tmp_path, case):
    """Reading gives the same adapter with and without a base."""
    name, config = FROM_PEFT[case]
    want = peft_folder(model(name), tmp_path / "a", **config)
    net = model(name)
    plain = outputs(net)
    adapter = peft.read_folder(tmp_path / "a", net)
    assert (want - plain).abs().max() > 1e-3, "the adapter must matter"
    torch.testing.assert_close(our_outputs(net, adapter), want, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(outputs(net), plain)
    for base in (None, [n for n, _ in net.named_modules() if n]):
        assert peft.read_folder(tmp_path / "a", base).digest() == adapter.digest()
    peft.write_folder(adapter, tmp_path / "b", base=net, task_type=None)
    torch.testing.assert_close(peft_outputs(model(name), tmp_path / "b"), want, rtol=TOLERANCE, atol=TOLERANCE)
    assert {peft.read_folder(tmp_path / "b", base).digest() for base in (net, None)} == {adapter.digest()}


SPECS = {
    "all linear": ("llama3", LoraSpec(rank=4, alpha=8)),
    "phi": ("phi3", LoraSpec(rank=4, alpha=8)),
    "gemma with its embedding": ("gemma3", LoraSpec(rank=4, alpha=8, targets=("embed_tokens", "q_proj"))),
    "rslora": ("llama3", LoraSpec(rank=5, alpha=7, rslora=True)),
    "patterns": (
        "llama3",
        LoraSpec(
            rank=4,
            alpha=8,
            targets=("q_proj", "k_proj", "down_proj"),
            rank_pattern={"k_proj": 2, "layers.0.self_attn.q_proj": 6},
            alpha_pattern={"down_proj": 3.5, "layers.1.self_attn.q_proj": 1},
        ),
    ),
    "some layers": ("llama3", LoraSpec(rank=4, alpha=8, targets=("q_proj",), layers=(1,))),
    "excludes": ("llama3", LoraSpec(rank=4, alpha=8, exclude=("layers.0.mlp.up_proj",))),
    "dora": ("llama3", LoraSpec(rank=4, alpha=8, targets=("q_proj", "down_proj"), dora=True)),
    "pissa": ("llama3", LoraSpec(rank=4, alpha=8, targets=("q_proj", "v_proj"), init="pissa")),
    "pissa with rslora": ("llama3", LoraSpec(rank=3, alpha=7, targets=("q_proj",), init="pissa", rslora=True)),
    "olora": ("llama3", LoraSpec(rank=4, alpha=8, targets=("q_proj", "v_proj"), init="olora")),
    "head": ("mistral", LoraSpec(rank=4, alpha=8, targets=("lm_head", "q_proj"))),
    "tied head": ("llama3", LoraSpec(rank=4, alpha=8, targets=("lm_head", "q_proj"))),
    "full copies": ("mistral", LoraSpec(rank=4, alpha=8, modules_to_save=("lm_head", "model.norm"))),
    "token rows": ("mistral", LoraSpec(rank=4, alpha=8, token_rows={"embed_tokens": (1, 9)})),
    "token rows, tied": ("llama3", LoraSpec(rank=4, alpha=8, token_rows={"embed_tokens": (1, 9)})),
    "full copies alone": ("mistral", LoraSpec(targets=(), modules_to_save=("lm_head",))),
    "token rows alone": ("llama3", LoraSpec(targets=(), token_rows={"embed_tokens": (4,)})),
    "convolutions": ("conv", LoraSpec(rank=3, alpha=5, targets=("conv1", "conv2", "point", "table", "out"))),
    "dora on convolutions": ("conv", LoraSpec(rank=3, alpha=5, targets=("conv1", "conv2", "out"), dora=True)),
    "mixtral": ("mixtral", LoraSpec(rank=3, alpha=6)),
    "mixtral, one parameter": ("mixtral", LoraSpec(rank=3, alpha=6, targets=("experts.down_proj",))),
    "mixtral, one layer of one": ("mixtral", LoraSpec(rank=3, alpha=6, targets=("layers.1.mlp.experts.gate_up_proj",))),
    "mixtral, ranks": ("mixtral", LoraSpec(rank=3, alpha=6, rslora=True, rank_pattern={"experts.down_proj": 2})),
    "qwen experts": (
        "qwen3_moe",
        LoraSpec(rank=3, alpha=6, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj")),
    ),
    "llama 4": ("llama4", LoraSpec(rank=3, alpha=6)),
}


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("case", SPECS)
def test_written_folders_have_equal_outputs_in_peft(tmp_path, case, with_base):
    name, spec = SPECS[case]
    net = model(name)
    adapter = random_adapter(create(net, spec, seed=0, dtype=torch.float64))
    want = our_outputs(net, adapter)
    assert (want - outputs(net)).abs().max() > 1e-3, "the adapter must matter"
    peft.write_folder(adapter, tmp_path / "a", base=net if with_base else None, task_type=None)
    torch.testing.assert_close(peft_outputs(model(name), tmp_path / "a"), want, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(
        our_outputs(net, peft.read_folder(tmp_path / "a", net)), want, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_float32_pairs_on_a_bfloat16_base_round_trip(tmp_path):
    """This is the usual combination; the pairs must be restored bit for bit."""
    peft_folder(model("llama3", torch.bfloat16), tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    adapter = peft.read_folder(tmp_path / "a", model("llama3", torch.bfloat16))
    assert {t.dtype for _, t in adapter.tensors()} == {torch.float32}
    peft.write_folder(adapter, tmp_path / "b", base=model("llama3", torch.bfloat16))
    assert peft.read_folder(tmp_path / "b").digest() == adapter.digest()
    peft_outputs(model("llama3", torch.bfloat16), tmp_path / "b")


def test_pissa_converted_by_peft_on_saving_is_read(tmp_path):
    import warnings

    from peft import LoraConfig, PeftModel, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=["q_proj"], r=3, lora_alpha=5, init_lora_weights="pissa")
        net = get_peft_model(model("llama3", torch.float32), config)
        net.peft_config["default"].init_lora_weights = True
        net.save_pretrained(str(tmp_path / "start"))
        net.peft_config["default"].init_lora_weights = "pissa"
        generator = torch.Generator().manual_seed(0)
        for _, p in sorted(net.named_parameters()):
            if p.requires_grad:
                p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        want = outputs(net.eval())
        net.save_pretrained(str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        assert isinstance(net, PeftModel)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 6
    base = model("llama3", torch.float32)
    torch.testing.assert_close(our_outputs(base, peft.read_folder(tmp_path / "a", base)), want, rtol=1e-4, atol=1e-5)
