"""The peak memory predicted by the plan for CUDA, compared with the peak that torch allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.models.text.fast import fast
from veneer.models.text.loss import text_loss
from veneer.plan.memory import Load, text_memory
from veneer.plan.shape import model_shape
from veneer.plan.tables import device_named

SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("rows", "length", "rank"), [(4, 512, 16), (1, 2048, 64), (8, 256, 8)])
def test_the_peak_is_within_a_tenth(rows: int, length: int, rank: int, checkpointing: bool) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = LlamaConfig(**SIZES, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().requires_grad_(False)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = torch.ones(rows, length, dtype=torch.bool)
    trained[:, 0] = False
    with attach(model) as attachment:
        attachment.add("a", create(model, LoraSpec(rank=rank), seed=0), trainable=True)
        attachment.use("a")
        optimizer = torch.optim.AdamW(list(attachment.parameters("a").values()), lr=1e-4, fused=True)
        with fast(model):
            for _ in range(3):
                ids = torch.randint(3, 32000, (rows * length,)).cuda()
                loss = text_loss(model, ids, [length] * rows, trained.flatten().cuda()) / trained.sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    load = Load((length,) * rows, rank=rank, checkpointing=checkpointing)
    counted = text_memory(model_shape(model), load, device_named("h100-80gb"))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(counted.peak - counted.context - counted.rounding, rel=0.1)
