"""Write a whole model as a GGUF file, as llama.cpp's convert_hf_to_gguf.py and llama-quantize do.

    fields     conversion/{base,llama,qwen,gemma}.py of llama.cpp
    tensors    float32 for vectors and norms; float16 or blocks (files/gguf_quantize.py) for matrices
    types      `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp: the _m mixtures give more bits to
               every third attn_v and ffn_down, and the output matrix has Q6_K

Matrices are rounded to float16 before they are quantized, because users of llama.cpp quantize float16 files.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from veneer.errors import BaseError, bullets
from veneer.files.gguf import read_gguf_file
from veneer.files.gguf_quantize import quantize
from veneer.models.config import LLAMA_CPP_ARCHITECTURES
from veneer.models.text.base import TextBase

TYPES = {"f16": ("F16", 1), "q8_0": ("Q8_0", 7), "q6_k": ("Q6_K", 18), "q5_k_m": ("Q5_K", 17), "q4_k_m": ("Q4_K", 15)}
"""Type of a file -> ggml's type of most matrices, and llama.cpp's number of the file type."""
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Type -> type of a matrix whose rows do not fill superblocks of 256."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLITS = {
    rf"{_WORDS}\p{{N}}{{1,3}}{_OTHERS}": "llama-bpe",
    rf"{_WORDS}\p{{N}}{_OTHERS}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _OTHERS.replace("[\\r\\n]*", "[\\r\\n/]*"): "tekken",
}
"""Regular expression of a byte-level tokenizer -> llama.cpp's name of it."""


def write_gguf_model(path: Path, model: Any, base: TextBase, kind: str, name: str) -> Counter[str]:
    """Write `model`, a merged model of `base` in float32, and return the number of tensors of each type.

    kind: one of TYPES. name: the model's name for users.

    Raises BaseError for another family, an unknown tokenizer, weights without a GGUF name, and weights
    outside float16's range."""
    import gguf

    config = model.config.get_text_config()
    if config.model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        message = f"GGUF files of whole models are not written for the family {config.model_type!r}"
        raise BaseError(message, where=str(base.directory), fix=f"families: {known}; or veneer adapter merge")
    architecture = LLAMA_CPP_ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.short_name)
    _add_shape(writer, config, TYPES[kind][1], base)
    _add_tokenizer(writer, base, config.vocab_size)
    counts = Counter[str]()
    for key, values in _named_tensors(model, config, architecture, base).items():
        type_ = _type_of(key, values.shape, kind, config, architecture)
        counts[type_] += 1
        if type_ == "F32":
            writer.add_tensor(key, values.numpy())
            continue
        half = values.half()
        if not torch.isfinite(half).all():
            raise BaseError(f"{key} has values outside float16's range", fix="use a smaller strength")
        if type_ == "F16":
            writer.add_tensor(key, half.numpy())
        else:
            coded = quantize(half.float().numpy(), type_)
            writer.add_tensor(key, coded, raw_dtype=gguf.GGMLQuantizationType[type_])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counts


def _add_shape(writer: Any, config: Any, file_type: int, base: TextBase) -> None:
    import gguf

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type in ("llama", "mistral"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head)
    scaling = rope.get("rope_type", "default")
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(rope["factor"])
        if scaling == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif scaling not in ("default", "llama3"):
        raise BaseError(f"rotary embeddings of the type {scaling!r} are not written", where=str(base.directory))
    if config.model_type == "gemma3_text":
        local = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10_000.0)
        writer.add_rope_freq_base_swa(local)
        writer.add_sliding_window(config.sliding_window)
        layers = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != layers or config.final_logit_softcapping:
            raise BaseError("llama.cpp has other sliding windows for Gemma 3", where=str(base.directory))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    return dict(parameters.get("full_attention", parameters))


