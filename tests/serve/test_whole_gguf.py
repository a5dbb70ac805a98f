"""A GGUF file with several quantization types, served over HTTP without requantizing.

The server runs as with `veneer serve --quantize keep`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import llama3
from tests.serve.whole import Mix, Shop, Whole, asking, prompt, served
from tests.tiny_base import VOCAB_SIZE
from tests.tiny_gguf import tiny_gguf
from veneer.core.attach import attach
from veneer.formats import peft

LONG = 150
"""Length of the long prompts in tokens: more than nine cache blocks, and more rows than two chunks of a
matrix product."""


def q4_k_m(name: str) -> str:
    """Return the quantization type of a tensor in llama.cpp's Q4_K_M files."""
    six = ("token_embd.weight", "output.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight")
    return "Q6_K" if name in six else "Q4_K"


def odd(name: str) -> str:
    """Return a tensor's type. Some fused groups mix quantization types, and some matrices are F16."""
    own = {"blk.0.attn_output.weight": "F16", "blk.1.attn_q.weight": "F16", "blk.1.ffn_up.weight": "Q8_0"}
    return own.get(name, q4_k_m(name))


CASES: dict[str, tuple[Any, int, bool]] = {
    "tied": (q4_k_m, VOCAB_SIZE, True),
    "untied": (q4_k_m, VOCAB_SIZE, False),
    "odd": (odd, VOCAB_SIZE + 7, False),
}


class FileShop(Shop):
    """A shop whose base is a GGUF file."""

    @property
    def base_dir(self) -> Path:
        return self.folder / "tiny.gguf"


@pytest.fixture(scope="module", params=list(CASES))
def shop(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    kinds, vocabulary, tied = CASES[request.param]
    shop = FileShop(tmp_path_factory.mktemp("mixed"))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"vocab_size": vocabulary, "tie_word_embeddings": tied, "head_dim": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 512}
    tiny_gguf(shop.base_dir, model=llama3(**sizes, **own, **ids), kind_of=kinds)
    for seed, (name, how) in enumerate({"a": {}, "b": {"rank": 5}, "dora": {"dora": True}}.items()):
        shop.make(name, seed, **how)
        shop.library.add(shop.adapters / name, name)
    return shop


@pytest.fixture(scope="module")
def server(shop: Shop) -> Iterator[Whole]:
    with served(shop, dtype="bfloat16", quantize="keep") as server:
        yield server


@torch.no_grad()
def wanted(shop: Shop, mix: Mix, ids: list[int]) -> Tensor:
    """Return the log-probabilities of a prompt's tokens, computed with dequantized float32 weights."""
    model: Any = shop.base.model
    with attach(model) as attachment:
        for name, _ in mix:
            attachment.add(name, peft.load_folder(shop.adapters / name, model).adapter)
        attachment.use(*mix)
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


MIXES: list[dict[str, float]] = [
    {}, {"a": 1.0}, {"b": 1.0}, {"dora": 1.0}, {"a": 0.5, "b": -0.7}, {"a": -1.0}, {"b": 2.0, "a": 0.25}, {},
]  # fmt: skip


def test_concurrent_mixes_equal_the_dequantized_weights(shop: Shop, server: Whole) -> None:
    """The prompts' log-probabilities agree within bfloat16 rounding. Long prompts share steps with other
    requests."""
    work = [(MIXES[i % len(MIXES)], prompt((LONG, 17, 64, 131)[i % 4], i)) for i in range(32)]
    asked = [
        asking("tiny.gguf", ids, 1, echo=True, extra_body={"mix": [f"{name}:{s}" for name, s in mix.items()]})
        for mix, ids in work
    ]
    for (mix, ids), got in zip(work, server.together(asked), strict=True):
        want = wanted(shop, list(mix.items()), ids)
        assert (torch.tensor(got.logprobs[1 : len(ids)]).double() - want).norm() <= 0.006 * want.norm(), (mix, len(ids))
    server.idle()
    base, plain = (wanted(shop, mix, prompt(LONG)) for mix in ([], [("a", 1.0)]))
    assert (base - plain).norm() > 0.015 * base.norm()  # the adapter has an effect
