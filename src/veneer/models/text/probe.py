"""Run a language model and its modules to determine what they compute.

    reference = ReferenceForward.compute(model)      before any module is replaced
    reference.nll_problem(nll)           "", or which token differs and by how much
    reference.logits_problem(logits)     the same for whole rows of logits
    rms_norm_weight_offset(module)       0 or 1, for an RMS norm  y = (0 + w or 1 + w) ⊙ x / √(mean x² + ε)
    gate_of(module)                      act, for a gated MLP     y = down(act(gate(x)) ⊙ up(x))

The whole model runs its original forward on a few padded rows of random tokens. The forward under test can
use packed rows; the comparison then shows whether information leaks from row to row. Attention windows are
shortened during the test, so that even short rows exceed the windows and the cost does not depend on the
config. Outputs are compared token by token, in float32.

The effect of rounding is measured: every row runs twice in one batch, and in the second run each layer's
output is moved by one unit in the last place, up or down at random. On Gemma 3 270M, this changes the loss of
a token by 1 in bfloat16 and by 1e-4 in float32, so a tolerance that depends only on the dtype would be too
wide or too narrow.

A module's formula does not depend on its weights, so modules are tested with weights that identify the
formula: zeros, ones and extreme values in a norm, small float64 matrices in an MLP. These weights are set in
a copy of the module, or for a single call. With the base's own weights, w ⊙ x̂ and (1 + w) ⊙ x̂ can be too
similar if a few weights are large.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.targets import base_of
from veneer.ops.device_transfer import in_float64

LENGTHS = (21, 9, 2)
"""Lengths of the probe's rows in tokens.

The first row is far longer than the short window, the second is one token longer than it, and the third is
the shortest row that has a loss."""

WINDOW = 8
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size")
_FACTOR = 8
"""Allowed deviation due to summation order, as a multiple of measured rounding."""


@contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Limit attention windows to WINDOW tokens, inside the with-block.

    Changes the config and every module that stores a window."""
    with ExitStack() as undo:
        for holder in (model.config.get_text_config(), *model.modules()):
            for name in _WINDOWS:
                size = getattr(holder, name, None)
                if type(size) is int and size > WINDOW:
                    undo.callback(setattr, holder, name, size)
                    setattr(holder, name, WINDOW)
        yield


