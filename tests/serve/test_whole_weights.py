"""`veneer serve --weights int8|int4` and `--quantize`: the answers of a base whose weights are what the pages say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import llama3
from tests.serve.whole import CONTEXT, Shop, asking, prompt, served
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


def int8(w: Tensor) -> Tensor:
    """A row's largest number is 127 steps, and a step is a bfloat16."""
    step = (w.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12).bfloat16().double()
    return (w / step).round().clamp(-127, 127) * step


def int4(w: Tensor) -> Tensor:
    """32 inputs of a row share a step and a middle, both bfloat16: 16 values from the smallest to the largest."""
    groups = w.view(len(w), -1, 32)
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-8).bfloat16().double()
    middle = (low + 8 * step).bfloat16().double()
    return (((groups - middle) / step).round().clamp(-8, 7) * step + middle).view_as(w)


@torch.no_grad()
def wanted(shop: Shop, ids: list[int], rounded: Any, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Log-probabilities of the prompt's own tokens, of the base and of the adapter, in float64. `values`: weights
    by name that stand in the place of the base's own."""
    model: Any = load_text(str(shop.base_dir), dtype="float32").model.double()
    model.load_state_dict(values or {}, strict=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("_proj") or name == "lm_head"):
            module.weight = nn.Parameter(rounded(module.weight), requires_grad=False)  # a tied embedding keeps its own

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
    """What a server says of the prompt's own tokens, of the base and of the adapter."""
    with served(shop, **({"dtype": "bfloat16"} | settings)) as server:
        asked = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0}
        answers = {name: server.client.completions.create(model=name, **asked) for name in ("tiny", "plain")}
    return {n: torch.tensor(a.choices[0].logprobs.token_logprobs[1:40]).double() for n, a in answers.items()}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_server_with_rounded_weights_answers_by_them_and_adapters_act_whole(shop: Shop, kind: str) -> None:
    """As near to weights rounded by hand as a server with its own weights is to those: both multiply in bfloat16."""
    ids = prompt(40)
    own = wanted(shop, ids, {"int8": int8, "int4": int4}[kind])
    plain = wanted(shop, ids, lambda w: w)
    dense, rounded = scored(shop, ids), scored(shop, ids, weights=kind)
    for name in own:
        off = (rounded[name] - own[name]).norm()
        assert off <= 2 * (dense[name] - plain[name]).norm(), name
        assert off <= 0.7 * (rounded[name] - plain[name]).norm(), name
    assert (own["tiny"] - own["plain"]).abs().max() > 0.1  # the adapter has its effect


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_32_at_once_with_long_prompts_are_as_by_rounded_weights(shop: Shop, kind: str) -> None:
    prompts = [prompt(n, n) for n in (150, 17, 131, 64)]
    work = [(name, i) for _ in range(4) for i in range(4) for name in ("tiny", "plain")]
    with served(shop, dtype="bfloat16", weights=kind) as server:
        answers = server.together([asking(name, prompts[i], 1, echo=True) for name, i in work])
        server.idle()
    own = [wanted(shop, ids, {"int8": int8, "int4": int4}[kind]) for ids in prompts]
    for (name, i), got in zip(work, answers, strict=True):
        want = own[i][name]
        off = torch.tensor(got.logprobs[1 : len(prompts[i])]).double() - want
        assert off.norm() <= 0.008 * want.norm(), (name, i)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_server_over_a_quantized_base_answers_as_the_library_does_over_it(shop: Shop, kind: str) -> None:
    """The weights are `load_text(quantize=…)`'s, which are QLoRA's own; computed in float32 on both sides."""
    ids = prompt(40)
    quantized = load_text(str(shop.base_dir), dtype="float32", quantize=kind).model
    values = {name: dequantized(quantized.get_parameter(name)) for name in quantized_weights(quantized)}
    own = wanted(shop, ids, lambda w: w, values)
    got = scored(shop, ids, dtype="float32", quantize=kind)
    for name in own:
        assert (got[name] - own[name]).abs().max() < 1e-4, name
    assert (own["tiny"] - wanted(shop, ids, lambda w: w)["tiny"]).abs().max() > 1e-3  # quantizing has its effect


def test_what_is_in_memory_and_what_went_out_of_it_is_in_the_metrics(shop: Shop) -> None:
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
        assert (
            one >= sum(t.nbytes for _, t in peft.read_folder(shop.adapters / "plain").tensors()) / 2
        )  # kept in bfloat16
        server.engine.residents.limit = int(one * 2)
        for name in ("more2", "more3"):
            server.ask(name, prompt(4), 2)
        last = series()
        assert (last["veneer:adapters_resident"], last["veneer:adapter_evictions_total"]) == (2, 1)
        assert last["veneer:adapters_resident_bytes"] == 2 * one
