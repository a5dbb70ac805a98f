"""Trained biases (`bias = "lora_only"` or `"all"`) are read, mixed, merged and written."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, Qwen2Config

from tests.attached import attached, holding
from tests.families import VOCAB, build
from tests.formats.twins import our_outputs, outputs, peft_folder, peft_outputs
from veneer.adapters import mix as mixing
from veneer.core.adapter import Adapter
from veneer.core.attach import attach
from veneer.core.forms import Delta
from veneer.core.merge import merged_state
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.convert import write
from veneer.formats.read import read

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2() -> torch.nn.Module:
    """Return a model with biases on q, k and v."""
    return _moved(build(Qwen2Config(vocab_size=VOCAB, num_key_value_heads=1, **SMALL)).double().eval())


def gpt2() -> torch.nn.Module:
    """Return a model that also has biases on norms and on transposed linear layers."""
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return _moved(build(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, **ids)).double())


def _moved(net: torch.nn.Module) -> torch.nn.Module:
    """Return the model with random values added to its biases, as if trained."""
    g = torch.Generator().manual_seed(4)
    for name, p in sorted(net.named_parameters()):
        if name.endswith("bias"):
            p.data.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net.eval()


CASES = {
    "of the targets": (qwen2, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "all, each on a target": (qwen2, {"target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "all"}),
    "all, beside the targets": (qwen2, {"target_modules": ["q_proj"], "bias": "all"}),
    "norms and transposed linears": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "with DoRA": (qwen2, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "use_dora": True}),
    "with a module saved whole": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_trained_biases_match_peft_logits(tmp_path, case):
    make, config = CASES[case]
    want = peft_folder(make(), tmp_path / "in", **config)
    without = peft.read_folder(tmp_path / "in", make())
    assert any(d.form == "replacement" for d in without.deltas.values())
    torch.testing.assert_close(our_outputs(make(), without), want, **EXACT)
    without.deltas = {}
    assert (our_outputs(make(), without) - want).abs().max() > 0.01  # the biases have an effect

    read_ = read(tmp_path / "in")
    write(read_.adapter, tmp_path / "out", "peft")
    torch.testing.assert_close(peft_outputs(make(), tmp_path / "out"), want, **EXACT)
    assert read(tmp_path / "out").adapter.digest() == read_.adapter.digest()

    merged = make()
    merged.load_state_dict(merged_state(merged, [(read_.adapter, 1.0)]), strict=False)
    torch.testing.assert_close(outputs(merged), want, rtol=1e-6, atol=1e-6)


def test_strength_interpolates_a_trained_bias(tmp_path):
    """The bias becomes W + s·(value − W), as for every other change.

    PEFT has no such strength, so the expected bias is computed here."""
    peft_folder(qwen2(), tmp_path / "in", target_modules=["q_proj", "v_proj"], bias="lora_only")
    adapter, net = peft.read_folder(tmp_path / "in"), qwen2()
    assert len(adapter.deltas) == 4
    with attached(net, adapter, 0.25):
        got = outputs(net)
    byhand = qwen2()
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            own = byhand.get_parameter(name)
            own += 0.25 * (delta.parts["value"] - own)
        for name, pair in adapter.pairs.items():
            byhand.get_submodule(name).weight += 0.25 * pair.scale * pair.B @ pair.A
    torch.testing.assert_close(got, outputs(byhand), rtol=1e-6, atol=1e-6)


def test_a_mix_is_exact_without_the_base(tmp_path):
    for seed, name in enumerate("ab"):
        peft_folder(qwen2(), tmp_path / name, target_modules=["q_proj"], bias="lora_only", r=seed + 2)
    a, b = (peft.read_folder(tmp_path / n) for n in "ab")
    assert len(a.deltas) == len(b.deltas) == 2
    for delta in b.deltas.values():
        delta.parts["value"] = delta.parts["value"] * 3
    peft.write_folder(b, tmp_path / "b")
    mixing.mix_adapters([f"{tmp_path / 'a'}:0.25", f"{tmp_path / 'b'}:0.75"], tmp_path / "out")
    net = qwen2()
    with holding(net, a=a, b=b) as attachment:
        attachment.use(("a", 0.25), ("b", 0.75))
        want = outputs(net)
    torch.testing.assert_close(peft_outputs(qwen2(), tmp_path / "out"), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_target_layout_without_biases_is_refused(tmp_path, to):
    peft_folder(qwen2(), tmp_path / "in", target_modules=["q_proj"], bias="lora_only")
    given = {"family": "qwen2"} if to == "gguf" else {}
    with pytest.raises(AdapterError, match="does not support a replacement change of the bias; merge it into the base"):
        write(read(tmp_path / "in").adapter, tmp_path / "out.gguf" if to == "gguf" else tmp_path / "out", to, **given)


def test_scaled_trained_bias_cannot_be_written_to_peft(tmp_path):
    peft_folder(qwen2(), tmp_path / "in", target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(AdapterError, match=r"a trained bias at a strength of 0\.5"):
        mixing.mix_adapters([f"{tmp_path / 'in'}:0.5"], tmp_path / "out")


def test_biases_of_another_shape_are_refused(tmp_path):
    peft_folder(qwen2(), tmp_path / "in", target_modules=["q_proj"], bias="lora_only")
    found = peft.load_folder(tmp_path / "in")
    tensors = dict(peft.encode_folder(found.adapter)[1])
    key = next(k for k in tensors if k.endswith(".base_layer.bias"))
    with pytest.raises(AdapterError, match="one value for each of 16 outputs is expected"):
        peft.interpret(found.config, tensors | {key: tensors[key][:-1]})
    none = Adapter(deltas={"model.norm.bias": Delta("replacement", {"value": torch.ones(16)}, (16,))})
    with pytest.raises(AdapterError, match="has no 'bias'"), attach(qwen2()) as attachment:
        attachment.add("a", none)


def test_peft_reads_the_written_bias_switch(tmp_path):
    for bias in ("lora_only", "all"):
        peft_folder(gpt2(), tmp_path / bias, target_modules=["c_attn"], bias=bias)
        write(read(tmp_path / bias).adapter, tmp_path / f"{bias}-out", "peft")
        assert json.loads((tmp_path / f"{bias}-out" / "adapter_config.json").read_text())["bias"] == bias
        assert (peft_outputs(gpt2(), tmp_path / f"{bias}-out") - outputs(gpt2())).abs().max() > 0.01
