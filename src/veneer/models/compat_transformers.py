"""Undocumented parts of transformers in use, and its process-wide registries."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from veneer.compat import Internals

TRANSFORMERS = Internals(
    "transformers",
    ">=5.24,<6",
    (
        "transformers.MODEL_FOR_CAUSAL_LM_MAPPING",
        "transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "transformers.PreTrainedModel.set_attn_implementation",
        "transformers.activations.ACT2FN",
        "transformers.core_model_loading.ConversionOps",
        "transformers.integrations.gguf.gguf_tokenizer_mapping.generate_merges",
        "transformers.integrations.gguf.reader._mapped",
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register",
        "transformers.masking_utils.eager_mask",
        "transformers.masking_utils.sdpa_mask",
        "transformers.modeling_gguf_pytorch_utils.TENSOR_PROCESSORS",
        "transformers.modeling_gguf_pytorch_utils.TensorProcessor",
        "transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map",
        "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS",
        "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register",
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
        "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING",
        "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING",
        "transformers.quantizers.base.HfQuantizer._process_model_before_weight_loading",
        "transformers.quantizers.base.HfQuantizer.get_quantize_ops",
        "transformers.quantizers.base.HfQuantizer.param_element_size",
        "transformers.quantizers.base.HfQuantizer.param_needs_quantization",
        "transformers.utils.chat_template_utils.render_jinja_template",
        "transformers.utils.quantization_config.QuantizationConfigMixin",
    ),
)

PRE_NORM_LAYERS = {"llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer"}
"""Family -> class of layers with h + attention(norm(h)), then h + mlp(norm(h)).

The last such layer can run on trained tokens only. models/text/fast.py checks this on the actual model; plans
assume it."""

_lock = threading.Lock()
registered: set[str] = set()
"""Names that this process has registered with transformers."""


def _once(name: str, register: Callable[[], None]) -> None:
    """Call `register` once for each name.

    Two threads can load bases at the same time."""
    with _lock:
        if name not in registered:
            register()
            registered.add(name)


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any] | str = "sdpa") -> None:
    """Register an attention implementation for `set_attn_implementation(name)`, once.

    `mask`: the function that makes its masks, or the name of a transformers mask: "sdpa" (booleans, none if
    causal) or "eager" (added to the scores)."""

    def register() -> None:
        own_mask = TRANSFORMERS(f"transformers.masking_utils.{mask}_mask") if isinstance(mask, str) else mask
        TRANSFORMERS("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register")(name, attention)
        TRANSFORMERS("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register")(name, own_mask)

    _once(f"attention {name}", register)


def own_attention(module: Any, name: str) -> Callable[..., Any]:
    """Return transformers' "sdpa" or "eager" attention function for a family.

    The eager function is in the family's own module."""
    if name == "eager":
        for kind in type(module).__mro__:
            attention: Any = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
            if attention is not None:
                return attention  # type: ignore[no-any-return]
    sdpa: Callable[..., Any] = TRANSFORMERS("transformers.integrations.sdpa_attention.sdpa_attention_forward")
    return sdpa


def register_quantizer(name: str, quantizer: type, config: type) -> None:
    """Register a quantizer for configs with this `quant_method`, once."""

    def register() -> None:
        TRANSFORMERS("transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING")[name] = quantizer
        TRANSFORMERS("transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING")[name] = config

    _once(f"quantizer {name}", register)
