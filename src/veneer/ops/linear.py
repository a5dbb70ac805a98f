"""Frozen linear maps with low-rank products: y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ.

A `LinearMap` is one projection, or several fused projections of the same x; `linear` applies the map. The
frozen weight never gets a gradient. A and B can be float32 while x and W are 16-bit: A and B are cast for the
products, and their gradients are float32. Nothing here depends on nn.Module, adapter names or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from veneer.ops.dispatch import dispatch
from veneer.ops.dropout import Dropout
from veneer.ops.int8 import Int8Weight
from veneer.ops.lora_segments import LoraSegments
from veneer.ops.lowrank import LowRank
from veneer.ops.prepacked import PrepackedWeights
from veneer.ops.products import in_float32, product

WeightCopies = PrepackedWeights | Int8Weight
"""Copies of a frozen weight that compute the weight's products."""


@dataclass(frozen=True, eq=False, slots=True)
class LinearMap:
    """A frozen weight (out, in) with low-rank products on its rows.

    The weight is one projection, or several projections of the same x, concatenated along the rows.

    bias: (out,).
    dora_scale: (out,) float32, DoRA's factor for each output, applied before the bias.
    products: the low-rank products. All use the same dropout mask on x, as in loralib's MergedLinear.
    copies: prepacked copies of the weight, or its 8-bit copy, if any.
    spans: token segments, if several adapters share x. Each product then applies only to its own segment's
        rows of x, with that segment's dropout. Not supported together with a DoRA scale."""

    weight: Tensor
    bias: Tensor | None = None
    products: tuple[LowRank, ...] = ()
    dora_scale: Tensor | None = None
    copies: WeightCopies | None = None
    spans: LoraSegments | None = None

    @property
    def dropout(self) -> float:
        """The dropout rate that all products share; 0 with `spans`."""
        return self.products[0].dropout if self.products and self.spans is None else 0.0


def join_maps(parts: Sequence[LinearMap], weight: Tensor | None = None) -> LinearMap:
    """Fuse several projections of the same x into one map.

    weight: the parts' weights concatenated along the rows, if already available.

    Raises ValueError for products with different dropout rates, because fused products use one dropout
    mask."""
    dropouts = sorted({part.dropout for part in parts if part.products})
    if len(dropouts) > 1:
        raise ValueError(f"low-rank products with dropouts {dropouts} cannot be joined into one")
    if len(parts) == 1 and (weight is None or weight is parts[0].weight):
        return parts[0]
    if weight is None:
        weight = torch.cat([p.weight for p in parts])
    bias = None
    if any(p.bias is not None for p in parts):
        bias = torch.cat([p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts])
    products: list[LowRank] = []
    at = 0
    for part in parts:
        products += [p.below(at) for p in part.products]
        at += part.weight.shape[0]
    dora_scale = None
    if any(p.dora_scale is not None for p in parts):
        ones = torch.ones(1, device=weight.device)
        dora_scale = torch.cat([ones.expand(len(p.weight)) if p.dora_scale is None else p.dora_scale for p in parts])
    spans = next((p.spans for p in parts if p.spans is not None), None)
    return LinearMap(weight, bias, tuple(products), dora_scale, spans=spans)


def split_map(linear_map: LinearMap, at: int) -> tuple[LinearMap, LinearMap]:
    """Split a map in two: the outputs before row `at`, and the remaining outputs.

    The weights of both parts are views.

    Raises ValueError if a product has dropout, because the two parts would sample different masks."""
    if any(p.dropout for p in linear_map.products):
        raise ValueError("low-rank products with dropout cannot be split: their parts share one dropped x")

    def rows(first: int, last: int) -> LinearMap:
        selected = slice(first, last)
        used = [p for p in linear_map.products if p.first < last and p.last > first]
        parts = [(p, p.B[max(first - p.first, 0) : last - p.first]) for p in used]
        products = tuple(replace(p, B=B, first=max(p.first - first, 0)) for p, B in parts)
        bias, dora_scale = (None if t is None else t[selected] for t in (linear_map.bias, linear_map.dora_scale))
        return LinearMap(linear_map.weight[selected], bias, products, dora_scale, spans=linear_map.spans)

    return rows(0, at), rows(at, len(linear_map.weight))


class _Products(Protocol):
    """An implementation of the op "low_rank", built from (products, number of weight rows, dtype)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add s·(x·Aᵀ)·Bᵀ to each product's columns of y; return u = x·Aᵀ."""

    def backward(self, g: Tensor, dx: Tensor | None) -> Tensor:
        """Add du·A to dx, if dx is given; return du = g·s·B."""

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        """Return [dA₁, dB₁, dA₂, …], given the output gradient g: (N, rows), and du."""


