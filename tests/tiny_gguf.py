"""The tiny base as a GGUF file, as llama.cpp's converter would write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

from tests.ops.draws import coded
from tests.tiny_base import CHAT_TEMPLATE, VOCAB_SIZE, tiny_model, tiny_tokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name in ("model.norm.weight", "lm_head.weight"):
        return {"model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a query or key weight with its rows in llama.cpp's order for RoPE.

    llama.cpp interleaves the pairs; transformers stores them as two halves.
    """
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def tiny_gguf(
    file: Path,
    quantized: bool = False,
    model: PreTrainedModel | None = None,
    kind_of: Callable[[str], str | None] | None = None,
) -> PreTrainedModel:
    """Write the tiny base to `file` and return the model. Matrices are float32, or Q8_0 if `quantized`.

    model: a Llama model to write instead of the tiny base
    kind_of: name in the file -> type of the matrix; None: float32; K-quants get random codes
    """
    model, tokenizer = model or tiny_model(), tiny_tokenizer()
    config = model.config
    w = gguf.GGUFWriter(str(file), "llama")
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_rope_dimension_count(config.head_dim)
    w.add_vocab_size(config.vocab_size)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    w.add_tokenizer_model("gpt2")
    unused = [f"<unused{i}>" for i in range(config.vocab_size - VOCAB_SIZE)]
    w.add_token_list([*sorted(raw["vocab"], key=raw["vocab"].get), *unused])
    w.add_token_types([3 if i < 3 else 1 for i in range(len(raw["vocab"]))] + [5] * len(unused))
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in raw["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_unk_token_id(0)
    w.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, own = tensor.numpy(), None if kind_of is None or tensor.ndim != 2 else kind_of(_gguf_name(name))
        if own is not None and own.endswith("_K"):
            raw_codes: Any = coded(tensor / 8, own).stored
            w.add_tensor(_gguf_name(name), raw_codes.raw.numpy(), raw_dtype=gguf.GGMLQuantizationType[own])
            continue
        if ".q_proj" in name:
            array = interleaved(array, config.num_attention_heads)
        elif ".k_proj" in name:
            array = interleaved(array, config.num_key_value_heads)
        if own is not None or (quantized and array.ndim == 2 and array.shape[1] % 32 == 0):
            kind = gguf.GGMLQuantizationType[own or "Q8_0"]
            w.add_tensor(_gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            w.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return model
