"""Singular values of low-rank changes, and low-rank approximations of dense changes.

    s·B·A = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ        B = Q_B·R_B, Aᵀ = Q_A·R_A (thin QR);  the core is rank × rank
          = U·diag(S)·V                  its singular value decomposition, exact, in O((out + in)·rank²)
    ‖s·B·A − best approximation of rank k‖ = √(Σ_{i>k} Sᵢ²)          Eckart and Young, Psychometrika 1936

All computations run in float64, because a truncation error is a small difference of large sums, and the terms
of a mix can cancel. The rank is low, so float64 costs little. Results are rounded once, to the requested
dtype. This module works on pairs and matrices, and does not depend on adapters, modules or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.core.adapter import Pair
from veneer.core.factors import factors, inner, norm
from veneer.errors import AdapterError


@dataclass(frozen=True)
class Bound:
    """A limit on the rank or error of a truncation.

    rank: at most this rank.
    energy: the smallest rank that keeps this share of ‖Δ‖².
    error: the smallest rank with ‖Δ − truncated Δ‖/‖Δ‖ at most this value.

    Raises AdapterError unless exactly one field is set, within its range."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        bounds = {n: v for n, v in vars(self).items() if v is not None}
        if len(bounds) != 1:
            raise AdapterError(f"{len(bounds)} conflicting limits", fix="give one of rank, energy and error")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank} keeps nothing", fix="a rank of 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            message = f"energy {self.energy:g} must be above 0 and at most 1"
            raise AdapterError(message, fix="give a fraction, for example 0.95")
        if self.error is not None and not 0 <= self.error < 1:
            message = f"error {self.error:g} must be at least 0 and below 1"
            raise AdapterError(message, fix="give a relative error, for example 0.05")


@dataclass(frozen=True)
class Cut:
    """The result of a truncation, in Frobenius norms.

    norm: ‖Δ‖ before truncation.
    error: ‖Δ − truncated Δ‖.
    rank: the remaining rank.
    rounding: the error from rounding to the dtype, nearly orthogonal to `error`."""

    norm: float
    error: float
    rank: int
    rounding: float = 0.0


# -- pairs as factors --------------------------------------------------------------------------------------------------


def rebuilt(model: Pair, A: Tensor, B: Tensor, dtype: torch.dtype = torch.float32) -> Pair:
    """Return a pair of scale 1 from factors, with the kind and the shapes of `model`.

    A, B: factors in the form that `factors(model)` returns."""
    if model.kind == "conv":
        A = A.reshape(-1, *model.A.shape[1:])
        B = B.reshape(*B.shape, *[1] * (model.A.ndim - 2))
    return Pair(A.to(dtype).contiguous(), B.to(dtype).contiguous(), 1.0, model.kind)


def like(shape: tuple[int, ...], embedding: bool = False) -> Pair:
    """Return an empty pair of the kind that changes a weight of `shape`.

    shape: (out, in), (out, in, k…), or (rows, dim) for an embedding."""
    if embedding:
        return Pair(torch.empty(0, shape[0]), torch.empty(shape[1], 0), 1.0, "embedding")
    kernel = shape[2:]
    A, B = torch.empty(0, *shape[1:]), torch.empty(shape[0], 0, *[1] * len(kernel))
    return Pair(A, B, 1.0, "conv" if kernel else "linear")


def stacked(pairs: Sequence[tuple[Pair, float]]) -> tuple[Tensor, Tensor]:
    """Return factors (A, B) of Σ strength·ΔW, with all ranks concatenated.

    Raises AdapterError if the shapes of the changes differ."""
    parts = [(*factors(pair), strength) for pair, strength in pairs]
    shapes = {(p.kind, A.shape[:-2], A.shape[-1], B.shape[-2]) for (p, _), (A, B, _) in zip(pairs, parts, strict=True)}
    if len(shapes) > 1:
        listing = "; ".join(f"{kind} {(*lead, out, n)}" for kind, lead, n, out in sorted(shapes, key=str))
        raise AdapterError(f"changes of unlike shapes cannot be added: {listing}")
    return torch.cat([A for A, _, _ in parts], -2), torch.cat([B * w for _, B, w in parts], -1)


def distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None = None) -> float:
    """Return ‖B₁·A₁ − B₂·A₂‖ (Frobenius) of factors (A, B), or ‖B₁·A₁‖ without `second`.

    Computed from Gram matrices, which are accurate down to 1e-6 of the larger norm. Below that, the Gram sums
    cancel, and the distance is computed from the singular values of the difference."""
    if second is None:
        return norm(first)
    square, second_square = inner(first, first), inner(second, second)
    total = square + second_square - 2 * inner(first, second)
    if total > 1e-12 * max(square, second_square):
        return math.sqrt(total)
    S = singular_values(torch.cat([first[0], second[0]], -2), torch.cat([first[1], -second[1]], -1))
    return float(torch.linalg.vector_norm(S))


def rounding(exact: tuple[Tensor, Tensor], pair: Pair) -> float:
    """Return ‖B'·A' − B·A‖ for exact factors (A, B) and the rounded `pair`.

    Computed as (B'−B)·A' + B·(A'−A), in which no large sums cancel."""
    (A, B), (A1, B1) = exact, factors(pair)
    both = torch.cat([A1, A1 - A], -2), torch.cat([B1 - B, B], -1)
    return math.sqrt(max(inner(both, both), 0.0))


# -- exact, from low-rank factors --------------------------------------------------------------------------------------


def thin_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition (U, S, V), B·A = U·diag(S)·V, in float64.

    A: (…, rank, n), B: (…, out, rank). U (…, out, k), S (…, k) descending, V (…, k, n), k = min(rank, out,
        n). Computed exactly, from the thin QR of both factors and the decomposition of the small core."""
    QB, RB = torch.linalg.qr(B.double())
    QA, RA = torch.linalg.qr(A.double().mT)
    U, S, V = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    return QB @ U, S, V @ QA.mT


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Return S of `thin_svd` without computing the singular vectors."""
    RB, RA = (torch.linalg.qr(t.double(), mode="r")[1] for t in (B, A.mT))
    values: Tensor = torch.linalg.svdvals(RB @ RA.mT)
    return values


def rank_for(S: Tensor, bound: Bound) -> int:
    """Return the rank that `bound` allows for singular values S (…, k), at least 1.

    For a batch, return the largest rank that any matrix needs."""
    if bound.rank is not None:
        return min(bound.rank, S.shape[-1])
    square = S.double().square()
    total = square.sum(-1, keepdim=True)
    dropped = total - square.cumsum(-1)
    # Sum the smallest values first, so that no large values cancel.
    dropped[..., :-1] = square.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    dropped[..., -1] = 0
    allowed = (1 - bound.energy) if bound.energy is not None else (bound.error or 0.0) ** 2
    return int((dropped > allowed * total).sum(-1).max()) + 1


def truncated(A: Tensor, B: Tensor, model: Pair, bound: Bound, dtype: torch.dtype) -> tuple[Pair, Cut]:
    """Return the best pair for B·A within `bound`, and the truncation error.

    The pair has scale 1, the kind of `model`, and the balanced factors U·√S and √S·V. `Cut.error` covers the
    dropped singular values; the error from rounding to `dtype` is reported separately as `Cut.rounding`."""
    U, S, V = thin_svd(A, B)
    k = rank_for(S, bound)
    root = S[..., :k].sqrt()
    exact = root.unsqueeze(-1) * V[..., :k, :], U[..., :k] * root.unsqueeze(-2)
    out = rebuilt(model, *exact, dtype)
    dropped, off = float(torch.linalg.vector_norm(S[..., k:])), rounding(exact, out)
    return out, Cut(float(torch.linalg.vector_norm(S)), dropped, out.rank, off)


