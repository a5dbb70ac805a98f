"""Mixes equal those computed densely in float64, and those of PEFT."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.core.test_truncate import KINDS, dense, noise, pair_of
from veneer.core.adapter import Adapter, Pair, TokenRows
from veneer.core.forms import Delta, change_of, delta_of, product_of
from veneer.core.mix import mix, mix_pairs, scaled_by_module
from veneer.core.truncate import Bound
from veneer.errors import AdapterError

FULL = Bound(error=0.0)
OUT, IN = 9, 12


def linear(rank: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Pair:
    return Pair(noise(rank, IN, seed=seed, dtype=dtype), noise(OUT, rank, seed=seed + 50, dtype=dtype), scale)


def one(pair: Pair, name: str = "m") -> Adapter:
    return Adapter({name: pair})


def close(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, float(np.abs(want).max())))


# -- sum ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(-2, 2).map(lambda x: round(x, 3)), st.floats(0.1, 3)),
        min_size=2,
        max_size=4,
    )
)
def test_a_sum_is_exact_whatever_the_ranks_scales_and_signs(parts):
    pairs = [(linear(rank, i, scale), strength) for i, (rank, strength, scale) in enumerate(parts)]
    want = sum(w * dense(p)[0] for p, w in pairs)
    out, part = mix_pairs(pairs)
    close(dense(out)[0], want)
    assert part.error <= 1e-6 * sum(abs(w) * np.linalg.norm(dense(p)) for p, w in pairs)
    assert part.norm == pytest.approx(float(np.linalg.norm(want)), rel=1e-6, abs=1e-6)
    back, _ = mix_pairs(pairs[::-1])
    close(dense(back), dense(out))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_mixes_like_the_dense_sum(kind):
    a, b = pair_of(kind, 5, 0), pair_of(kind, 3, 20)
    want = 0.5 * dense(a) - 2 * dense(b)
    close(dense(mix_pairs([(a, 0.5), (b, -2.0)])[0]), want)
    out, part = mix_pairs([(a, 0.5), (b, -2.0)], "svd", Bound(rank=2))
    s = np.linalg.svd(want, compute_uv=False)
    assert part.error == pytest.approx(float(np.sqrt((s[..., 2:] ** 2).sum())), rel=1e-5)
    assert part.cut == part.error
    assert part.error == pytest.approx(float(np.linalg.norm(dense(out) - want)), rel=1e-5)


def test_rounding_to_sixteen_bits_is_part_of_the_error():
    pairs = [(linear(2, 0), 1.0), (linear(2, 1), 0.3)]
    out, part = mix_pairs(pairs, dtype=torch.bfloat16)
    want = sum(w * dense(p)[0] for p, w in pairs)
    assert part.error == pytest.approx(float(np.linalg.norm(dense(out)[0] - want)), rel=1e-6)
    assert 1e-4 < part.error / part.norm < 1e-2


def test_mixing_unlike_shapes_lists_every_module():
    bad = Pair(noise(2, 5), noise(OUT, 2), 1.0)
    with pytest.raises(AdapterError, match="unlike shapes") as error:
        mix([(Adapter({"a": linear(2, 0), "b": linear(2, 0)}), 1.0), (Adapter({"a": bad, "b": bad}), 1.0)])
    assert "a, b: changes of unlike shapes" in str(error.value)
    pairs = {n: linear(2, 0) for n in "abcde"}
    with pytest.raises(AdapterError, match="a, b, c and 2 more: changes of unlike shapes"):
        mix([(Adapter(pairs), 1.0), (Adapter(dict.fromkeys(pairs, bad)), 1.0)])
    with pytest.raises(AdapterError, match="no method"):
        mix([(Adapter(), 1.0)], "average")
    with pytest.raises(AdapterError, match="nothing"):
        mix([])


# -- TIES, compared with its definition in numpy ---------------------------------------------------


def keep(t: np.ndarray, density: float) -> np.ndarray:
    order = np.sort(np.abs(t).ravel())[::-1]
    return np.where(np.abs(t) >= order[round(density * t.size) - 1], t, 0)


def elected(parts: list[np.ndarray]) -> np.ndarray:
    sign = np.sign(sum(parts))
    out = np.zeros_like(parts[0])
    for index in np.ndindex(out.shape):
        agree = [p[index] for p in parts if np.sign(p[index]) == sign[index] != 0]
        out[index] = np.mean(agree) if agree else 0
    return out


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_trimming_applies_to_entries_of_the_dense_change(density):
    pairs = [(linear(3, 0, 2.0), 1.0), (linear(2, 1), -0.7), (linear(4, 2, 0.5), 1.3)]
    tau = [w * dense(p)[0] for p, w in pairs]
    answer = elected([keep(t, density) for t in tau])
    out, part = mix_pairs(pairs, "ties", FULL, density=density)
    close(dense(out)[0], answer)
    assert part.error == pytest.approx(float(np.linalg.norm(dense(out)[0] - sum(tau))), rel=1e-4, abs=1e-4)
    cut, report = mix_pairs(pairs, "ties", Bound(rank=2), density=density)
    s = np.linalg.svd(answer, compute_uv=False)
    assert report.cut == pytest.approx(float(np.sqrt((s[2:] ** 2).sum())), rel=1e-4)
    assert cut.rank == 2


def test_ties_requires_a_rank_limit_and_positive_density():
    with pytest.raises(AdapterError, match="full rank"):
        mix_pairs([(linear(2, 0), 1.0)], "ties")
    with pytest.raises(AdapterError, match="above 0 and at most 1"):
        mix_pairs([(linear(2, 0), 1.0)], "ties", FULL, density=0.0)


# -- orthogonal --------------------------------------------------------------------------------------------------------


def thin(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, v = np.linalg.svd(dense(pair)[0], full_matrices=False)
    return u[:, : pair.rank], s[: pair.rank], v[: pair.rank]


def test_orthogonal_is_the_papers_procrustes_solution():
    a, b = linear(3, 0), linear(2, 1, 0.5)
    (ua, sa, va), (ub, sb, vb) = thin(a), thin(b)
    pu, _, qu = np.linalg.svd(np.hstack([ua, ub]), full_matrices=False)
    pv, _, qv = np.linalg.svd(np.vstack([va, vb]).T, full_matrices=False)
    want = pu @ qu @ np.diag(np.concatenate([0.8 * sa, 0.5 * sb])) @ (pv @ qv).T
    out, part = mix_pairs([(a, 0.8), (b, 0.5)], "orthogonal")
    close(dense(out)[0], want)
    truth = 0.8 * dense(a)[0] + 0.5 * dense(b)[0]
    assert part.error == pytest.approx(float(np.linalg.norm(want - truth)), rel=1e-4)


def test_orthogonal_of_disjoint_and_equal_adapters():
    eye = torch.eye(12)
    a = Pair(eye[:2] * 2, eye[:OUT, :2].contiguous(), 1.0)
    b = Pair(eye[5:8], eye[:OUT, 4:7].contiguous(), 3.0)
    close(dense(mix_pairs([(a, 1.0), (b, -0.5)], "orthogonal")[0])[0], dense(a)[0] - 0.5 * dense(b)[0])
    c = linear(3, 4)
    close(dense(mix_pairs([(c, 1.0), (c, 1.0)], "orthogonal")[0])[0], dense(c)[0], 1e-5)
    close(dense(mix_pairs([(c, 0.7)], "orthogonal")[0])[0], 0.7 * dense(c)[0])


# -- PEFT --------------------------------------------------------------------------------------------------------------


def peft_mix(pairs: list[Pair], weights: list[float], kind: str, **how: Any) -> np.ndarray:
    """Return the ΔW that PEFT's add_weighted_adapter computes."""
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Linear(IN, OUT, bias=False)

    configs = [LoraConfig(r=p.rank, lora_alpha=p.scale * p.rank, target_modules=["m"]) for p in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), configs[0], adapter_name="0")
        for i, config in enumerate(configs[1:], 1):
            model.add_adapter(str(i), config)
        layer = model.base_model.model.m
        for i, p in enumerate(pairs):
            layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = p.A.clone(), p.B.clone()
        model.add_weighted_adapter([str(i) for i in range(len(pairs))], weights, "mix", combination_type=kind, **how)
        return layer.get_delta_weight("mix").detach().double().numpy()


