"""Truncation through low-rank factors equals the SVD of the dense change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.core.adapter import Pair
from veneer.core.truncate import (
    Bound,
    Cut,
    distance,
    factors,
    inner,
    like,
    low_rank,
    rank_for,
    rebuilt,
    singular_values,
    thin_svd,
    truncated,
)
from veneer.errors import AdapterError


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair_of(kind: str, rank: int = 5, seed: int = 0) -> Pair:
    """Return a pair with decreasing singular values, so that the cut differs for each rank."""
    fall = 0.5 ** torch.arange(rank, dtype=torch.float32)
    if kind == "conv":
        A, B = noise(rank, 4, 3, 3, seed=seed), noise(9, rank, 1, 1, seed=seed + 1)
        return Pair(A * fall[:, None, None, None], B, 1.5, "conv")
    if kind == "experts":
        return Pair(noise(3, rank, 7, seed=seed) * fall[:, None], noise(3, 8, rank, seed=seed + 1), -2.0, "experts")
    A, B = noise(rank, 12, seed=seed) * fall[:, None], noise(9, rank, seed=seed + 1)
    return Pair(A, B, 0.75, "embedding" if kind == "embedding" else "linear")


def dense(pair: Pair) -> np.ndarray:
    """Return ΔW computed with numpy, independently of the code under test."""
    A, B = pair.A.double().numpy(), pair.B.double().numpy()
    if pair.kind == "experts":
        return pair.scale * np.einsum("eor,eri->eoi", B, A)
    return pair.scale * (B.reshape(len(B), -1) @ A.reshape(len(A), -1))[None]


def truncate(pair: Pair, bound: Bound) -> tuple[Pair, Cut]:
    return truncated(*factors(pair), pair, bound, torch.float32)


KINDS = ["linear", "embedding", "conv", "experts"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 4, 5, 9])
def test_truncation_is_optimal_and_reports_its_error(kind, rank):
    pair = pair_of(kind)
    whole = dense(pair)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    out, cut = truncate(pair, Bound(rank=rank))
    best = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    np.testing.assert_allclose(dense(out), best, atol=2e-6 * s.max())
    assert cut.error == pytest.approx(math.sqrt((s[..., rank:] ** 2).sum()), rel=1e-9, abs=1e-12 * s.max())
    assert cut.norm == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    assert out.scale == 1.0
    assert out.kind == pair.kind
    assert out.A.shape[2:] == pair.A.shape[2:]
    assert out.A.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_thin_svd_equals_numpys_of_the_dense_matrix(rank, out, n, seed):
    A, B = noise(rank, n, seed=seed), noise(out, rank, seed=seed + 1)
    U, S, V = thin_svd(A, B)
    whole = B.double() @ A.double()
    torch.testing.assert_close(U * S @ V, whole, rtol=1e-12, atol=1e-12)
    want = np.linalg.svd(whole.numpy(), compute_uv=False)[: len(S)]
    np.testing.assert_allclose(S.numpy(), want, atol=1e-12 * max(1.0, want[0]))
    np.testing.assert_allclose(singular_values(A, B).numpy(), want, atol=1e-12 * max(1.0, want[0]))
    eye = torch.eye(len(S), dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, eye)
    torch.testing.assert_close(V @ V.mT, eye)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.floats(0.01, 1), st.booleans())
def test_rank_for_returns_the_smallest_rank_within_the_bound(length, share, by_energy):
    S = torch.linspace(1, 0.1, length, dtype=torch.float64)
    k = rank_for(S, Bound(energy=share) if by_energy else Bound(error=share * 0.99))

    def holds(rank: int) -> bool:
        kept = float(S[:rank].square().sum() / S.square().sum())
        return kept >= share - 1e-12 if by_energy else 1 - kept <= (share * 0.99) ** 2 + 1e-12

    assert holds(k)
    assert k == 1 or not holds(k - 1) or share > 0.999


@pytest.mark.parametrize("kind", ["linear", "conv", "experts"])
def test_an_error_of_zero_keeps_everything_and_drops_empty_ranks(kind):
    pair = pair_of(kind)
    out, cut = truncate(pair, Bound(error=0.0))
    assert (out.rank, cut.error) == (5, 0.0)
    down, up = (-2, -1) if kind == "experts" else (0, 1)
    twice = Pair(torch.cat([pair.A] * 2, down), torch.cat([pair.B] * 2, up), 1.0, pair.kind)
    assert truncate(twice, Bound(error=1e-9))[0].rank == 5


def test_a_delta_of_zero_is_kept_as_zero():
    out, cut = truncate(Pair(noise(4, 6), torch.zeros(5, 4), 2.0), Bound(error=0.1))
    assert (cut.norm, cut.error, out.rank) == (0.0, 0.0, 1)
    assert not dense(out).any()


def test_truncation_subtracts_the_origin():
    A, B = noise(2, 6, seed=3), noise(5, 2, seed=4)
    pair = Pair(A, B, 2.0, origin=(noise(2, 6, seed=5), noise(5, 2, seed=6)))
    want = 2.0 * (B @ A - pair.origin[1] @ pair.origin[0]).double().numpy()
    np.testing.assert_allclose(dense(truncate(pair, Bound(rank=4))[0]), want[None], atol=1e-5)


BAD = [{}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"error": 1.0}, {"error": -0.1}]


@pytest.mark.parametrize("bad", BAD)
def test_bound_takes_exactly_one_valid_number(bad):
    with pytest.raises(AdapterError):
        Bound(**bad)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_and_inner_products_are_those_of_the_dense_changes(kind):
    one, two = pair_of(kind, 5, 0), pair_of(kind, 3, 10)
    a, b = dense(one), dense(two)
    assert inner(factors(one), factors(two)) == pytest.approx(float((a * b).sum()), rel=1e-10)
    assert distance(factors(one), factors(two)) == pytest.approx(float(np.linalg.norm(a - b)), rel=1e-10)
    assert distance(factors(one)) == pytest.approx(float(np.linalg.norm(a)), rel=1e-10)


def test_distance_is_accurate_for_nearly_equal_factors():
    A, B = noise(3, 20, dtype=torch.float64), noise(30, 3, seed=1, dtype=torch.float64)
    near = B + 1e-9 * noise(30, 3, seed=2, dtype=torch.float64)
    want = float(torch.linalg.vector_norm((near - B) @ A))
    assert distance((A, B), (A, near)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("fall", [0.7, 0.97, 1.0])
def test_low_rank_of_dense_matrix_is_optimal(shape, fall):
    U, V = (torch.linalg.qr(noise(n, 200, seed=n, dtype=torch.float64))[0] for n in shape)
    S = fall ** torch.arange(200, dtype=torch.float64)
    matrix = ((U * S) @ V.mT).float()
    for rank in (8, 150):  # the first uses subspace iteration, the second the Gram matrix
        A, B, cut = low_rank(matrix, Bound(rank=rank))
        best = float(S[rank:].square().sum().sqrt())
        true = float(torch.linalg.vector_norm(matrix.double() - B @ A))
        floor = 2e-6 * float(S.norm())
        assert cut.error == pytest.approx(true, rel=1e-3, abs=floor)
        assert true <= best * 1.01 + floor
        assert A.shape == (rank, shape[1])


def test_low_rank_finds_exact_rank_of_dense_matrix():
    matrix = noise(120, 5, seed=1) @ noise(5, 90, seed=2)
    for bound in (Bound(rank=5), Bound(error=1e-5), Bound(energy=1 - 1e-9)):
        A, B, cut = low_rank(matrix, bound)
        assert cut.rank == 5
        assert float((B @ A - matrix.double()).norm()) < 1e-6 * float(matrix.norm())
        assert cut.error < 1e-6 * cut.norm


@pytest.mark.parametrize(("shape", "kind"), [((4, 6), "linear"), ((4, 6, 3), "conv"), ((4, 6, 3, 1), "conv")])
def test_weight_shape_determines_pair_kind(shape, kind):
    matrix = noise(shape[0], math.prod(shape[1:]), dtype=torch.float64)
    A, B, _ = low_rank(matrix, Bound(error=0.0))
    pair = rebuilt(like(shape), A, B, torch.float64)
    assert pair.kind == kind
    np.testing.assert_allclose(dense(pair)[0], matrix.numpy(), atol=1e-12)
    assert pair.A.shape[1:] == shape[1:]
