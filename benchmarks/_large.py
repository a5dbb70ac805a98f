"""Llamas of random weights at real sizes: for memory and speed, where what they say does not matter."""

from __future__ import annotations

import json
from pathlib import Path

LARGE = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
"""Shapes of Llama 3.2, their heads tied to an embedding of 128,256 tokens."""


def write_large(size: str, folder: Path) -> None:
    """A Llama of random weights as a checkpoint of a shard a layer, never in memory as a whole."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **LARGE[size], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=8192
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, own in shards.items():
        tensors = {
            n: torch.ones(shape).bfloat16() if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for n, shape in own.items()
        }  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, own in shards.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
