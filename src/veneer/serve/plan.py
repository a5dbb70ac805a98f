"""The forward of a base of Llama's kind, as tensors: what the runner's first way runs.

    x ← x + o(attention(qkv(norm(x))))        x ← x + down(silu(gate(h)) ⊙ up(h)), h = norm(x)

Llama, Mistral, Qwen2, Qwen3, Phi-3 and whoever is built as they are; the runner finds out by a probe whether a base is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.fused import gated, normed
from veneer.core.targets import base_modules
from veneer.models.text import TextBase
from veneer.serve.matrix import Matrix
from veneer.serve.paged import PackedRows, Pages, Rotary
from veneer.serve.thin import Group, Layout, Segments

__all__ = ["Block", "Plan", "Weights", "layout_of", "plan_of", "static_positions"]

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")

Weights = Callable[[tuple[str, ...]], Matrix]
"""The weights of some linear modules, below one another, by the modules' names."""


@dataclass(frozen=True, eq=False)
class Block:
    """One layer; `window` 0 for none."""

    norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    rotary: Rotary
    out: Matrix
    out_bias: Tensor | None
    norm_after: Tensor
    gate_up: Matrix
    down: Matrix
    window: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A base of Llama's kind as tensors. Its layout's groups: qkv, o, gate-up, down of each layer, then the head."""

    embedding: Tensor
    blocks: list[Block]
    norm: Tensor
    head: Matrix
    head_bias: Tensor | None
    eps: float
    scale: float

    def hidden(self, ids: Tensor, batch: PackedRows, segments: Segments | None, pages: Pages) -> Tensor:
        """The normed output of the last layer, (tokens, dim)."""
        x = F.embedding(ids, self.embedding)
        if segments is not None:
            segments.embed(ids, x)
        for i, block in enumerate(self.blocks):
            h = normed(x, block.norm, self.eps)
            qkv = block.qkv(h, block.qkv_bias)
            if segments is not None:
                segments.add(4 * i, h, qkv)
            pages.turn_and_store(i, qkv, block.rotary, batch)
            attended = pages.attend(i, qkv, batch, self.scale, window=block.window)
            _add_onto(x, attended, block.out, block.out_bias, segments, 4 * i + 1)
            h = normed(x, block.norm_after, self.eps)
            both = block.gate_up(h)
            if segments is not None:
                segments.add(4 * i + 2, h, both)
            _add_onto(x, gated(both, "silu"), block.down, None, segments, 4 * i + 3)
        return normed(x, self.norm, self.eps)

    def logits(self, x: Tensor, segments: Segments | None) -> Tensor:
        out = self.head(x, self.head_bias)
        if segments is not None:
            segments.add(4 * len(self.blocks), x, out)
        return out


def layout_of(base: TextBase) -> Layout:
    """The groups of a base of Llama's kind; none for another."""
    model: Any = base.model
    groups: list[Group] = []
    modules: dict[str, Any] = dict(base_modules(model))
    embedding = next((n for n, m in modules.items() if m is model.get_input_embeddings()), "")

    def group(at: str, *choices: tuple[str, ...]) -> None:
        names = next(c for c in choices if all(f"{at}{n}" in modules for n in c))
        parts = [modules[f"{at}{n}"] for n in names]
        if any(type(m) is not nn.Linear for m in parts):
            raise StopIteration
        sizes, biases = tuple(m.out_features for m in parts), tuple(m.bias for m in parts)
        groups.append(Group(tuple(f"{at}{n}" for n in names), sizes, biases, lambda i: parts[i].weight.detach()))

    try:
        for i in range(model.config.get_text_config().num_hidden_layers):
            at = f"model.layers.{i}."
            group(f"{at}self_attn.", ("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
            group(f"{at}self_attn.", ("o_proj",))
            group(f"{at}mlp.", ("gate_proj", "up_proj"), ("gate_up_proj",))
            group(f"{at}mlp.", ("down_proj",))
        group("", ("lm_head",))
    except StopIteration:
        groups = []
    return Layout(tuple(groups), embedding, base.dtype, base.device)


def plan_of(base: TextBase, layout: Layout, weights: Weights, embedding: Tensor, context: int) -> Plan:
    """Raises NotImplementedError where the base is of another kind; whether it is of this one, a probe tells."""
    root: Any = base.model.model
    config: Any = base.model.config.get_text_config()
    if not layout.groups:
        raise NotImplementedError("its layers are not Llama's")
    if config.hidden_act not in ("silu", "swish"):
        raise NotImplementedError(f"its gate is {config.hidden_act}")
    static_positions(config)
    probe = torch.zeros(1, dtype=torch.float32, device=base.device)
    cos, sin = root.rotary_emb(probe, torch.arange(context, device=base.device)[None])
    cos, sin = (t[0, :, : t.shape[-1] // 2].float().contiguous() for t in (cos, sin))
    blocks = []
    for i, layer in enumerate(root.layers):
        qkv, out, gate_up, down = layout.groups[4 * i : 4 * i + 4]
        own = layer.self_attn
        q_norm, k_norm = (getattr(own, n).weight.detach() if hasattr(own, n) else None for n in ("q_norm", "k_norm"))
        rotary = Rotary(cos, sin, q_norm, k_norm, config.rms_norm_eps)
        if any(b is not None for g in (gate_up, down) for b in g.biases):
            raise NotImplementedError("its MLP has biases")
        window = getattr(own, "sliding_window", getattr(config, "sliding_window", None)) or 0
        blocks.append(
            Block(
                layer.input_layernorm.weight.detach(), weights(qkv.modules), qkv.bias, rotary, weights(out.modules),
                out.biases[0], layer.post_attention_layernorm.weight.detach(), weights(gate_up.modules),
                weights(down.modules), window,
            )
        )  # fmt: skip
    head, norm = layout.groups[-1], root.norm.weight.detach()
    scale = root.layers[0].self_attn.scaling
    return Plan(embedding, blocks, norm, weights(head.modules), head.biases[0], config.rms_norm_eps, scale)


def _add_onto(x: Tensor, h: Tensor, matrix: Matrix, bias: Tensor | None, segments: Segments | None, g: int) -> None:
    """x += h·Wᵀ + b and its thin products, in place."""
    if segments is not None and segments.gained(g):  # DoRA needs the base's product by itself
        y = matrix(h, bias)
        segments.add(g, h, y)
        x.add_(y)
        return
    matrix.add_onto(x, h)
    if bias is not None:
        x.add_(bias)
    if segments is not None:
        segments.add(g, h, x)


def static_positions(config: Any) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise NotImplementedError(f"{rope} positions depend on the longest sequence")
