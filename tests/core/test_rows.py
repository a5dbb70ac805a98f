"""A batch with one mix per row equals its rows computed separately."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.attached import holding
from tests.families import FAMILIES
from veneer.core import Adapter, Attachment, LoraSpec, Pair, TokenRows, attach, create
from veneer.core.forms import Delta
from veneer.core.selection import MAX_REPEATS
from veneer.errors import AdapterError, ConfigError

Mix = tuple[tuple[str, float], ...]


class Gate(nn.Module):
    """A module with two input tensors; an adapter can have a full copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, by: Tensor) -> tuple[Tensor, None]:
        return x * torch.sigmoid(self.inner(by)), None


class Net(nn.Module):
    """All kinds of layers: embedding with tied head, linear, norm, two-input gate, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.gate = Gate()
        self.conv = nn.Conv2d(6, 4, 3, padding=1)
        self.line = nn.Conv1d(4, 6, 1)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.words(ids))
        x = self.norm(x + self.gate(x, self.words(ids))[0])
        picture = x.transpose(1, 2).unflatten(2, (2, -1))
        x = x + self.line(self.conv(picture).flatten(2)).transpose(1, 2)
        out: Tensor = self.head(x)
        return out


def _noise(adapter: Adapter, seed: int, amount: float = 0.3) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    return adapter.mapped(lambda t: t + amount * torch.randn(t.shape, generator=g))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    def made(seed: int, *targets: str, **more: Any) -> Adapter:
        return _noise(create(model, LoraSpec(targets=targets, **more), seed=seed), seed)

    g = torch.Generator().manual_seed(9)

    def r(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=g)

    loha = Delta("hadamard", {"a1": r(6, 2), "b1": r(2, 6), "a2": r(6, 2), "b2": r(2, 6)}, (6, 6), 0.7)
    norm = {"norm.weight": Delta("dense", {"value": r(6)}, (6,)), "norm.bias": Delta("dense", {"value": r(6)}, (6,))}
    bias = {"line.bias": Delta("dense", {"value": r(6)}, (6,)), "conv.bias": Delta("dense", {"value": r(4)}, (4,))}
    return {
        "linears": made(1, "first", "head", rank=2),
        "everything": made(2, "first", "words", "conv", "line", rank=4),
        "dora": made(3, "first", "conv", "line", rank=3, dora=True),
        "pissa": made(4, "first", rank=2, init="pissa"),
        "forms": Adapter(deltas={"first.weight": loha, "conv.weight": Delta("gain", {"value": r(4)}), **norm, **bias}),
        "words": Adapter(token_rows={"words": TokenRows((3, 7), r(2, 6))}),
        "other words": Adapter(token_rows={"words": TokenRows((7, 8, 1), r(3, 6))}),
        "whole": made(5, rank=2, modules_to_save=("gate", "line")),
    }


def close(got: Tensor, want: Tensor) -> None:
    """Assert equality within the float32 rounding of a few layers."""
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-5 * want.norm()


def alone(attachment: Attachment, mixes: list[Mix], ids: Tensor) -> Tensor:
    out = []
    for i, row in enumerate(ids):
        with attachment.using(*mixes[i % len(mixes)]):
            out.append(attachment.model(row[None]))
    return torch.cat(out)


STRENGTHS = st.sampled_from([1.0, 1.0, 0.5, -0.7, 2.0, 0.0])
NAMES = ["linears", "everything", "dora", "pissa", "forms", "words", "other words"]
PLAIN = st.lists(st.tuples(st.sampled_from(NAMES), STRENGTHS), max_size=3)


@settings(max_examples=60, deadline=None)
@given(mixes=st.lists(PLAIN.map(tuple), min_size=1, max_size=5), repeats=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_batch_equals_its_rows_one_by_one(net: Attachment, mixes: list[Mix], repeats: int, seed: int) -> None:
    ids = torch.randint(0, 12, (len(mixes) * repeats, 4), generator=torch.Generator().manual_seed(seed))
    net.use_rows(mixes)
    want = alone(net, mixes, ids)
    close(net.model(ids), want)
    with torch.no_grad():  # uses prepared copies, see core.ready
        close(net.model(ids), want)


@settings(max_examples=25, deadline=None)
@given(
    picks=st.lists(
        st.sampled_from([(), ("whole",), ("whole", "words"), ("pissa",), ("words",)]), min_size=2, max_size=5
    ),
    repeats=st.integers(1, 2),
)
def test_rows_under_full_copies(net: Attachment, picks: list[tuple[str, ...]], repeats: int) -> None:
    mixes: list[Mix] = [tuple((name, 1.0) for name in pick) for pick in picks]
    ids = torch.randint(0, 12, (len(mixes) * repeats, 4), generator=torch.Generator().manual_seed(1))
    net.use_rows(mixes)
    with torch.no_grad():
        close(net.model(ids), alone(net, mixes, ids))


def test_row_without_adapter_equals_the_base(net: Attachment) -> None:
    ids = torch.randint(0, 12, (3, 4), generator=torch.Generator().manual_seed(3))
    net.use()
    base = net.model(ids)
    net.use_rows([["everything", ("forms", 0.5)], [], ["dora"]])
    assert torch.equal(net.model(ids)[1], base[1])
    net.use_rows([[], [], []])
    assert torch.equal(net.model(ids), base)


def test_gradients_of_each_row_reach_its_own_adapter() -> None:
    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    ids = torch.randint(0, 12, (4, 4), generator=torch.Generator().manual_seed(4))
    made = adapters(model)
    with attach(model) as attachment:
        for name in ("linears", "dora"):
            attachment.add(name, made[name], trainable=True)
        parameters = [p for name in ("linears", "dora") for p in attachment.parameters(name).values()]
        mixes: list[Mix] = [(("linears", 0.5),), (("dora", 1.0),), (("linears", 1.0), ("dora", -1.0)), ()]
        attachment.use_rows(mixes)
        batch = torch.autograd.grad(model(ids).square().sum(), parameters)
        single = torch.autograd.grad(alone(attachment, mixes, ids).square().sum(), parameters)
    for got, want in zip(batch, single, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_a_language_model(family: str) -> None:
    model = FAMILIES[family]().requires_grad_(False)
    ids = torch.randint(3, 160, (6, 10), generator=torch.Generator().manual_seed(0))
    spec = LoraSpec(rank=2, targets=("all-linear", "embed_tokens", "lm_head"))
    with attach(model) as attachment, torch.no_grad():
        for seed, name in enumerate("abc"):
            attachment.add(name, _noise(create(model, spec, seed=seed), seed, 0.1))
        mixes: list[Mix] = [(("a", 1.0),), (), (("a", 0.5), ("b", -1.0), ("c", 1.0))]
        attachment.use_rows(mixes)
        got = model(ids).logits
        want = []
        for i, row in enumerate(ids):
            with attachment.using(*mixes[i % 3]):
                want.append(model(row[None]).logits)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)


def test_a_bf16_base_under_a_float32_adapter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False).bfloat16()
    pair = Pair(torch.randn(2, 6), torch.randn(4, 2), 0.5)
    x = torch.randn(4, 3, 6).bfloat16()
    with holding(model, a=Adapter(pairs={"0": pair})) as attachment, torch.no_grad():
        attachment.use_rows([["a"], []])
        y = model(x)
        assert y.dtype == torch.bfloat16
        base = model[0].base(x)
        assert torch.equal(y[1::2], base[1::2])
        exact = base.double() + x.double() @ pair.A.double().T @ pair.B.double().T * 0.5
        torch.testing.assert_close(y[::2].double(), exact[::2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 3 * (MAX_REPEATS + 1)])
def test_batch_that_is_no_multiple_of_the_mixes_is_refused(net: Attachment, batch: int) -> None:
    net.use_rows([["linears"], [], ["everything"]])
    with pytest.raises(AdapterError, match=rf"3 mixes for a batch of {batch} rows"):
        net.model(torch.zeros(batch, 4, dtype=torch.long))


def test_module_without_batch_rows_is_an_error() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 6), "conv": nn.Conv2d(6, 6, 1), "norm": nn.LayerNorm(6)})
    loud = Adapter(deltas={"norm.weight": Delta("dense", {"value": torch.ones(6)}, (6,))})
    with holding(model, a=create(model, LoraSpec(targets=("linear", "conv")), seed=0), n=loud) as attachment:
        attachment.use_rows([["a", "n"], []])
        for name, x in [
            ("linear", torch.ones(6)),  # a vector, whose first dimension is the features
            ("conv", torch.ones(6, 4, 4)),  # a picture without a batch dimension
            ("linear", torch.ones(2 * 77, 6)),  # the tokens of all rows, flattened
            ("norm", torch.ones(2 * 77, 6)),
            ("norm", torch.ones(3, 6)),
        ]:
            with pytest.raises(AdapterError):
                model[name](x)
        attachment.use_rows([["a"], ["a"]])
        assert model["linear"](torch.ones(6)).shape == (6,), "where all rows have the same mix, rows do not matter"


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_shared_expert_with_flattened_rows(tokens: int) -> None:
    """The shared expert's input is (rows · tokens, dim).

    Its first dimension could be mistaken for that of a batch with repeated rows, which has another order."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 160, "hidden_size": 16, "intermediate_size": 24, "shared_expert_intermediate_size": 24}
    sizes |= {"moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts=4)).eval().requires_grad_(False)
    ids = torch.randint(3, 160, (2, tokens), generator=torch.Generator().manual_seed(0))
    mixes: list[Mix] = [(("a", 1.0),), (("b", 1.0),)]
    with attach(model) as attachment, torch.no_grad():
        for seed, name in enumerate("ab"):
            spec = LoraSpec(rank=2, targets=("shared_expert.down_proj",))
            attachment.add(name, _noise(create(model, spec, seed=seed), seed, 0.5))
        attachment.use_rows(mixes)
        if tokens == 1:
            got = model(input_ids=ids).logits
            want = []
            for row, mix in zip(ids, mixes, strict=True):
                with attachment.using(*mix):
                    want.append(model(row[None]).logits)
            close(got, torch.cat(want))
        else:
            with pytest.raises(
                AdapterError, match=f"a batch of {2 * tokens} in this module, where the model has 2 row"
            ):
                model(input_ids=ids)
    assert not model._forward_pre_hooks


def test_row_mixes_use_the_batch_of_the_called_part() -> None:
    """An image base's parts are called one by one; the module that contains them is never called."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(6, 6)), "text": nn.Sequential(nn.Linear(6, 6))})
    parts.requires_grad_(False)
    with holding(parts, a=_noise(create(parts, LoraSpec(targets=("0",)), seed=0), 0)) as attachment, torch.no_grad():
        attachment.use_rows([["a"], []])
        for name, x in (("text", torch.randn(2, 3, 6)), ("unet", torch.randn(4, 3, 6)), ("text", torch.randn(2, 3, 6))):
            plain, changed = parts[name][0].base(x), parts[name](x)
            same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, changed, strict=True)]
            assert same == [False, True] * (len(x) // 2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_single_token_rows_mix_experts(implementation: str) -> None:
    model = FAMILIES["mixtral"]()
    model.set_experts_implementation(implementation)
    ids = torch.arange(6)[:, None]
    with attach(model) as attachment, torch.no_grad():
        for seed, name in enumerate("ab"):
            spec = LoraSpec(rank=2, targets=("experts.*", "q_proj"))
            attachment.add(name, _noise(create(model, spec, seed=seed), seed))
        mixes: list[list[str | tuple[str, float]]] = [["a"], [], [("b", 0.5)], ["a", "b"], ["a"], []]
        attachment.use_rows(mixes)
        got = model(ids).logits
        for row, mix in enumerate(mixes):
            with attachment.using(*mix):
                torch.testing.assert_close(got[row], model(ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)


def test_fused_experts_refuse_row_mixes() -> None:
    model = FAMILIES["mixtral"]()
    with holding(model, a=create(model, LoraSpec(rank=2, targets=("experts.down_proj",)), seed=0)) as attachment:
        attachment.use_rows([["a"], []])
        with pytest.raises(AdapterError, match="each row cannot have its own mix"):
            model(torch.ones(2, 5, dtype=torch.long))
        attachment.use_rows([["a"], ["a"]])
        model(torch.ones(2, 5, dtype=torch.long))


def test_invalid_row_mixes_are_refused(net: Attachment) -> None:
    net.use("linears")
    before = net.selection
    for mixes, say in [
        ([], "no rows"),
        ([["linears"], ["lineals"]], "no adapter named 'lineals'"),
        ([["whole", "forms"]], "use one of the two"),
    ]:
        with pytest.raises(AdapterError, match=say):
            net.use_rows(mixes)
        assert net.selection is before
    with pytest.raises(ConfigError, match="strength of 'dora'"):
        net.use_rows([[], [("dora", float("inf"))]])
    assert net.selection is before


def test_removed_adapter_leaves_all_row_mixes() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with attach(model) as attachment:
        for name, seed in (("a", 1), ("b", 2)):
            attachment.add(name, _noise(create(model, LoraSpec(rank=2, targets=("0",)), seed=seed), seed))
        attachment.use_rows([["a", "b"], ["b"]])
        attachment.remove("b")
        x = torch.randn(2, 6)
        got = model(x)
        attachment.use("a")
        torch.testing.assert_close(got[0], model(x)[0])
        attachment.use()
        assert torch.equal(got[1], model(x)[1])
