"""A tiny random model of every supported family, made from its real config class.

Each builder is deterministic: float32, eval mode, two layers, vocabulary `VOCAB`, at most 64 wide. Weights are drawn
wider than the families' own initialisation, so that every module matters to the output, and have the statistics of real
ones: norms off one, a few channels of norms and embeddings far larger than the rest, embeddings tied where the family
ties them. `large_norms` goes as far as Gemma 3 does. The mixes are on purpose: sliding and full attention, rope and
no-rope layers, dense and expert layers where the family has both.

FAMILIES take every fast path; OTHERS are those that the fast paths have a part of, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

VOCAB = 160
MOE_FAMILIES = ("llama4", "mixtral", "qwen3_moe")

COMMON: dict[str, Any] = {
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
                    if parameter.numel() >= 16:  # those of queries and keys are tame in real ones, too
                        parameter[::9].mul_(2.0).add_(1.0)
                elif "embed_tokens" in name:
                    parameter[:, ::11].mul_(2.0)
    return model.eval()


def large_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Every norm of a hidden state as Gemma 3 270M has them: w around 30, 450 in a few channels, -0.9 in others."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.numel() >= 16:
                parameter.copy_(30 + 10 * torch.randn(len(parameter), generator=generator))
                parameter[::9], parameter[1::9] = 450.0, -0.9
    return model


def llama3(**changes: Any) -> PreTrainedModel:
    return build(LlamaConfig(**(COMMON | {"tie_word_embeddings": True} | changes)))


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
    return build(Llama4TextConfig(**(COMMON | own | changes)))


def mistral(**changes: Any) -> PreTrainedModel:
    return build(MistralConfig(**(COMMON | {"sliding_window": 16, "head_dim": 8} | changes)))


def mixtral(**changes: Any) -> PreTrainedModel:
    own = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return build(MixtralConfig(**(COMMON | own | changes)))


def qwen3(**changes: Any) -> PreTrainedModel:
    return build(Qwen3Config(**(COMMON | {"head_dim": 8, "tie_word_embeddings": True} | changes)))


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
    return build(Qwen3MoeConfig(**(COMMON | own | changes)))


def gemma3(**changes: Any) -> PreTrainedModel:
    """Layer 0: sliding attention. Layer 1: full attention."""
    own = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return build(Gemma3TextConfig(**(COMMON | own | changes)))


def phi3(**changes: Any) -> PreTrainedModel:
    """Fused qkv_proj and gate_up_proj."""
    return build(Phi3Config(**(COMMON | {"original_max_position_embeddings": 256} | changes)))


def gemma2(**changes: Any) -> PreTrainedModel:
    """Scores and logits are capped: c·tanh(s/c)."""
    own = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return build(Gemma2Config(**(COMMON | own | changes)))


def gemma4(**changes: Any) -> PreTrainedModel:
    """A model with two kinds of layers, heads of two sizes, and an embedding for each layer; layers 2 and 3 reuse the
    keys and values of layers 0 and 1."""
    own = {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": changes.get("vocab_size", VOCAB),
        "final_logit_softcapping": 30.0,
        "initializer_range": 0.05,
    }
    return build(Gemma4TextConfig(**(COMMON | own | changes)))


def gpt_oss(**changes: Any) -> PreTrainedModel:
    """Attention sinks, biases, experts with a clipped gate."""
    own = {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return build(GptOssConfig(**(COMMON | own | changes)))


def qwen3_next(**changes: Any) -> PreTrainedModel:
    """Layer 0: a gated delta rule, with a state that runs through the row. Layer 1: gated attention. Norms 1 + w."""
    own = {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }
    return build(Qwen3NextConfig(**(COMMON | own | changes)))


def phi(**changes: Any) -> PreTrainedModel:
    """Layer norms with biases, rotary positions in half of each head, an MLP without a gate."""
    return build(PhiConfig(**(COMMON | {"partial_rotary_factor": 0.5} | changes)))


def ministral3(**changes: Any) -> PreTrainedModel:
    """Mistral Small's text model: heads wider than hidden / heads, queries scaled by their place from 16 tokens on."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.5,
    }
    return build(
        Ministral3Config(**(COMMON | {"head_dim": 16, "sliding_window": None, "rope_parameters": rope} | changes))
    )


def deepseek_v3(**changes: Any) -> PreTrainedModel:
    """Latent attention, keys wider than values. Layer 0: dense. Layer 1: experts beside a shared one."""
    own = {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    return build(DeepseekV3Config(**(COMMON | own | changes)))


OTHERS: dict[str, Callable[..., PreTrainedModel]] = {
    "gemma2": gemma2,
    "gemma4": gemma4,
    "gpt_oss": gpt_oss,
    "qwen3_next": qwen3_next,
    "phi": phi,
    "ministral3": ministral3,
    "deepseek_v3": deepseek_v3,
}

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