@dataclass(frozen=True, eq=False)
class ReferenceForward:
    """The output of a model's original forward on the probe.

    `ids`: (N,), packed rows of LENGTHS. `logits`: (N, vocabulary), float32. `perturbed`: the logits after
    perturbing the rounding of every layer. `eps`: machine epsilon of the model's dtype."""

    ids: Tensor
    logits: Tensor
    perturbed: Tensor
    eps: float

    @classmethod
    @torch.no_grad()
    def compute(cls, model: Any) -> ReferenceForward:
        """Return the output of the unmodified model. The model's errors are not caught."""
        weight = model.get_input_embeddings().weight
        vocabulary, device = weight.shape[0], weight.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (sum(LENGTHS),), generator=generator).to(device)
        rows = nn.utils.rnn.pad_sequence(list(ids.split(LENGTHS)), batch_first=True)
        real = torch.arange(rows.shape[1], device=device) < torch.tensor(LENGTHS, device=device)[:, None]
        with short_windows(model), _perturbed_rounding(model, len(LENGTHS)):
            out = model(input_ids=rows.repeat(2, 1), attention_mask=real.long().repeat(2, 1), use_cache=False)
        logits, perturbed = (half[real].float() for half in out.logits.chunk(2))
        return cls(ids, logits, perturbed, torch.finfo(out.logits.dtype).eps)

    @property
    def trained(self) -> Tensor:
        """The trained tokens, (N,) bool: all but the first token of each row."""
        out = torch.ones_like(self.ids, dtype=torch.bool)
        out[[0, *torch.tensor(LENGTHS).cumsum(0)[:-1].tolist()]] = False
        return out

    def nll_problem(self, nll: Tensor) -> str:
        """Return how `nll` differs from the reference, or "" if only by rounding.

        nll: one value for each token of `trained`, computed with short windows."""
        at = self.trained.nonzero()[:, 0]
        expected, perturbed = (
            torch.nn.functional.cross_entropy(x[at - 1], self.ids[at], reduction="none")
            for x in (self.logits, self.perturbed)
        )
        size = self.logits[at - 1].abs().amax(1)
        return self._problem(nll.detach().float()[:, None], expected[:, None], perturbed[:, None], size, "loss")

    def logits_problem(self, logits: Tensor, at: Tensor | None = None) -> str:
        """Return how `logits` differ from the reference, or "" if only by rounding.

        logits: (tokens, vocabulary). at: indices of the tokens that the logits belong to; by default, all
        tokens."""
        selected = slice(None) if at is None else at
        expected = self.logits[selected]
        return self._problem(
            logits.float(), expected, self.perturbed[selected], expected.abs().amax(1), "largest logit"
        )

    def rows_agree(self, logits: Tensor, at: Tensor) -> bool:
        """Return whether whole rows of logits equal the reference up to rounding.

        The test is ‖logits − expected‖ ≤ r·‖expected‖ for each row, where r is 16·eps or _FACTOR times the
        median effect of perturbed rounding, whichever is larger. A product with another number of rows can
        sum in another order, and a deep base amplifies the difference. The median ignores tokens whose
        experts change. logits: (tokens, vocabulary). at: indices of the tokens."""
        logits, expected, perturbed = map(in_float64, (logits, self.logits, self.perturbed))
        rounding = float(((perturbed - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
        most = max(16 * self.eps, _FACTOR * rounding)
        return bool(((logits - expected[at]).norm(dim=-1) <= most * expected[at].norm(dim=-1)).all())

    def _problem(self, got: Tensor, expected: Tensor, perturbed: Tensor, size: Tensor, quantity: str) -> str:
        """Return how the rows of `got` and `expected` differ, or "" if only by rounding.

        size: (rows,), magnitude of the values that were rounded last."""
        if got.shape != expected.shape or not torch.isfinite(got).all():
            return f"its {quantity} is not finite" if got.shape == expected.shape else f"it gives {tuple(got.shape)}"
        off = (got - expected).abs().amax(1)
        explained = _FACTOR * (perturbed - expected).abs().max() + 2 * self.eps * size
        worst = int((off - explained).argmax())
        if off[worst] <= explained[worst]:
            return ""
        error = f"the {quantity} of token {worst + 1} of {len(off)} is {float(off[worst]):.3g} off"
        return f"{error}, but rounding explains only {float(explained[worst]):.2g}"


@contextmanager
def _perturbed_rounding(model: Any, first: int) -> Iterator[None]:
    """Move layer outputs by one unit in the last place, in the rows from `first` on."""
    generator = torch.Generator().manual_seed(1)

    def move(_module: nn.Module, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or len(hidden) != 2 * first:
            return out
        signs = torch.randint(0, 2, hidden[first:].shape, generator=generator).to(hidden) * 2 - 1
        hidden = torch.cat([hidden[:first], hidden[first:] * (1 + torch.finfo(hidden.dtype).eps * signs)])
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    depth = model.config.get_text_config().num_hidden_layers
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), ())
    with ExitStack() as undo:
        for module in (model.get_input_embeddings(), *layers):
            undo.callback(module.register_forward_hook(move).remove)
        yield


# -- modules -----------------------------------------------------------------------------------------------------------


class UnknownFormula(Exception):
    """Raised if a module does not compute the tested formula. The message says why."""


def norm_parts(module: nn.Module, plus: float) -> tuple[Tensor, float]:
    """Return (w, ε) of an RMS norm.

    If `plus` is 0, w is the weight. Otherwise, w is `plus` + weight in at least float32, because 16 bits are
    too few for 1 + weight. Raises UnknownFormula for a norm without a weight."""
    weight = getattr(module, "weight", None)
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor):
        raise UnknownFormula("the norm has no weight or no ε")
    values = weight.detach()
    return (values if not plus else values.to(torch.promote_types(values.dtype, torch.float32)) + plus), eps


def rms_norm_weight_offset(module: nn.Module) -> float:
    """Return the number that an RMS norm adds to its weight, 0 or 1.

    Raises UnknownFormula if the module computes anything other than one of these RMS norms."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        raise UnknownFormula("the norm has no weight or no ε")
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        raise UnknownFormula("it has parameters besides its weight")
    generator = torch.Generator().manual_seed(0)
    n = len(weight)
    x, wild = torch.randn(4, n, generator=generator), torch.randn(n, generator=generator)
    x[1:, : n // 8] *= 30.0  # As in real activations, a few channels are far larger than the rest.
    x[3] *= 1e-3  # This token is so small that ε matters.
    wild[n // 2 :] *= 20.0
    with torch.no_grad():
        tried = [torch.zeros(n), torch.ones(n), wild]
        got = [_called_with(module, w, x) for w in tried]
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
        for plus in (0.0, 1.0):
            if all(_close(y, (w.double() + plus) * normed, 1e-5) for w, y in zip(tried, got, strict=True)):
                break
        else:
            raise UnknownFormula("its result differs from both conventions")
        values = weight.detach()
        scale, _ = norm_parts(module, plus)
        x = x.to(values.device, values.dtype)
        y, wide = module(x), in_float64(x)
        normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        if y.dtype != x.dtype or not _close(y, in_float64(scale) * normed, 4 * torch.finfo(values.dtype).eps):
            raise UnknownFormula(f"in {values.dtype} its result differs")
    return plus


def _called_with(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    parameter = module.get_parameter("weight")
    out: Tensor = torch.func.functional_call(module, {"weight": weight.to(parameter.device)}, (x.to(parameter.device),))
    return out.cpu()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether each element of a differs from b by at most `tolerance` · |b|."""
    a, b = in_float64(a), in_float64(b)
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * b.abs() + 1e-30).all())


