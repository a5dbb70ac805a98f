"""Cached weights of mixes are exact and up to date, and their memory is bounded."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from tests.attached import attached, holding
from tests.core.test_rows import NAMES, STRENGTHS, close
from veneer.core import Adapter, Attachment, LoraSpec, Pair, attach, create
from veneer.core.mix_cache import MixCache

IDS = torch.randint(0, 12, (2, 4), generator=torch.Generator().manual_seed(0))
MIXES = st.lists(st.tuples(st.sampled_from(NAMES), STRENGTHS), min_size=1, max_size=4)


def outputs(attachment: Attachment, limit: int, *inputs: Tensor) -> Tensor:
    attachment.cache.limit = limit
    with torch.no_grad():
        out: Tensor = attachment.model(*inputs)
    assert attachment.cache.bytes <= limit
    return out


@settings(max_examples=60, deadline=None)
@given(mix=MIXES)
def test_copies_equal_the_reference(net: Attachment, mix: list[tuple[str, float]]) -> None:
    net.use(*mix)
    close(outputs(net, 1 << 20, IDS), outputs(net, 0, IDS))


@settings(max_examples=40, deadline=None)
@given(strengths=st.lists(STRENGTHS, min_size=3, max_size=3))
def test_stacks_equal_the_reference(strengths: list[float]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 90, 3)).requires_grad_(False)
    with attach(model) as attachment:
        for seed in range(3):
            made = create(model, LoraSpec(rank=1 + seed, targets=("0", "2"), alpha=3.0), seed=seed)
            attachment.add(f"a{seed}", made.mapped(lambda t: t + 0.1))
        attachment.use(*((f"a{i}", s) for i, s in enumerate(strengths)))
        x = torch.randn(3, 40)
        limit = 4 * (6 * (40 + 50 + 18 + 90))
        got = outputs(attachment, limit, x)
        assert set(attachment.cache.kinds()) <= {"stack"}
        close(got, outputs(attachment, 0, x))


@pytest.mark.parametrize("wide", [False, True])
def test_bf16_cache_is_as_exact_as_the_reference(wide: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).requires_grad_(False).bfloat16()
    x = torch.randn(64, 256).bfloat16()
    W, bias = model[0].weight.double(), model[0].bias.double()
    exact = x.double() @ W.T + bias
    dtype = torch.float32 if wide else torch.bfloat16
    with attach(model) as attachment:
        for i in range(3):
            pair = Pair((torch.randn(16, 256) / 16).to(dtype), (torch.randn(256, 16) / 40).to(dtype), 0.5)
            attachment.add(f"a{i}", Adapter(pairs={"0": pair}))
            exact += x.double() @ pair.A.double().T @ pair.B.double().T * 0.5 * 0.7
        attachment.use(*((f"a{i}", 0.7) for i in range(3)))
        error = {}
        for name, limit in (("copy", 1 << 20), ("stack", 2 * 48 * 512), ("", 0)):
            got = outputs(attachment, limit, x)
            assert set(attachment.cache.kinds()) == {name}
            error[name] = float((got.double() - exact).norm() / exact.norm())
    assert error["copy"] < 1.25 * error[""] + 1e-4
    assert error["stack"] < 1.25 * error[""] + 1e-4
    assert error[""] < 0.004


@settings(max_examples=30, deadline=None)
@given(
    strengths=st.lists(STRENGTHS, min_size=2, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    order=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_grouped_copies_equal_single_copies(
    strengths: list[float], dtype: torch.dtype, order: torch.memory_format
) -> None:
    """The modules have equal shapes but different scales and ranks, with and without biases.

    Each has one or two adapters; one module has DoRA."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {f"l{i}": nn.Linear(24, 20, bias=i % 2 == 0) for i in range(5)}
    parts |= {f"c{i}": nn.Conv2d(3, 7, 3) for i in range(5)}
    model = nn.ModuleDict(parts).requires_grad_(False).to(dtype)
    for i in range(5):
        model[f"c{i}"].to(memory_format=order)

    def pair(name: str, rank: int) -> Pair:
        into = (24,) if name[0] == "l" else (3, 3, 3)
        A, B = (
            torch.randn(rank, *into),
            torch.randn(20 if name[0] == "l" else 7, rank, *([] if len(into) == 1 else [1, 1])),
        )
        kind = "linear" if name[0] == "l" else "conv"
        magnitude = torch.rand(20) + 1 if name == "l4" else None
        return Pair(A.to(dtype), B.to(dtype), 0.1 * (1 + int(name[1])), kind, magnitude)

    one = Adapter(pairs={name: pair(name, 4) for name in model})
    two = Adapter(pairs={name: pair(name, 3 if name == "l1" else 2) for name in model if name not in ("l2", "c1")})
    with holding(model, one=one, two=two) as attachment:
        attachment.use(*zip(("one", "two"), strengths, strict=True))
        x = {"l": torch.randn(6, 24).to(dtype), "c": torch.randn(2, 3, 8, 8).to(dtype)}

        def run() -> list[Tensor]:
            with torch.no_grad():
                return [model[name](x[name[0]]) for name in model]

        together = run()
        mix = tuple((adapter, s) for adapter, s in zip((one, two), strengths, strict=True) if s)
        assert attachment.cache.kinds() == (["copy"] if mix else [])
        apart = []
        for name in model:
            base, own = attachment.cache.modules[name], {}
            if any(name in adapter.pairs for adapter, _ in mix):
                alone = MixCache({name: base}, 1 << 30).get(name, mix)  # a cache without other modules to group with
                assert alone.weight is not None
                own = {"weight": alone.weight} | ({} if alone.bias is None else {"bias": alone.bias})
            apart.append(functional_call(base, own, x[name[0]]))
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_base_weights_are_not_changed(net: Attachment) -> None:
    before = copy.deepcopy(net.model.state_dict())
    net.use("everything", ("forms", 0.5), "dora")
    outputs(net, 1 << 20, IDS)
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())


