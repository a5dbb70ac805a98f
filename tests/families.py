"""A tiny random model of every supported family, built from the family's real config class.

Each builder is deterministic: float32, eval mode, two layers, vocabulary `VOCAB`, width at most 64. Weights
have a wider range than in the families' own initialization, so that every module affects the output. Other
statistics are those of real models: norms differ from 1, a few channels of norms and embeddings are far
larger than the rest, and embeddings are tied if the family ties them. `large_norms` makes norms as large as
in Gemma 3. Families with two kinds of layers have one layer of each.

FAMILIES take every fast path; OTHERS take some fast paths or none."""

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
    """Build a causal language model with seeded weights, without changing the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                    if parameter.numel() >= 16:  # leaves out the small norms of queries and keys
                        parameter[::9].mul_(2.0).add_(1.0)
                elif "embed_tokens" in name:
                    parameter[:, ::11].mul_(2.0)
    return model.eval()


def large_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Set every norm of a hidden state to values in Gemma 3 270M's range.

    They are about 30, except for 450 in some channels and -0.9 in others."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.numel() >= 16:
                parameter.copy_(30 + 10 * torch.randn(len(parameter), generator=generator))
                parameter[::9], parameter[1::9] = 450.0, -0.9
    return model


def _family(config: type[PreTrainedConfig], **values: Any) -> Callable[..., PreTrainedModel]:
    """Return a function that builds a model; its keyword arguments replace values of the configuration."""
    return lambda **changes: build(config(**(COMMON | values | changes)))


_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8} | _SLIDING
_TOP_2 = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

llama3 = _family(LlamaConfig, tie_word_embeddings=True)
qwen3_moe = _family(Qwen3MoeConfig, **_EXPERTS, mlp_only_layers=[0], norm_topk_prob=True)
mistral = _family(MistralConfig, sliding_window=16, head_dim=8)
gemma3 = _family(Gemma3TextConfig, **_GEMMA)


def gemma4(**changes: Any) -> PreTrainedModel:
    """Build a model with two kinds of layers, heads of two sizes, and an embedding per layer.

    Layers 2 and 3 reuse the keys and values of layers 0 and 1."""
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


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama3": llama3,
    # layer 0: dense, rope; layer 1: experts with a shared expert, no rope, temperature-tuned attention
    "llama4": _family(
        Llama4TextConfig,
        head_dim=8,
        intermediate_size=24,
        intermediate_size_mlp=48,
        attention_chunk_size=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        moe_layers=[1],
        no_rope_layers=[1, 0],
    ),
    "mistral": mistral,
    "mixtral": _family(MixtralConfig, **_TOP_2, intermediate_size=24, sliding_window=None),
    "qwen3": _family(Qwen3Config, head_dim=8, tie_word_embeddings=True),
    "qwen3_moe": qwen3_moe,  # layer 0: dense; layer 1: experts
    "gemma3": gemma3,  # layer 0: sliding attention; layer 1: full attention
    "phi3": _family(Phi3Config, original_max_position_embeddings=256),  # fused qkv_proj and gate_up_proj
}

OTHERS: dict[str, Callable[..., PreTrainedModel]] = {
    # scores and logits are capped: c·tanh(s/c)
    "gemma2": _family(Gemma2Config, **_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma4": gemma4,
    # attention sinks, biases, and experts with a clipped gate
    "gpt_oss": _family(GptOssConfig, **_TOP_2, **_SLIDING, head_dim=8),
    # layer 0: gated delta rule, with a state that moves along the row; layer 1: gated attention; norms 1 + w
    "qwen3_next": _family(
        Qwen3NextConfig,
        **_EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    # layer norms with biases, rotary positions in half of each head, an MLP with no gate
    "phi": _family(PhiConfig, partial_rotary_factor=0.5),
    # head size above hidden / heads; queries are scaled according to their position, from position 16 on
    "ministral3": _family(
        Ministral3Config,
        head_dim=16,
        sliding_window=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    ),
    # latent attention, keys wider than values; layer 0: dense; layer 1: experts and a shared expert
    "deepseek_v3": _family(
        DeepseekV3Config,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    ),
}
