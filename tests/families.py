"""A tiny random model of every supported family, made from its real config class.

Each builder is deterministic: float32, eval mode, two layers, vocabulary `VOCAB`, at most 64 wide. Weights are drawn
wider than the families' own initialisation, and norms are moved off one, so that every module matters to the output.
The mixes are on purpose: sliding and full attention, rope and no-rope layers, dense and expert layers where the
family has both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 160
MOE_FAMILIES = ("llama4", "mixtral", "qwen3_moe")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The causal language model of `config` with seeded weights; leaves the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def llama3(**changes: Any) -> PreTrainedModel:
    return build(LlamaConfig(**(_COMMON | {"tie_word_embeddings": True} | changes)))


def llama4(**changes: Any) -> PreTrainedModel:
    """Layer 0: dense, rope. Layer 1: experts with a shared expert, no rope, temperature-tuned attention."""
    own = {
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 64,
    }
    return build(Llama4TextConfig(**(_COMMON | own | changes)))


def mistral(**changes: Any) -> PreTrainedModel:
    return build(MistralConfig(**(_COMMON | {"sliding_window": 16, "head_dim": 8} | changes)))


def mixtral(**changes: Any) -> PreTrainedModel:
    own = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return build(MixtralConfig(**(_COMMON | own | changes)))


def qwen3(**changes: Any) -> PreTrainedModel:
    return build(Qwen3Config(**(_COMMON | {"head_dim": 8, "tie_word_embeddings": True} | changes)))


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    """Layer 0: dense. Layer 1: experts."""
    own = {
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    }
    return build(Qwen3MoeConfig(**(_COMMON | own | changes)))


def gemma3(**changes: Any) -> PreTrainedModel:
    """Layer 0: sliding attention. Layer 1: full attention."""
    own = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return build(Gemma3TextConfig(**(_COMMON | own | changes)))


def phi3(**changes: Any) -> PreTrainedModel:
    """Fused qkv_proj and gate_up_proj."""
    return build(Phi3Config(**(_COMMON | {"original_max_position_embeddings": 256} | changes)))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama3": llama3,
    "llama4": llama4,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "gemma3": gemma3,
    "phi3": phi3,
}
