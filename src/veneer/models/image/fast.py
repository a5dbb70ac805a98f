"""A denoiser's training step on the fast paths, for the length of a with-block.

    with fast_denoiser(base.denoiser) as how:        how.summary() says what was swapped, and what was left and why
        loss.backward()

Swapped: the attention of FLUX.1's, FLUX.2's and Qwen-Image's blocks (projections that share an input joined to one
product, norms, rotation and attention one function; not where texts of unlike lengths are masked) and of the UNets'
transformers; FLUX.2's gated MLPs; GEGLU, and gelu with the tanh;
in a UNet's residual blocks group norms with silu and with what time adds; dropout that drops nothing; on a UNet's way
up the gradient of skip connections that nothing trained comes before, which torch makes and throws away. Every module
is first run both ways on a small random input and swapped only where the two agree, and everything is put back bit for
bit at the end. What a family does differently is left as diffusers has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.core.targets import base_of
from veneer.models.compat_diffusers import DIFFUSERS
from veneer.models.swap import FastReport, Join, random_input, replace_forward, same_dtype, without_dropout
from veneer.ops.attention import cross_attention, joint_attention
from veneer.ops.conv import live_conv
from veneer.ops.cpu import memory
from veneer.ops.device_transfer import in_float64
from veneer.ops.linear import LinearMap, linear, split_map
from veneer.ops.mlp import gated_mlp, geglu, gelu_tanh, swiglu
from veneer.ops.norms import norm_silu


class DenoiserReport(FastReport):
    def summary(self) -> str:
        """One line for a person: what was swapped, and what was left as it is and why."""
        parts = [f"{n} × {kind}" for kind, n in sorted(self.swapped.items())]
        left = [f"; {kind} as diffusers has it ({why})" for kind, why in sorted(self.left.items())]
        return f"fast paths: {', '.join(parts) or 'none'}{''.join(left)}"


@contextmanager
def fast_denoiser(denoiser: nn.Module) -> Iterator[DenoiserReport]:
    """Swaps what can be swapped, as the module says, for the length of the with-block."""
    report = DenoiserReport()
    with ExitStack() as undo:
        undo.enter_context(memory.kept_memory())
        with without_dropout(denoiser):
            _swap(denoiser, report, undo)
        yield report


def _swap(denoiser: nn.Module, report: DenoiserReport, undo: ExitStack) -> None:
    for _, module in list(denoiser.named_modules()):
        kind = type(module).__name__
        make = _SWAPS.get(kind)
        if make is None:
            continue
        with ExitStack() as attempt:
            if why := make(module, attempt):
                report.left[kind] = why
                continue
            undo.push(attempt.pop_all())
        report.swapped[kind] = report.swapped.get(kind, 0) + 1


def _parts(module: Any, *names: str) -> list[nn.Module] | None:
    """The linear modules of these names, attached or not; None where one is missing or something else."""
    found = [getattr(module, name, None) for name in names]
    kept = [m for m in found if isinstance(m, nn.Module) and type(base_of(m)) is nn.Linear]
    return kept if len(kept) == len(names) else None


def _agree(a: Tensor, b: Tensor) -> bool:
    """Equal within what rounding in their dtype explains: each token (or place) by itself, and each channel by itself,
    so that a few large channels do not hide the others. (n, tokens, channels) or (n, channels, height, width).

    Two ways to add up the same attention in float32 lie up to 21 eps apart where a token's values all but cancel
    (AVX512 and AVX2, tiny SDXL); a norm's eps of 1e-5 for 1e-6 would be 38 at a variance of 1."""
    if a.shape != b.shape or not torch.isfinite(b).all():
        return False
    dim = 1 if a.ndim == 4 else -1
    wide_a, wide_b = (in_float64(t).movedim(dim, -1).flatten(0, -2) for t in (a, b))
    tolerance = (30 if a.dtype == torch.float32 else 12) * torch.finfo(a.dtype).eps
    tiny = torch.finfo(a.dtype).tiny
    off, size = wide_a - wide_b, wide_b.norm() / max(wide_b.numel(), 1) ** 0.5
    for along in (0, 1):
        least = (
            1e-2 * size * wide_b.shape[along] ** 0.5
        )  # what is all but nothing beside the rest may be rounding alone
        if (off.norm(dim=along) > tolerance * wide_b.norm(dim=along).clamp_min(least) + tiny).any():
            return False
    return True


