"""Run a denoiser's training step with the fast implementations of `ops`.

    with fast_denoiser(base.denoiser) as report:     report.summary() lists swapped and skipped modules
        loss.backward()

What is swapped:
- attention of FLUX.1, FLUX.2 and Qwen-Image blocks (except with masked texts of different lengths) and of the
  U-Nets' transformers: one matrix product for the projections that share an input; one function for norms,
  rotation and attention
- FLUX.2's gated MLPs; GEGLU; tanh-gelu
- group norms in a U-Net's residual blocks, fused with silu and with the added time embedding
- dropout with p = 0
- convolutions on a U-Net's up path: if no trained module precedes a skip connection, the fast version does
  not compute the connection's gradient, which torch would compute and discard

Before a module is swapped, both implementations run on a small random input and must give the same result.
When the with-block ends, every module is restored exactly. All other modules keep diffusers' implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.core.targets import base_of
from veneer.models.patching import (
    FastReport,
    FusedProjection,
    random_input,
    replace_forward,
    same_dtype,
    widen_products,
    without_dropout,
)
from veneer.ops.attention import cross_attention, joint_attention
from veneer.ops.conv import frozen_conv
from veneer.ops.cpu import memory
from veneer.ops.device_transfer import in_float64
from veneer.ops.linear import LinearMap, linear, split_map
from veneer.ops.mlp import gated_mlp, geglu, gelu_tanh, swiglu
from veneer.ops.norms import norm_silu


class DenoiserReport(FastReport):
    def summary(self) -> str:
        """Return one line for the user: swapped modules, skipped modules with reasons."""
        parts = [f"{n} × {kind}" for kind, n in sorted(self.swapped.items())]
        skipped = [f"; {kind} not swapped ({why})" for kind, why in sorted(self.skipped.items())]
        return f"fast paths: {', '.join(parts) or 'none'}{''.join(skipped)}"


@contextmanager
def fast_denoiser(denoiser: nn.Module) -> Iterator[DenoiserReport]:
    """Replace modules with fast implementations inside the with-block."""
    report = DenoiserReport()
    with ExitStack() as undo:
        undo.enter_context(memory.keep_freed_memory())
        widen_products(denoiser, undo)
        with without_dropout(denoiser):
            _swap(denoiser, report, undo)
        yield report


def _swap(denoiser: nn.Module, report: DenoiserReport, undo: ExitStack) -> None:
    for _, module in list(denoiser.named_modules()):
        kind = type(module).__name__
        swap_kind = _SWAPS.get(kind)
        if swap_kind is None:
            continue
        with ExitStack() as attempt:
            if why := swap_kind(module, attempt):
                report.skipped[kind] = why
                continue
            undo.push(attempt.pop_all())
        report.swapped[kind] = report.swapped.get(kind, 0) + 1


def _parts(module: Any, *names: str) -> list[nn.Module] | None:
    """Return the linear modules with these names, or None if one is not linear.

    The modules can have adapters."""
    modules = [getattr(module, name, None) for name in names]
    linear = [m for m in modules if isinstance(m, nn.Module) and type(base_of(m)) is nn.Linear]
    return linear if len(linear) == len(names) else None


def _equal_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Return whether a and b are equal up to rounding in their dtype.

    The comparison is per token (or position) and per channel, so that a few large channels do not hide errors
    in other channels. a, b: (n, tokens, channels) or (n, channels, height, width).

    The float32 tolerance, 30 eps, lies between a harmless and a real difference: the same attention summed in
    two orders differs by up to 21 eps if a token's values nearly cancel (AVX512 and AVX2, tiny SDXL); a norm
    with an eps of 1e-5 instead of 1e-6 differs by 38 eps at a variance of 1."""
    if a.shape != b.shape or not torch.isfinite(b).all():
        return False
    dim = 1 if a.ndim == 4 else -1
    wide_a, wide_b = (in_float64(t).movedim(dim, -1).flatten(0, -2) for t in (a, b))
    tolerance = (30 if a.dtype == torch.float32 else 12) * torch.finfo(a.dtype).eps
    tiny = torch.finfo(a.dtype).tiny
    off, size = wide_a - wide_b, wide_b.norm() / max(wide_b.numel(), 1) ** 0.5
    for along in (0, 1):
        least = 1e-2 * size * wide_b.shape[along] ** 0.5  # a value far below this can be rounding error
        if (off.norm(dim=along) > tolerance * wide_b.norm(dim=along).clamp_min(least) + tiny).any():
            return False
    return True


