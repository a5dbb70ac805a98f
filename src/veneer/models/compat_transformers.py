"""Access to undocumented parts of transformers: the attention functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

PRE_NORM_LAYERS = {"llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer"}
"""Family -> decoder layer class that computes h + attention(norm(h)), then h + mlp(norm(h)).

In these families, the last decoder layer can run, after its attention, for only the tokens that the loss
needs. models/text/fast.py checks the actual model; memory plans assume that the check passes."""


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any] | None = None) -> None:
    """Register an attention implementation for `set_attn_implementation(name)`.

    `mask`: the function that creates the attention masks; by default SDPA's function, which returns boolean
    masks, or None for causal attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask or sdpa_mask)


def transformers_attention(module: Any, name: str) -> Callable[..., Any]:
    """Return transformers' "sdpa" or "eager" attention function for a module.

    The eager function is defined in the modeling file of each family."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if name == "eager":
        for kind in type(module).__mro__:
            attention: Any = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
            if attention is not None:
                return attention  # type: ignore[no-any-return]
    return sdpa_attention_forward  # type: ignore[no-any-return]