def _differs(module: nn.Module, forward: Callable[..., Any], undo: ExitStack, *args: Any, **kwargs: Any) -> str:
    """Put `forward` on the module if it gives what the module gives; else why not."""

    def run() -> list[Tensor]:
        # with gradients, so that both sides are what training runs
        out = module(*args, **kwargs)
        return list(out) if isinstance(out, tuple) else [out]

    wanted = run()
    replace_forward(module, forward, undo)
    got = run()
    same = len(got) == len(wanted) and all(_agree(a.detach(), b.detach()) for a, b in zip(got, wanted, strict=True))
    return "" if same else "its result differs"


def _product(join: Join, x: Tensor) -> Tensor | None:
    """The joined projections of x, or None where a module has to be called or another dtype is asked for."""
    joined = _map(join, x)
    return None if joined is None else linear(x, joined)


def _map(join: Join, x: Tensor) -> LinearMap | None:
    """The joined projections, or None where they cannot be multiplied by x as it is."""
    joined = join.linear_map()
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

    return _differs(module, forward, undo, random_input(2, 12, like.shape[1], like=like))


def _gelu(module: Any, undo: ExitStack) -> str:
    """torch's nn.GELU, which has no weights to know a dtype by, and diffusers' GELU, a projection before it."""
    proj = getattr(module, "proj", None)
    if module.approximate != "tanh":
        return "it is another function"
    like = torch.empty(0, 8) if proj is None else base_of(proj).weight
    assert isinstance(like, Tensor)

    def forward(self: Any, x: Tensor) -> Tensor:
        return gelu_tanh(x if proj is None else self.proj(x))

    return _differs(module, forward, undo, random_input(2, 12, like.shape[1], like=like))


def _dropout(module: Any, undo: ExitStack) -> str:
    """torch copies what it drops nothing from, and the gradient too."""
    if module.p:
        return "it drops something"
    replace_forward(module, lambda self, x: x, undo)
    return ""


# -- FLUX.1, FLUX.2 and Qwen-Image -------------------------------------------------------------------------------------


def _flux_attention(module: Any, undo: ExitStack) -> str:
    own_processors = (
        DIFFUSERS("diffusers.models.transformers.transformer_flux.FluxAttnProcessor"),
        DIFFUSERS("diffusers.models.transformers.transformer_flux2.Flux2AttnProcessor"),
        _qwen_processor(),
    )
    if type(module.processor) not in own_processors or getattr(module, "fused_projections", False):
        return f"its processor is {type(module.processor).__name__}"
    two = module.added_kv_proj_dim is not None
    own, added = _parts(module, "to_q", "to_k", "to_v"), None
    norms = [module.norm_q, module.norm_k]
    if two:
        added = _parts(module, "add_q_proj", "add_k_proj", "add_v_proj")
        norms += [module.norm_added_q, module.norm_added_k]
    if own is None or (two and added is None):
        return "its projections are not plain linears"
    if not _frozen(norms):
        return _NORMS
    joins = [Join(own, undo)] + ([Join(added, undo)] if added is not None else [])
    like = base_of(own[0]).weight
    assert isinstance(like, Tensor)
    x = random_input(2, 12, like.shape[1], like=like)
    size = getattr(module, "head_dim", None) or module.inner_dim // module.heads
    given: dict[str, Any] = {"image_rotary_emb": _positions(15 if two else 12, size, like)}
    if type(module.processor) is _qwen_processor():  # complex, and those of picture and text apart
        cos, sin = given["image_rotary_emb"]
        given["image_rotary_emb"] = torch.complex(cos[:, ::2], sin[:, ::2]).split([12, 3])
    if added is not None:
        other = base_of(added[0]).weight
        assert isinstance(other, Tensor)
        given["encoder_hidden_states"] = random_input(2, 3, other.shape[1], like=other)
    original = type(module).forward
    return _differs(module, _flux_forward(original, joins, norms, size), undo, x, **given)


def _qwen_processor() -> type:
    return DIFFUSERS("diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0")  # type: ignore[no-any-return]


_NORMS = "its norms are trained, without weights or of different ε"


def _frozen(norms: list[Any]) -> bool:
    weights = [getattr(norm, "weight", None) for norm in norms]
    return not any(w is None or w.requires_grad for w in weights) and len({norm.eps for norm in norms}) == 1


