"""A base's forward and backward on the fast paths of core.fused and core.attention, for the length of a with-block.

    with fast(model) as how:        how.summary() says what was swapped, and what was left as it is and why
        text_loss(model, …)

Nothing here is believed because of a class name: every module is first run both ways on a small random input, and
swapped only where the two agree; then the whole model is, over rows of different lengths lying one after another
against the same rows padded. What a family does differently therefore costs speed and never correctness.

Swapped, on instances, and put back bit for bit at the end: norms, gated MLPs, Llama-like attention, and through
transformers' attention interface the attention of every other family. While the block lasts, the weights of projections
that share an input lie in one tensor, of which each is a view: same parameters, same bits.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer import kernels
from veneer.core.attention import RowLayout, attention, rotary_attention
from veneer.core.fused import Projection, gated_mlp, joined, linears
from veneer.core.layers import LoraLinear
from veneer.core.norms import rms_norm
from veneer.core.quantised import Quantised, stacked
from veneer.core.targets import base_of

__all__ = [
    "FastReport", "Join", "agree", "fast", "probe", "projection_of", "put", "report_of", "same_dtype",
    "without_dropout",
]  # fmt: skip

_ATTENTION = "veneer_rows"
_MARK = "_veneer_fast"


@dataclass
class FastReport:
    """What runs on a fast path: kind of module -> how many; `left`: kind -> why it was left as it is."""

    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    rows: bool = False
    """Whether rows can lie one after another without padding (checked on this very model)."""
    kept: int = 0
    """Bytes of dequantised weights kept (`keep`)."""
    joins: list[Join] = field(default_factory=list, repr=False)
    keeps: bool = False
    """Whether the last layer, after its attention, works on the tokens of `RowLayout.keep` alone."""

    def summary(self) -> str:
        parts = [f"{n} × {kind}" for kind, n in sorted(self.swapped.items())]
        text = "fast paths: " + (", ".join(parts) if parts else "none")
        text += "; rows without padding" if self.rows else "; padded rows"
        text += "; last layer at trained tokens alone" if self.keeps else ""
        text += f"; {self.kept / 1e6:,.0f} MB of weights kept dequantised" if self.kept else ""
        for kind, why in sorted(self.left.items()):
            text += f"; {kind} as transformers has it ({why})"
        return text + f"; {kernels.status()}"


def report_of(model: nn.Module) -> FastReport:
    """What `fast` did to `model`; outside of it, nothing."""
    return getattr(model, _MARK, FastReport())


@contextmanager
def fast(model: Any, *, keep: int = 0, hold: bool = True) -> Iterator[FastReport]:
    """Swap what can be swapped; see the module. Entering it again inside is harmless.

    `keep`: bytes that dequantised weights of a quantised base may take while the block lasts; the others are
    dequantised at each use. `hold`: whether a path may keep hold of weights. Where they come and go (sharded ones) it
    may not: then rows lie without padding, and norms, MLPs and projections are called as they are."""
    if getattr(model, _MARK, None) is not None:
        yield getattr(model, _MARK)
        return
    report = FastReport()
    with ExitStack() as undo:
        undo.enter_context(kernels.kept_memory())
        modules = [(name, module) for name, module in model.named_modules() if not isinstance(module, LoraLinear)]
        with without_dropout(model):
            if hold:
                _swap_norms(modules, report, undo)
                _swap_mlps(modules, report, undo)
            else:
                report.left["every module"] = "its weights come and go"
            _swap_attention(model, modules if hold else [], report, undo)
            setattr(model, _MARK, report)
            undo.callback(delattr, model, _MARK)
            if keep:
                _keep_dequantised(report, keep, undo)
            report.rows = _rows_agree(model, report)
            if report.rows:
                _swap_last_layer(model, report, undo)
        yield report


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Two ways can only be compared where neither draws."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -- putting a forward on an instance ----------------------------------------------------------------------------------


def put(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    module.forward = types.MethodType(forward, module)
    undo.callback(module.__dict__.pop, "forward", None)


def agree(a: Tensor, b: Tensor) -> bool:
    """Equal within what rounding in their dtype explains."""
    if a.shape != b.shape or not torch.isfinite(b).all():
        return False
    wide_a, wide_b = a.double(), b.double()
    tolerance = 8 * torch.finfo(a.dtype).eps
    return bool((wide_a - wide_b).norm() <= tolerance * wide_b.norm() + torch.finfo(a.dtype).tiny)


def probe(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def projection_of(module: nn.Module) -> Projection | None:
    """What a linear module is now, or None if it has to be called."""
    if isinstance(module, LoraLinear):
        return module.projection()
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    if module.weight.requires_grad or "forward" in module.__dict__:
        return None
    return Projection(module.weight, module.bias)


class Join:
    """The weights of linear modules that share an input, laid below one another in one tensor; `undo` parts them.

    Quantised weights stay where they are: the tensor is one over all their codes."""

    def __init__(self, modules: list[nn.Module], undo: ExitStack) -> None:
        self.modules = modules
        self.weight: Tensor | None = None
        bases = [base_of(m) for m in modules]
        weights = [getattr(b, "weight", None) for b in bases]
        plain = all(type(b) is nn.Linear for b in bases)
        if not plain or len({(w.dtype, w.device, w.shape[1]) for w in weights if w is not None}) != 1:
            return
        parameters = [w for w in weights if w is not None]
        quantised = [w for w in parameters if isinstance(w, Quantised)]
        if len(quantised) == len(parameters):
            self.weight = stacked(quantised)
            return
        if len(modules) < 2 or quantised or len({p.data_ptr() for p in parameters}) != len(parameters):
            return
        whole = torch.cat([p.detach() for p in parameters])
        at = 0
        for p in parameters:
            kernels.page_out(p.detach())
            p.data = whole[at : at + len(p)]
            at += len(p)
        self.weight = whole
        undo.callback(self._part, parameters)

    def _part(self, parameters: list[nn.Parameter]) -> None:
        self.weight = None
        for p in parameters:
            p.data = p.data.clone()

    def linears(self) -> Any:
        """The joined projections with the pairs that act now, or None if some module has to be called."""
        parts = [projection_of(m) for m in self.modules]
        known = [p for p in parts if p is not None]
        if len(known) != len(parts) or len({p.dropout for p in known if p.A is not None}) > 1:
            return None
        if len(known) > 1 and not isinstance(self.weight, Quantised):
            if self.weight is None:
                return None
            at = 0
            for p in known:
                if p.weight.data_ptr() != self.weight[at:].data_ptr():
                    return None
                at += len(p.weight)
        return joined(known, self.weight)


def _keep_dequantised(report: FastReport, most: int, undo: ExitStack) -> None:
    """Weights in the order in which they are used, as long as there is room. Which ones does not matter: each is used
    as often as the next."""
    for join in report.joins:
        weight = join.weight
        if isinstance(weight, Quantised) and weight.kept is None and report.kept + weight.nbytes <= most:
            weight.keep()
            report.kept += weight.nbytes
            undo.callback(setattr, weight, "kept", None)


# -- norms -------------------------------------------------------------------------------------------------------------


def _swap_norms(modules: list[tuple[str, nn.Module]], report: FastReport, undo: ExitStack) -> None:
    """RMSNorm classes of both conventions, w ⊙ x̂ and (1 + w) ⊙ x̂, told apart by running them."""
    for _, module in modules:
        kind = type(module).__name__
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not kind.endswith("RMSNorm") or not isinstance(weight, Tensor) or not isinstance(eps, float):
            continue
        x = probe(4, weight.shape[0], like=weight)
        scaled = [weight.detach(), (weight.detach().double() + 1).to(weight.dtype)]
        with torch.no_grad():
            wanted = module(x)
            convention = next((i for i, w in enumerate(scaled) if agree(rms_norm(x, w, eps), wanted)), None)
        if convention is None or weight.requires_grad:
            report.left[kind] = "it is trained" if weight.requires_grad else "its result differs from both conventions"
            continue
        if convention == 1 and not torch.equal(scaled[1].double(), weight.detach().double() + 1):
            report.left[kind] = f"1 + w does not fit {weight.dtype}"
            continue
        put(module, _norm_forward(scaled[convention], eps), undo)
        report.swapped[kind] = report.swapped.get(kind, 0) + 1


def _norm_forward(weight: Tensor, eps: float) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return rms_norm(x, weight, eps)

    return forward


# -- gated MLPs --------------------------------------------------------------------------------------------------------


def _activation(module: nn.Module) -> str | None:
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(function):
        return None
    x = torch.linspace(-4, 4, 101)
    with torch.no_grad():
        y = function(x)
        known = {
            "silu": torch.nn.functional.silu(x),
            "gelu": torch.nn.functional.gelu(x),
            "gelu_tanh": torch.nn.functional.gelu(x, approximate="tanh"),
        }
        return next((name for name, value in known.items() if torch.allclose(y, value, atol=1e-6)), None)


def _swap_mlps(modules: list[tuple[str, nn.Module]], report: FastReport, undo: ExitStack) -> None:
    """down(act(gate(x)) ⊙ up(x)) with gate_proj and up_proj apart, or joined in gate_up_proj."""
    for _, module in modules:
        children = dict(module.named_children())
        parts = [children[n] for n in ("gate_proj", "up_proj", "gate_up_proj") if n in children]
        if "down_proj" not in children or not parts or not all(_is_linear(m) for m in (*parts, children["down_proj"])):
            continue
        kind, act = type(module).__name__, _activation(module)
        if act is None:
            report.left[kind] = "its activation is not silu or gelu"
            continue
        with ExitStack() as attempt:
            join, down = Join(parts, attempt), Join([children["down_proj"]], attempt)
            weight = _weight(parts[0])
            x = probe(1, 4, weight.shape[1], like=weight)
            with torch.no_grad():
                wanted = module(x)
                put(module, _mlp_forward(type(module).forward, join, down, act), attempt)
                same = agree(module(x), wanted)
            if same:
                undo.push(attempt.pop_all())
                report.swapped[kind] = report.swapped.get(kind, 0) + 1
                report.joins += [join, down]
            else:
                report.left[kind] = "its result differs from a gated MLP's"


def _is_linear(module: nn.Module) -> bool:
    return type(base_of(module)) is nn.Linear


def _weight(module: nn.Module) -> Tensor:
    weight = base_of(module).weight
    assert isinstance(weight, Tensor)
    return weight


def same_dtype(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


def _mlp_forward(original: Callable[..., Any], join: Join, down: Join, act: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        first, last = join.linears(), down.linears()
        if first is None or last is None or not same_dtype(x, first.weight):
            out: Tensor = original(self, x)
            return out
        return gated_mlp(x, first, last, act)

    return forward


# -- attention ---------------------------------------------------------------------------------------------------------

_LLAMA_LIKE = ("LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention")
"""Attention whose forward is q, k, v projections, rotary positions in halves, causal softmax, o projection, and nothing
else; `_rows_agree` checks the claim on the model at hand."""


def _interface(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: rows where a layout is passed down, torch's own attention elsewhere."""
    layout: RowLayout | None = kwargs.pop("row_layout", None)
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return attention(q, k, v, layout, scale, kwargs.get("sliding_window"))[None], None


