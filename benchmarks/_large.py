"""Llamas of real sizes with random weights, for benchmarks of memory and speed."""

from __future__ import annotations

import json
from pathlib import Path

_LLAMA_32 = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
LARGE: dict[str, dict[str, int | bool]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, **_LLAMA_32,
    },
    "3B": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, **_LLAMA_32,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Shapes of Llama 3.2 (its head is tied to an embedding of 128,256 tokens) and of Mistral 7B."""

LAYERS_A_SHARD = {"1B": 1, "3B": 1, "7B": 11}
"""The 7B checkpoint gets five-gigabyte shards like Mistral's; smaller shards would hide their cost."""


def write_large(size: str, folder: Path) -> None:
    """Write a Llama with random weights as a sharded checkpoint, one shard at a time to save memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LARGE[size], max_position_embeddings=8192)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        part = str(int(name.split(".")[2]) // LAYERS_A_SHARD[size]) if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, own in shards.items():
        tensors = {
            n: torch.ones(shape).bfloat16()
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for n, shape in own.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, own in shards.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
