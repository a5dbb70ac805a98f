"""Laws of the core that hold for any shapes, ranks, scales and strengths."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.attached import attached, holding
from veneer.core import Adapter, LoraSpec, Pair, attach, create, delta, merged_state
from veneer.core.adapter import alpha_of, scale_of
from veneer.core.forms import Delta

strengths = st.floats(-2, 2).filter(lambda s: abs(s) > 1e-3)


class Case:
    """A small float64 model with one module, an input, and adapters for the module.

    Equations between results hold to 1e-9; results that must be identical are equal bit for bit.
    """

    def __init__(self, draw: Any) -> None:
        self.kind = draw(st.sampled_from(["linear", "embedding", "conv1d", "conv2d", "experts"]))
        self.rank = draw(st.integers(1, 4))
        self.dora = self.kind != "experts" and draw(st.booleans())
        self.by_input = self.dora and self.kind != "embedding" and draw(st.booleans())
        self.form = None if self.kind == "experts" else draw(st.sampled_from([None, *FORMS]))
        self.init = draw(st.sampled_from(["zero-b", "gaussian", "pissa", "olora"]))
        bias = draw(st.booleans())
        i, o = draw(st.integers(4, 7)), draw(st.integers(4, 7))
        g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        self.generator = g
        if self.kind == "embedding":
            module: nn.Module = nn.Embedding(i, o)
            self.x = torch.randint(0, i, (2, 3), generator=g)
        elif self.kind == "conv1d":
            module = nn.Conv1d(i, o, 2, stride=draw(st.integers(1, 2)), bias=bias)
            self.x = torch.randn(2, i, 6, generator=g, dtype=torch.float64)
        elif self.kind == "conv2d":
            module = nn.Conv2d(i, o, (2, 1), dilation=draw(st.integers(1, 2)), bias=bias)
            self.x = torch.randn(2, i, 5, 4, generator=g, dtype=torch.float64)
        elif self.kind == "experts":
            module = Experts(3, i, o, flipped=draw(st.booleans()))
            self.x = torch.randn(3, 2, i, generator=g, dtype=torch.float64)
        else:
            module = nn.Linear(i, o, bias=bias)
            self.x = torch.randn(2, 3, i, generator=g, dtype=torch.float64)
        self.model = nn.ModuleDict({"m": module}).double().requires_grad_(False)
        for p in self.model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))

    def fresh(self) -> Adapter:
        spec = LoraSpec(
            rank=self.rank,
            alpha=3.0,
            targets=("m", "m.up_proj")[self.kind == "experts"],
            init=self.init,
            dora=self.dora,
        )
        return create(self.model, spec, seed=0, dtype=torch.float64)

    def trained(self) -> Adapter:
        """Return an adapter with changed tensors, as if trained.

        If the case says so, the adapter has DoRA norms per output or per input, and deltas.
        """
        g = self.generator
        out = self.fresh().mapped(lambda t: t + 0.5 * torch.randn(t.shape, generator=g, dtype=t.dtype))
        module = self.model["m"]
        if self.by_input:
            shape = (1, module.weight.shape[1], *[1] * (module.weight.ndim - 2))
            pair = out.pairs["m"]
            pair.magnitude = torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
        if self.form is not None:
            out.deltas["m.weight"] = random_delta(self.form, tuple(module.weight.shape), g)
            if getattr(module, "bias", None) is not None:
                out.deltas["m.bias"] = random_delta("dense", tuple(module.bias.shape), g)
        return out

    def __call__(self, model: nn.Module | None = None) -> Tensor:
        out: Tensor = (model or self.model)["m"](self.x)
        return out


FORMS = ("dense", "hadamard", "kronecker", "gain", "gain by input", "rows")


def random_delta(form: str, shape: tuple[int, ...], g: torch.Generator) -> Delta:
    """Return a random delta for a parameter of the given shape; "rows" is a slice of a Kronecker product."""

    def make(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    out, rest = shape[0], shape[1:]
    n = math.prod(rest)
    if form == "dense":
        return Delta("dense", {"value": make(*shape)}, shape, 0.7)
    if form == "hadamard":
        return Delta(
            "hadamard", {"a1": make(out, 2), "b1": make(2, n), "a2": make(out, 3), "b2": make(3, n)}, shape, 0.3
        )
    if form == "kronecker":
        return Delta("kronecker", {"w1": make(1, 1), "a2": make(out, 2), "b2": make(2, n)}, shape, 0.4)
    if form == "rows":
        whole = (3 * out, *shape[1:])
        return Delta("kronecker", {"w1": make(3, 1), "w2": make(*shape)}, shape, 0.4, None, (out, 2 * out), whole)
    value = make(out) if form == "gain" else make(1, shape[1])
    return Delta("gain", {"value": value}, (), 0.5)


class Experts(nn.Module):
    def __init__(self, experts: int, i: int, o: int, flipped: bool) -> None:
        super().__init__()
        self.is_transposed = flipped
        self.up_proj = nn.Parameter(torch.empty(experts, i, o) if flipped else torch.empty(experts, o, i))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.up_proj if self.is_transposed else self.up_proj.transpose(-1, -2))


cases = st.composite(lambda draw: Case(draw))()


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


@given(cases, strengths)
def test_fresh_adapter_gives_the_base_s_output(case: Case, strength: float) -> None:
    """Outputs are equal bit for bit if B (for an embedding: A) is zero and DoRA is off, otherwise to 1e-5."""
    base = case()
    before = copy.deepcopy(case.model.state_dict())
    with holding(case.model, trainable=True, a=case.fresh()) as attachment:
        assert torch.equal(case(), base)
        attachment.use(("a", strength))
        if case.init in ("zero-b", "gaussian") and not case.dora:
            assert torch.equal(case(), base)
        torch.testing.assert_close(case(), base, rtol=1e-5, atol=1e-5)
    assert torch.equal(case(), base)
    after = case.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@given(cases, strengths)
def test_merged_equals_attached(case: Case, strength: float) -> None:
    adapter = case.trained()
    with attached(case.model, adapter, strength) as attachment:
        y = case()
        state = attachment.merged(("a", strength))
    merged = copy.deepcopy(case.model)
    merged.load_state_dict(state, strict=False)
    near(y, case(merged))


@given(cases, strengths, strengths)
def test_mix_is_linear_in_its_strengths(case: Case, s: float, t: float) -> None:
    base = case()
    with holding(case.model, a=case.trained(), b=case.trained()) as attachment:
        alone = []
        for name in ("a", "b"):
            attachment.use(name)
            alone.append(case() - base)
        attachment.use(("a", s), ("b", t))
        near(case() - base, s * alone[0] + t * alone[1])
        attachment.use(("b", t), ("a", s))
        near(case() - base, s * alone[0] + t * alone[1])
        attachment.use(("a", s), ("a", t))
        near(case() - base, (s + t) * alone[0])


@given(cases)
def test_collapsed_adapter_has_the_same_delta_and_digest(case: Case) -> None:
    adapter = case.trained()
    small = adapter.collapsed()
    assert all(p.origin is None for p in small.pairs.values())
    assert adapter.digest() == small.digest()
    parameter = "up_proj" if case.kind == "experts" else None
    for name, pair in adapter.pairs.items():
        near(delta(case.model["m"], small.pairs[name], parameter), delta(case.model["m"], pair, parameter))
    outs = []
    with attach(case.model) as attachment:
        for i, version in enumerate((adapter, small)):
            attachment.add(str(i), version)
            attachment.use(str(i))
            outs.append(case())
    near(outs[0], outs[1])


@given(cases, strengths)
def test_gradients_equal_those_of_the_merged_weight(case: Case, strength: float) -> None:
    """For pairs without a magnitude, dL/dA and dL/dB equal autograd through W + strength·s·(B·A − B₀·A₀)."""
    case.dora, case.by_input, case.form = False, False, None  # deltas are not trained
    adapter = case.trained()
    ((name, pair),) = adapter.pairs.items()
    with attached(case.model, adapter, strength, trainable=True) as attachment:
        y = case()
        weight = torch.randn(y.shape, generator=case.generator, dtype=torch.float64)
        (y * weight).sum().backward()
        ours = attachment.parameters("a")
        grads = [ours[f"{name}.A"].grad, ours[f"{name}.B"].grad]
    A, B = (t.clone().requires_grad_() for t in (pair.A, pair.B))
    key = name if case.kind == "experts" else f"{name}.weight"
    module = case.model["m"]
    stored = dict(case.model.named_parameters())[key]
    product = B @ A if pair.kind != "conv" else B.flatten(1) @ A.flatten(1)
    origin = torch.zeros_like(product)
    if pair.origin is not None:
        A0, B0 = pair.origin
        origin = B0 @ A0 if pair.kind != "conv" else B0.flatten(1) @ A0.flatten(1)
    change = strength * pair.scale * (product - origin)
    if case.kind == "embedding" or getattr(module, "is_transposed", False):
        change = change.mT
    new = stored + change.reshape(stored.shape)
    z = _call(case, key, new)
    (z * weight).sum().backward()
    near(grads[0], A.grad)
    near(grads[1], B.grad)


def _call(case: Case, key: str, weight: Tensor) -> Tensor:
    out: Tensor = torch.func.functional_call(case.model["m"], {key.removeprefix("m."): weight}, (case.x,))
    return out


@given(st.integers(1, 512), st.floats(0.1, 1000), st.booleans())
def test_alpha_and_scale_are_inverse(rank: int, alpha: float, rslora: bool) -> None:
    scale = scale_of(alpha, rank, rslora)
    assert abs(alpha_of(scale, rank, rslora) - alpha) <= 1e-12 * alpha
    assert scale_of(alpha, rank, True) == alpha / rank**0.5


@given(cases)
def test_different_adapters_have_different_digests(case: Case) -> None:
    adapter = case.trained()
    copied = adapter.mapped(lambda t: t.clone())
    assert adapter.digest() == copied.digest()
    ((name, pair),) = adapter.pairs.items()
    for other in (
        Adapter(pairs={name: Pair(pair.A * 2, pair.B, pair.scale, pair.kind, pair.magnitude, pair.origin)}),
        Adapter(pairs={name: Pair(pair.A, pair.B, pair.scale * 2, pair.kind, pair.magnitude, pair.origin)}),
        Adapter(pairs={name + "x": pair}),
        Adapter(pairs={name: Pair(pair.A.float(), pair.B, pair.scale, pair.kind, pair.magnitude)}),
    ):
        assert other.digest() != adapter.digest()


@given(cases)
def test_merging_is_deterministic_and_writes_nothing(case: Case) -> None:
    adapter = case.trained()
    before = copy.deepcopy(case.model.state_dict())
    first, second = (merged_state(case.model, [(adapter, 0.5), (adapter, 0.5)]) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(t, before[k]) for k, t in case.model.state_dict().items())
    once = merged_state(case.model, [(adapter, 1.0)])
    for key in once:
        near(first[key], once[key])