def _swap_if_equal(module: nn.Module, forward: Callable[..., Any], undo: ExitStack, *args: Any, **kwargs: Any) -> str:
    """Replace the module's forward; return "", or a reason if the result differs."""

    def run() -> list[Tensor]:
        # with autograd, as in training
        out = module(*args, **kwargs)
        return list(out) if isinstance(out, tuple) else [out]

    expected = run()
    replace_forward(module, forward, undo)
    actual = run()
    pairs = zip(actual, expected, strict=True)
    equal = len(actual) == len(expected) and all(_equal_up_to_rounding(a.detach(), b.detach()) for a, b in pairs)
    return "" if equal else "its result differs"


def _product(projection: FusedProjection, x: Tensor) -> Tensor | None:
    """Return the fused projections of x, or None to call the modules separately.

    Separate calls are needed if a module has hooks, or if x and the weights have different dtypes."""
    joined = _map(projection, x)
    return None if joined is None else linear(x, joined)


def _map(projection: FusedProjection, x: Tensor) -> LinearMap | None:
    """Return the fused linear map, or None if the modules must be called separately."""
    joined = projection.linear_map()
    return None if joined is None or not same_dtype(x, joined.weight) else joined


# -- activations -------------------------------------------------------------------------------------------------------


def _geglu(module: Any, undo: ExitStack) -> str:
    like = base_of(module.proj).weight
    assert isinstance(like, Tensor)
    original = type(module).forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))

    return _swap_if_equal(module, forward, undo, random_input(2, 12, like.shape[1], like=like))


def _gelu(module: Any, undo: ExitStack) -> str:
    """Swap torch's nn.GELU, or diffusers' projection with GELU.

    nn.GELU has no weights that could determine the test input's dtype."""
    proj = getattr(module, "proj", None)
    if module.approximate != "tanh":
        return "it is a different function"
    like = torch.empty(0, 8) if proj is None else base_of(proj).weight
    assert isinstance(like, Tensor)

    def forward(self: Any, x: Tensor) -> Tensor:
        return gelu_tanh(x if proj is None else self.proj(x))

    return _swap_if_equal(module, forward, undo, random_input(2, 12, like.shape[1], like=like))


def _dropout(module: Any, undo: ExitStack) -> str:
    """Make a dropout module with p = 0 return its input; torch would copy it twice."""
    if module.p:
        return "its p is not 0"
    replace_forward(module, lambda self, x: x, undo)
    return ""


# -- FLUX.1, FLUX.2 and Qwen-Image -------------------------------------------------------------------------------------


def _flux_attention(module: Any, undo: ExitStack) -> str:
    processor = type(module.processor).__name__
    if processor not in _FLUX_PROCESSORS or getattr(module, "fused_projections", False):
        return f"its processor is {processor}"
    two = module.added_kv_proj_dim is not None
    image_parts, text_parts = _parts(module, "to_q", "to_k", "to_v"), None
    norms = [module.norm_q, module.norm_k]
    if two:
        text_parts = _parts(module, "add_q_proj", "add_k_proj", "add_v_proj")
        norms += [module.norm_added_q, module.norm_added_k]
    if image_parts is None or (two and text_parts is None):
        return "its projections are not plain linears"
    if not _frozen(norms):
        return _NORMS
    joins = [FusedProjection(parts, undo) for parts in (image_parts, text_parts) if parts is not None]
    like = base_of(image_parts[0]).weight
    assert isinstance(like, Tensor)
    x = random_input(2, 12, like.shape[1], like=like)
    size = getattr(module, "head_dim", None) or module.inner_dim // module.heads
    arguments: dict[str, Any] = {"image_rotary_emb": _positions(15 if two else 12, size, like)}
    if processor == _QWEN_PROCESSOR:  # Qwen-Image has complex positions, in separate tensors for picture and text
        cos, sin = arguments["image_rotary_emb"]
        arguments["image_rotary_emb"] = torch.complex(cos[:, ::2], sin[:, ::2]).split([12, 3])
    if text_parts is not None:
        text_weight = base_of(text_parts[0]).weight
        assert isinstance(text_weight, Tensor)
        arguments["encoder_hidden_states"] = random_input(2, 3, text_weight.shape[1], like=text_weight)
    original = type(module).forward
    return _swap_if_equal(module, _flux_forward(original, joins, norms, size), undo, x, **arguments)


