"""A server's steps on a GPU that is not there: the host reads the chosen tokens and nothing else, and the bytes are
those of the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from tests.families import FAMILIES
from veneer.errors import ConfigError
from veneer.plan.serving import Traffic
from veneer.plan.tables import base_config
from veneer.serve.traced import traced_serving

pytestmark = pytest.mark.usefixtures("gpu_that_is_not_there")

FEW = Traffic(prompt=40, answer=20, together=6, tenants=3)


@pytest.mark.parametrize(("family", "quantise"), [("llama3", None), ("qwen3", "nf4"), ("qwen3_moe", None)])
def test_a_step_reads_the_chosen_tokens_and_waits_for_nothing_else(family: str, quantise: str | None) -> None:
    found = traced_serving(FAMILIES[family]().config.to_dict(), FEW, rank=4, quantise=quantise)
    assert not found.waits
    assert sum(found.trace.waits.values()) == 2, found.trace.waits  # of a step that decodes, and one with prompts
    assert found.ways.startswith("packed" if family == "qwen3_moe" else "fused")
    for part in ("weights", "keys and values", "adapters"):
        assert found.trace.at_peak[part] > 0
    assert "served, traced: " in found.text()
    assert ("recorded steps, counted" in found.text()) == (family != "qwen3_moe")


def test_what_comes_beside_the_base_is_as_it_is_counted() -> None:
    narrow = {
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32000,
    }
    traffic = Traffic(prompt=600, answer=100, together=16, tenants=8)
    found = traced_serving({**base_config("meta-llama/Llama-3.1-8B"), **narrow}, traffic)
    assert found.counted is not None
    assert found.trace.at_peak["keys and values"] == found.counted.cache
    assert found.trace.at_peak["adapters"] == pytest.approx(found.counted.adapter, rel=0.01)
    assert found.trace.at_peak["weights"] == pytest.approx(found.counted.weights, rel=0.01)
    assert abs(found.off) < 0.05, (found.trace.at_peak, found.counted)


def test_fewer_tenants_than_requests_share_their_adapters() -> None:
    config = FAMILIES["llama3"]().config.to_dict()
    some, all_own = (traced_serving(config, replace(FEW, tenants=n), rank=4).trace.at_peak for n in (2, 9))
    assert all_own["adapters"] == 3 * some["adapters"]


def test_a_base_whose_sequences_run_alone_is_not_traced() -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"head_dim": 16, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("gpt_oss", vocab_size=300, pad_token_id=0, **small).to_dict()
    with pytest.raises(ConfigError, match="each sequence of this base alone"):
        traced_serving(config, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantise", "tenants"),
    [
        ("meta-llama/Llama-3.1-8B", None, 32),
        ("meta-llama/Llama-3.1-70B", "nf4", 32),
        ("mistralai/Mistral-Large-Instruct-2407", "nf4", 32),
        ("meta-llama/Llama-4-Scout-17B-16E", None, 2),
        ("Qwen/Qwen3-30B-A3B", None, 2),
    ],
)
def test_at_true_size_counted_and_traced_agree(name: str, quantise: str | None, tenants: int) -> None:
    found = traced_serving(base_config(name), Traffic(tenants=tenants), quantise=quantise)
    assert not found.waits
    assert all("/sampler.py" in place for place in found.trace.wide), found.trace.wide  # scores that are drawn from
    assert abs(found.off) < 0.05, (found.trace.at_peak, found.counted)
