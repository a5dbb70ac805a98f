"""`fast` on a CUDA device (`make test-gpu`)."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES
from tests.models.text.test_fast import attached, rows
from veneer.models.text.fast import fast
from veneer.models.text.loss import text_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fast_gradients_on_cuda_match_the_cpu(family: str, dtype: torch.dtype) -> None:
    """bfloat16 gradients are compared with those of equal weights in float32.

    The tolerance is the rounding error expected from 8 bits of precision in a small model."""
    model = FAMILIES[family]().to(torch.bfloat16).float()
    attachment = attached(model)
    ids, lengths, trained = rows()
    wanted = torch.autograd.grad(text_loss(model, ids, lengths, trained), list(attachment.parameters("a").values()))
    attachment.detach()
    model = model.to("cuda", dtype)
    attachment = attached(model)
    with fast(model) as how:
        assert how.rows, how.summary()
        loss = text_loss(model, ids.cuda(), lengths, trained.cuda())
        got = torch.autograd.grad(loss, list(attachment.parameters("a").values()))
    a, b = torch.cat([g.flatten().cpu() for g in got]), torch.cat([g.flatten() for g in wanted])
    assert (a - b).norm() <= (1e-3 if dtype == torch.float32 else 0.5) * b.norm()


def test_a_step_of_fused_adamw_in_bfloat16_lowers_the_loss() -> None:
    model = FAMILIES["llama3"]().to("cuda", torch.bfloat16)
    attachment = attached(model)
    parameters = list(attachment.parameters("a").values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    ids, lengths, trained = rows()
    losses = []
    with fast(model):
        for _ in range(8):
            loss = text_loss(model, ids.cuda(), lengths, trained.cuda())
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