def test_sum_and_svd_equal_pefts_cat_and_svd():
    pairs, weights = [linear(4, 0, 2.0), linear(2, 1, 0.5)], [0.7, 0.4]
    given_ = list(zip(pairs, weights, strict=True))
    close(dense(mix_pairs(given_)[0])[0], peft_mix(pairs, weights, "cat"), 1e-5)
    close(dense(mix_pairs(given_, "svd", Bound(rank=3))[0])[0], peft_mix(pairs, weights, "svd", svd_rank=3), 1e-5)
    close(
        dense(mix_pairs(given_, "svd")[0])[0], peft_mix(pairs, weights, "svd"), 1e-5
    )  # without a rank, PEFT uses the largest of the pairs


def test_trimming_matches_peft_svd_variants():
    pairs = [linear(4, 0, 2.0), linear(2, 1, 0.5)]
    got, _ = mix_pairs([(p, 1.0) for p in pairs], "ties", Bound(rank=9), density=0.5)
    close(dense(got)[0], peft_mix(pairs, [1.0, 1.0], "ties_svd", density=0.5, svd_rank=9), 1e-5)


# -- full adapters -----------------------------------------------------------------------------------------------------


def test_single_adapter_modules_are_copied_exactly():
    a, b = Adapter({"x": linear(2, 0), "y": linear(3, 1)}), Adapter({"y": linear(2, 2), "z": linear(4, 3)})
    for method in ("sum", "svd", "orthogonal"):
        out = mix([(a, 1.0), (b, -0.5)], method)
        assert torch.equal(out.adapter.pairs["x"].A, a.pairs["x"].A)
        assert out.adapter.pairs["z"].scale == -0.5
        assert torch.equal(out.adapter.pairs["z"].B, b.pairs["z"].B)
        assert sorted(out.parts) == ["x", "y", "z"]


