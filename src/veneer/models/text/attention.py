"""Attention of any family of transformers, computed by a function of the caller's for the length of a call.

    undo = divert_attention(model)                    through transformers' attention interface
    with attending(attend):
        model(input_ids=ids[:, None], position_ids=…)          every token a row of its own
    undo()

Outside of `attending` the model's attention is torch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.models.compat_transformers import TRANSFORMERS, register_attention

_NAME = "veneer_diverted"


@dataclass(frozen=True)
class AttentionSettings:
    """The settings that a layer passes to its attention: scores are scale · q·k, then cap · tanh(score / cap) where
    `cap` is above 0; a query sees keys up to `window` back where that is above 0; `sinks`: whether there are any."""

    scale: float | None
    cap: float
    window: int
    sinks: bool


_KNOWN = {
    "scaling", "softcap", "sliding_window", "s_aux", "dropout", "is_causal", "position_ids",
    "use_cache", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""What a layer may say of its attention and `AttentionSettings` carries, and what says nothing of it. Anything else
would be lost."""

_Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionSettings], Tensor]
"""(layer, q (tokens, heads, d), k, v (tokens, kv, d), how) -> (tokens, heads, d)"""


class _Now(threading.local):
    attend: _Attend | None = None


_now = _Now()


def divert_attention(model: Any) -> Callable[[], None]:
    """Every layer of `model` calls the function of `attending` from now on. Returns a function that undoes this."""
    register_attention(_NAME, _attention, _mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    return lambda: model.set_attn_implementation(before)


def as_it_came(model: Any) -> None:
    """A copy of a diverted model computes its attention by itself again: as torch has it, which is how a diverted one
    computes outside of `attending`."""
    if model.config._attn_implementation == _NAME:
        model.set_attn_implementation("sdpa")


def _mask(*args: Any, **kwargs: Any) -> Any:
    return None if _now.attend is not None else TRANSFORMERS("transformers.masking_utils.sdpa_mask")(*args, **kwargs)


@contextmanager
def attending(attend: _Attend) -> Iterator[None]:
    """`attend` computes the attention of diverted models within the with-block, in this thread."""
    _now.attend = attend
    try:
        yield
    finally:
        _now.attend = None


def new_cache(model: Any) -> Any:
    """transformers' own cache for one sequence."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if (attend := _now.attend) is None:
        sdpa = TRANSFORMERS("transformers.integrations.sdpa_attention.sdpa_attention_forward")
        own: Tensor
        own, _ = sdpa(module, query, key, value, attention_mask, **kwargs)
        return own, None
    if query.shape[2] != 1:
        raise NotImplementedError(f"{query.shape[2]} queries in a row")
    asked = sorted(k for k, v in kwargs.items() if v is not None and k not in _KNOWN)
    if asked:
        raise NotImplementedError(f"{type(module).__name__} asks its attention for {', '.join(asked)}")
    window = kwargs.get("sliding_window") or 0
    how = AttentionSettings(
        kwargs.get("scaling"), kwargs.get("softcap") or 0.0, window, kwargs.get("s_aux") is not None
    )
    return attend(module.layer_idx, query[:, :, 0], key[:, :, 0], value[:, :, 0], how)[:, None], None
