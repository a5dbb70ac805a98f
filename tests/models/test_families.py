"""The tiny models that the other tests stand on are what they claim to be."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, MOE_FAMILIES, OTHERS, VOCAB
from tests.tiny_base import tiny_base_dir, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
def test_same_weights_each_time_and_global_random_state_untouched(family: str) -> None:
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    one, two = (FAMILIES | OTHERS)[family](), (FAMILIES | OTHERS)[family]()
    assert torch.equal(torch.rand(3), expected_next)
    left, right = one.state_dict(), two.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
def test_forward_is_finite_and_every_parameter_matters(family: str) -> None:
    model = (FAMILIES | OTHERS)[family]()
    assert not model.training
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    assert logits.shape == (2, 24, VOCAB)
    assert torch.isfinite(logits).all()
    logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_moe_families_hold_fused_expert_parameters(family: str) -> None:
    fused = {n: p.shape for n, p in FAMILIES[family]().named_parameters() if p.dim() == 3}
    assert {n.rsplit(".", 1)[1] for n in fused} == {"gate_up_proj", "down_proj"}


def test_tiny_tokenizer_returns_any_text_and_frames_chat_turns() -> None:
    tokenizer = tiny_tokenizer()
    for text in ["hello there", "naïve 🙂 漢字", ' {"a":\n 1} ']:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert turn.endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_tiny_base_loads_with_transformers(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_base_dir(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.eos_token == "<|im_end|>"
