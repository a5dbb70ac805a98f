"""Run a base's forward and backward pass on the fast paths of ops.

    with fast(model) as report:     report.summary() lists the swapped modules, and reasons for skipped ones
        text_loss(model, …)

A class name alone is never enough to swap a module. The original model runs first, for reference. A norm or
MLP is swapped only if a test shows that it computes the same formula as its replacement. Attention is swapped
only if every layer uses transformers' interface with options that the replacement supports. Then the whole
model must reproduce its original output, token by token, on rows packed without padding
(models/text/probe.py). An unusual family therefore loses speed but never correctness, and `summary` reports
which modules were not swapped.

The forward methods of norms, gated MLPs and Llama-like attention are replaced on the module instances. The
attention of all other families is swapped through transformers' attention interface. At the end, everything
is restored exactly. Inside the with-block, the weights of projections that share an input are views of one
tensor; parameter objects and values stay the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.experts import expert_product
from veneer.core.layers import LoraExperts, LoraLinear
from veneer.core.targets import base_of
from veneer.models.compat_transformers import PRE_NORM_LAYERS, register_attention, transformers_attention
from veneer.models.patching import (
    FastReport,
    FusedProjection,
    cache_dequantized,
    cache_prepacked,
    fast_report,
    marked,
    replace_forward,
    same_dtype,
    widen_products,
    without_dropout,
)
from veneer.models.shard import CallWithWeights, Sharded, call_unsharded
from veneer.models.text.loss import padded_nll, rows_nll
from veneer.models.text.probe import (
    LENGTHS,
    ReferenceForward,
    UnknownFormula,
    gate_of,
    gate_parts,
    norm_parts,
    rms_norm_weight_offset,
    short_windows,
)
from veneer.ops.attention import HeadNorms, RowLayout, VarlenSettings, rope_varlen_attention, varlen_attention
from veneer.ops.cpu import memory
from veneer.ops.linear import linear
from veneer.ops.mlp import gated_mlp
from veneer.ops.norms import rms_norm
from veneer.ops.products import in_float32

_ATTENTION = "veneer_rows"


@contextmanager
def fast(model: Any, *, keep: int = 0, pack: int = 0, sharded: Sharded | None = None) -> Iterator[FastReport]:
    """Replace modules with fast implementations inside the with-block.

    Calls can be nested. `keep`: byte budget for cached dequantized weights of a quantized base; all other
    weights are dequantized at each use. `pack`: byte budget for prepacked copies of an unquantized base's
    weights, used if prepacked products are clearly faster (ops/prepacked.py). `sharded`: the model's
    `Sharded` object. Its weights are inspected one block at a time, in the same order on every process, and
    projections with the same input are joined if they were sharded together (`weights_together`)."""
    if (already := fast_report(model)).active:
        yield already
        return
    report = FastReport(active=True)
    with ExitStack() as undo:
        undo.enter_context(memory.keep_freed_memory())
        with without_dropout(model):
            undo.enter_context(marked(model, report))
            try:
                reference = (sharded or call_unsharded)(ReferenceForward.compute, model)
            except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                report.skipped["model"] = f"its original forward fails on padded rows: {type(error).__name__}: {error}"
            else:
                _swap(model, reference, report, undo, sharded)
            widen_products(model, undo)
            if keep:
                cache_dequantized(report, keep, undo)
            if pack:
                cache_prepacked(model, report, pack, undo)
        yield report


def _swap(
    model: Any, reference: ReferenceForward, report: FastReport, undo: ExitStack, sharded: Sharded | None
) -> None:
    """Swap modules and use packed rows, but only if the model's output stays the same.

    If packed rows change the output, swap modules only. If swapped modules change the output too, swap
    nothing."""
    call = sharded or call_unsharded
    modules_to_swap = [module for module in model.modules() if not isinstance(module, LoraLinear)]

    def modules() -> Iterator[nn.Module]:
        """Yield each module while its weights are gathered."""
        try:
            for module in modules_to_swap:
                if sharded is not None:
                    sharded.gather_block(module)
                yield module
        finally:
            if sharded is not None:
                sharded.reshard()

    with ExitStack() as swapped:
        _swap_norms(modules(), report, swapped)
        _swap_mlps(modules(), report, swapped, move=sharded is None)
        for kind in route_experts(modules_to_swap if sharded is None else (), swapped):
            report.swapped[kind] = report.swapped.get(kind, 0) + 1
        with ExitStack() as attempt:
            previous = dict(report.swapped), len(report.joins)
            problem = _swap_attention(model, modules(), report, attempt, move=sharded is None)
            problem = problem or _rows_problem(model, reference, call)
            if not problem:
                report.rows = True
                swapped.push(attempt.pop_all())
                _swap_last_layer(model, reference, report, swapped, call)
                _widen_residuals(model, reference, swapped, call)
        if problem:
            report.skipped["rows"] = problem
            report.swapped, report.joins = previous[0], report.joins[: previous[1]]
            problem = reference.nll_problem(call(_nll, model, reference))
            if report.swapped and problem:
                report.skipped["every module"] = problem
                report.swapped, report.joins = {}, []
                return
        undo.push(swapped.pop_all())


# -- norms -------------------------------------------------------------------------------------------------------------


def _swap_norms(modules: Iterable[nn.Module], report: FastReport, undo: ExitStack) -> None:
    for module in modules:
        kind = type(module).__name__
        if not kind.endswith("RMSNorm"):
            continue
        try:
            plus = rms_norm_weight_offset(module)
            parts = norm_parts(module, plus)
        except UnknownFormula as why:
            report.skipped[kind] = str(why)
            continue
        if any(p.requires_grad for p in module.parameters()):
            report.skipped[kind] = "it is trained"
            continue
        weight, eps = parts
        replace_forward(module, _norm_forward(weight, eps), undo)
        report.norms[kind] = plus
        report.swapped[kind] = report.swapped.get(kind, 0) + 1


def _norm_forward(weight: Tensor, eps: float) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return rms_norm(x.to(weight.dtype) if x.dtype == torch.float32 else x, weight, eps)

    return forward


def _widen_residuals(model: Any, reference: ReferenceForward, undo: ExitStack, call: CallWithWeights) -> None:
    """Keep the residual stream of 16-bit layers in float32, if products are computed in float32 too.

    Norms round the sum to 16 bits and save only the rounded sum, so the float32 sum needs no memory per layer.
    The error of a token's loss falls by a quarter (docs/notes/text-training-speed.md)."""
    layers = list(getattr(getattr(model, "model", None), "layers", None) or [])
    kinds = {type(layer).__name__ for layer in layers}
    if len(layers) < 2 or not kinds <= set(PRE_NORM_LAYERS.values()):
        return
    original = type(layers[0]).forward

    def norms_are_ours() -> bool:
        """Return whether every norm rounds to 16 bits. A full copy in an adapter replaces a norm and does not round."""
        norms = (n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm))
        return all("forward" in norm.__dict__ for norm in (model.model.norm, *norms))

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if in_float32(hidden_states) and norms_are_ours():
            hidden_states = hidden_states.float()
        return original(self, hidden_states, *args, **kwargs)

    with ExitStack() as attempt:
        replace_forward(layers[0], forward, attempt)
        if not _rows_problem(model, reference, call):
            undo.push(attempt.pop_all())


