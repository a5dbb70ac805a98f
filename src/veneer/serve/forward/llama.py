"""The forward pass of a Llama-like base on plain tensors: the runner's "fused" path.

    x ← x + o(attention(qkv(norm(x))))        x ← x + down(silu(gate(h)) ⊙ up(h)), h = norm(x)

Supports Llama, Mistral, Qwen2, Qwen3, Phi-3 and compatible families; the runner uses a probe to check whether
a base is compatible. If ops/cpu/decoder.c is available, a single call of it runs all layers. Otherwise, or
with a DoRA adapter, Python runs the layers one by one, with bit-identical results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.targets import base_modules
from veneer.models.text.base import TextBase
from veneer.ops.cpu import compiled
from veneer.ops.mlp import gated
from veneer.ops.norms import normed
from veneer.ops.weight_layouts import PrepackedWeight
from veneer.ops.weight_panels import Panels
from veneer.serve.forward.lowrank import AdapterBatch, BaseLayout, Group
from veneer.serve.forward.paged import PackedRows, Pages, Rotary
from veneer.serve.forward.weights import in_blocks, invariant

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")

_JoinedWeights = Callable[[tuple[str, ...]], PrepackedWeight]
"""Returns the stacked weight of the linear modules with these names."""


@dataclass(frozen=True, eq=False)
class Block:
    """One layer. `window`: sliding window in tokens, or 0."""

    norm: Tensor
    qkv: PrepackedWeight
    qkv_bias: Tensor | None
    rotary: Rotary
    out: PrepackedWeight
    out_bias: Tensor | None
    norm_after: Tensor
    gate_up: PrepackedWeight
    down: PrepackedWeight
    window: int


class _Table(NamedTuple):
    """Arguments of ops/cpu/decoder.c.

    `layers`: the values of decoder.c's FIELDS for each layer. `scratch`: elements of scratch memory per
    token.
    """

    run: Callable[..., None]
    layers: Tensor
    sizes: Tensor
    numbers: Tensor
    scratch: int


@dataclass(frozen=True, eq=False)
class LlamaForward:
    """The tensors of a Llama-like base. Layout groups: qkv, o, gate-up, down of each layer, then the head."""

    embedding: Tensor
    blocks: list[Block]
    norm: Tensor
    head: PrepackedWeight
    head_bias: Tensor | None
    eps: float
    scale: float
    pages: Pages
    rows: int = 0
    """Rows per block of row-wise functions (weights.in_blocks); 0: all at once."""

    def hidden(self, ids: Tensor, batch: PackedRows, segments: AdapterBatch | None) -> Tensor:
        """Return the normalized output of the last layer, (tokens, dim)."""
        x = self._embedded(ids, segments)
        self._run(x, range(len(self.blocks)), batch, segments)
        return self._normed(x, self.norm)

    def each_layer(self, ids: Tensor, batch: PackedRows, segments: AdapterBatch | None) -> Iterator[Tensor]:
        """Yield each layer's output, (tokens, dim), then the normalized output, bit-identical to `hidden`.

        The next layer overwrites each yielded tensor. All layers can share the pages of one layer.
        """
        x = self._embedded(ids, segments)
        for i in range(len(self.blocks)):
            self._run(x, range(i, i + 1), batch, segments)
            yield x
        yield self._normed(x, self.norm)

    def _embedded(self, ids: Tensor, segments: AdapterBatch | None) -> Tensor:
        x = F.embedding(ids, self.embedding)
        if segments is not None:
            segments.embed(ids, x)
        return x

    def _run(self, x: Tensor, layers: range, batch: PackedRows, segments: AdapterBatch | None) -> None:
        """Run these layers on x in place."""
        if self.decode_table is not None and (segments is None or not segments.gains):
            self._decode(x, self.decode_table, layers, batch, segments)
        else:
            self._layer_by_layer(x, layers, batch, segments)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return in_blocks(lambda part: normed(part, weight, self.eps), x, self.rows)

    def with_windows(self, longest: int) -> LlamaForward:
        """Return a copy with the same weights and with windows of at most `longest` tokens."""
        return replace(self, blocks=[replace(b, window=min(b.window, longest)) for b in self.blocks])

    @cached_property
    def decode_table(self) -> _Table | None:
        """Return the arguments of ops/cpu/decoder.c, which runs all layers of a batch without DoRA in one call.

        Return None if the kernel does not support this base.
        """
        library, pages = compiled.usable("decode", self.embedding), self.pages
        weights = [(b.qkv, b.out, b.gate_up, b.down) for b in self.blocks]
        panels = [[m for m in layer_panels if isinstance(m, Panels)] for layer_panels in weights]
        if library is None or pages.native is None or any(len(layer_panels) < 4 for layer_panels in panels):
            return None
        qkv, out, gate_up, _ = panels[0]
        ffn = gate_up.out // 2
        if ffn % 16 or qkv.out != (pages.heads + 2 * pages.kv) * pages.d:
            return None
        rows = []
        for i, (b, layer_panels) in enumerate(zip(self.blocks, panels, strict=True)):
            qkv_w, out_w, gate_up_w, down_w = (m.pointers for m in layer_panels)
            vectors = [b.norm, b.qkv_bias, b.rotary.q_norm, b.rotary.k_norm, b.out_bias, b.norm_after]
            if any(t is not None and compiled.usable("decode", t) is None for t in vectors):
                return None
            fields = [
                b.norm,
                qkv_w,
                b.qkv_bias,
                b.rotary.q_norm,
                b.rotary.k_norm,
                out_w,
                b.out_bias,
                b.norm_after,
                gate_up_w,
                down_w,
                b.window,
                pages.K[i],
                pages.V[i],
            ]
            rows.append([f.data_ptr() if isinstance(f, Tensor) else f or 0 for f in fields])
        sizes = torch.tensor([out.out, pages.heads, pages.kv, pages.d, ffn])
        wide = out.out + (2 * pages.heads + 2 * pages.kv) * pages.d + 3 * ffn
        return _Table(library.decode, torch.tensor(rows), sizes, torch.tensor([self.eps, self.scale]), wide)

    def _decode(
        self, x: Tensor, table: _Table, layers: range, batch: PackedRows, segments: AdapterBatch | None
    ) -> None:
        rotary, scratch = self.blocks[0].rotary, x.new_empty(len(x) * table.scratch)
        pointers = (0,) * 7 if segments is None else segments.pointers(x, 4 * layers.start)
        table.run(
            x.data_ptr(),
            len(x),
            table.layers[layers.start].data_ptr(),
            len(layers),
            table.sizes.data_ptr(),
            table.numbers.data_ptr(),
            rotary.cos.data_ptr(),
            rotary.sin.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            batch.starts.data_ptr(),
            len(batch.lengths),
            batch.tables.data_ptr(),
            batch.tables.shape[1],
            max(batch.lengths),
            *pointers,
            scratch.data_ptr(),
            torch.get_num_threads(),
        )

    def _layer_by_layer(self, x: Tensor, layers: range, batch: PackedRows, segments: AdapterBatch | None) -> None:
        pages = self.pages
        for i in layers:
            block = self.blocks[i]
            h = self._normed(x, block.norm)
            qkv = block.qkv(h, block.qkv_bias)
            if segments is not None:
                segments.add(4 * i, h, qkv)
            pages.rope_and_cache(i, qkv, block.rotary, batch)
            attended = pages.attend(i, qkv, batch, self.scale, window=block.window)
            _add_onto(x, attended, block.out, block.out_bias, segments, 4 * i + 1)
            h = self._normed(x, block.norm_after)
            both = block.gate_up(h)
            if segments is not None:
                segments.add(4 * i + 2, h, both)
            h = in_blocks(lambda part: gated(part, "silu"), both, self.rows)
            _add_onto(x, h, block.down, None, segments, 4 * i + 3)

    def logits(self, x: Tensor, segments: AdapterBatch | None) -> Tensor:
        out = self.head(x, self.head_bias)
        if segments is not None:
            segments.add(4 * len(self.blocks), x, out)
        return out


def layout_of(base: TextBase) -> BaseLayout:
    """Return the layout of a Llama-like base; for other bases, a layout without groups."""
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
    return BaseLayout(tuple(groups), embedding, base.dtype, base.device)


def llama_forward(
    base: TextBase, layout: BaseLayout, joined_weights: _JoinedWeights, embedding: Tensor, context: int, pages: Pages
) -> LlamaForward:
    """Build the forward pass of a Llama-like base.

    If `layout.rows` is above 0, the forward pass is batch-invariant (weights.in_blocks). Raises
    NotImplementedError for a base that is known to differ from Llama. Other differences raise no error, so the
    caller has to check the results with a probe.
    """
    root: Any = base.model.model
    config: Any = base.model.config.get_text_config()
    if not layout.groups:
        raise NotImplementedError("its layers are not Llama's")
    if config.hidden_act not in ("silu", "swish"):
        raise NotImplementedError(f"its gate activation is {config.hidden_act}")
    static_positions(config)
    if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
        raise NotImplementedError("its queries are scaled by their position")

    def weights(names: tuple[str, ...]) -> PrepackedWeight:
        return invariant(joined_weights(names), layout.rows)

    probe = torch.zeros(1, dtype=torch.float32, device=base.device)
    cos, sin = root.rotary_emb(probe, torch.arange(context, device=base.device)[None])
    cos, sin = (t[0, :, : t.shape[-1] // 2].float().contiguous() for t in (cos, sin))
    blocks = []
    for i, layer in enumerate(root.layers):
        qkv, out, gate_up, down = layout.groups[4 * i : 4 * i + 4]
        attention = layer.self_attn
        q_norm, k_norm = (
            getattr(attention, n).weight.detach() if hasattr(attention, n) else None for n in ("q_norm", "k_norm")
        )
        rotary = Rotary(cos, sin, q_norm, k_norm, config.rms_norm_eps)
        if any(b is not None for g in (gate_up, down) for b in g.biases):
            raise NotImplementedError("its MLP has biases")
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or 0
        blocks.append(
            Block(
                layer.input_layernorm.weight.detach(),
                weights(qkv.modules),
                qkv.bias,
                rotary,
                weights(out.modules),
                out.biases[0],
                layer.post_attention_layernorm.weight.detach(),
                weights(gate_up.modules),
                weights(down.modules),
                window,
            )
        )
    head, norm = layout.groups[-1], root.norm.weight.detach()
    scale = root.layers[0].self_attn.scaling
    head_weight = weights(head.modules)
    return LlamaForward(
        embedding, blocks, norm, head_weight, head.biases[0], config.rms_norm_eps, scale, pages, layout.rows
    )


def _add_onto(
    x: Tensor, h: Tensor, weight: PrepackedWeight, bias: Tensor | None, segments: AdapterBatch | None, g: int
) -> None:
    """Compute x += h·Wᵀ + b in place, and add the low-rank products of the adapters."""
    y = None
    if segments is not None and segments.gained(g):  # DoRA needs the base's product without the adapters' products
        y = weight(h, bias)
        x.add_(y)
    else:
        weight.add_onto(x, h, bias)
    if segments is not None:
        segments.add(g, h, x, y)


def static_positions(config: Any) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise NotImplementedError(f"{rope} positions depend on the longest sequence")
