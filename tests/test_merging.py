"""A mix folded into new weights computes what the attached mix does, and the base stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.formats.twins import model, our_outputs, outputs, random_adapter
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError
from veneer.merging import Merged, merged_model

SPECS = {
    "llama": ("llama3", LoraSpec(rank=4, alpha=8)),
    "dora": ("llama3", LoraSpec(rank=4, alpha=8, targets=("q_proj",), dora=True)),
    "tied embedding": ("llama3", LoraSpec(rank=4, alpha=8, targets=("embed_tokens",))),
    "tied head": ("llama3", LoraSpec(rank=4, alpha=8, targets=("lm_head",))),
    "token rows, tied": ("llama3", LoraSpec(targets=(), token_rows={"embed_tokens": (1, 9)})),
    "full copies": ("mistral", LoraSpec(rank=2, alpha=4, modules_to_save=("lm_head", "model.norm"))),
    "mixtral": ("mixtral", LoraSpec(rank=2, alpha=4)),
    "llama 4": ("llama4", LoraSpec(rank=2, alpha=4)),
    "phi": ("phi3", LoraSpec(rank=2, alpha=4)),
    "gemma": ("gemma3", LoraSpec(rank=2, alpha=4, targets=("embed_tokens", "q_proj"))),
}


@pytest.mark.parametrize("case", SPECS)
def test_the_merged_model_saved_and_loaded_computes_what_the_attached_one_does(tmp_path, case):
    name, spec = SPECS[case]
    net = model(name)
    before = copy.deepcopy(net.state_dict())
    adapter = random_adapter(create(net, spec, seed=0, dtype=torch.float64))
    want = our_outputs(net, adapter)
    report = Merged()
    merged = merged_model(net, [(adapter, 1.0)], torch.float64, report)
    merged.save_pretrained(tmp_path / "m")
    again = type(net).from_pretrained(tmp_path / "m", dtype=torch.float64, experts_implementation="eager").eval()
    torch.testing.assert_close(outputs(again), want, rtol=1e-6, atol=1e-6)
    assert report.delta_error < 1e-6
    assert report.untied == (case in ("tied embedding", "tied head", "gemma"))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_mix_is_the_sum_of_its_parts():
    net = model("llama3")
    one, two = (random_adapter(create(net, LoraSpec(rank=2, alpha=4), seed=s, dtype=torch.float64), s) for s in (1, 2))
    mixed = merged_model(net, [(one, 0.5), (two, -1.0)], torch.float64)
    name = "model.layers.0.mlp.down_proj.weight"
    base, pairs = net.state_dict()[name], [a.pairs[name.removesuffix(".weight")] for a in (one, two)]
    want = base + 0.5 * pairs[0].scale * pairs[0].B @ pairs[0].A - pairs[1].scale * pairs[1].B @ pairs[1].A
    torch.testing.assert_close(mixed.state_dict()[name], want, rtol=1e-12, atol=1e-12)


def test_sixteen_bits_are_rounded_once_from_the_exact_sum():
    net = model("llama3", torch.float32)
    adapter = random_adapter(create(net, LoraSpec(rank=2, alpha=4, targets=("q_proj",)), seed=0))
    merged = merged_model(net, [(adapter, 1.0)], torch.bfloat16)
    for name, pair in adapter.pairs.items():
        exact = net.get_submodule(name).weight + pair.scale * (pair.B @ pair.A)
        assert torch.equal(merged.get_submodule(name).weight, exact.to(torch.bfloat16))
    assert {t.dtype for t in merged.state_dict().values()} == {torch.bfloat16}


def test_the_report_says_how_much_of_a_small_delta_is_left():
    net = model("llama3", torch.bfloat16)
    adapter = random_adapter(create(net, LoraSpec(rank=2, alpha=4, targets=("q_proj",)), seed=0))
    reports = {}
    for strength in (1.0, 1e-2, 1e-4, 1e-7):
        merged_model(net, [(adapter, strength)], torch.bfloat16, reports.setdefault(strength, Merged()))
    shares = [r.changed for r in reports.values()]
    errors = [r.delta_error for r in reports.values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.01
    assert errors[0] < 0.05
    assert errors[-1] > 0.5
    # by hand, for one of them
    merged = merged_model(net, [(adapter, 1e-2)], torch.bfloat16)
    error = size = 0.0
    for name, pair in adapter.pairs.items():
        delta = 1e-2 * pair.scale * (pair.B @ pair.A)
        kept = (merged.get_submodule(name).weight.float() - net.get_submodule(name).weight.float()).detach()
        error, size = error + float((kept - delta).square().sum()), size + float(delta.square().sum())
    assert reports[1e-2].delta_error == pytest.approx((error / size) ** 0.5, rel=1e-3)


def test_what_does_not_fit_into_float16_is_refused():
    net = model("llama3", torch.float32)
    adapter = create(net, LoraSpec(rank=2, alpha=4, targets=("q_proj",)), seed=0)
    for pair in adapter.pairs.values():
        pair.B += 1e6
    with pytest.raises(AdapterError, match="do not fit into"):
        merged_model(net, [(adapter, 1.0)], torch.float16)