@pytest.fixture
def small() -> Iterator[Attachment]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)).requires_grad_(False)
    with attach(model) as attachment:
        for seed in range(3):
            made = create(model, LoraSpec(rank=2, targets=("0", "1"), dropout=0.5 * (seed == 2)), seed=seed)
            attachment.add(f"a{seed}", made.mapped(lambda t: t + 0.3))
        attachment.use("a0", "a1")
        model.eval()
        yield attachment


X = torch.linspace(-1, 1, 12).view(2, 6)


def fresh(attachment: Attachment) -> Tensor:
    """Return the output without the cache."""
    with torch.enable_grad():
        out: Tensor = attachment.model(X)
    return out.detach()


def check(attachment: Attachment, made: bool = True) -> None:
    with torch.no_grad():
        got = attachment.model(X)
    torch.testing.assert_close(got, fresh(attachment))
    assert bool(attachment.cache.bytes) == made


def test_changed_weights_are_not_read_from_the_cache(small: Attachment) -> None:
    check(small)
    with torch.no_grad():
        small.adapters["a0"].pairs["0"].A.add_(1.0)
    check(small)
    with torch.no_grad():
        small.model[1].base.bias.add_(1.0)
        small.model[1].base.weight.mul_(1.5)
    check(small)
    small.model[0].base.weight.data = small.model[0].base.weight.data.clone() + 1
    check(small)
    small.use(("a0", 0.5), "a1")
    check(small)
    small.remove("a1")
    assert small.cache.bytes == 0
    check(small)
    small.add("a1", create(small.model, LoraSpec(rank=1, targets=("0",)), seed=7).mapped(lambda t: t - 0.2))
    small.use("a1", "a0")
    check(small)
    small.model.double()
    small.adapters["a0"].pairs["0"].A.mul_(2.0)
    with torch.no_grad():
        got = small.model(X.double())
    assert got.dtype == torch.float64


def test_trained_mixes_are_not_cached(small: Attachment) -> None:
    small.add("t", small.adapter("a0"), trainable=True)
    small.use("t", "a1")
    for step in range(3):
        check(small, made=False)
        with torch.no_grad():
            for p in small.parameters("t").values():
                p.data.add_(0.1 * step)


def test_inference_tensors_are_not_cached() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    with torch.inference_mode():
        pair = Pair(torch.ones(2, 6), torch.ones(4, 2), 1.0)
    with attached(model, Adapter(pairs={"0": pair})), torch.inference_mode():
        before = model(X)
        pair.A.mul_(2.0)
        assert not torch.equal(model(X), before)


def test_dropout_hooks_and_autocast_bypass_the_cache(small: Attachment) -> None:
    small.use("a2")
    with torch.no_grad():
        small.model.train()
        torch.manual_seed(0)
        assert not torch.equal(small.model(X), small.model(X)), "dropout draws anew"
        small.model.eval()
        assert torch.equal(small.model(X), small.model(X))
        seen: list[Tensor] = []
        handle = small.model[0].base.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
        small.model(X)
        handle.remove()
        assert torch.equal(seen[0], nn.functional.linear(X, small.model[0].base.weight, small.model[0].base.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert small.model(X).dtype == torch.bfloat16


def test_memory_is_bounded_over_many_mixes(small: Attachment) -> None:
    one = 2 * 24 * 4
    small.cache.limit = 3 * one
    with torch.no_grad():
        for i in range(100):
            small.use(("a0", 1 + i / 100), "a1")
            small.model(X)
            assert small.cache.bytes <= 3 * one
    assert small.cache.kinds() == ["copy"] * 3