def _positions(tokens: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin to try a module with."""
    angles = random_input(tokens, dim // 2, like=like).float().repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


class _Turns:
    """Rotary positions as `joint_attention` takes them, made once of those that a model makes for all of its blocks."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, given: tuple[Tensor, Tensor] | None) -> Tensor | None:
        if given is None:
            return None
        one, two = given
        if self._last is None or self._last[0] is not one:
            if one.is_complex():  # Qwen-Image's, of the picture and of the text, whose tokens come first
                self._last = one, torch.cat([two, one])
            else:
                self._last = one, torch.complex(one[:, ::2].float(), two[:, ::2].float()).contiguous()
        return self._last[1]


def _flux_forward(
    original: Callable[..., Any], joins: list[Join], norms: list[Any], head_dim: int
) -> Callable[..., Any]:
    turns = _Turns()
    eps = float(norms[0].eps)

    def weight_of(tokens: list[int]) -> Tensor:
        """w_q, w_k of every token: the text's first, as its queries and keys come first."""
        rows = []
        for which in (0, 1):
            own = [norms[which]] if len(tokens) == 1 else [norms[2 + which], norms[which]]
            rows.append(torch.cat([m.weight.float().expand(n, -1) for m, n in zip(own, tokens, strict=True)]))
        return torch.stack(rows)[:, None, None]

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # as Qwen-Image's mask
        streams = [hidden_states] if encoder_hidden_states is None else [encoder_hidden_states, hidden_states]
        products: list[Tensor | None] = []
        if attention_mask is None and not kwargs and len(streams) == len(joins):
            products = [_product(join, x) for join, x in zip(reversed(joins), streams, strict=True)]
        known = [p for p in products if p is not None]
        if len(known) != len(streams):
            kwargs["image_rotary_emb"] = image_rotary_emb
            return original(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        turn = turns.of(image_rotary_emb)
        qkv = known[0] if len(known) == 1 else torch.cat(known, 1)
        heads = qkv.view(*qkv.shape[:2], 3, -1, head_dim)
        out = joint_attention(heads, weight_of([p.shape[1] for p in known]), eps, turn)
        if encoder_hidden_states is None:
            return out
        text, picture = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return self.to_out[1](self.to_out[0](picture.contiguous())), self.to_add_out(text.contiguous())

    return forward


def _flux2_feed_forward(module: Any, undo: ExitStack) -> str:
    first, last = _parts(module, "linear_in"), _parts(module, "linear_out")
    if first is None or last is None or type(module.act_fn).__name__ != "Flux2SwiGLU":
        return "its projections are not plain linears"
    gate_up, down = Join(first, undo), Join(last, undo)
    original = type(module).forward

    def forward(self: Any, x: Tensor) -> Any:
        one, two = _map(gate_up, x), _map(down, x)
        return original(self, x) if one is None or two is None else gated_mlp(x, one, two)

    like = base_of(first[0]).weight
    assert isinstance(like, Tensor)
    return _differs(module, forward, undo, random_input(2, 12, like.shape[1], like=like))


def _flux2_parallel(module: Any, undo: ExitStack) -> str:
    """A block of one stream: [q; k; v; gate; up] of x, attention beside a gated MLP, one projection of both.

    The product is taken in two, of q, k and v and of gate and up, so that each lies together as what reads it wants it,
    and nothing is copied or filled with zeros for its gradient."""
    processor = DIFFUSERS("diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttnProcessor")
    if type(module.processor) is not processor:
        return f"its processor is {type(module.processor).__name__}"
    first, last, norms = _parts(module, "to_qkv_mlp_proj"), _parts(module, "to_out"), [module.norm_q, module.norm_k]
    if first is None or last is None or type(module.mlp_act_fn).__name__ != "Flux2SwiGLU":
        return "its projections are not plain linears"
    if not _frozen(norms):
        return _NORMS
    join, out, turns, eps = Join(first, undo), Join(last, undo), _Turns(), float(norms[0].eps)
    original = type(module).forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        whole = _map(join, hidden_states) if attention_mask is None and not kwargs else None
        if whole is None or whole.dropout:
            return original(self, hidden_states, attention_mask, image_rotary_emb, **kwargs)
        of_heads, of_mlp = split_map(whole, 3 * self.inner_dim)
        heads = linear(hidden_states, of_heads).view(*hidden_states.shape[:2], 3, -1, self.head_dim)
        weight = torch.stack([norm.weight.float() for norm in norms])[:, None, None, None]
        attended = joint_attention(heads, weight, eps, turns.of(image_rotary_emb))
        both = torch.cat([attended, swiglu(linear(hidden_states, of_mlp))], dim=-1)
        made = _product(out, both)
        return self.to_out(both) if made is None else made

    like = base_of(first[0]).weight
    assert isinstance(like, Tensor)
    given = {"image_rotary_emb": _positions(12, module.head_dim, like)}
    return _differs(module, forward, undo, random_input(2, 12, like.shape[1], like=like), **given)


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
        return "it resamples, drops or norms in a way of its own"
    original = type(module).forward

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or any(type(n) is not nn.GroupNorm or n._forward_hooks for n in (self.norm1, self.norm2)):
            return original(self, input_tensor, temb, *args, **kwargs)
        live = _live(self, input_tensor)
        group = input_tensor.shape[1] // self.norm1.num_groups  # the norm's gradient mixes the channels of a group
        hidden = _convolved(self.conv1, _normed(self.norm1, input_tensor), -(-live // group) * group)
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(self.nonlinearity(temb))
        hidden = self.conv2(_normed(self.norm2, hidden, shift))
        shortcut = self.conv_shortcut
        return hidden + (input_tensor if shortcut is None else _convolved(shortcut, input_tensor, live))

    like = module.norm1.weight
    time = None if module.time_emb_proj is None else random_input(2, module.time_emb_proj.in_features, like=like)
    return _differs(module, forward, undo, random_input(2, module.in_channels, 4, 4, like=like), time)


def _normed(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    return norm_silu(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps)


_BEFORE_SKIP: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Residual blocks that read a skip connection beside what comes from below -> the channels of the latter."""


def _up(module: Any, undo: ExitStack) -> str:
    """Have the residual blocks of a level on the way up know where in their input the skip connection begins."""

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        skips = kwargs.get("res_hidden_states_tuple") or (args[1] if len(args) > 1 else ())
        for block, skip in zip(module.resnets, reversed(skips), strict=False):
            _BEFORE_SKIP[block] = block.in_channels - skip.shape[1]

    undo.callback(lambda: [_BEFORE_SKIP.pop(block, None) for block in module.resnets])
    undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    return ""


def _live(block: nn.Module, x: Tensor) -> int:
    """How many of the first channels of x want a gradient. Read off x itself, not kept from an earlier call: with
    recomputing, calls of a block are not in the order of the model's."""
    made_by = x.grad_fn
    if block in _BEFORE_SKIP and made_by is not None and made_by.name() == "CatBackward0":
        parts = made_by.next_functions
        if len(parts) == 2 and parts[1][0] is None:
            return _BEFORE_SKIP[block]
    return x.shape[1]


def _convolved(conv: Any, x: Tensor, live: int) -> Tensor:
    """conv(x), whose gradient is wanted for the first `live` channels of x."""
    plain = type(conv) is nn.Conv2d and not conv._forward_hooks and not conv._forward_pre_hooks
    plain = plain and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    if live >= x.shape[1] or not plain or not x.requires_grad or conv.weight.requires_grad:
        out: Tensor = conv(x)
        return out
    return live_conv(x, conv.weight, conv.bias, conv.padding, live)


def _unet_attention(module: Any, undo: ExitStack) -> str:
    if type(module.processor) is not DIFFUSERS("diffusers.models.attention_processor.AttnProcessor2_0"):
        return f"its processor is {type(module.processor).__name__}"
    plain = (
        all(getattr(module, name, None) is None for name in ("spatial_norm", "group_norm", "norm_q", "norm_k"))
        and not module.norm_cross
        and not module.residual_connection
        and module.rescale_output_factor == 1
    )
    q, kv, last = _parts(module, "to_q"), _parts(module, "to_k", "to_v"), _parts(module.to_out, "0")
    if not plain or q is None or kv is None or last is None:
        return "it has norms or projections of its own"
    crossed = bool(module.is_cross_attention)
    joins = [Join(q, undo), Join(kv, undo)] if crossed else [Join([*q, *kv], undo)]
    like, other = base_of(q[0]).weight, base_of(kv[0]).weight
    assert isinstance(like, Tensor)
    assert isinstance(other, Tensor)
    given = {"encoder_hidden_states": random_input(2, 3, other.shape[1], like=other)} if crossed else {}
    forward = _unet_forward(type(module).forward, joins, Join(last, undo))
    return _differs(module, forward, undo, random_input(2, 12, like.shape[1], like=like), **given)


def _unet_forward(original: Callable[..., Any], joins: list[Join], last: Join) -> Callable[..., Any]:
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
        made = _product(last, out)
        return self.to_out[1](self.to_out[0](out) if made is None else made)

    return forward


def _attention(module: Any, undo: ExitStack) -> str:
    """diffusers' class of that name is the UNets' and Qwen-Image's."""
    return (_flux_attention if type(module.processor) is _qwen_processor() else _unet_attention)(module, undo)


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
