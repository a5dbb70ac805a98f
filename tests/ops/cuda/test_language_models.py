"""A whole step of a language model with every kernel in its place is the padded reference's: loss and gradients."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES
from tests.models.text.test_fast import LENGTHS, attached, gradients
from veneer.models.text.fast import fast
from veneer.ops import choice
from veneer.ops.cuda.launch import recorded


@pytest.mark.parametrize("family", ["llama3", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[family]()
    attachment = attached(model)
    model.eval()
    with monkeypatch.context() as patch:
        patch.setattr(choice, "PINNED", "torch")
        slow = gradients(model, attachment)
    with fast(model) as how:
        assert how.rows, how.summary()
        with recorded() as launches:
            quick = gradients(model, attachment)
    ran = {each.name for each in launches}
    assert {"rms_norm", "rms_norm_backward", "gate", "gate_backward", "token_nll"} <= ran
    assert {"attend", "attend_of_q", "attend_of_kv"} <= ran
    assert len(LENGTHS) == 3
    for a, b in zip(quick, slow, strict=True):
        assert (a - b).norm() <= 3e-5 * b.norm() + 1e-7