def _swap_attention(model: Any, modules: list[tuple[str, nn.Module]], report: FastReport, undo: ExitStack) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = getattr(model.config, "_attn_implementation", None)
    if before not in ("sdpa", "eager"):
        report.left["attention"] = f"it runs on {before}"
        return
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _interface)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    undo.callback(model.set_attn_implementation, before)
    for _, module in modules:
        kind = type(module).__name__
        if kind not in _LLAMA_LIKE:
            continue
        children = dict(module.named_children())
        parts = [children.get(n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
        if all(p is not None and _is_linear(p) for p in parts):
            join, out = Join([p for p in parts[:3] if p is not None], undo), Join([p for p in parts[3:] if p], undo)
            put(module, _attention_forward(type(module).forward, join, out), undo)
            report.swapped[kind] = report.swapped.get(kind, 0) + 1
            report.joins += [join, out]


def _attention_forward(original: Callable[..., Any], join: Join, out: Join) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout: RowLayout | None = kwargs.get("row_layout")
        first, last = (None, None) if layout is None or args else (join.linears(), out.linears())
        if first is None or last is None or layout is None or not same_dtype(hidden_states, first.weight):
            return original(self, hidden_states, *args, **kwargs)
        cos, sin = layout.tables(kwargs["position_embeddings"])
        n = hidden_states.shape[1]
        kv = len(_weight(join.modules[1])) // self.head_dim
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        qkv = linears(hidden_states, first).view(n, -1, self.head_dim)
        heads = rotary_attention(qkv, cos, sin, kv, layout, self.scaling, window)
        if kwargs.get("kept_alone"):
            heads = heads[layout.keep]
        return linears(heads.view(1, len(heads), -1), last), None

    return forward


_PRE_NORM_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""h + attention(norm(h)), then h + mlp(norm(h)), and nothing else; checked on the model at hand."""


def _swap_last_layer(model: Any, report: FastReport, undo: ExitStack) -> None:
    """Of the last layer's output only the tokens that predict a trained one are read: with a quarter of the tokens
    trained, 63% of one layer's work falls away."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers or type(layers[-1]).__name__ not in _PRE_NORM_LAYERS:
        return
    layer = layers[-1]
    if "forward" not in layer.self_attn.__dict__:
        return
    with ExitStack() as attempt:
        put(layer, _kept_forward(type(layer).forward), attempt)
        report.keeps = True
        attempt.callback(setattr, report, "keeps", False)
        if _rows_agree(model, report):
            undo.push(attempt.pop_all())


def _kept_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout: RowLayout | None = kwargs.get("row_layout")
        if layout is None or layout.keep is None or args:
            return original(self, hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, kept_alone=True, **kwargs)
        if attended.shape[1] == hidden_states.shape[1]:  # the attention had to run as transformers has it
            attended = attended[:, layout.keep]
        hidden_states = hidden_states[:, layout.keep] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    return forward


# -- the whole model ---------------------------------------------------------------------------------------------------


def _rows_agree(model: Any, report: FastReport) -> bool:
    """Whether rows without padding give the loss that padded rows give, on this model as it is now."""
    from veneer.models.loss import padded_loss, rows_loss

    if "attention" in report.left:
        return False
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lengths = [5, 9, 2]
    generator = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (sum(lengths),), generator=generator).to(device)
    trained = torch.ones(len(ids), dtype=torch.bool, device=device)
    trained[[0, 5, 14]] = False
    try:
        with torch.no_grad():
            flat, padded = rows_loss(model, ids, lengths, trained), padded_loss(model, ids, lengths, trained)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        report.left["rows"] = f"it does not take them: {type(error).__name__}"
        return False
    eps = torch.finfo(next(model.parameters()).dtype).eps
    if abs(float(flat) - float(padded)) <= 4 * eps * abs(float(padded)):
        return True
    report.left["rows"] = f"losses differ: {float(flat):.6f} against {float(padded):.6f} padded"
    return False