class LowRankProducts:
    """Low-rank products of one x, stacked; the reference of the op "low_rank".

    A is (Σ rank, in); s·B is block-diagonal, (rows, Σ rank).

    u = x·Aᵀ and du = g·s·B read x and g once for all pairs. The other matrix products run block by block,
    because full products would multiply by the zeros of s·B. For two pairs of 1536 × 16, u·(s·B)ᵀ takes 0.60
    ms block by block and 0.87 ms as a full product; gᵀ·u takes 0.81 ms and 1.23 ms."""

    def __init__(self, products: Sequence[LowRank], rows: int, dtype: torch.dtype) -> None:
        # In float32 arithmetic, A and s·B keep their float32 values, and u and du are not rounded.
        dtype = torch.float32 if in_float32(products[0].A.new_empty(1, 1, dtype=dtype)) else dtype
        self.scales = [p.scale for p in products]
        self.dtypes = [(p.A.dtype, p.B.dtype) for p in products]
        at = 0
        self.blocks: list[tuple[slice, slice]] = []
        for p in products:
            self.blocks.append((slice(p.first, p.last), slice(at, at + len(p.A))))
            at += len(p.A)
        if len(products) == 1 and len(products[0].B) == rows:
            self.A, self.sB = products[0].A.to(dtype), (products[0].B * products[0].scale).to(dtype)
            return
        self.A = torch.cat([p.A for p in products]).to(dtype)
        self.sB = self.A.new_zeros(rows, at)
        for p, block in zip(products, self.blocks, strict=True):
            self.sB[block] = p.B * p.scale

    def down(self, x: Tensor) -> Tensor:
        """Return u = x·Aᵀ."""
        return product(x, self.A.t(), dtype=self.A.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add u·(s·B)ᵀ to y; return u."""
        u = self.down(x)
        for rows, columns in self.blocks:
            product(u[:, columns], self.sB[rows, columns].t(), out=y[:, rows], add=True)
        return u

    def backward(self, g: Tensor, dx: Tensor | None) -> Tensor:
        """Add du·A to dx, if dx is given; return du."""
        du = product(g, self.sB, dtype=self.sB.dtype)
        if dx is not None:
            product(du, self.A, out=dx, add=True)
        return du

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        """Return [dA₁, dB₁, dA₂, …], given g: (N, Σ out) and du = g·s·B: (N, Σ rank)."""
        dA = product(du.t(), x)
        out = []
        for scale, (of_A, of_B), (rows, columns) in zip(self.scales, self.dtypes, self.blocks, strict=True):
            dB = product(u[:, columns].t(), g[:, rows]).t()
            out += [dA[columns].to(of_A), dB.to(of_B).mul_(scale)]
        return out


class _Dropped:
    """Low-rank products with dropout on x, and the same mask in forward and backward."""

    def __init__(self, products: _Products, drop: Dropout) -> None:
        self.products, self.drop = products, drop

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.products.forward(self.drop(x), y)

    def backward(self, g: Tensor, dx: Tensor | None) -> Tensor:
        dropped_dx = None if dx is None else torch.zeros_like(dx)
        du = self.products.backward(g, dropped_dx)
        if dx is not None and dropped_dx is not None:
            dx.add_(self.drop(dropped_dx))
        return du

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        return self.products.gradients(g, self.drop(x), u, du)


class _InSpans:
    """Products of several adapters, each on the rows of its own segment.

    The u and the du of all adapters are flattened and concatenated."""

    def __init__(self, x: Tensor, products: Sequence[LowRank], y: Tensor, spans: LoraSegments) -> None:
        members: dict[int, list[int]] = {}
        for index, each in enumerate(products):
            members.setdefault(each.span, []).append(index)
        firsts = {span: products[indices[0]] for span, indices in members.items()}
        drops = spans.dropouts({span: first.dropout for span, first in firsts.items() if first.dropout})
        bounds, self.indices = spans.bounds(len(x)), list(members.values())
        self.parts: list[tuple[slice, _Products]] = []
        for span, indices in members.items():
            at = bounds[span]
            self.parts.append((at, _products_for(x[at], tuple(products[i] for i in indices), y[at], drops.get(span))))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        us = [span_products.forward(x[at], y[at]) for at, span_products in self.parts]
        self.sizes = [u.shape for u in us]
        return torch.cat([u.flatten() for u in us])

    def backward(self, g: Tensor, dx: Tensor | None) -> Tensor:
        dus = [span_products.backward(g[at], None if dx is None else dx[at]) for at, span_products in self.parts]
        return torch.cat([du.flatten() for du in dus])

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        counts = [size.numel() for size in self.sizes]
        out: dict[int, list[Tensor]] = {}
        parts = zip(self.parts, self.indices, self.sizes, u.split(counts), du.split(counts), strict=True)
        for (at, span_products), indices, size, own_u, own_du in parts:
            gradients = span_products.gradients(g[at], x[at], own_u.view(size), own_du.view(size))
            out |= {index: gradients[2 * i : 2 * i + 2] for i, index in enumerate(indices)}
        return [t for index in sorted(out) for t in out[index]]


def _products(x: Tensor, linear_map: LinearMap) -> _Products:
    """Return the low-rank products of a map, from the implementation of "low_rank" in use."""
    y = x.new_empty(0, len(linear_map.weight))
    if linear_map.spans is not None:
        return _InSpans(x, linear_map.products, y, linear_map.spans)
    drop = Dropout.sample(linear_map.dropout) if linear_map.dropout else None
    return _products_for(x, linear_map.products, y, drop)


def _products_for(x: Tensor, products: tuple[LowRank, ...], y: Tensor, drop: Dropout | None) -> _Products:
    build = dispatch("low_rank", x, y, products) or LowRankProducts
    built: _Products = build(products, y.shape[1], x.dtype)
    return built if drop is None else _Dropped(built, drop)


def low_rank_tensors(linear_map: LinearMap) -> list[Tensor]:
    """Return [A₁, B₁, A₂, …], the tensors of a map that can require gradients."""
    return [t for p in linear_map.products for t in (p.A, p.B)]


class LinearOutput(NamedTuple):
    """The output `y` of a linear map, and the tensors that its backward pass needs.

    u: x·Aᵀ.
    plain: the input of the DoRA scale.
    products: the low-rank products, saved because rebuilding them is expensive for small layers.
    copies: the weight's prepacked copies or its 8-bit copy."""

    y: Tensor
    u: Tensor | None = None
    plain: Tensor | None = None
    products: _Products | None = None
    copies: WeightCopies | None = None


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = True,
    copies: WeightCopies | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return x·Wᵀ + b, or x·W if not `transposed`, without autograd.

    x: (N, in), or (N, out) if not `transposed`.
    copies: the weight's prepacked copies or its 8-bit copy.
    more: as in `product`."""
    if copies is not None and (by_copy := copies.product(x, weight, bias, transposed)) is not None:
        return by_copy if more is None else product(*more, out=by_copy, add=True)
    return product(x, weight.t() if transposed else weight, bias, more=more)


def keeps_copy(dtype: torch.dtype, rows: int, columns: int, transposed: bool) -> bool:
    """Return whether a product would use a prepacked copy of its weight.

    Used for memory estimates.

    transposed: whether the product is x·Wᵀ."""
    weight = torch.empty(1, dtype=dtype).expand(rows, columns)
    x = torch.empty(1, columns if transposed else rows, dtype=dtype)
    return dispatch("prepacked_linear", x, weight, None, transposed) is not None


def linear_forward(x: Tensor, linear_map: LinearMap) -> LinearOutput:
    """Run `linear` on x (N, in), for functions that define their own backward pass."""
    W, b, dora_scale, copies = linear_map.weight, linear_map.bias, linear_map.dora_scale, linear_map.copies
    if dora_scale is None:
        products = _products(x, linear_map) if linear_map.products else None
        y, u = _with_low_rank(x, W, b, copies, products)
        return LinearOutput(y, u, None, products, copies)
    if not linear_map.dropout:
        products = _products(x, linear_map)
        plain, u = _with_low_rank(x, W, None, copies, products)
        return LinearOutput(scale_outputs(plain, dora_scale, b), u, plain, products, copies)
    # PEFT's DoRA with dropout: x·Wᵀ + b + (dora_scale − 1) ⊙ d·Wᵀ + dora_scale ⊙ s·(d·Aᵀ)·Bᵀ, where d is x
    # after dropout
    y = frozen_linear(x, W, b, copies=copies)
    products = _products(x, linear_map)
    assert isinstance(products, _Dropped)
    dropped = products.drop(x)
    plain, low_rank_output = frozen_linear(dropped, W, copies=copies), torch.zeros_like(y)
    u = products.products.forward(dropped, low_rank_output)
    y = (plain * (dora_scale - 1)).add_(low_rank_output * dora_scale).add_(y).to(y.dtype)
    return LinearOutput(y, u, plain.add_(low_rank_output), products, copies)


def _with_low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copies: WeightCopies | None,
    products: _Products | None,
) -> tuple[Tensor, Tensor | None]:
    """Return x·Wᵀ + b with low-rank products added, and u = x·Aᵀ."""
    inner = products.products if isinstance(products, _Dropped) else products
    if isinstance(inner, LowRankProducts) and in_float32(x, weight):
        u = inner.down(products.drop(x) if isinstance(products, _Dropped) else x)
        return frozen_linear(x, weight, bias, copies=copies, more=(u, inner.sB.t())), u
    y = frozen_linear(x, weight, bias, copies=copies)
    return y, None if products is None else products.forward(x, y)


def linear_backward(
    g: Tensor, weight: Tensor, output: LinearOutput, dora_scale: Tensor | None, need_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return dx, g', du, and the gradient of the DoRA scale.

    g' is the gradient with respect to the low-rank products' output; du = g'·s·B."""
    products, plain = output.products, output.plain

    def input_gradient(t: Tensor, more: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return frozen_linear(t, weight, transposed=False, copies=output.copies, more=more)

    def both_gradients(t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return dx and du."""
        if need_dx and isinstance(products, LowRankProducts) and in_float32(t, weight):
            du = products.backward(t, None)
            return input_gradient(t, (du, products.A)), du
        dx = input_gradient(t) if need_dx else None
        return dx, None if products is None else products.backward(t, dx)

    if dora_scale is None or plain is None or products is None:
        dx, du = both_gradients(g)
        return dx, g, du, None
    inner, d_scale = _scale_gradients(g, plain, dora_scale)
    if not isinstance(products, _Dropped):
        dx, du = both_gradients(inner)
        return dx, inner, du, d_scale
    dx, dropped = (input_gradient(g), input_gradient(inner - g)) if need_dx else (None, None)
    du = products.products.backward(inner, dropped)
    if dx is not None and dropped is not None:
        dx.add_(products.drop(dropped))
    return dx, inner, du, d_scale


def scale_outputs(y: Tensor, dora_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return dora_scale ⊙ y + b, rounded once.

    The scale is not rounded to y's dtype: DoRA scales are near 1, where neighboring bfloat16 values differ by
    1/128 or 1/256."""
    run = dispatch("dora_scale", dora_scale, y, *([] if bias is None else [bias]))
    if run is not None:
        result: Tensor = run(y, dora_scale, bias)
        return result
    out = y * dora_scale
    return (out if bias is None else out.add_(bias)).to(y.dtype)


def _scale_gradients(g: Tensor, y: Tensor, dora_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y (the input of the DoRA scale) and of the scale."""
    run = dispatch("dora_scale_backward", dora_scale, g, y)
    if run is not None:
        gradients: tuple[Tensor, Tensor] = run(g, y, dora_scale)
        return gradients
    return (g * dora_scale).to(g.dtype), (g.to(dora_scale.dtype) * y).sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear_map: LinearMap, dora_scale: Tensor | None, *flat: Tensor) -> Tensor:
        output = linear_forward(x, linear_map)
        # A and B are saved too, so that autograd detects changes to them before backward.
        ctx.save_for_backward(x if flat else None, output.u, output.plain, dora_scale, *flat)
        ctx.products, ctx.weight, ctx.copies = output.products, linear_map.weight, linear_map.copies
        return output.y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, u, plain, dora_scale, *_ = ctx.saved_tensors
        output, g = LinearOutput(g, u, plain, ctx.products, ctx.copies), g.contiguous()
        dx, inner, du, d_scale = linear_backward(g, ctx.weight, output, dora_scale, ctx.needs_input_grad[0])
        return (dx, None, d_scale, *low_rank_gradients(output, inner, x, du))


def low_rank_gradients(output: LinearOutput, g: Tensor, x: Tensor, du: Tensor | None) -> list[Tensor]:
    """Return the gradients of `low_rank_tensors`, from the results of `linear_backward`."""
    if output.products is None or output.u is None or du is None:
        return []
    return output.products.gradients(g, x, output.u, du)


def linear(x: Tensor, linear_map: LinearMap) -> Tensor:
    """Return y = x·Wᵀ + b, with s·(x·Aᵀ)·Bᵀ added to the output columns of each part.

    x: (…, in) → (…, Σ out).

    The DoRA scale multiplies everything except b. Saves x, the narrow x·Aᵀ and, with a DoRA scale, the
    scale's input for backward. Reference: F.linear(x, W, b), with s·F.linear(F.linear(d, A), B) added to each
    product's columns, where d is x after dropout."""
    y: Tensor = _Linear.apply(
        x.reshape(-1, x.shape[-1]), linear_map, linear_map.dora_scale, *low_rank_tensors(linear_map)
    )
    # This view is created outside the autograd Function, because callers can write into the result.
    return y.view(*x.shape[:-1], y.shape[-1])