_PARTS = ("gate_proj", "up_proj", "gate_up_proj")


def gate_parts(module: nn.Module) -> tuple[list[nn.Module], nn.Module] | None:
    """Return ([gate, up], down) or ([gate_up], down) if a module can be a gated MLP.

    Returns None if the module does not have these linear projections."""
    children = dict(module.named_children())
    parts = [children[n] for n in _PARTS if n in children]
    down = children.get("down_proj")
    if down is None or not parts or not all(type(base_of(m)) is nn.Linear for m in (*parts, down)):
        return None
    return parts, down


def gate_of(module: nn.Module) -> str:
    """Return the activation of a gated MLP: silu, gelu or gelu_tanh.

    module: a module for which `gate_parts` found the projections. Raises UnknownFormula if the module computes
    something else."""
    act = _activation(module)
    if act is None:
        raise UnknownFormula("its activation is not silu or gelu")
    if "forward" in module.__dict__:
        raise UnknownFormula("its forward was replaced")
    if any(isinstance(m, nn.Dropout) and m.p for m in module.modules()):
        raise UnknownFormula("it uses dropout")
    hidden, inner = 6, 10
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 4

    small = copy.copy(module)
    small._modules = dict(module._modules)
    linears: dict[str, nn.Linear] = {}
    for name, child in module.named_children():
        if name not in (*_PARTS, "down_proj"):
            continue
        shape = {"down_proj": (inner, hidden), "gate_up_proj": (hidden, 2 * inner)}.get(name, (hidden, inner))
        bias = getattr(base_of(child), "bias", None) is not None
        linear = nn.Linear(*shape, bias=bias, device="meta", dtype=torch.float64)
        for key, value in linear.named_parameters():
            setattr(linear, key, nn.Parameter(random(*value.shape), requires_grad=False))
        small._modules[name] = linears[name] = linear
    x = random(1, 7, hidden)
    with torch.no_grad():
        try:
            got = small(x)
        except Exception as error:  # With these sizes, a module of another kind can raise any exception.
            raise UnknownFormula(f"its formula could not be tested: {type(error).__name__}") from None
        if "gate_up_proj" in linears:
            gate, up = linears["gate_up_proj"](x).chunk(2, dim=-1)
        else:
            gate, up = linears["gate_proj"](x), linears["up_proj"](x)
        expected = linears["down_proj"](_ACTIVATIONS[act](gate) * up)
    if not isinstance(got, Tensor) or not _close(got, expected, 1e-6):
        raise UnknownFormula("its result differs from a gated MLP's")
    return act


_ACTIVATIONS: dict[str, Any] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _activation(module: nn.Module) -> str | None:
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(function):
        return None
    x = torch.linspace(-40, 40, 1001)  # The range is wide enough to reach the limits of clipped activations.
    with torch.no_grad():
        y = function(x)
        candidates = _ACTIVATIONS.items()
        return next((name for name, f in candidates if y.shape == x.shape and torch.allclose(y, f(x), atol=1e-6)), None)
