"""Initialization: zero delta, determinism, and the distributions given in the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.families import FAMILIES
from veneer.core import LoraSpec, create, delta
from veneer.errors import ConfigError, TargetError


def zoo() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(40, 30), nn.Embedding(50, 20), nn.Conv2d(8, 12, 3), nn.Conv1d(8, 12, 5), nn.Linear(30, 40)
    )


ALL = ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("init", ["zero-b", "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_every_init_starts_at_zero_delta(init: str, dora: bool) -> None:
    model = zoo()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapter = create(model, LoraSpec(rank=4, targets=ALL, init=init, dora=dora), seed=0)
    assert {p.kind for p in adapter.pairs.values()} == {"linear", "embedding", "conv"}
    for name, pair in adapter.pairs.items():
        change = delta(model[int(name)], pair)
        assert change.shape == model[int(name)].weight.shape
        # DoRA divides by the norm and multiplies by it, which rounds twice
        assert change.abs().max() <= (1e-6 if dora else 0.0)
        assert pair.A.dtype == pair.B.dtype == torch.float32
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_adapter_depends_on_seed_not_global_random_state() -> None:
    model = zoo()
    digests = set()
    for _ in range(2):
        torch.rand(7)
        digests.add(create(model, LoraSpec(targets=ALL), seed=3).digest())
    assert len(digests) == 1
    assert create(model, LoraSpec(targets=ALL), seed=4).digest() not in digests


def test_factors_have_the_stated_distributions() -> None:
    model = nn.Sequential(nn.Linear(400, 30), nn.Embedding(50, 400), nn.Conv2d(100, 12, 2))
    plain = create(model, LoraSpec(rank=16, targets=("0", "1", "2")), seed=0).pairs
    for name in ("0", "2"):
        bound = 1 / math.sqrt(400)
        assert plain[name].A.abs().max() <= bound
        assert plain[name].A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not plain[name].B.any()
    assert not plain["1"].A.any()
    assert plain["1"].B.std().item() == pytest.approx(1, rel=0.05)
    gauss = create(model, LoraSpec(rank=16, targets=("0", "2"), init="gaussian"), seed=0).pairs
    assert gauss["0"].A.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert gauss["2"].A.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_pissa_is_the_best_approximation_of_its_rank() -> None:
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    pair = create(model, LoraSpec(rank=3, alpha=5.0, targets=("0",), init="pissa"), seed=0).pairs["0"]
    W = model[0].weight.detach()
    rest = torch.linalg.svdvals(W - pair.scale * pair.B @ pair.A)
    torch.testing.assert_close(rest[:6], torch.linalg.svdvals(W)[3:], rtol=1e-4, atol=1e-5)


def test_olora_is_an_orthonormal_basis_of_the_first_columns() -> None:
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    pair = create(model, LoraSpec(rank=3, targets=("0",), init="olora"), seed=0).pairs["0"]
    torch.testing.assert_close(pair.B.T @ pair.B, torch.eye(3))
    torch.testing.assert_close((pair.B @ pair.A)[:, :3], model[0].weight.detach()[:, :3])


def test_pissa_starts_each_expert_from_its_own_weight() -> None:
    model = FAMILIES["mixtral"]()
    adapter = create(model, LoraSpec(rank=3, targets=("experts.down_proj",), init="pissa"), seed=0)
    pair = adapter.pairs["model.layers.0.mlp.experts.down_proj"]
    W = model.get_parameter("model.layers.0.mlp.experts.down_proj").detach()
    for e in range(len(W)):
        rest = torch.linalg.svdvals(W[e] - pair.scale * pair.B[e] @ pair.A[e])
        torch.testing.assert_close(rest[0], torch.linalg.svdvals(W[e])[3], rtol=1e-4, atol=1e-5)


def test_dora_starts_with_the_norm_of_each_output() -> None:
    model = zoo()
    pairs = create(model, LoraSpec(rank=2, targets=ALL, dora=True), seed=0).pairs
    torch.testing.assert_close(pairs["0"].magnitude, model[0].weight.detach().norm(dim=1))
    torch.testing.assert_close(pairs["1"].magnitude, model[1].weight.detach().norm(dim=0))
    torch.testing.assert_close(pairs["2"].magnitude, model[2].weight.detach().flatten(1).norm(dim=1))


def test_full_copies_do_not_share_memory_with_the_base() -> None:
    model = FAMILIES["mistral"]().to(torch.bfloat16)
    spec = LoraSpec(targets=(), modules_to_save=("lm_head",), token_rows={"embed_tokens": (5, 3)})
    adapter = create(model, spec, seed=0)
    copy = adapter.modules["lm_head"]["weight"]
    assert copy.dtype == torch.float32
    torch.testing.assert_close(copy, model.lm_head.weight.detach().float())
    rows = adapter.token_rows["model.embed_tokens"]
    assert rows.indices == (3, 5)
    torch.testing.assert_close(rows.rows, model.model.embed_tokens.weight.detach()[[3, 5]].float())
    copy.zero_()
    rows.rows.zero_()
    assert model.lm_head.weight.any(dim=1).all()
    assert model.model.embed_tokens.weight[[3, 5]].any(dim=1).all()


IMPOSSIBLE_SETTINGS = [
    (LoraSpec(rank=0), ConfigError, "rank 0"),
    (LoraSpec(rank_pattern={"0": 0}), ConfigError, "rank 0"),
    (LoraSpec(alpha=-1.0), ConfigError, "alpha -1"),
    (LoraSpec(dropout=1.0), ConfigError, "dropout 1.0"),
    (LoraSpec(init="pisa"), ConfigError, "'pisa'"),  # type: ignore[arg-type]
    (LoraSpec(targets=()), TargetError, "nothing to train"),
    (LoraSpec(rank=31, targets=("0",), init="pissa"), TargetError, "rank 31 on 0: at most 30"),
]


@pytest.mark.parametrize(("spec", "error", "say"), IMPOSSIBLE_SETTINGS)
def test_impossible_settings_are_refused(spec: LoraSpec, error: type[Exception], say: str) -> None:
    with pytest.raises(error, match=say):
        create(zoo(), spec, seed=0)


def test_dora_on_experts_is_refused_with_a_fix() -> None:
    with pytest.raises(TargetError, match="exclude"):
        create(FAMILIES["mixtral"](), LoraSpec(dora=True), seed=0)
    adapter = create(FAMILIES["mixtral"](), LoraSpec(dora=True, exclude=("*.experts",)), seed=0)
    assert all(p.magnitude is not None for p in adapter.pairs.values())
