"""Exports for vLLM, TGI and llama.cpp have a single rank, scale 1 and an unchanged effect."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.image_adapters import by_hand, numbers
from tests.formats.twins import model, our_outputs, outputs, peft_outputs, random_adapter
from veneer.core.adapter import Adapter, LoraSpec, Pair, TokenRows
from veneer.core.forms import Delta
from veneer.core.init import create
from veneer.errors import AdapterError
from veneer.formats.card import read_card
from veneer.formats.convert import encode, write
from veneer.formats.gguf import read_gguf
from veneer.formats.read import read
from veneer.formats.server_export import folded

Q, K = (f"model.layers.0.self_attn.{p}_proj" for p in "qk")
EMBED, HEAD = "model.embed_tokens", "lm_head"
PATTERNS = LoraSpec(rank=4, alpha=6, rank_pattern={"q_proj": 2, "down_proj": 3}, alpha_pattern={"v_proj": 7})


def mixed_rank_adapter(net: torch.nn.Module) -> Adapter:
    """Return a random adapter with ranks 2 to 4 and varied scales."""
    return random_adapter(create(net, PATTERNS, seed=0)).mapped(lambda t: t.to(next(net.parameters()).dtype))


def test_vllm_folder_has_one_rank_and_scale_one(tmp_path):
    net = model("llama3")
    adapter = mixed_rank_adapter(net)
    written = write(adapter, tmp_path / "it", "vllm")
    config = json.loads((tmp_path / "it" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (4, 4, False, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert written.ranks == {4: len(adapter.pairs)}
    card = read_card(tmp_path / "it").card
    assert (card.rank, card.alpha) == (4, 4.0)
    assert "--max-lora-rank 8" in written.notes[0]
    ours = our_outputs(net, adapter)
    assert (ours - outputs(net)).abs().max() > 0.1
    torch.testing.assert_close(peft_outputs(net, tmp_path / "it"), ours, rtol=1e-9, atol=1e-9)
    assert read(tmp_path / "it").adapter.digest() == written.digest


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0.01, 100), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_folding_changes_no_effect(pairs, dtype):
    adapter = Adapter()
    for i, (r, s, power) in enumerate(pairs):
        scale, kind = (2.0 ** round(s / 25), "embedding") if power else (s, "linear")
        A, B = numbers((r, 6), f"A{i}", dtype), numbers((4, r), f"B{i}", dtype)
        adapter.pairs[f"m.{i}"] = Pair(A, B, scale, kind)
    out = folded(adapter)
    assert {p.rank for p in out.pairs.values()} == {max(p.rank for p in adapter.pairs.values())}
    for name, pair in out.pairs.items():
        before = adapter.pairs[name]
        assert (pair.scale, pair.kind) == (1.0, before.kind)
        if before.kind == "embedding":  # the scale is a power of two, so B keeps its dtype
            assert pair.B.dtype == dtype
        want = by_hand(before)
        assert (by_hand(pair) - want).norm() <= 6e-8 * want.norm() * before.rank


UNSERVED_CHANGES = [
    (
        {"pairs": {Q: Pair(numbers((2, 4), "A"), numbers((6, 2), "B"), 1, magnitude=torch.ones(6))}},
        "does not support DoRA",
    ),
    ({"pairs": {Q: Pair(numbers((2, 4, 3), "A"), numbers((6, 2, 1), "B"), 1, "conv")}}, "convolution"),
    ({"pairs": {Q: Pair(numbers((3, 2, 4), "A"), numbers((3, 6, 2), "B"), 1, "experts")}}, "experts"),
    ({"deltas": {f"{Q}.bias": Delta("dense", {"value": torch.ones(6)}, (6,))}}, "dense change of the bias"),
    ({"modules": {Q: {"weight": torch.ones(6, 4)}}}, "does not load full copies"),
    ({"token_rows": {EMBED: TokenRows((1,), torch.ones(1, 4))}}, "token rows"),
    ({"pairs": {"unet.conv_in": Pair(numbers((2, 4), "A"), numbers((6, 2), "B"), 1)}}, "serves language models"),
]


@pytest.mark.parametrize(("change", "why"), UNSERVED_CHANGES)
@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_changes_that_need_a_merge_are_refused(to, change, why):
    name = next(iter(next(iter(change.values()))))
    adapter = Adapter({K: Pair(numbers((2, 4), "A"), numbers((6, 2), "B"), 1)})
    for what, value in change.items():
        getattr(adapter, what).update(value)
    with pytest.raises(AdapterError, match=why) as refusal:
        encode(adapter, to, family="llama")
    assert name.removesuffix(".bias") in refusal.value.what
    assert "merge it" in str(refusal.value)
    assert K not in refusal.value.what


VLLM_LIMITS = [
    (Pair(torch.ones(600, 4), torch.ones(6, 600), 1), Q, "ranks up to 512"),
    (Pair(torch.ones(1, 5), torch.ones(6, 1), 1, "embedding"), "transformer_wte", "embed_tokens"),
    (Pair(torch.ones(1, 5), torch.ones(258_049, 1), 1), HEAD, "at most 258,048 rows"),
]


@pytest.mark.parametrize(("pair", "name", "why"), VLLM_LIMITS)
def test_vllms_own_limits(pair, name, why):
    with pytest.raises(AdapterError, match=why):
        encode(Adapter({name: pair}), "vllm")


def test_gguf_has_one_rank_and_survives_a_round_trip(tmp_path):
    net = model("llama3", torch.float32)
    adapter = mixed_rank_adapter(net)
    adapter.pairs[EMBED] = Pair(numbers((3, 160), "A"), numbers((32, 3), "B"), 0.75, "embedding")
    out = tmp_path / "it.gguf"
    written = write(adapter, out, "gguf", family="llama", head_dim=8)
    assert list(tmp_path.iterdir()) == [out]
    found = read_gguf(out)
    assert found.fields["adapter.lora.alpha"] == 4.0
    assert {p.rank for p in found.adapter.pairs.values()} == {4}
    assert written.ranks == {4: len(adapter.pairs)}
    assert found.adapter.digest() == written.digest
    torch.testing.assert_close(our_outputs(net, found.adapter), our_outputs(net, adapter), rtol=1e-5, atol=1e-5)
    encoded = encode(adapter, "gguf", family="llama", head_dim=8)
    assert encoded.metadata["general.architecture"] == "llama"
    assert encoded.tensors["blk.0.attn_q.weight.lora_a"].shape == (4, 32)
    assert write(adapter, tmp_path / "two.gguf", "gguf", family="llama", head_dim=8).digest == written.digest


def test_gguf_without_architecture_writes_nothing(tmp_path):
    adapter = Adapter({Q: Pair(numbers((2, 4), "A"), numbers((6, 2), "B"), 1)})
    with pytest.raises(AdapterError, match="architecture"):
        write(adapter, tmp_path / "it.gguf", "gguf")
    with pytest.raises(AdapterError, match="heads of an unknown size"):
        write(adapter, tmp_path / "it.gguf", "gguf", family="llama")
    assert not list(tmp_path.iterdir())
