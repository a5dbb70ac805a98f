"""Models with merged weights compute what the attached mix computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.attached import attached
from tests.core.test_layers import IDS, trained
from tests.families import FAMILIES
from veneer.core import LoraSpec, Pair, attach, delta, merged_state
from veneer.core.merge import adapted_norm, low_rank_norm
from veneer.errors import AdapterError
from veneer.ops.quantized import quantize


def loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Return a copy of the model with new weights; a weight in `state` is no longer tied."""
    out = copy.deepcopy(model)
    for name, tensor in state.items():
        owner, _, key = name.rpartition(".")
        setattr(out.get_submodule(owner), key, nn.Parameter(tensor))
    return out


SPECS = {
    "plain": LoraSpec(rank=3, targets=("all-linear", "embed_tokens", "lm_head")),
    "dora": LoraSpec(rank=3, targets=("all-linear", "embed_tokens"), dora=True, exclude=("experts",)),
    "pissa": LoraSpec(rank=3, init="pissa"),
    "whole": LoraSpec(
        rank=3, targets=("q_proj",), modules_to_save=("model.norm", "lm_head", "layers.1.self_attn.v_proj")
    ),
    "rows": LoraSpec(rank=3, targets=("q_proj",), token_rows={"embed_tokens": (5, 77)}),
}


@pytest.mark.parametrize("what", SPECS)
@pytest.mark.parametrize("family", ["llama3", "gemma3", "mixtral", "llama4"])
def test_merged_equals_attached(family: str, what: str) -> None:
    """Outputs agree within 2e-5 of the largest logit in float32.

    They differ because W + ΔW is rounded before the product, and W·x + ΔW·x after it."""
    model = FAMILIES[family]()
    spec = SPECS[what]
    if family == "llama3" and what == "dora":
        spec = LoraSpec(rank=3, targets=("all-linear", "embed_tokens"), dora=True)
    if family == "gemma3" and what == "dora":
        spec = LoraSpec(rank=3, dora=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with attached(model, trained(model, spec)) as attachment:
        y = model(IDS).logits
        state = attachment.merged("a")
    z = loaded(model, state)(IDS).logits
    assert not torch.equal(y, model(IDS).logits)
    torch.testing.assert_close(y, z, rtol=0, atol=2e-5 * y.abs().max().item())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_mix_merges_by_strength() -> None:
    model = FAMILIES["llama3"]()
    with attach(model) as attachment:
        attachment.add("a", trained(model, SPECS["plain"], 1))
        attachment.add("b", trained(model, LoraSpec(rank=2, dora=True), 2))
        attachment.add("c", trained(model, SPECS["whole"], 3))
        mix = (("a", 0.5), ("b", -0.25))
        attachment.use(*mix)
        y = model(IDS).logits
        z = loaded_base(model, attachment.merged(*mix))
        torch.testing.assert_close(y, z, rtol=0, atol=2e-5 * y.abs().max().item())
        with pytest.raises(AdapterError, match=r"strength 1\.0"):
            attachment.merged(("c", 0.5))


ROWS = LoraSpec(targets=(), token_rows={"embed_tokens": (3, 5, 77)})
BESIDE_ROWS = {
    "a pair on the embedding": LoraSpec(rank=2, targets=("embed_tokens",)),
    "a pair on the tied head": LoraSpec(rank=2, targets=("lm_head",)),
    "DoRA on the head": LoraSpec(rank=2, targets=("lm_head",), dora=True),
    "both": LoraSpec(rank=2, targets=("embed_tokens", "lm_head")),
    "other rows": LoraSpec(targets=(), token_rows={"embed_tokens": (5, 9)}),
}


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("beside", BESIDE_ROWS)
def test_token_rows_add_to_other_changes_of_their_weight(beside: str, strength: float) -> None:
    """The weight is W + s·(rows − W) + ΔW, whether attached for all rows, attached per row, or merged."""
    model = FAMILIES["llama3"]()
    ids = IDS.clone()
    ids[:, :4] = torch.tensor([5, 77, 9, 3])
    with attach(model) as attachment, torch.no_grad():
        attachment.add("rows", trained(model, ROWS, 1))
        attachment.add("other", trained(model, BESIDE_ROWS[beside], 2))
        mix = (("rows", strength), ("other", 0.7))
        attachment.use(*mix)
        y = model(ids).logits
        attachment.use_rows([mix, ()])
        torch.testing.assert_close(model(ids).logits[0], y[0], rtol=0, atol=1e-5 * y.abs().max().item())
        z = loaded_base(model, attachment.merged(*mix), ids)
        attachment.use(("rows", strength))
        assert (model(ids).logits - y).abs().max() > 0.01 * y.abs().max(), "the other one acts too"
    torch.testing.assert_close(y, z, rtol=0, atol=2e-5 * y.abs().max().item())


def test_token_rows_without_other_changes_are_exact() -> None:
    model = FAMILIES["llama3"]()
    adapter = trained(model, ROWS, 1)
    rows = adapter.token_rows["model.embed_tokens"]
    with attached(model, adapter), torch.no_grad():
        assert torch.equal(model.model.embed_tokens(torch.tensor(rows.indices)), rows.rows)


def loaded_base(model: nn.Module, state: dict[str, Tensor], ids: Tensor = IDS) -> Tensor:
    out: Tensor = loaded(FAMILIES["llama3"](), state)(ids).logits
    return out


def test_merged_state_lists_changed_and_tied_weights() -> None:
    model = FAMILIES["llama3"]()
    W = model.model.embed_tokens.weight.detach()
    assert set(merged_state(model, [(trained(model, LoraSpec(targets=("q_proj",))), 1.0)])) == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }
    state = merged_state(model, [(trained(model, LoraSpec(targets=("embed_tokens",))), 1.0)])
    assert set(state) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(state["lm_head.weight"], W)
    assert not torch.equal(state["model.embed_tokens.weight"], W)
    state = merged_state(model, [(trained(model, LoraSpec(targets=(), token_rows={"embed_tokens": (5,)})), 1.0)])
    assert torch.equal(state["model.embed_tokens.weight"], state["lm_head.weight"])
    assert (state["lm_head.weight"] != W).any(dim=1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounded_once_to_the_bases_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(40, 30)).to(dtype)
    a, b = (trained(nn.Sequential(nn.Linear(40, 30)), LoraSpec(rank=4, targets=("0",)), s) for s in (1, 2))
    got = merged_state(model, [(a, 1.0), (b, 0.5)])["0.weight"]
    exact = model[0].weight.detach().double()
    for adapter, strength in ((a, 1.0), (b, 0.5)):
        pair = adapter.pairs["0"]
        exact = exact + strength * pair.scale * pair.B.double() @ pair.A.double()
    assert got.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    else:
        # the float32 sum can round to a neighbor of the nearest number, but rarely does
        assert (got != exact.to(dtype)).float().mean() < 0.01


