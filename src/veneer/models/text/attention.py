"""Replace a transformers model's attention with a caller's function.

    undo = divert_attention(model)                    uses transformers' attention interface
    with attending(attend):
        model(input_ids=ids[:, None], position_ids=…)          every token is a separate row
    undo()

Outside `attending`, the model computes attention with torch's SDPA.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.models.compat_transformers import register_attention, transformers_attention

_NAME = "veneer_diverted"


@dataclass(frozen=True)
class AttentionSettings:
    """Attention settings of a layer.

    Scores are scale · q·k. If `cap` > 0, a score s becomes cap · tanh(s / cap). If `window` > 0, a query
    attends to keys up to `window` tokens back. `sinks`: whether the layer has attention sinks."""

    scale: float | None
    cap: float
    window: int
    sinks: bool


_KNOWN = {
    "scaling", "softcap", "sliding_window", "s_aux", "dropout", "is_causal", "position_ids",
    "use_cache", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""Keyword arguments that `AttentionSettings` covers or that can be ignored.

Any other argument raises an error."""

_Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionSettings], Tensor]
"""(layer, q (tokens, heads, d), k, v (tokens, kv, d), settings) -> (tokens, heads, d)"""


class _Now(threading.local):
    attend: _Attend | None = None


_now = _Now()


def divert_attention(model: Any) -> Callable[[], None]:
    """Make every layer use the function set by `attending`; return an undo function."""
    register_attention(_NAME, _attention, _mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    return lambda: model.set_attn_implementation(previous)


def restore_attention(model: Any) -> None:
    """Restore SDPA attention on a copy of a model that `divert_attention` changed."""
    if model.config._attn_implementation == _NAME:
        model.set_attn_implementation("sdpa")


def _mask(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return None if _now.attend is not None else sdpa_mask(*args, **kwargs)


@contextmanager
def attending(attend: _Attend) -> Iterator[None]:
    """Use `attend` as the attention function of diverted models, in this thread only."""
    _now.attend = attend
    try:
        yield
    finally:
        _now.attend = None


def new_cache(model: Any) -> Any:
    """Return an empty transformers cache for one sequence."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if (attend := _now.attend) is None:
        result: Tensor
        result, _ = transformers_attention(module, "sdpa")(module, query, key, value, attention_mask, **kwargs)
        return result, None
    if query.shape[2] != 1:
        raise NotImplementedError(f"{query.shape[2]} queries per row are not supported")
    unsupported = sorted(k for k, v in kwargs.items() if v is not None and k not in _KNOWN)
    if unsupported:
        message = f"{type(module).__name__} passes unsupported arguments to its attention: {', '.join(unsupported)}"
        raise NotImplementedError(message)
    window = kwargs.get("sliding_window") or 0
    how = AttentionSettings(
        kwargs.get("scaling"), kwargs.get("softcap") or 0.0, window, kwargs.get("s_aux") is not None
    )
    return attend(module.layer_idx, query[:, :, 0], key[:, :, 0], value[:, :, 0], how)[:, None], None
