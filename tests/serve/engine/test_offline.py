"""Offline completions equal those of `complete`, whether or not the engine can run the base."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn

from tests import families
from tests.serve.forward.test_runner import base_of, trained
from tests.tiny_base import VOCAB_SIZE
from veneer.core.attach import attach
from veneer.core.forms import Delta
from veneer.errors import DataError
from veneer.models.text.generate import Completion, complete
from veneer.ops.quantized import quantize
from veneer.serve.engine import offline
from veneer.serve.engine.engine import TextEngine
from veneer.serve.engine.offline import answering

PROMPTS = [
    "The printer",
    "a",
    "I was charged twice for the same invoice; please",
    "How do I reset my password? The link",
]
MIX = [("one", 1.0), ("two", -0.5)]


def model_of(family: str) -> Any:
    build: Any = {**families.FAMILIES, **families.OTHERS}[family]
    return build(vocab_size=VOCAB_SIZE)


def both_ways(model: Any, adapters: dict[str, Any], mix: list[tuple[str, float]]) -> tuple[list[Completion], ...]:
    """Return the completions of `complete` and of `answering`, both with the same mix."""
    base = base_of(model)
    with attach(model) as attachment:
        for name, adapter in adapters.items():
            attachment.add(name, adapter)
        with answering(base, adapters, rows=2) as answer:
            attachment.use(*mix)
            got = answer(PROMPTS, mix, max_new_tokens=9)
        return complete(base, PROMPTS, max_new_tokens=9), got


@pytest.mark.parametrize("mix", [[], [("one", 1.0)], MIX])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3"])
def test_answers_equal_the_models(family: str, mix: list[tuple[str, float]]) -> None:
    model = model_of(family).train()
    adapters = {"one": trained(model, 1), "two": trained(model, 2)}
    wanted, got = both_ways(model, adapters, mix)
    assert got == wanted
    assert model.training
    if mix:
        assert [c.ids for c in got] != [c.ids for c in both_ways(model, adapters, [])[1]]


def test_the_engine_is_used_if_it_can_run_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[TextEngine] = []

    def create_engine(*args: Any) -> TextEngine:
        engines.append(TextEngine(*args))
        return engines[-1]

    monkeypatch.setattr(offline, "TextEngine", create_engine)
    model = model_of("llama3")
    plain = trained(model, 1)
    other = trained(model, 2)
    name, pair = next(iter(other.pairs.items()))
    dense = type(other)(deltas={f"{name}.weight": Delta("dense", {"value": torch.zeros(len(pair.B), pair.A.shape[1])})})
    for family, adapters, engine in (
        ("llama3", {"a": plain}, True),
        ("llama3", {"a": plain, "b": dense}, False),
        ("gemma3", {}, False),
    ):
        with answering(base_of(model_of(family)), adapters) as answer:
            answer(PROMPTS, [], max_new_tokens=2)
            assert (engines[-1].stats().steps > 0) == engine


def test_a_quantized_base_also_uses_the_engine() -> None:
    model = model_of("llama3")
    # quantize a single module, so that its fused group mixes plain and quantized weights
    module = model.model.layers[0].mlp.down_proj
    module.weight = nn.Parameter(quantize(module.weight.detach(), "int8"), requires_grad=False)
    with answering(base_of(model), {}) as answer:
        assert answer(PROMPTS, [], max_new_tokens=3) == complete(base_of(model), PROMPTS, max_new_tokens=3)


def test_the_caller_can_run_an_event_loop() -> None:
    base = base_of(model_of("llama3"))

    async def inside() -> list[Completion]:
        with answering(base, {}) as answer:
            return answer(PROMPTS, [], max_new_tokens=5)

    assert asyncio.run(inside()) == complete(base, PROMPTS, max_new_tokens=5)


def test_bad_prompts_are_refused_and_the_context_limits_answers() -> None:
    base = base_of(model_of("llama3"))
    with answering(base, {}) as answer:
        with pytest.raises(DataError, match="is empty"):
            answer(["a", ""], [], max_new_tokens=5)
        (long,) = answer(["a" * 250], [], max_new_tokens=50)
        assert long == complete(base, ["a" * 250], max_new_tokens=50)[0]
        assert long.prompt_tokens + len(long.ids) <= base.context
