"""A whole step of a language model with every kernel in its place is the padded reference's: loss and gradients."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES, OTHERS
from tests.models.text.test_fast import LENGTHS, attached, gradients
from veneer.models.text.fast import fast
from veneer.ops.cuda.launch import recorded

_SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "qwen3_moe", "gemma2", "gpt_oss")]


@pytest.mark.parametrize("family", ["llama3", *_SLOW])
def test_a_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = (FAMILIES | OTHERS)[family]()
    attachment = attached(model)
    model.eval()
    with monkeypatch.context() as patch:
        patch.setattr("veneer.ops.dispatch.DEVICE", "torch")
        slow = gradients(model, attachment)
    with fast(model) as how:
        assert how.rows, how.summary()
        with recorded() as launches:
            quick = gradients(model, attachment)
    ran = {each.name for each in launches}
    assert {"rms_norm", "rms_norm_backward"} <= ran
    assert family in ("gpt_oss", "qwen3_moe") or {"gate", "gate_backward"} <= ran
    assert family == "gemma2" or "token_nll" in ran  # its logits are capped
    assert family not in ("gemma3", "qwen3_moe") or {"norm_turn", "norm_turn_backward"} <= ran
    assert {"attend", "attend_of_q", "attend_of_kv"} <= ran
    assert len(LENGTHS) == 3
    for a, b in zip(quick, slow, strict=True):
        assert (a - b).norm() <= 3e-5 * b.norm() + 1e-7