# -- gated MLPs --------------------------------------------------------------------------------------------------------


def _swap_mlps(modules: Iterable[nn.Module], report: FastReport, undo: ExitStack, *, move: bool) -> None:
    """Swap MLPs of the form down(act(gate(x)) ⊙ up(x)).

    gate_proj and up_proj can be separate modules or one module gate_up_proj."""
    for module in modules:
        matched = gate_parts(module)
        if matched is None:
            continue
        kind, (parts, last) = type(module).__name__, matched
        try:
            act = gate_of(module)
        except UnknownFormula as why:
            report.skipped[kind] = str(why)
            continue
        projection, down = FusedProjection(parts, undo, move=move), FusedProjection([last], undo)
        replace_forward(module, _mlp_forward(type(module).forward, projection, down, act), undo)
        report.swapped[kind] = report.swapped.get(kind, 0) + 1
        report.joins += [projection, down]


def _mlp_forward(
    original: Callable[..., Any], projection: FusedProjection, down: FusedProjection, act: str
) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        first, last = projection.linear_map(), down.linear_map()
        if first is None or last is None or not same_dtype(x, first.weight):
            out: Tensor = original(self, x)
            return out
        return gated_mlp(x, first, last, act)

    return forward


# -- experts -----------------------------------------------------------------------------------------------------------