# -- tokenizer -------------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, base: TextBase, rows: int) -> None:
    from gguf import TokenType

    tokenizer: Any = base.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        message = f"tokenizers of the type {state['model']['type']} are not written to GGUF"
        raise BaseError(message, where=str(base.directory))
    pieces = bool(state["model"].get("byte_fallback"))  # SentencePiece's tokenizer, as of Llama 2, Mistral and Gemma
    merges = [m.split(" ") if isinstance(m, str) else m for m in state["model"]["merges"]]
    words, added = {i: t for t, i in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    tokens = [words.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [TokenType.NORMAL if i in words else TokenType.UNUSED for i in range(rows)]
    for i, token in enumerate(tokens):
        if i in added:
            special = added[i].special or re.fullmatch(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>", token)
            types[i] = TokenType.CONTROL if special else TokenType.USER_DEFINED
            tokens[i] = token if special else token.replace("▁", " ")
        elif pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = TokenType.BYTE
    if pieces and (unknown := tokenizer.unk_token_id) is not None:
        types[unknown] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _splitter(state["pre_tokenizer"] or {}, base))
    writer.add_token_list(tokens)
    if pieces:
        # llama.cpp joins the pair with the highest score first, and tokenizers the pair of the first merge.
        rank: dict[str, int] = {}
        for i, (left, right) in enumerate(merges):
            rank.setdefault(left + right, i)
        writer.add_token_scores([-float(rank.get(words.get(i, ""), len(merges))) for i in range(rows)])
        writer.add_add_space_prefix(_adds_space(state))
    writer.add_token_types(types)
    if not pieces:
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges])
    for kind in ("bos", "eos", "unk", "sep", "pad", "mask"):
        if (number := getattr(tokenizer, f"{kind}_token_id", None)) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    if base.end_of_turn_id is not None and base.end_of_turn_id != tokenizer.eos_token_id:
        writer.add_eot_token_id(base.end_of_turn_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id])
    if base.has_chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts its first token before a text."""
    return bool(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])


def _adds_space(state: dict[str, Any]) -> bool:
    text = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    return '"Prepend"' in text or bool(re.search(r'"prepend_scheme": "(first|always)"', text))


def _splitter(state: dict[str, Any], base: TextBase) -> str:
    """Return llama.cpp's name of the rule by which a byte-level tokenizer splits a text into words."""
    if base.directory.is_file():
        pre = read_gguf_file(base.directory, long_arrays=False).fields.get("tokenizer.ggml.pre")
        return str(pre or "default")
    steps = state.get("pretokenizers", [state])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := _SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
        return name
    message = "llama.cpp has no name that veneer knows for the way this tokenizer splits words"
    fix = "export to transformers (veneer adapter merge) and convert the folder with llama.cpp's convert_hf_to_gguf.py"
    raise BaseError(message, where=str(base.directory), fix=fix)


# -- tensors ---------------------------------------------------------------------------------------------------------


def _named_tensors(model: Any, config: Any, architecture: str, base: TextBase) -> dict[str, torch.Tensor]:
    """Return the model's weights under GGUF's names, as llama.cpp computes with them.

    Rows of q and k are permuted for Llama (see formats/gguf.py), and Gemma's norms include the 1 that its
    layers add."""
    import gguf

    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    out: dict[str, torch.Tensor] = {}
    unknown = []
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        out["rope_freqs.weight"] = _llama3_factors(rope, config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if key is None:
            unknown.append(f"{name} {tuple(tensor.shape)}")
            continue
        values = tensor.detach().float().cpu()
        if architecture == "llama" and (part := re.search(r"\.([qk])_proj\.", name)):
            heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        out[key] = values.contiguous()
    if unknown:
        raise BaseError(f"GGUF has no name for these weights:\n{bullets(unknown)}", where=str(base.directory))
    return out


def _llama3_factors(rope: dict[str, Any], config: Any) -> torch.Tensor:
    """Return Llama 3's divisor of each rotary frequency."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2).double() / head)
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    divisors: torch.Tensor = 1 / ((1 - smooth) / factor + smooth)
    return divisors.float()


def _type_of(key: str, shape: tuple[int, ...], kind: str, config: Any, architecture: str) -> str:
    """Return ggml's type of a tensor in a file of type `kind`."""
    if len(shape) < 2 or key.endswith("_norm.weight"):
        return "F32"
    want, columns, layers = TYPES[kind][0], shape[-1], config.num_hidden_layers
    if want == "F16":
        return want
    if key == "output.weight" or (key == "token_embd.weight" and config.tie_word_embeddings):
        want = want if want == "Q8_0" else "Q6_K"
    elif block := re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", key):
        layer, eighth = int(block[1]), layers // 8
        if kind.endswith("_m") and (layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2):
            want = "Q6_K"
        elif block[2] == "attn_v" and want == "Q4_K" and layers == 80:  # Llama and Qwen of 70 billion weights
            many = architecture == "qwen2" or config.num_attention_heads != config.num_key_value_heads
            want = "Q5_K" if many else want
    if columns % 256 and want != "Q8_0":
        want = _SMALLER_BLOCKS[want]
    return "F16" if columns % 32 else want
