"""One row of a family's table, and the text encoders' rows. Knows names alone; no widths, no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Part", "Row", "clip", "t5"]

Part = tuple[int, int, int]
"""Rows [begin, end) of `total`, in equal units."""


@dataclass(frozen=True)
class Row:
    """A module, its kind, and its name in the original code ("" where that is the same): all of that original module,
    or `part` of its rows, or with its halves in the other order."""

    module: str
    kind: str = "linear"
    original: str = ""
    part: Part | None = None
    swap: bool = False


def clip(component: str, layers: int, projection: bool) -> Iterator[Row]:
    """CLIP's text model: with `projection` transformers' CLIPTextModelWithProjection, else its CLIPTextModel (under the
    names of its files, with `text_model.`, which transformers 5 dropped from the class)."""
    top = f"{component}.text_model"
    yield Row(f"{top}.embeddings.token_embedding", "embedding")
    yield Row(f"{top}.embeddings.position_embedding", "embedding")
    for i in range(layers):
        layer = f"{top}.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield Row(f"{layer}.self_attn.{name}")
        yield Row(f"{layer}.layer_norm1", "norm")
        yield Row(f"{layer}.mlp.fc1")
        yield Row(f"{layer}.mlp.fc2")
        yield Row(f"{layer}.layer_norm2", "norm")
    yield Row(f"{top}.final_layer_norm", "norm")
    if projection:
        yield Row(f"{component}.text_projection")


def t5(component: str, layers: int) -> Iterator[Row]:
    """transformers' T5EncoderModel with a gated feed-forward (T5 v1.1)."""
    yield Row(f"{component}.shared", "embedding")
    yield Row(f"{component}.encoder.embed_tokens", "embedding")
    for i in range(layers):
        block = f"{component}.encoder.block.{i}"
        for name in "qkvo":
            yield Row(f"{block}.layer.0.SelfAttention.{name}")
        if i == 0:
            yield Row(f"{block}.layer.0.SelfAttention.relative_attention_bias", "embedding")
        yield Row(f"{block}.layer.0.layer_norm", "norm")
        for name in ("wi_0", "wi_1", "wo"):
            yield Row(f"{block}.layer.1.DenseReluDense.{name}")
        yield Row(f"{block}.layer.1.layer_norm", "norm")
    yield Row(f"{component}.encoder.final_layer_norm", "norm")