def route_experts(modules: Iterable[nn.Module], undo: ExitStack) -> list[str]:
    """Make each of Llama 4's experts compute only the tokens routed to it.

    Returns the class name of each changed module. transformers passes all tokens to every expert, and zeroes
    most of them."""
    experts = [module for module in modules if type(module).__name__ == "Llama4TextMoe"]
    for module in experts:
        replace_forward(module, _routed_forward(type(module).forward), undo)
    return [type(module).__name__ for module in experts]


def _routed_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        experts = self.experts
        x = hidden_states.reshape(-1, self.hidden_dim)
        weights: list[tuple[Tensor | None, dict[str, Any]]] | None
        if isinstance(experts, LoraExperts):
            weights = experts.weights(len(x))
        else:
            weights = [(None, dict(experts.named_parameters(recurse=False)))]
        if weights is None or torch.is_autocast_enabled(x.device.type):
            return original(self, hidden_states)
        scores, logits = self.router(x)
        expert_ids = logits.topk(self.top_k, dim=1).indices
        out = self.shared_expert(x)
        for at, weights_of_pass in weights:
            token, outputs = routed(self, x, scores, expert_ids, at, weights_of_pass)
            out = out.index_add(0, token, outputs)
        return out, logits

    def routed(
        self: Any, x: Tensor, scores: Tensor, expert_ids: Tensor, at: Tensor | None, weights_of_pass: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return (indices of the routed tokens, expert outputs for these tokens)."""
        if at is not None:
            scores, expert_ids = scores[at], expert_ids[at]
        expert, order = expert_ids.flatten().sort(stable=True)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        ends = counts.index_add_(0, expert, torch.ones_like(expert)).cumsum(0)
        token = order // self.top_k if at is None else at[order // self.top_k]
        inputs = x[token] * scores.gather(1, expert_ids).flatten()[order, None]  # The router weights scale the inputs.
        gate, up = expert_product(inputs, weights_of_pass["gate_up_proj"], ends).chunk(2, dim=-1)
        return token, expert_product(up * self.experts.act_fn(gate), weights_of_pass["down_proj"], ends)

    return forward


# -- attention ---------------------------------------------------------------------------------------------------------

_LLAMA_LIKE = ("LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention")
"""Attention classes with Llama's formula.

The formula consists only of q, k, v, o projections, half-split rotations and causal softmax. `_rows_problem`
checks this on the actual model."""

_WITH_HEAD_NORMS = ("Gemma3Attention", "Qwen3Attention", "Qwen3MoeAttention")
"""Classes like `_LLAMA_LIKE`, with RMS norms q_norm and k_norm before the rotation."""


_KNOWN = {
    "scaling", "dropout", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids", "kept_alone",
    "use_cache", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""Attention options that varlen attention supports or ignores.

The options in the last line of the set are meant for the model and do not affect the attention. Any other
option that is not None (position_bias …) raises an error."""


class _UnsupportedAttention(Exception):
    """An attention option that varlen attention does not support."""


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    implementation: str,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Compute attention, as an implementation of transformers' attention interface.

    If a row layout is passed, this uses varlen attention. Otherwise it uses the model's original
    `implementation`, "sdpa" or "eager"."""
    layout: RowLayout | None = kwargs.pop("row_layout", None)
    unsupported = sorted(k for k, v in kwargs.items() if v is not None and k not in _KNOWN)
    if unsupported:
        message = f"{type(module).__name__} passes unsupported arguments to its attention: {', '.join(unsupported)}"
        raise _UnsupportedAttention(message)
    if layout is None:
        attention = transformers_attention(module, implementation)
        padded: tuple[Tensor, Any] = attention(module, query, key, value, attention_mask, **kwargs)
        return padded
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise _UnsupportedAttention(f"{type(module).__name__} attends to later tokens")
    if query.shape[-1] != value.shape[-1]:
        raise _UnsupportedAttention(f"{type(module).__name__} has keys and values of different widths")
    if kwargs.get("dropout") or _has_dropout(module):
        raise _UnsupportedAttention(f"{type(module).__name__} uses attention dropout in training")
    layout.attended.add(id(module))
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    window, cap, sinks = (kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    return varlen_attention(q, k, v, VarlenSettings(layout, scale, window, cap or 0.0, sinks))[None], None


def _has_dropout(module: nn.Module) -> bool:
    """Return whether the module has attention dropout, which no kernel here supports."""
    values = [getattr(module, name, None) for name in ("attention_dropout", "attn_dropout", "dropout")]
    return any(p > 0 for p in (getattr(f, "p", f) for f in values) if isinstance(p, float | int))


def _swap_attention(
    model: Any, modules: Iterable[nn.Module], report: FastReport, undo: ExitStack, *, move: bool
) -> str:
    """Swap the attention; return "" or the reason why it cannot be swapped.

    The caller verifies the result with `_rows_problem`."""
    from transformers.masking_utils import eager_mask

    previous = getattr(model.config, "_attn_implementation", None)
    if previous not in ("sdpa", "eager"):
        return f"its attention implementation is {previous}"
    name = f"{_ATTENTION}_{previous}"
    attention = functools.partial(_interface, implementation=previous)
    register_attention(name, attention, eager_mask if previous == "eager" else None)
    model.set_attn_implementation(name)
    undo.callback(model.set_attn_implementation, previous)
    if model.config._attn_implementation != name:
        return "its attention does not go through transformers' interface"
    for module in modules:
        kind = type(module).__name__
        norms = _head_norms(module, report) if kind in _WITH_HEAD_NORMS else None
        if kind not in _LLAMA_LIKE and norms is None:
            continue
        parts = _attention_parts(module)
        if parts is not None:
            projection, out = FusedProjection(parts[:3], undo, move=move), FusedProjection(parts[3:], undo)
            replace_forward(module, _attention_forward(type(module).forward, projection, out, norms), undo)
            report.swapped[kind] = report.swapped.get(kind, 0) + 1
            report.joins += [projection, out]
    return ""


def _attention_parts(module: nn.Module) -> list[nn.Module] | None:
    """Return the linear projections q, k, v and o of an attention module.

    Returns None if one is missing or is not linear."""
    children = dict(module.named_children())
    parts = [children[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj") if n in children]
    return parts if len(parts) == 4 and all(type(base_of(m)) is nn.Linear for m in parts) else None


def weights_together(model: nn.Module) -> list[list[nn.Module]]:
    """Return groups of projections with the same input, which `shard` can join."""
    out = []
    for module in model.modules():
        matched = gate_parts(module)
        if matched is not None:
            out.append(matched[0])
        elif type(module).__name__ in (*_LLAMA_LIKE, *_WITH_HEAD_NORMS):
            out.append((_attention_parts(module) or [])[:3])
    return [parts for parts in out if len(parts) > 1]


def _head_norms(module: Any, report: FastReport) -> tuple[list[nn.Module], HeadNorms] | None:
    """Return q_norm and k_norm, and their combined parameters.

    Returns None unless both norms were swapped and have the same ε."""
    head_norms = [module.q_norm, module.k_norm]
    kinds = [type(norm).__name__ for norm in head_norms]
    if not all(
        kind in report.norms and "forward" in norm.__dict__ for kind, norm in zip(kinds, head_norms, strict=True)
    ):
        return None
    parts = [norm_parts(norm, report.norms[kind]) for kind, norm in zip(kinds, head_norms, strict=True)]
    if parts[0][1] != parts[1][1]:
        return None
    return head_norms, HeadNorms(torch.stack([weight for weight, _ in parts]), parts[0][1])


def _attention_forward(
    original: Callable[..., Any],
    projection: FusedProjection,
    out: FusedProjection,
    norms: tuple[list[nn.Module], HeadNorms] | None,
) -> Callable[..., Any]:
    head_norms = None if norms is None else norms[1]

    def untouched(self: Any) -> bool:
        """Return whether q_norm and k_norm have no hooks and have not been replaced."""
        modules = [] if norms is None else norms[0]
        pairs = zip(modules, (self.q_norm, self.k_norm) if modules else (), strict=True)
        return all(norm is now and not norm._forward_hooks and not norm._forward_pre_hooks for norm, now in pairs)

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout: RowLayout | None = kwargs.get("row_layout")
        kept_alone = kwargs.pop("kept_alone", False)
        ours = layout is not None and not args and untouched(self)
        first, last = (projection.linear_map(), out.linear_map()) if ours else (None, None)
        if first is None or last is None or layout is None or not same_dtype(hidden_states, first.weight):
            return original(self, hidden_states, *args, **kwargs)
        if _has_dropout(self):
            raise _UnsupportedAttention(f"{type(self).__name__} uses attention dropout in training")
        layout.attended.add(id(self))
        cos, sin = layout.tables(kwargs["position_embeddings"])
        n = hidden_states.shape[1]
        kv = base_of(projection.modules[1]).out_features // self.head_dim
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        qkv = linear(hidden_states, first).view(n, -1, self.head_dim)
        heads = rope_varlen_attention(qkv, cos, sin, kv, VarlenSettings(layout, self.scaling, window), head_norms)
        if kept_alone:
            heads = heads[layout.keep]
        return linear(heads.reshape(1, len(heads), -1), last), None

    return forward


def _swap_last_layer(
    model: Any, reference: ReferenceForward, report: FastReport, undo: ExitStack, call: CallWithWeights
) -> None:
    """Compute the last layer only for tokens that predict a token in the loss.

    If a quarter of the tokens count in the loss, this saves 63% of the layer's work."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers or type(layers[-1]).__name__.removeprefix("FSDP") not in PRE_NORM_LAYERS.values():
        return
    layer = layers[-1]
    if "forward" not in layer.self_attn.__dict__:
        return
    with ExitStack() as attempt:
        replace_forward(layer, _last_layer_forward(type(layer).forward), attempt)
        report.keeps = True
        report.keeps = not _rows_problem(model, reference, call)
        if report.keeps:
            undo.push(attempt.pop_all())


def _last_layer_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout: RowLayout | None = kwargs.get("row_layout")
        if layout is None or layout.keep is None or args:
            return original(self, hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, kept_alone=True, **kwargs)
        if attended.shape[1] == hidden_states.shape[1]:  # transformers' attention returns all tokens.
            attended = attended[:, layout.keep]
        hidden_states = hidden_states[:, layout.keep] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    return forward


# -- the whole model ---------------------------------------------------------------------------------------------------


def _nll(model: Any, reference: ReferenceForward, layout: RowLayout | None = None) -> Tensor:
    """Return the NLL of the probe's tokens; with `layout`, use packed rows."""
    with torch.no_grad(), short_windows(model):
        if layout is not None:
            return rows_nll(model, reference.ids, LENGTHS, reference.trained, layout)
        return padded_nll(model, reference.ids, LENGTHS, reference.trained)


def _rows_problem(model: Any, reference: ReferenceForward, call: CallWithWeights) -> str:
    """Return "" if packed rows reproduce the original output, or else a reason."""
    layout = RowLayout(LENGTHS, reference.ids.device)
    try:
        nll = call(_nll, model, reference, layout)
    except _UnsupportedAttention as asked:
        return str(asked)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"the model does not support packed rows: {type(error).__name__}"
    layers = model.config.get_text_config().num_hidden_layers
    if len(layout.attended) != layers:
        return f"{layers - len(layout.attended)} of {layers} layers do not use a supported attention function"
    return reference.nll_problem(nll)