_QWEN_PROCESSOR = "QwenDoubleStreamAttnProcessor2_0"
_FLUX_PROCESSORS = ("FluxAttnProcessor", "Flux2AttnProcessor", _QWEN_PROCESSOR)
_NORMS = "its norms are trained, lack weights or have different ε"


def _frozen(norms: list[Any]) -> bool:
    weights = [getattr(norm, "weight", None) for norm in norms]
    return not any(w is None or w.requires_grad for w in weights) and len({norm.eps for norm in norms}) == 1


def _positions(tokens: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cos and sin of random rotary angles, for testing a module."""
    angles = random_input(tokens, dim // 2, like=like).float().repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


class _Rotations:
    """Rotary positions for `joint_attention`, converted once for all blocks."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def get(self, angles: tuple[Tensor, Tensor] | None) -> Tensor | None:
        if angles is None:
            return None
        first, second = angles
        if self._last is None or self._last[0] is not first:
            if first.is_complex():  # Qwen-Image passes (picture, text); the result has text tokens first
                self._last = first, torch.cat([second, first])
            else:
                self._last = first, torch.complex(first[:, ::2].float(), second[:, ::2].float()).contiguous()
        return self._last[1]


def _flux_forward(
    original: Callable[..., Any], joins: list[FusedProjection], norms: list[Any], head_dim: int
) -> Callable[..., Any]:
    rotations = _Rotations()
    eps = float(norms[0].eps)

    def weight_of(tokens: list[int]) -> Tensor:
        """Return (w_q, w_k) for every token, text tokens first like the queries and keys."""
        rows = []
        for side in (0, 1):
            stream_norms = [norms[side]] if len(tokens) == 1 else [norms[2 + side], norms[side]]
            rows.append(torch.cat([m.weight.float().expand(n, -1) for m, n in zip(stream_norms, tokens, strict=True)]))
        return torch.stack(rows)[:, None, None]

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # Qwen-Image's mask
        streams = [hidden_states] if encoder_hidden_states is None else [encoder_hidden_states, hidden_states]
        products: list[Tensor | None] = []
        if attention_mask is None and not kwargs and len(streams) == len(joins):
            products = [_product(projection, x) for projection, x in zip(reversed(joins), streams, strict=True)]
        computed = [p for p in products if p is not None]
        if len(computed) != len(streams):
            kwargs["image_rotary_emb"] = image_rotary_emb
            return original(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        rotation = rotations.get(image_rotary_emb)
        qkv = computed[0] if len(computed) == 1 else torch.cat(computed, 1)
        heads = qkv.view(*qkv.shape[:2], 3, -1, head_dim)
        out = joint_attention(heads, weight_of([p.shape[1] for p in computed]), eps, rotation)
        if encoder_hidden_states is None:
            return out
        text, picture = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return self.to_out[1](self.to_out[0](picture.contiguous())), self.to_add_out(text.contiguous())

    return forward


def _flux2_feed_forward(module: Any, undo: ExitStack) -> str:
    first, last = _parts(module, "linear_in"), _parts(module, "linear_out")
    if first is None or last is None or type(module.act_fn).__name__ != "Flux2SwiGLU":
        return "its projections are not plain linears"
    gate_up, down = FusedProjection(first, undo), FusedProjection(last, undo)
    original = type(module).forward

    def forward(self: Any, x: Tensor) -> Any:
        gate_up_map, down_map = _map(gate_up, x), _map(down, x)
        return original(self, x) if gate_up_map is None or down_map is None else gated_mlp(x, gate_up_map, down_map)

    like = base_of(first[0]).weight
    assert isinstance(like, Tensor)
    return _swap_if_equal(module, forward, undo, random_input(2, 12, like.shape[1], like=like))


def _flux2_parallel(module: Any, undo: ExitStack) -> str:
    """Swap a single-stream block, which computes attention parallel to a gated MLP.

    The first projection gives [q; k; v; gate; up]; the second projection takes the results of attention and
    MLP. The first projection is split into [q; k; v] and [gate; up], so that each part of its output is
    contiguous and the gradient of each part needs no copy or zero fill."""
    if type(module.processor).__name__ != "Flux2ParallelSelfAttnProcessor":
        return f"its processor is {type(module.processor).__name__}"
    first, last, norms = _parts(module, "to_qkv_mlp_proj"), _parts(module, "to_out"), [module.norm_q, module.norm_k]
    if first is None or last is None or type(module.mlp_act_fn).__name__ != "Flux2SwiGLU":
        return "its projections are not plain linears"
    if not _frozen(norms):
        return _NORMS
    projection, out = FusedProjection(first, undo), FusedProjection(last, undo)
    rotations, eps = _Rotations(), float(norms[0].eps)
    original = type(module).forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        full = _map(projection, hidden_states) if attention_mask is None and not kwargs else None
        if full is None or full.dropout:
            return original(self, hidden_states, attention_mask, image_rotary_emb, **kwargs)
        of_heads, of_mlp = split_map(full, 3 * self.inner_dim)
        heads = linear(hidden_states, of_heads).view(*hidden_states.shape[:2], 3, -1, self.head_dim)
        weight = torch.stack([norm.weight.float() for norm in norms])[:, None, None, None]
        attended = joint_attention(heads, weight, eps, rotations.get(image_rotary_emb))
        both = torch.cat([attended, swiglu(linear(hidden_states, of_mlp))], dim=-1)
        result = _product(out, both)
        return self.to_out(both) if result is None else result

    like = base_of(first[0]).weight
    assert isinstance(like, Tensor)
    arguments = {"image_rotary_emb": _positions(12, module.head_dim, like)}
    return _swap_if_equal(module, forward, undo, random_input(2, 12, like.shape[1], like=like), **arguments)


# -- UNets -------------------------------------------------------------------------------------------------------------


def _residual(module: Any, undo: ExitStack) -> str:
    usual = (
        module.upsample is None
        and module.downsample is None
        and module.time_embedding_norm == "default"
        and not module.skip_time_act
        and module.output_scale_factor == 1
        and not module.dropout.p
    )
    norms = [module.norm1, module.norm2]
    if not usual or type(module.nonlinearity) is not nn.SiLU or any(type(n) is not nn.GroupNorm for n in norms):
        return "its resampling, dropout or norms are unusual"
    original = type(module).forward

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or any(type(n) is not nn.GroupNorm or n._forward_hooks for n in (self.norm1, self.norm2)):
            return original(self, input_tensor, temb, *args, **kwargs)
        live = _live(self, input_tensor)
        group = input_tensor.shape[1] // self.norm1.num_groups  # The norm's gradient mixes the channels of a group.
        hidden = _convolved(self.conv1, _normed(self.norm1, input_tensor), -(-live // group) * group)
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(self.nonlinearity(temb))
        hidden = self.conv2(_normed(self.norm2, hidden, shift))
        shortcut = self.conv_shortcut
        return hidden + (input_tensor if shortcut is None else _convolved(shortcut, input_tensor, live))

    like = module.norm1.weight
    time = None if module.time_emb_proj is None else random_input(2, module.time_emb_proj.in_features, like=like)
    return _swap_if_equal(module, forward, undo, random_input(2, module.in_channels, 4, 4, like=like), time)


def _normed(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    return norm_silu(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps)


_BEFORE_SKIP: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Residual block -> number of input channels before the skip connection's channels."""


def _up(module: Any, undo: ExitStack) -> str:
    """Record the input channel at which each residual block's skip connection begins."""

    def resize(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        skips = kwargs.get("res_hidden_states_tuple") or (args[1] if len(args) > 1 else ())
        for block, skip in zip(module.resnets, reversed(skips), strict=False):
            _BEFORE_SKIP[block] = block.in_channels - skip.shape[1]

    undo.callback(lambda: [_BEFORE_SKIP.pop(block, None) for block in module.resnets])
    undo.callback(module.register_forward_pre_hook(resize, with_kwargs=True).remove)
    return ""


def _live(block: nn.Module, x: Tensor) -> int:
    """Return the number of leading channels of x that require a gradient.

    The number comes from x's autograd graph and not from an earlier call, because recomputation calls blocks
    in a different order than the model."""
    made_by = x.grad_fn
    if block in _BEFORE_SKIP and made_by is not None and made_by.name() == "CatBackward0":
        parts = made_by.next_functions
        if len(parts) == 2 and parts[1][0] is None:
            return _BEFORE_SKIP[block]
    return x.shape[1]


def _convolved(conv: Any, x: Tensor, live: int) -> Tensor:
    """Return conv(x), with a gradient for only the first `live` channels of x."""
    plain = type(conv) is nn.Conv2d and not conv._forward_hooks and not conv._forward_pre_hooks
    plain = plain and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    if live >= x.shape[1] or not plain or not x.requires_grad or conv.weight.requires_grad:
        out: Tensor = conv(x)
        return out
    return frozen_conv(x, conv.weight, conv.bias, padding=conv.padding, live=live)


def _unet_attention(module: Any, undo: ExitStack) -> str:
    if type(module.processor).__name__ != "AttnProcessor2_0":
        return f"its processor is {type(module.processor).__name__}"
    plain = (
        all(getattr(module, name, None) is None for name in ("spatial_norm", "group_norm", "norm_q", "norm_k"))
        and not module.norm_cross
        and not module.residual_connection
        and module.rescale_output_factor == 1
    )
    q, kv, last = _parts(module, "to_q"), _parts(module, "to_k", "to_v"), _parts(module.to_out, "0")
    if not plain or q is None or kv is None or last is None:
        return "its norms or projections are unusual"
    crossed = bool(module.is_cross_attention)
    joins = [FusedProjection(q, undo), FusedProjection(kv, undo)] if crossed else [FusedProjection([*q, *kv], undo)]
    like, kv_weight = base_of(q[0]).weight, base_of(kv[0]).weight
    assert isinstance(like, Tensor)
    assert isinstance(kv_weight, Tensor)
    arguments = {"encoder_hidden_states": random_input(2, 3, kv_weight.shape[1], like=kv_weight)} if crossed else {}
    forward = _unet_forward(type(module).forward, joins, FusedProjection(last, undo))
    return _swap_if_equal(module, forward, undo, random_input(2, 12, like.shape[1], like=like), **arguments)


def _unet_forward(
    original: Callable[..., Any], joins: list[FusedProjection], last: FusedProjection
) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        crossed = len(joins) == 2
        fits = attention_mask is None and not kwargs and hidden_states.ndim == 3
        fits = fits and crossed == (encoder_hidden_states is not None)
        first = _product(joins[0], hidden_states) if fits else None
        second = _product(joins[1], encoder_hidden_states) if fits and encoder_hidden_states is not None else None
        if first is None or (crossed and second is None):
            return original(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        n = len(first)
        if second is None:
            out = joint_attention(first.view(n, first.shape[1], 3, self.heads, -1))
        else:
            k, v = second.view(n, second.shape[1], 2, self.heads, -1).unbind(2)
            out = cross_attention(first.view(n, first.shape[1], self.heads, -1), k, v)
        result = _product(last, out)
        return self.to_out[1](self.to_out[0](out) if result is None else result)

    return forward


def _attention(module: Any, undo: ExitStack) -> str:
    """Swap attention. diffusers uses the same class for U-Nets and Qwen-Image."""
    swap = _flux_attention if type(module.processor).__name__ == _QWEN_PROCESSOR else _unet_attention
    return swap(module, undo)


_SWAPS: dict[str, Callable[[Any, ExitStack], str]] = {
    "Attention": _attention,
    "CrossAttnUpBlock2D": _up,
    "Dropout": _dropout,
    "Flux2Attention": _flux_attention,
    "Flux2FeedForward": _flux2_feed_forward,
    "Flux2ParallelSelfAttention": _flux2_parallel,
    "FluxAttention": _flux_attention,
    "GEGLU": _geglu,
    "GELU": _gelu,
    "ResnetBlock2D": _residual,
    "UpBlock2D": _up,
}
