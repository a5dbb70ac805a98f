"""`veneer serve --quantize`: completions of a quantized base, and adapter metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import llama3
from tests.serve.whole import CONTEXT, Shop, prompt, served
from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from veneer.core.attach import attach
from veneer.formats import peft
from veneer.models.quantize import quantized_weights
from veneer.models.text.base import load_text
from veneer.ops.quantized import dequantized


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("weights"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT}
    llama3(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2).bfloat16().save_pretrained(shop.base_dir)
    tiny_tokenizer().save_pretrained(shop.base_dir)
    shop.make("plain", 1)
    shop.library.add(shop.adapters / "plain", "plain")
    return shop


@torch.no_grad()
def wanted(shop: Shop, ids: list[int], values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the log-probabilities of the prompt's tokens, with the base and with the adapter, in float64.

    `values`: name -> weight that replaces the base's weight.
    """
    model: Any = load_text(str(shop.base_dir), dtype="float32").model.double()
    model.load_state_dict(values or {}, strict=False)

    def score() -> Tensor:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    out = {"tiny": score()}
    with attach(model) as attachment:
        attachment.add("plain", peft.load_folder(shop.adapters / "plain", model).adapter)
        attachment.use(("plain", 1.0))
        out["plain"] = score()
    return out


def scored(shop: Shop, ids: list[int], **settings: Any) -> dict[str, Tensor]:
    """Return the server's log-probabilities of the prompt's tokens, with the base and with the adapter."""
    with served(shop, **({"dtype": "bfloat16"} | settings)) as server:
        asked = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0}
        answers = {name: server.client.completions.create(model=name, **asked) for name in ("tiny", "plain")}
    return {n: torch.tensor(a.choices[0].logprobs.token_logprobs[1:40]).double() for n, a in answers.items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_server_answers_like_the_library(shop: Shop, kind: str) -> None:
    """The reference is `load_text(quantize=…)`, which quantizes as QLoRA does; both compute in float32."""
    ids = prompt(40)
    quantized = load_text(str(shop.base_dir), dtype="float32", quantize=kind).model
    values = {name: dequantized(quantized.get_parameter(name)) for name in quantized_weights(quantized)}
    own = wanted(shop, ids, values)
    got = scored(shop, ids, dtype="float32", quantize=kind)
    for name in own:
        assert (got[name] - own[name]).abs().max() < 1e-4, name
    assert (own["tiny"] - wanted(shop, ids)["tiny"]).abs().max() > 1e-3  # quantization has an effect


def test_metrics_count_loads_and_evictions(shop: Shop) -> None:
    for seed in (2, 3):
        shop.make(f"more{seed}", seed)
        shop.library.add(shop.adapters / f"more{seed}", f"more{seed}")
    with served(shop, dtype="bfloat16") as server:

        def series() -> dict[str, float]:
            text = server.http.get("/metrics").text
            lines = [line.split() for line in text.splitlines() if line.startswith("veneer")]
            return {name.partition("{")[0]: float(value) for name, value in lines}

        server.ask("plain", prompt(4), 2)
        first = series()
        assert first["veneer:adapters_resident"] == 1
        one = first["veneer:adapters_resident_bytes"]
        # half of the file's size, because the server stores adapters in bfloat16
        assert one >= sum(t.nbytes for _, t in peft.read_folder(shop.adapters / "plain").tensors()) / 2
        server.engine.residents.limit = int(one * 2)
        for name in ("more2", "more3"):
            server.ask(name, prompt(4), 2)
        last = series()
        assert (last["veneer:adapters_resident"], last["veneer:adapter_evictions_total"]) == (2, 1)
        assert last["veneer:adapters_resident_bytes"] == 2 * one