def test_total_error_is_the_norm_over_all_entries():
    a, b = (Adapter({n: linear(3, i + 7 * j) for i, n in enumerate("xyz")}) for j in range(2))
    out = mix([(a, 1.0), (b, 1.0)], "svd", Bound(rank=1))
    truth = {n: dense(a.pairs[n])[0] + dense(b.pairs[n])[0] for n in "xyz"}
    off = sum(np.linalg.norm(dense(out.adapter.pairs[n])[0] - truth[n]) ** 2 for n in "xyz") ** 0.5
    assert out.error == pytest.approx(off / sum(np.linalg.norm(t) ** 2 for t in truth.values()) ** 0.5, rel=1e-5)
    bounded = mix([(a, 1.0), (b, 1.0)], "sum", Bound(error=0.3))
    assert bounded.error <= 0.3
    assert all(p.error <= 0.3 * p.norm * (1 + 1e-6) for p in bounded.parts.values())


def dora(seed: int = 0) -> tuple[Pair, torch.Tensor]:
    W = noise(OUT, IN, seed=90)
    pair = linear(2, seed)
    pair.magnitude = 1.2 * torch.linalg.vector_norm(W, dim=1)
    return pair, W


def test_mixing_dora_needs_base_and_bound():
    pair, W = dora()
    alone = mix([(one(pair), 1.0), (one(linear(2, 1), "n"), 1.0)])
    assert torch.equal(alone.adapter.pairs["m"].magnitude, pair.magnitude)
    plain = linear(3, 4)
    parts = [(one(pair), 0.5), (one(plain), 2.0)]
    with pytest.raises(AdapterError, match=r"m: a pair with a magnitude .* needs the base"):
        mix(parts, bound=FULL)
    with pytest.raises(AdapterError, match="give a rank"):
        mix(parts, weights={"m.weight": W}.get)
    change = change_of(W.double(), pair.scale * pair.B.double() @ pair.A.double(), pair.magnitude)
    want = 0.5 * change.numpy() + 2 * dense(plain)[0]
    out = mix(parts, bound=Bound(rank=4), weights={"m.weight": W}.get)
    s = np.linalg.svd(want, compute_uv=False)
    assert out.parts["m"].error == pytest.approx(float(np.sqrt((s[4:] ** 2).sum())), rel=1e-4)
    close(dense(mix(parts, bound=FULL, weights={"m.weight": W}.get).adapter.pairs["m"])[0], want)


def kronecker(seed: int, scale: float = 1.0) -> Delta:
    return Delta("kronecker", {"w1": noise(3, 4, seed=seed), "w2": noise(3, 3, seed=seed + 1)}, (OUT, IN), scale)


def test_mixing_deltas_by_form_and_bound():
    k, other, pair = kronecker(0, 0.5), kronecker(5), linear(2, 3)
    single = mix([(Adapter(deltas={"m.weight": k}), -2.0)]).adapter.deltas["m.weight"]
    assert (single.form, single.scale) == ("kronecker", -1.0)
    both = mix([(Adapter(deltas={"m.weight": k}), 1.0), (Adapter(deltas={"m.weight": other}), 3.0)])
    want = product_of(k).double() + 3 * product_of(other).double()
    assert both.adapter.deltas["m.weight"].form == "dense"
    close(product_of(both.adapter.deltas["m.weight"]), want)
    beside = [(Adapter({"m": pair}, deltas={"m.weight": k}), 1.0), (one(pair), 1.0)]
    kept = mix(beside).adapter
    assert kept.deltas["m.weight"].form == "kronecker"
    close(dense(kept.pairs["m"])[0], 2 * dense(pair)[0])
    for method in ("sum", "ties"):
        folded = mix(beside, method, FULL, density=1.0)
        assert not folded.adapter.deltas
        first, second = dense(pair)[0] + product_of(k).double().numpy(), dense(pair)[0]
        close(dense(folded.adapter.pairs["m"])[0], first + second if method == "sum" else elected([first, second]))
    assert mix([(Adapter(deltas={"m.weight": k}), 2.0)], bound=Bound(rank=3)).adapter.pairs["m"].rank == 3
    conv = Delta("dense", {"value": noise(4, 3, 2, 2)}, (4, 3, 2, 2))
    folded = mix([(Adapter(deltas={"c.weight": conv}), 1.0)], bound=FULL).adapter.pairs["c"]
    assert folded.kind == "conv"
    close(dense(folded)[0], conv.parts["value"].flatten(1).double())


