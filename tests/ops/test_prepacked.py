"""Prepacked products match float64; changed weights invalidate prepacked copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.exact import TOLERANCE, draw, same, seeded, wide  # noqa: F401, seeded acts by itself
from tests.ops.draws import factors
from veneer.ops.dispatch import dispatch, override_ops
from veneer.ops.linear import LinearMap, linear
from veneer.ops.loss import token_nll
from veneer.ops.lowrank import LowRank
from veneer.ops.mlp import gated_mlp
from veneer.ops.prepacked import ByteBudget, PrepackedWeights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
"""Dtypes that can be prepacked."""
OUT, IN = 326, 262
"""Sizes that are large enough to be prepacked, but not multiples of a block."""


@pytest.fixture(autouse=True)
def copies() -> Iterator[None]:
    """Prepack every weight that can be prepacked, regardless of the profile."""
    with override_ops(prepacked_linear="onednn"):
        yield


def kept_here(dtype: torch.dtype) -> bool:
    W = torch.empty(256, 256, dtype=dtype)
    return dispatch("prepacked_linear", W, W, None, True) is not None


@DTYPES
@pytest.mark.parametrize("rows", [259, 3, 0])
@pytest.mark.parametrize(("bias", "gain"), [(False, False), (True, False), (True, True)])
def test_prepacked_linear_matches_float64(dtype: torch.dtype, rows: int, bias: bool, gain: bool) -> None:
    x, W = draw(rows, IN, dtype=dtype).requires_grad_(), draw(OUT, IN, dtype=dtype)
    b = draw(OUT, dtype=dtype) if bias else None
    gains = (1 + draw(OUT, dtype=torch.float32, scale=0.1)).requires_grad_() if gain else None
    A, B = ab = factors(dtype, (4, IN), (OUT, 4))
    of = [x, *ab, *([] if gains is None else [gains])]
    room = ByteBudget(2 * W.nbytes)
    y = linear(x, LinearMap(W, b, (LowRank(A, B, 0.5),), gains, PrepackedWeights(W, room)))
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, of, g)]
    xd, A, B, *rest = ofd = [wide(t) for t in of]
    yd = F.linear(xd, W.double()) + 0.5 * (xd @ A.T) @ B.T
    yd = (rest[0] * yd if rest else yd) + (0 if b is None else b.double())
    same(got, [yd, *torch.autograd.grad(yd, ofd, g.double())], TOLERANCE[dtype])
    assert room.taken == (2 * W.nbytes if kept_here(dtype) else 0)


@DTYPES
def test_prepacked_mlp_matches_float64(dtype: torch.dtype) -> None:
    x, up, down = draw(17, IN, dtype=dtype).requires_grad_(), draw(2 * OUT, IN, dtype=dtype), draw(IN, OUT, dtype=dtype)
    room = ByteBudget(2 * (up.nbytes + down.nbytes))
    y = gated_mlp(x, *(LinearMap(W, copies=PrepackedWeights(W, room)) for W in (up, down)))
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, x, g)]
    xd = wide(x)
    gate, value = F.linear(xd, up.double()).chunk(2, -1)
    yd = F.linear(F.silu(gate) * value, down.double())
    same(got, [yd, *torch.autograd.grad(yd, xd, g.double())], 2 * TOLERANCE[dtype])
    assert room.taken == (room.most if kept_here(dtype) else 0)


@DTYPES
def test_loss_with_prepacked_copies_matches_float64(dtype: torch.dtype) -> None:
    hidden, W = draw(37, IN, dtype=dtype).requires_grad_(), draw(OUT, IN, dtype=dtype, scale=0.1)
    targets = torch.randint(0, OUT, (37,))
    targets[3] = -100
    room = ByteBudget(2 * W.nbytes)
    nll = token_nll(hidden, W, targets, chunk=16, copies=PrepackedWeights(W, room))
    got = [nll, *torch.autograd.grad(nll.sum(), hidden)]
    hd = wide(hidden)
    nd = F.cross_entropy(hd @ W.double().T, targets, reduction="none", ignore_index=-100)
    same(got, [nd, *torch.autograd.grad(nd.sum(), hd)], TOLERANCE[dtype])
    assert room.taken == (room.most if kept_here(dtype) else 0)


def test_prepacked_copies_respect_the_budget() -> None:
    x, weights = (
        draw(5, IN, dtype=torch.float32).requires_grad_(),
        [draw(OUT, IN, dtype=torch.float32) for _ in range(3)],
    )
    most = 3 * weights[0].nbytes + 1
    room = ByteBudget(most)
    copies = [PrepackedWeights(W, room) for W in weights]
    for W, own in zip(weights, copies, strict=True):
        y = linear(x, LinearMap(W, copies=own))
        (dx,) = torch.autograd.grad(y.sum(), x)
        same([y, dx], [wide(x) @ W.double().T, W.double().sum(0).expand(5, -1)], TOLERANCE[torch.float32])
    assert room.taken == (3 * weights[0].nbytes if kept_here(torch.float32) else 0)


def _write(W: nn.Parameter) -> None:
    with torch.no_grad():
        W.mul_(2)


def _load(W: nn.Parameter) -> None:
    with torch.no_grad():
        W.copy_(torch.ones_like(W))


def _move(W: nn.Parameter) -> None:
    W.data = W.data * 2


def _there_and_back(W: nn.Parameter) -> None:
    """Convert a parameter to float64 and back, as nn.Module.to does.

    The new values can reuse the freed memory."""
    W.data = W.data.to(torch.float64) * 2
    W.data = W.data.to(torch.float32)


def _optimise(W: nn.Parameter) -> None:
    W.requires_grad_()
    W.grad = torch.ones_like(W)
    torch.optim.SGD([W], lr=0.5).step()
    W.requires_grad_(False)


CHANGES = [
    *((_write, False), (_load, False), (_move, False), (_there_and_back, False), (_optimise, False)),
    *((_write, True), (_load, True), (_optimise, True)),
]


@pytest.mark.parametrize(("change", "joined"), CHANGES)
def test_changed_weight_invalidates_its_copy(change: Callable[[nn.Parameter], None], joined: bool) -> None:
    """`joined`: the parameter is part of a fused weight.

    models/patching.py detects that such a parameter has moved."""
    x, W = draw(5, IN, dtype=torch.float32), nn.Parameter(draw(OUT, IN, dtype=torch.float32), requires_grad=False)
    whole: Tensor = W
    if joined:
        whole = torch.cat([W.detach(), draw(OUT, IN, dtype=torch.float32)])
        W.data = whole[:OUT]
    room = ByteBudget(2 * whole.nbytes)
    own = LinearMap(whole, copies=PrepackedWeights(whole, room, [W]))
    before = linear(x, own)
    change(W)
    after = linear(x, own)
    same([after], [x.double() @ whole.double().T], TOLERANCE[torch.float32])
    assert not torch.allclose(before, after)
    assert room.taken == 0  # the copies' memory is released too


def test_weight_change_between_forward_and_backward_takes_effect() -> None:
    x, W = draw(5, IN, dtype=torch.float32).requires_grad_(), draw(OUT, IN, dtype=torch.float32)
    y = linear(x, LinearMap(W, copies=PrepackedWeights(W, ByteBudget(2 * W.nbytes))))
    torch.autograd.grad(y.sum(), x, retain_graph=True)  # creates both copies
    W.mul_(3)
    (dx,) = torch.autograd.grad(y.sum(), x)
    same([dx], [W.double().sum(0).expand(5, -1)], TOLERANCE[torch.float32])


def test_torch_products_keep_no_copies() -> None:
    x, W, room = draw(5, IN, dtype=torch.float32), draw(OUT, IN, dtype=torch.float32), ByteBudget(1 << 20)
    with override_ops(prepacked_linear="torch"):
        made: Tensor = linear(x, LinearMap(W, copies=PrepackedWeights(W, room)))
    assert room.taken == 0
    assert torch.equal(made, x @ W.t())