# -- from dense matrices -----------------------------------------------------------------------------------------------


def low_rank(matrix: Tensor, bound: Bound, *, oversample: int = 16, most: int = 30) -> tuple[Tensor, Tensor, Cut]:
    """Return (A, B, Cut) with B·A close to a dense `matrix` (out, n), within `bound`.

    The factors are float64 and balanced. If the rank is far below both dimensions, the method is subspace
    iteration from a fixed random start (Halko, Martinsson and Tropp, arXiv 0909.4061), in the matrix's dtype.
    Once the captured part of ‖Δ‖² grows by less than 1e-4 of the remainder, the iteration stops, and an exact
    decomposition inside the subspace follows. Otherwise the method is an eigendecomposition of the smaller
    Gram matrix in float64, which gives the best approximation for singular values above 1e-8 of the largest.
    In both cases `Cut.error` is the true distance, because the result is a projection:
    ‖Δ − QQᵀΔ‖² = ‖Δ‖² − ‖QᵀΔ‖².

    most: maximum number of iterations."""
    D = matrix if matrix.dtype == torch.float64 else matrix.float()
    flip = D.shape[0] < D.shape[1]
    D = D.mT if flip else D  # now tall: out ≥ n
    n = D.shape[1]
    norm = float(torch.linalg.vector_norm(D, dtype=torch.float64))
    if bound.rank is not None and 4 * (bound.rank + oversample) < n:
        Q = _subspace(D, bound.rank + oversample, norm, most)
    else:
        Q = torch.linalg.eigh(_gram(D))[1].flip(-1)
    # D·Q: (out, m), with Q orthonormal over n
    caught = torch.cat([rows.double() @ Q for rows in D.split(4096)])
    U, S, V = torch.linalg.svd(caught, full_matrices=False) if Q.shape[1] < n else _columns(caught)
    k = rank_for(S, bound)
    root = S[:k].sqrt()
    B, A = U[:, :k] * root, root.unsqueeze(-1) * (V[:k] @ Q.mT)
    retained = float(S[:k].square().sum())
    error = math.sqrt(max(norm**2 - retained, 0.0)) if norm and k < n else 0.0
    if error < 1e-6 * norm:  # the difference of squares is not accurate enough here; compute the distance
        error = float(torch.linalg.vector_norm(D.double() - B @ A))
    return (B.mT, A.mT, Cut(norm, error, k)) if flip else (A, B, Cut(norm, error, k))


def _columns(caught: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of D·Q, where Q holds all eigenvectors of DᵀD.

    The columns of D·Q are already orthogonal."""
    S = torch.linalg.vector_norm(caught, dim=0)
    S, order = S.sort(descending=True)
    U = caught[:, order] / S.clamp_min(torch.finfo(torch.float64).tiny)
    return U, S, torch.eye(len(order), dtype=torch.float64, device=caught.device)[order]


def _gram(D: Tensor) -> Tensor:
    """Return DᵀD in float64, computed in blocks of rows to avoid a copy of D."""
    out = torch.zeros(D.shape[1], D.shape[1], dtype=torch.float64, device=D.device)
    for rows in D.split(4096):
        block = rows.double()
        out.addmm_(block.mT, block)
    return out


def _subspace(D: Tensor, width: int, norm: float, most: int) -> Tensor:
    """Return an orthonormal basis (n, width) close to the leading right singular vectors."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(D.shape[1], width, generator=generator, dtype=torch.float32).to(D.device, D.dtype)
    previous = -1.0
    for _ in range(most):
        Y = torch.linalg.qr(D @ Q)[0]
        Z = D.mT @ Y
        caught = float(Z.double().square().sum())
        Q = torch.linalg.qr(Z)[0]
        if caught - previous <= 1e-4 * max(norm**2 - caught, 0.0) + 1e-14 * norm**2:
            break
        previous = caught
    basis: Tensor = torch.linalg.qr(Q.double())[0]
    return basis