def test_gains_of_one_axis_add_without_the_base():
    W = noise(OUT, IN)
    rows, more = (Delta("gain", {"value": noise(OUT, seed=s)}) for s in (1, 2))
    columns = Delta("gain", {"value": noise(1, IN, seed=3)})
    out = mix([(Adapter(deltas={"m.weight": rows}), 0.5), (Adapter(deltas={"m.weight": more}), 2.0)]).adapter.deltas
    close(delta_of(W, out["m.weight"]), 0.5 * delta_of(W, rows) + 2 * delta_of(W, more))
    mixed = [(Adapter(deltas={"m.weight": rows}), 1.0), (Adapter(deltas={"m.weight": columns}), 1.0)]
    with pytest.raises(AdapterError, match="a gain needs the base"):
        mix(mixed)
    got = mix(mixed, weights={"m.weight": W}.get).adapter.deltas["m.weight"]
    close(product_of(got), delta_of(W, rows) + delta_of(W, columns))


def test_biases_add_up_and_are_trimmed_as_entries():
    a, b = (Adapter(deltas={"m.bias": Delta("dense", {"value": noise(6, seed=s)}, (6,), 2.0)}) for s in (1, 2))
    x, y = (2 * noise(6, seed=s).double().numpy() for s in (1, 2))
    close(product_of(mix([(a, 1.0), (b, -1.0)]).adapter.deltas["m.bias"]), x - y)
    got = mix([(a, 1.0), (b, -1.0)], "ties", Bound(rank=1), density=0.5).adapter.deltas["m.bias"]
    close(product_of(got), elected([keep(x, 0.5), -keep(y, 0.5)]))


def test_full_copies_and_token_rows_mix_as_deltas():
    W, x, y = noise(4, 3), noise(4, 3, seed=1), noise(4, 3, seed=2)
    a, b = Adapter(modules={"head": {"weight": x}}), Adapter(modules={"head": {"weight": y}})
    assert torch.equal(mix([(a, 1.0)]).adapter.modules["head"]["weight"], x)
    close(mix([(a, 0.25), (b, 0.75)]).adapter.modules["head"]["weight"], 0.25 * x + 0.75 * y)
    with pytest.raises(AdapterError, match=r"head: a mix of full copies whose strengths add up to 2 needs the base"):
        mix([(a, 1.0), (b, 1.0)])
    got = mix([(a, 1.0), (b, 1.0)], weights={"head.weight": W}.get).adapter.modules["head"]["weight"]
    close(got, x + y - W)
    rows = [Adapter(token_rows={"e": TokenRows(ids, t)}) for ids, t in (((1, 3), x[:2]), ((3, 2), y[:2]))]
    with pytest.raises(AdapterError, match="token rows whose strengths add up to 2"):
        mix([(rows[0], 1.0), (rows[1], 1.0)])
    apart = mix([(rows[0], 1.0), (Adapter(token_rows={"e": TokenRows((2,), y[:1])}), 1.0)]).adapter.token_rows["e"]
    assert apart.indices == (1, 2, 3)
    close(apart.rows, torch.stack([x[0], y[0], x[1]]))
    full = mix([(rows[0], 1.0), (rows[1], 1.0)], weights={"e.weight": W}.get).adapter.token_rows["e"]
    close(full.rows, torch.stack([x[0], y[1], x[1] + y[0] - W[3]]))


def test_mixing_does_not_change_its_inputs():
    adapter = Adapter({"m": linear(2, 0)}, deltas={"m.bias": Delta("dense", {"value": noise(OUT)}, (OUT,))})
    before = copy.deepcopy(adapter).digest()
    mix([(adapter, 2.0), (one(linear(1, 1)), 1.0)], "ties", Bound(rank=2))
    assert adapter.digest() == before


def test_scaling_an_adapter_changes_only_scales():
    a = Adapter({"x": linear(2, 0, 3.0), "y": linear(2, 1), "z": dora()[0]}, deltas={"x.weight": kronecker(0)})
    out = scaled_by_module(a, {"x": -0.5, "y": 0.0, "z": 1.0}.__getitem__)
    assert (out.pairs["x"].scale, out.deltas["x.weight"].scale, sorted(out.pairs)) == (-1.5, -0.5, ["x", "z"])
    assert out.pairs["x"].A is a.pairs["x"].A
    with pytest.raises(AdapterError, match="z: a pair with a magnitude"):
        scaled_by_module(a, lambda name: 0.5)