def test_delta_of_each_kind_by_hand() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    torch.testing.assert_close(delta(nn.Linear(5, 3), Pair(A, B, 0.5)), 0.5 * B @ A)
    torch.testing.assert_close(delta(nn.Embedding(5, 3), Pair(A, B, 0.5, "embedding")), 0.5 * (B @ A).T)
    A, B = torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    expected = 0.5 * torch.einsum("orxy,rikl->oikl", B, A)
    torch.testing.assert_close(delta(nn.Conv2d(4, 6, 3), Pair(A, B, 0.5, "conv")), expected)
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.randn(7, 3, 5))
    A, B = torch.randn(7, 2, 5), torch.randn(7, 3, 2)
    torch.testing.assert_close(delta(module, Pair(A, B, 0.5, "experts"), "down_proj"), 0.5 * B @ A)
    module.is_transposed = True
    module.down_proj = nn.Parameter(torch.randn(7, 5, 3))
    torch.testing.assert_close(delta(module, Pair(A, B, 0.5, "experts"), "down_proj"), 0.5 * (B @ A).mT)


@pytest.mark.parametrize(("kind", "within"), [(None, 1e-4), ("nf4", 1e-4), ("float64", 1e-12)])
def test_low_rank_norm_equals_adapted_norm(kind: str | None, within: float) -> None:
    """Holds for a float32 pair on a 16-bit or quantized W; exact if nothing is rounded."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float64 if kind == "float64" else torch.float32
    W = (0.05 * torch.randn(96, 256, generator=g)).to(torch.float64 if kind == "float64" else torch.bfloat16)
    W = quantize(W, kind) if kind == "nf4" else W
    A, B = (0.02 * torch.randn(*shape, generator=g) for shape in ((16, 256), (96, 16)))
    pair = Pair(A.to(dtype), B.to(dtype), 4.0)
    wanted = adapted_norm(W, pair)
    torch.testing.assert_close(low_rank_norm(W, pair), wanted, rtol=within, atol=0)
    plain = adapted_norm(W, Pair(A.to(dtype), torch.zeros(96, 16, dtype=dtype), 1.0))
    assert (wanted / plain - 1).abs().max() > 10 * within, "the pair changes it"
