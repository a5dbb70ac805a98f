"""Layers: fast path, dtypes, mixing, experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.attached import attached, holding
from tests.families import FAMILIES
from veneer.core import Adapter, LoraSpec, TokenRows, attach, create, delta
from veneer.core.experts import AdaptedWeight
from veneer.core.layers import LoraLinear

IDS = torch.randint(3, 160, (2, 10), generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module, spec: LoraSpec, seed: int = 0, amount: float = 0.1) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    return create(model, spec, seed=seed).mapped(lambda t: t + amount * torch.randn(t.shape, generator=g))


@pytest.mark.parametrize(("more", "strength"), [({}, 0.7), ({"dora": True}, 1.0), ({"init": "pissa"}, 0.7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (6,)])
def test_the_fast_path_equals_the_reference(
    shape: tuple[int, ...], bias: bool, more: dict[str, Any], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=bias)).requires_grad_(False)
    adapter = trained(model, LoraSpec(rank=2, targets=("0",), **more), amount=0.5)
    x = torch.randn(shape, requires_grad=True)
    results = []
    with attached(model, adapter, strength, trainable=True) as attachment:
        assert model[0].linear_map() is not None
        for fast in (True, False):
            if not fast:
                monkeypatch.setattr(LoraLinear, "linear_map", lambda self: None)
            y = model(x)
            y.mul_(torch.linspace(1, 2, 4))  # in place, as some models do with a module's output
            grads = torch.autograd.grad(y.square().sum(), [x, *attachment.parameters("a").values()])
            results.append([y, *grads])
    for fast_value, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast_value, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_fresh_origin_pair_leaves_16_bit_output_unchanged(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False).to(torch.bfloat16)
    x = torch.randn(9, 64).bfloat16()
    wanted = model(x)
    with attached(model, create(model, LoraSpec(rank=8, targets=("0",), init=init), seed=0), trainable=True):  # type: ignore[arg-type]
        assert len(model[0].linear_map().products[0].A) == 16
        assert torch.equal(model(x), wanted)


def test_a_base_that_trains_keeps_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with attached(model, trained(model, LoraSpec(rank=2, targets=("0",))), trainable=True):
        model(torch.ones(2, 6)).sum().backward()
        assert model[0].base.weight.grad is not None


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mixtral"])
def test_a_bf16_base_under_a_float32_adapter(family: str) -> None:
    """Outputs are bf16 and close to those of the float32 model; gradients are float32."""
    exact = FAMILIES[family]().requires_grad_(False)
    adapter = trained(exact, LoraSpec(rank=3, targets=("all-linear", "embed_tokens", "lm_head")))
    outs = []
    for model in (exact, copy.deepcopy(exact).to(torch.bfloat16)):
        with attached(model, adapter, trainable=True) as attachment:
            y = model(IDS).logits
            y.float().square().mean().backward()
            assert all(
                p.grad is not None and p.grad.dtype == torch.float32 for p in attachment.parameters("a").values()
            )
            outs.append(y)
    assert outs[1].dtype == torch.bfloat16
    error = (outs[1].float() - outs[0]).norm() / outs[0].norm()
    assert error < 0.1  # two layers with 8 bits of mantissa; the routing of a token can differ


def test_autocast() -> None:
    model = FAMILIES["llama3"]().requires_grad_(False)
    adapter = trained(model, LoraSpec(rank=3))
    with attached(model, adapter, trainable=True):
        exact = model(IDS).logits
        with torch.autocast("cpu", torch.bfloat16):
            y = model(IDS).logits
            y.float().square().mean().backward()
        assert (y.float() - exact).norm() / exact.norm() < 0.05


def test_transposed_linear_of_gpt2() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 7))
    x = torch.randn(3, 7)
    for spec in (LoraSpec(rank=2, targets=("0",)), LoraSpec(rank=2, targets=("0",), dora=True)):
        adapter = trained(model, spec, amount=0.5)
        pair = adapter.pairs["0"]
        assert pair.A.shape == (2, 7)
        with attached(model, adapter):
            y = model(x)
        change = delta(model[0], pair)
        assert change.shape == model[0].weight.shape
        torch.testing.assert_close(y, x @ (model[0].weight + change) + model[0].bias)


def test_packed_weight_is_read_through_an_identity_input() -> None:
    """A layer whose stored weight is packed, as in a quantized base.

    The adapted layer calls the packed module. DoRA and merging compute the dense weight as the module's
    output for an identity matrix."""

    class LinearPacked(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.bias = nn.Parameter(linear.bias.detach().clone())
            self.scale = linear.weight.detach().abs().max() / 127
            self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * self.scale, self.bias)

    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    packed = nn.Sequential(LinearPacked(linear))
    plain = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        plain[0].weight.copy_(packed[0].weight * packed[0].scale)
        plain[0].bias.copy_(linear.bias)
    x = torch.randn(3, 6)
    for spec in (LoraSpec(rank=2, targets=("0",)), LoraSpec(rank=2, targets=("0",), dora=True)):
        adapter = trained(plain, spec, amount=0.5)
        outs = []
        for model in (plain, packed):
            with attached(model, adapter):
                outs.append(model(x))
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(delta(packed[0], adapter.pairs["0"]), delta(plain[0], adapter.pairs["0"]))


def test_token_rows_mix_by_strength_in_embedding_and_tied_head() -> None:
    model = FAMILIES["gemma3"]()
    embedding = model.model.embed_tokens
    W = embedding.weight.detach()
    r1, r2 = torch.randn(2, 32), torch.randn(2, 32)
    x = torch.tensor([[5, 7, 9, 11]])
    with attach(model) as attachment:
        attachment.add("a", Adapter(token_rows={"model.embed_tokens": TokenRows((9, 5), r1)}))
        attachment.add("b", Adapter(token_rows={"model.embed_tokens": TokenRows((5, 7), r2)}))
        for mix in ([("a", 1.0)], [("a", 0.25)], [("a", 0.5), ("b", -0.5)], [("a", 1.0), ("b", 1.0)]):
            new = W.clone()
            for name, strength in mix:
                for row, index in zip(*((r1, (9, 5)) if name == "a" else (r2, (5, 7))), strict=True):
                    new[index] += strength * (row - W[index])
            attachment.use(*mix)
            torch.testing.assert_close(model.model.embed_tokens(x), new[x] * embedding.embed_scale)
            hidden = torch.randn(1, 3, 32)
            torch.testing.assert_close(model.lm_head(hidden), hidden @ new.T)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama4"])
def test_experts_never_build_dense_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AdaptedWeight) -> Tensor:
        raise AssertionError("an expert weight was made dense")

    monkeypatch.setattr(AdaptedWeight, "dense", refuse)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = FAMILIES[family]()
        if family != "llama4":
            model.set_experts_implementation(implementation)
        with attached(model, trained(model, LoraSpec(rank=2)), trainable=True):
            model(IDS).logits.sum().backward()


def test_expert_dropout_has_the_right_mean() -> None:
    """Averaged over many samples, the output equals the output without dropout."""
    model = FAMILIES["mixtral"]()
    experts = model.model.layers[0].mlp.experts
    adapter = trained(model, LoraSpec(rank=2, targets=("experts.down_proj",), dropout=0.5))
    with holding(model, a=adapter) as attachment:
        layer = model.model.layers[0].mlp.experts
        g = torch.Generator().manual_seed(0)
        x = torch.randn(6, 32, generator=g)
        index, weights = torch.randint(0, 4, (6, 2), generator=g), torch.rand(6, 2, generator=g)
        base = experts(x, index, weights)
        attachment.use("a")
        exact = layer(x, index, weights)
        model.train()
        torch.manual_seed(0)
        draws = torch.stack([layer(x, index, weights) for _ in range(1500)])
        assert draws.std(0).max() > 0.05
        assert (draws.mean(0) - exact).norm() / (exact - base).norm() < 0.1
