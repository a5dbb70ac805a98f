"""GGUF files as bases: read by transformers, dequantised, and made a plain model again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["load_gguf"]


def load_gguf(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a GGUF file with every weight dequantised to `dtype`: an ordinary module, savable and trainable.

    Exact in float32; in bfloat16 each weight is rounded once. Raises what transformers raises."""
    from transformers import AutoModelForCausalLM, GgufConfig

    with _no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
        )
    # What was read is dequantised, but transformers still takes the model for a quantised one, and refuses to save it.
    for name in ("quantization_config", "_model_name_or_path", "_pre_quantization_dtype"):
        model.config.__dict__.pop(name, None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one here with tqdm itself, which its own switch for progress bars does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    drawn: Any = getattr(reader, "tqdm", None)
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = drawn
