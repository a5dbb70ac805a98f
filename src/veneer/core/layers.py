"""Layers that wrap the base's modules and add the selected adapters' output.

    y = base(x) + Σ strengthᵢ·ΔWᵢ·x                       ΔW: core.merge

| layer         | low-rank products                                                                    |
| LoraLinear    | s·(x·Aᵀ)·Bᵀ; and the logits of replaced token rows in a head tied to an embedding    |
| LoraEmbedding | s·Aᵀ[ids]·Bᵀ, times the base's `embed_scale`; and replaced token rows                |
| LoraConv      | s·conv₁(conv(x, A), B), 1-d and 2-d                                                  |
| LoraExperts   | the base's own forward with weights that multiply as W + s·B·A, never materialized   |
| FullModule    | none: only full copies, which every layer supports, and changes to its parameters    |

A layer holds the base's module, the module's name and the attachment. With an empty selection, the layer
calls the base's module unchanged. Products with A and B run in A's dtype, and the sum is cast back once, as
in PEFT; a single plain pair on a plain nn.Linear uses the faster `ops.linear`. A delta (LoHa, LoKr, …) is
materialized at each call and multiplied separately from W, because adding the delta to a 16-bit W could round
the delta away; this costs memory for one ΔW at a time. A trainable delta is not materialized if multiplying
by its parts is cheaper: a LoHa of rank r runs as a pair of rank r², a LoKr one factor at a time. Layers do
not know which adapters exist.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.compat import TORCH
from veneer.core.adapter import Adapter, Pair, TokenRows
from veneer.core.experts import AdaptedWeight
from veneer.core.forms import Delta, as_low_rank, is_trained, kronecker_factors, norm_along, product_of
from veneer.core.merge import adapted_norm, delta_of, low_rank_norm, pair_matrix, to_matrix, to_sum_dtype, weight_of
from veneer.core.merge import delta as module_delta
from veneer.core.mix_cache import CachedModule, MixCache
from veneer.core.selection import ActiveMix, MixBatch, Selection, SpanAdapters, run_segments
from veneer.errors import AdapterError
from veneer.ops.linear import LinearMap, linear
from veneer.ops.lowrank import LowRank
from veneer.ops.products import product


class Owner(Protocol):
    """The attributes of an Attachment that a layer uses."""

    selection: Selection
    cache: MixCache


class Layer(nn.Module):
    """A module that replaces the base's module `base`.

    embeddings: names of embeddings that share this module's weight, including the module's own name if the
        module is an embedding. Token rows for any of these names apply to this layer (T5 ties three
        embeddings and the head)."""

    is_veneer_layer = True
    base: Any  # an nn.Module; its attributes depend on the module's class

    def __init__(self, base: nn.Module, name: str, owner: Owner, embeddings: Sequence[str] = ()) -> None:
        super().__init__()
        self.base, self.name, self.owner, self.embeddings = base, name, owner, tuple(embeddings)
        self.training = base.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _uncompiled(self, *args, **kwargs)
        return self.selected(*args, **kwargs)

    def selected(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output under the current selection."""
        selection = self.owner.selection
        if selection.spans is not None:
            return self.with_spans(*args, **kwargs)
        if selection.rows is not None:
            return self.by_rows(selection.rows, *args, **kwargs)
        if not selection.mix:
            return self._modules["base"](*args, **kwargs)  # type: ignore[misc]
        return self.under(selection.mix, *args, **kwargs)

    def under(self, mix: ActiveMix, *args: Any, **kwargs: Any) -> Any:
        """Return the output with one mix on every row."""
        if not mix:
            return self.base(*args, **kwargs)
        for adapter, _ in mix:
            if (full := adapter.modules.get(self.name)) is not None:
                return _with_tensors(self.base, full)(*args, **kwargs)
        return self.adapted(mix, *args, **kwargs)

    def by_rows(self, rows: MixBatch, *args: Any, **kwargs: Any) -> Any:
        """Return the output with one mix per row.

        The result equals that of `under` on each row separately."""
        segments = rows.segments(self.is_changed_by)
        if len(segments) == 1:
            return self.under(segments[0].mix, *args, **kwargs)
        return run_segments(rows, segments, self.under, args, kwargs, self.name)

    def with_spans(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output with one adapter per segment of the tokens.

        Only linear layers apply pairs in this mode."""
        return self.base(*args, **kwargs)

    def is_changed_by(self, adapter: Adapter) -> bool:
        """Return whether an adapter changes this module."""
        name = self.name
        if name in adapter.modules or name in adapter.pairs or self.adapter_rows(adapter) is not None:
            return True
        return bool(adapter.deltas) and any(f"{name}.{key}" in adapter.deltas for key in self.base._parameters)

    def adapted(self, mix: Sequence[tuple[Adapter, float]], *args: Any, **kwargs: Any) -> Any:
        """Return the output under a mix that has no full copy of this module."""
        return self.base(*args, **kwargs)

    def pairs(self, mix: Sequence[tuple[Adapter, float]], name: str | None = None) -> list[tuple[Pair, float, float]]:
        """Return (pair, strength, dropout) for each pair of the mix on this module.

        Dropout is 0 outside training."""
        key = name or self.name
        drop = self.training
        return [(a.pairs[key], s, a.dropout if drop else 0.0) for a, s in mix if key in a.pairs]

    def deltas(self, mix: Sequence[tuple[Adapter, float]]) -> list[tuple[str, Delta, float]]:
        """Return (parameter, delta, strength) for each delta of the mix on this module."""
        having = [(a.deltas, s) for a, s in mix if a.deltas]
        keys = self.base._parameters if having else ()
        return [(k, d[f"{self.name}.{k}"], s) for d, s in having for k in keys if f"{self.name}.{k}" in d]

    def rows(self, mix: Sequence[tuple[Adapter, float]]) -> list[tuple[TokenRows, float]]:
        return [(rows, s) for a, s in mix if (rows := self.adapter_rows(a)) is not None]

    def adapter_rows(self, adapter: Adapter) -> TokenRows | None:
        """Return the adapter's token rows that apply to this layer."""
        if not adapter.token_rows:
            return None
        return next((adapter.token_rows[name] for name in self.embeddings if name in adapter.token_rows), None)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the base module's state dict, under the base's names.

        Saving an attached model therefore saves the base."""
        return self.base.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def __getattr__(self, name: str) -> Any:
        """Read other attributes (weight, padding_idx, in_features, …) from the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


def _selected(layer: Layer, *args: Any, **kwargs: Any) -> Any:
    return layer.selected(*args, **kwargs)


# Layers run uncompiled inside a compiled model, because a compiled selection would force a recompile at each
# change of the selection. (torch.compiler.disable is the public name, but loads the compiler immediately.)
_uncompiled = TORCH("torch._disable_dynamo")(_selected)


def _with_tensors(module: nn.Module, tensors: Mapping[str, Any], prefix: str = "") -> nn.Module:
    """Return a copy of `module` with some tensors replaced; other tensors are shared.

    The base is never written to, not even during a call. Each replacement is cast to the dtype of the tensor
    that it replaces."""
    out = copy.copy(module)
    # A forward set on the instance is bound to `module` and would use the original tensors.
    out.__dict__.pop("forward", None)
    for kind in ("_parameters", "_buffers"):
        table = dict(getattr(module, kind))
        for key, old in table.items():
            new = tensors.get(prefix + key)
            if new is not None:
                table[key] = new.to(old.dtype) if isinstance(new, Tensor) else new
        out.__dict__[kind] = table
    out.__dict__["_modules"] = {
        key: None if child is None else _with_tensors(child, tensors, f"{prefix}{key}.")
        for key, child in module._modules.items()
    }
    return out


class FullModule(Layer):
    """A module that no other layer class supports, usually a norm or a router.

    Deltas of the module's parameters, and pairs on its `weight`, are summed in float32 and rounded once."""

    def adapted(self, mix: Sequence[tuple[Adapter, float]], *args: Any, **kwargs: Any) -> Any:
        sums: dict[str, Tensor] = {}
        for key, change, strength in self._changes(mix):
            sums[key] = sums.get(key, to_sum_dtype(self.base.get_parameter(key))) + change * strength
        return _with_tensors(self.base, sums)(*args, **kwargs) if sums else self.base(*args, **kwargs)

    def _changes(self, mix: Sequence[tuple[Adapter, float]]) -> Iterator[tuple[str, Tensor, float]]:
        """Yield (parameter, ΔW, strength) for each change to this module's parameters."""
        for key, delta, strength in self.deltas(mix):
            yield key, module_delta(self.base, delta, key), strength
        for pair, strength, _ in self.pairs(mix):
            yield "weight", delta_of(to_sum_dtype(self.base.weight), pair), strength


class _Lora(Layer):
    """Base class of the layers with a single input.

    Contains the reference implementation, y = base(x) + Σ strength·ΔW·x."""

    def under(self, mix: ActiveMix, *args: Any, **kwargs: Any) -> Any:
        if mix and len(args) == 1 and not kwargs and not torch.is_grad_enabled():
            cached = self.owner.cache.get(self.name, mix)
            if cached is not None and self._may_use(cached, mix, args[0]):
                return self.by_cache(cached, args[0])
        return super().under(mix, *args, **kwargs)

    def _may_use(self, cached: CachedModule, mix: ActiveMix, x: Tensor) -> bool:
        """Return whether the cached module can replace the base and the adapters for the input x."""
        attributes = self._modules["base"].__dict__
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or has_other_forward(self.base):
            return False
        if (cached.drops and self.training) or self.rows(mix):
            return False
        return x.dtype == cached.dtype and not torch.is_autocast_enabled(x.device.type)

    def by_cache(self, cached: CachedModule, x: Tensor) -> Tensor:
        """Return the output from a cached copy or stack.

        The reference implementation is `adapted`."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return B·(A·x) in A's dtype."""
        raise NotImplementedError

    def channels(self, v: Tensor) -> Tensor:
        """Return a vector (out,) in a shape that broadcasts against the output."""
        return v

    def scaled(self, x: Tensor, v: Tensor) -> Tensor:
        """Return x with each channel multiplied by the matching entry of v: (in,)."""
        return x * v.to(x.dtype)

    def product(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return W·x without the bias, in x's dtype.

        weight: used instead of W, in W's stored shape."""
        raise NotImplementedError

    def change(self, x: Tensor, y: Tensor, pair: Pair, dropout: float = 0.0) -> Tensor:
        """Return ΔW·x of one pair, given y = base(x).

        Dropout is applied to the input of the pair, as in PEFT."""
        x = x.to(pair.A.dtype) if x.is_floating_point() else x
        dropped = F.dropout(x, dropout) if dropout else x
        low_rank_output = self.low_rank(dropped, pair.A, pair.B) * pair.scale
        origin_output = None if pair.origin is None else self.low_rank(x, *pair.origin) * -pair.scale
        if pair.magnitude is None:
            return low_rank_output if origin_output is None else low_rank_output + origin_output
        if pair.magnitude.ndim > 1:
            return self._change_by_input(dropped, pair)
        W = to_matrix(self.base, pair.kind, weight_of(self.base))
        dora_scale = self.channels(pair.magnitude / adapted_norm(W, pair).to(pair.magnitude.dtype))
        if dropout:
            core = self.product(dropped)
            if pair.origin is not None:
                core = core - self.low_rank(dropped, *pair.origin) * pair.scale
        else:
            bias = getattr(self.base, "bias", None)
            core = y.to(low_rank_output.dtype) if bias is None else y.to(low_rank_output.dtype) - self.channels(bias)
            core = core if origin_output is None else core + origin_output
        out = (dora_scale - 1) * core + dora_scale * low_rank_output
        return out if origin_output is None else out + origin_output

    def _change_by_input(self, x: Tensor, pair: Pair) -> Tensor:
        """Return ΔW·x for a magnitude with one norm per input.

        ΔW·x = (W + ΔP)·(g ⊙ x) − W·x, with g = m/‖W + ΔP‖."""
        weight = weight_of(self.base)
        assert pair.magnitude is not None
        matrix = to_matrix(self.base, pair.kind, weight)
        with torch.no_grad():
            product = pair_matrix(pair)
            shape = weight.shape if pair.kind == "conv" else matrix.shape
            norm = norm_along((matrix.to(product.dtype) + product).reshape(shape), pair.magnitude).flatten()
        dora_scale = pair.magnitude.flatten() / norm.to(pair.magnitude.dtype)
        out = self.product(self.scaled(x, dora_scale - 1))
        for A, B, s in [(pair.A, pair.B, pair.scale), *([(*pair.origin, -pair.scale)] if pair.origin else [])]:
            out = out + self.low_rank(self.scaled(x, dora_scale), A, B) * s
        return out

    def adapted(self, mix: Sequence[tuple[Adapter, float]], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base(x, *args, **kwargs)
        out = y
        for pair, strength, dropout in self.pairs(mix):
            change = self.change(x, y, pair, dropout)
            out = out + (change if strength == 1.0 else change * strength)
        for key, delta, strength in self.deltas(mix):
            out = out + self.delta_output(x, key, delta) * strength
        return self.replaced(x, y, out, self.rows(mix)).to(y.dtype)

    def by_rows(self, rows: MixBatch, *args: Any, **kwargs: Any) -> Any:
        """Run the base once for all rows, and each adapter once on the rows that use it.

        Rows without an adapter add no cost."""
        if any(self.name in share.adapter.modules for share in rows.rows_by_adapter) or not args:
            return super().by_rows(rows, *args, **kwargs)
        segments = rows.segments(self.is_changed_by)
        if len(segments) == 1:
            return self.under(segments[0].mix, *args, **kwargs)
        x: Tensor = args[0]
        if x.ndim < self.min_dims():
            raise AdapterError(f"an input {tuple(x.shape)} has no rows to assign mixes to", where=self.name)
        rows.repeats(len(x), self.name)
        if not torch.is_grad_enabled() and self.owner.cache.all_copied(mix for mix, _ in segments):
            return run_segments(rows, segments, self.under, args, kwargs, self.name)
        y = self.base(*args, **kwargs)
        out = y
        for share in rows.rows_by_adapter:
            if self.is_changed_by(share.adapter):
                at = rows.index(share.rows, len(x), x.device)
                for change in self.changes(x.index_select(0, at), y.index_select(0, at), share.adapter):
                    out = _add_to_rows(out, at, change * rows.strengths(share, change), may_write=out is not y)
        for mix, segment_rows in rows.segments(lambda adapter: self.adapter_rows(adapter) is not None):
            if mix:
                at = rows.index(segment_rows, len(x), x.device)
                own_x, own_y, own_out = (t.index_select(0, at) for t in (x, y, out))
                out = out.index_copy(0, at, self.replaced(own_x, own_y, own_out, self.rows(mix)))
        return out.to(y.dtype)

    def changes(self, x: Tensor, y: Tensor, adapter: Adapter) -> Iterator[Tensor]:
        """Yield the terms that one adapter at strength 1 adds to y = base(x), in y's shape."""
        for pair, _, dropout in self.pairs([(adapter, 1.0)]):
            yield self.change(x, y, pair, dropout)
        for key, delta, _ in self.deltas([(adapter, 1.0)]):
            delta_output = self.delta_output(x, key, delta)
            yield delta_output.expand_as(y) if key == "bias" else delta_output

    def delta_output(self, x: Tensor, key: str, delta: Delta) -> Tensor:
        """Return what a delta of the parameter `key` adds to the output, at strength 1."""
        if is_trained(delta):
            return self.trained_output(x, delta) * delta.scale
        weight_delta = module_delta(self.base, delta, key)
        if key == "bias":
            return self.channels(weight_delta)
        return self.product(x.to(weight_delta.dtype) if x.is_floating_point() else x, weight_delta)

    def trained_output(self, x: Tensor, delta: Delta) -> Tensor:
        """Return P·x for a trainable LoHa or LoKr, without the scale s.

        Intermediate matrices are not saved for the backward pass, which recomputes them at the cost of one
        more product."""
        delta_dtype = next(iter(delta.parts.values())).dtype
        dtype = x.dtype if x.dtype.itemsize == 2 else delta_dtype
        x, kernel = x.to(dtype), delta.shape[2:]
        if (low := as_low_rank(delta)) is not None:
            A, B = (t.to(dtype) for t in low)
            return self.low_rank(x, A.view(-1, *delta.shape[1:]), B.view(*B.shape, *[1] * len(kernel)))

        def compute() -> Tensor:
            if (factors := kronecker_factors(delta)) is not None:
                return self.kronecker(x, *(t.to(dtype) for t in factors))
            full_product = product_of(replace(delta, scale=1.0)).to(dtype)
            return self.product(x, full_product if kernel else to_matrix(self.base, "linear", full_product))

        out: Tensor = checkpoint(compute, use_reentrant=False, preserve_rng_state=False)
        return out

    def kronecker(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """Return (w1 ⊗ w2)·x without materializing w1 ⊗ w2."""
        raise NotImplementedError

    def min_dims(self) -> int:
        """Return the minimum number of dimensions of an input that has a row dimension."""
        return 2

    def replaced(self, x: Tensor, y: Tensor, out: Tensor, rows: Sequence[tuple[TokenRows, float]]) -> Tensor:
        """Apply token rows: return out + Σ strength·(new − y), in out's dtype.

        y is base(x); new is the output with the replaced rows. Only the outputs of replaced rows change.
        Other changes to the same weight, already in `out`, are kept, as in a merge."""
        return out


def _add_to_rows(y: Tensor, at: Tensor, change: Tensor, may_write: bool) -> Tensor:
    """Return y with `change` added to its rows `at`, in the wider of the two dtypes.

    may_write: whether y can be changed in place."""
    wide = torch.promote_types(y.dtype, change.dtype)
    change = change.to(wide)
    if may_write and y.dtype == wide and not (y.requires_grad or change.requires_grad):
        return y.index_add_(0, at, change)
    return y.to(wide).index_add(0, at, change)


def _replaced_rows(new: Tensor, old: Tensor, out: Tensor, strength: float) -> Tensor:
    """Return out + strength·(new − old) in out's dtype.

    At strength 1 the result is `new`, bit for bit, if `out` still equals `old`."""
    new, old = new.to(out.dtype), old.to(out.dtype)
    return new + (out - old) if strength == 1.0 else out + (new - old) * strength


def forward_in_float32(self: nn.Linear, x: Tensor) -> Tensor:
    """Return nn.Linear's output, computed in float32 if both x and the frozen weight have 16 bits.

    On machines where float32 is faster, models.patching.widen_products makes this the `forward` of linear modules."""
    weight, bias = self.weight, self.bias
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if not frozen or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return _linear_in_float32(x, weight, bias)


def _linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return linear(x, LinearMap(weight, bias))
    return product(x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], len(weight))


def has_other_forward(module: nn.Module) -> bool:
    """Return whether an instance's `forward` was replaced, except by `forward_in_float32`."""
    return getattr(module.__dict__.get("forward"), "__func__", forward_in_float32) is not forward_in_float32


class LoraLinear(_Lora):
    def linear_map(self) -> LinearMap | None:
        """Return this layer as a LinearMap, or None if that is not possible.

        A LinearMap has a frozen weight and at most one low-rank product, or one product per segment. A
        trainable LoHa counts as a product if it is small enough (`as_low_rank`). Unsupported are: several
        products, other deltas, a mix per row, DoRA with an origin or at a strength other than 1, an origin
        with dropout, a full copy, replaced rows, and a base with hooks or trainable parameters."""
        base, selection = self.base, self.owner.selection
        mix: Sequence[tuple[Adapter, float]] = selection.mix
        spans = selection.spans
        if selection.rows is not None:
            segments = selection.rows.segments(self.is_changed_by)
            if len(segments) > 1:
                return None
            mix = segments[0].mix
        if type(base).forward is not nn.Linear.forward or has_other_forward(base) or base.weight.requires_grad:
            return None
        if base._forward_hooks or base._forward_pre_hooks or (base.bias is not None and base.bias.requires_grad):
            return None
        if spans is not None and (span_products := self._products_of(spans)):
            return LinearMap(base.weight, base.bias, span_products, spans=spans.spans)
        if not mix:
            return LinearMap(base.weight, base.bias)
        pairs, deltas = self.pairs(mix), self.deltas(mix)
        if len(pairs) + len(deltas) > 1 or self.rows(mix) or any(self.name in a.modules for a, _ in mix):
            return None
        if deltas:
            _, delta, strength = deltas[0]
            low = as_low_rank(delta) if is_trained(delta) else None
            return low and LinearMap(base.weight, base.bias, (LowRank(*low, delta.scale * strength),))
        if not pairs:
            return LinearMap(base.weight, base.bias)
        pair, strength, dropout = pairs[0]
        if pair.origin is not None and (dropout or pair.magnitude is not None):
            return None  # dropout applies to the pair's input, but not to the origin's
        products = (pair.low_rank(strength, dropout),)
        if pair.magnitude is None:
            return LinearMap(base.weight, base.bias, products)
        # At a strength other than 1, x·Wᵀ + strength·ΔW·x is not a DoRA scale times one product.
        if strength != 1.0 or pair.magnitude.ndim > 1:
            return None
        norm = adapted_norm if base.weight.dtype == pair.magnitude.dtype else low_rank_norm
        dora_scale = pair.magnitude / norm(weight_of(base), pair).to(pair.magnitude.dtype)
        return LinearMap(base.weight, base.bias, products, dora_scale)

    def _products_of(self, spans: SpanAdapters) -> tuple[LowRank, ...]:
        """Return the low-rank products of all adapters that have a pair on this module."""
        pairs = (self.pairs([(adapter, 1.0)]) for adapter in spans.adapters)
        found = ((span, *each) for span, span_pairs in enumerate(pairs) for each in span_pairs)
        return tuple(replace(pair.low_rank(strength, dropout), span=span) for span, pair, strength, dropout in found)

    def with_spans(self, *args: Any, **kwargs: Any) -> Any:
        spans, x, plain = self.owner.selection.spans, args[0], self.linear_map()
        if spans is None or not self._products_of(spans):
            return self.base(*args, **kwargs)
        if plain is None or x.dtype != plain.weight.dtype or torch.is_autocast_enabled(x.device.type):
            raise AdapterError("this layer cannot apply its adapters to only a part of the tokens", where=self.name)
        return linear(x, plain)

    def adapted(self, mix: Sequence[tuple[Adapter, float]], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = self.linear_map()
        is_autocast = torch.is_autocast_enabled(x.device.type)
        if plain is None or not plain.products or x.dtype != plain.weight.dtype or is_autocast:
            return super().adapted(mix, x, *args, **kwargs)
        return linear(x, plain)

    def by_cache(self, cached: CachedModule, x: Tensor) -> Tensor:
        multiply = _linear_in_float32 if "forward" in self.base.__dict__ else F.linear
        if cached.product is None:
            return multiply(x, cached.weight, cached.bias)  # type: ignore[arg-type]
        y = multiply(x, self.base.weight, self.base.bias)
        u = multiply(x, cached.product.A)
        product(u.view(-1, u.shape[-1]), cached.product.B.t(), out=y.view(-1, y.shape[-1]), add=True)
        return y

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)

    def product(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        stored = weight_of(self.base) if weight is None else weight
        return F.linear(x, to_matrix(self.base, "linear", stored).to(x.dtype))

    def kronecker(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """Return w1·X·w2ᵀ (l, k), where X (m, n) is x as a matrix.

        Needs about 1/l of the operations of ΔW·x."""
        parts = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
        return torch.matmul(w1, F.linear(parts, w2)).flatten(-2)

    def replaced(self, x: Tensor, y: Tensor, out: Tensor, rows: Sequence[tuple[TokenRows, float]]) -> Tensor:
        """Add the change in the replaced rows' logits.

        out[…, i] += strength·x·(row_i − W_i)"""
        for token_rows, strength in rows:
            index = torch.tensor(token_rows.indices, device=y.device)
            bias = getattr(self.base, "bias", None)
            new = F.linear(x, token_rows.rows.to(x.dtype), None if bias is None else bias[index]).to(y.dtype)
            old, total = y.index_select(-1, index), out.index_select(-1, index)
            out = out.index_copy(-1, index, _replaced_rows(new, old, total, strength))
        return out


class LoraEmbedding(_Lora):
    def min_dims(self) -> int:
        return 1

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = self.base
        out = F.embedding(x, A.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq) @ B.t()
        return out if self._scale is None else out * self._scale.to(out.dtype)

    def product(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        out = F.embedding(x, weight_of(self.base) if weight is None else weight)
        return out if self._scale is None else out * self._scale.to(out.dtype)

    @property
    def _scale(self) -> Tensor | None:
        """Gemma's `embed_scale`, which multiplies embedding rows after the lookup."""
        scale = getattr(self.base, "embed_scale", None)
        return torch.as_tensor(scale) if scale is not None else None

    def change(self, x: Tensor, y: Tensor, pair: Pair, dropout: float = 0.0) -> Tensor:
        return super().change(x, y, pair)  # dropout does not apply to token ids

    def replaced(self, x: Tensor, y: Tensor, out: Tensor, rows: Sequence[tuple[TokenRows, float]]) -> Tensor:
        for token_rows, strength in rows:
            index, order = torch.tensor(token_rows.indices, device=x.device).sort()
            at = torch.searchsorted(index, x).clamp_max_(len(index) - 1)
            hit = (index[at] == x).unsqueeze(-1)
            new = F.embedding(order[at], token_rows.rows.to(y.dtype))
            new = new if self._scale is None else new * self._scale.to(y.dtype)
            out = torch.where(hit, _replaced_rows(new, y, out, strength), out)
        return out


class LoraConv(_Lora):
    """A convolution with groups = 1, with low-rank pairs."""

    def min_dims(self) -> int:
        return weight_of(self.base).ndim

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        up = F.conv1d if A.ndim == 3 else F.conv2d
        return up(self.base._conv_forward(x, A, None), B)

    def by_cache(self, cached: CachedModule, x: Tensor) -> Tensor:
        conv = self.base
        if cached.product is None:
            out: Tensor = conv._conv_forward(x, cached.weight, cached.bias)
            return out
        y: Tensor = conv._conv_forward(x, conv.weight, conv.bias)
        return y.add_(self.low_rank(x, cached.product.A, cached.product.B))

    def channels(self, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * (weight_of(self.base).ndim - 2))

    def kronecker(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """Convolve each of the m channel groups with w2, then combine the groups with w1."""
        if w2.ndim < weight_of(self.base).ndim:  # w2 has the kernel's dimensions flattened
            w2 = w2.unflatten(1, (-1, *weight_of(self.base).shape[2:]))
        parts = x.unflatten(1, (w1.shape[1], w2.shape[1])).flatten(0, 1)
        each = self.base._conv_forward(parts, w2, None)
        mixed = torch.matmul(w1, each.view(len(x), w1.shape[1], -1))
        return mixed.view(len(x), -1, *each.shape[2:])

    def scaled(self, x: Tensor, v: Tensor) -> Tensor:
        dims = weight_of(self.base).ndim - 2
        return x * v.view(-1, *[1] * dims).to(x.dtype)

    def product(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        stored = weight_of(self.base) if weight is None else weight
        out: Tensor = self.base._conv_forward(x, stored.to(x.dtype), None)
        return out


class LoraExperts(Layer):
    """Fused experts: the base's forward, with changed weights as `AdaptedWeight`s."""

    def is_changed_by(self, adapter: Adapter) -> bool:
        pairs = (f"{self.name}.{key}" for key in self.base._parameters)
        return super().is_changed_by(adapter) or any(name in adapter.pairs for name in pairs)

    def by_rows(self, rows: MixBatch, *args: Any, **kwargs: Any) -> Any:
        """Run the tokens of each mix through the experts separately.

        Every row must be one token; otherwise raises AdapterError."""
        segments = rows.segments(self.is_changed_by)
        if len(segments) == 1:
            return self.under(segments[0].mix, *args, **kwargs)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if not tensors or {len(t) for t in tensors} != {rows.batch or len(rows.mixes)}:
            problem = "fused experts receive the tokens of all rows together, so each row cannot have its own mix"
            fix = "run the rows one after another with use(), or leave out the adapters that change the experts"
            raise AdapterError(problem, where=self.name, fix=fix)
        return run_segments(rows, segments, self.under, args, kwargs, self.name, all_rows=True)

    def adapted(self, mix: Sequence[tuple[Adapter, float]], *args: Any, **kwargs: Any) -> Any:
        return _with_tensors(self.base, self._adapted(mix))(*args, **kwargs)

    def weights(self, tokens: int) -> list[tuple[Tensor | None, dict[str, Any]]] | None:
        """Return the base's parameters under the current selection, for `tokens` tokens.

        Each item is (token indices, parameters), with None as the indices if the parameters apply to all
        tokens. With a mix per row, every token is a row. Return None if the selection has full copies or
        deltas of this module."""
        selection = self.owner.selection
        segments = None if selection.rows is None else selection.rows.segments(self.is_changed_by)
        mixes = [selection.mix] if segments is None else [mix for mix, _ in segments]
        if any(self.deltas(mix) or any(self.name in a.modules for a, _ in mix) for mix in mixes):
            return None
        indices: list[Tensor | None] = [None]
        if selection.rows is not None and segments is not None and len(segments) > 1:
            rows, device = selection.rows, next(self.base.parameters()).device
            rows.repeats(tokens, self.name)
            indices = [rows.index(segment_rows, tokens, device) for _, segment_rows in segments]
        plain = dict(self.base.named_parameters(recurse=False))
        return [(at, {**plain, **self._adapted(mix)}) for at, mix in zip(indices, mixes, strict=True)]

    def _adapted(self, mix: Sequence[tuple[Adapter, float]]) -> dict[str, AdaptedWeight]:
        flipped = bool(getattr(self.base, "is_transposed", False))
        weights: dict[str, AdaptedWeight] = {}
        for parameter, weight in self.base.named_parameters(recurse=False):
            if pairs := self.pairs(mix, f"{self.name}.{parameter}"):
                parts = [part for pair in pairs for part in _parts(*pair)]
                weights[parameter] = AdaptedWeight(weight, [p.transposed() for p in parts] if flipped else parts)
        return weights


def _parts(pair: Pair, strength: float, dropout: float) -> list[LowRank]:
    """Return the low-rank products of one pair on fused experts.

    The origin is a separate product because dropout does not apply to the origin."""
    s = pair.scale * strength
    out = [LowRank(pair.A, pair.B, s, dropout)]
    return out if pair.origin is None else [*out, LowRank(*pair.origin, -s)]
