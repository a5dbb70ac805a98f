"""Splitting and joining fused projections keeps ΔW."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.formats.test_module_tensors import close, rand
from veneer.core.adapter import Pair
from veneer.core.forms import Delta, change_of, delta_of, part_problems, product_of
from veneer.core.merge import pair_matrix
from veneer.errors import AdapterError
from veneer.formats.fused import join_parts, split, swap_halves, trimmed

QKV = [(0, 1, 3), (1, 2, 3), (2, 3, 3)]
LINEAR1 = [(0, 1, 7), (1, 2, 7), (2, 3, 7), (3, 7, 7)]


def product(item: Pair | Delta) -> Tensor:
    if isinstance(item, Pair):
        return pair_matrix(item).reshape(item.B.shape[0], *item.A.shape[1:])
    return product_of(item)


def item_of(form: str, rows: int, scale: float, seed: int = 0, kernel: tuple[int, ...] = ()) -> Pair | Delta:
    """Return a pair or delta for a weight of shape (rows, 6, kernel…), or (rows,) for a bias."""
    if form == "pair":
        A, B = rand(2, 6, *kernel, seed=seed), rand(rows, 2, *[1] * len(kernel), seed=seed)
        return Pair(A, B, scale, "conv" if kernel else "linear")
    if form == "dense":
        return Delta("dense", {"value": rand(rows, 6, *kernel, seed=seed)}, (rows, 6, *kernel), scale)
    if form == "bias":
        return Delta("dense", {"value": rand(rows, seed=seed)}, (rows,), scale)
    if form == "loha":
        parts = {f"a{n}": rand(rows, 2, seed=seed + int(n)) for n in "12"}
        parts |= {f"b{n}": rand(2, 6, seed=seed + 7 + int(n)) for n in "12"}
        if kernel:
            parts |= {f"t{n}": rand(2, 2, *kernel, seed=seed + int(n)) for n in "12"}
        return Delta("hadamard", parts, (rows, 6, *kernel), scale)
    assert rows % 2 == 0
    parts = {"w1": rand(2, 3, seed=seed), "w2": rand(rows // 2, 2, *kernel, seed=seed)}
    return Delta("kronecker", parts, (rows, 6, *kernel), scale)


FORMS = ["pair", "dense", "bias", "loha", "lokr"]
kernels = st.sampled_from([(), (3, 3)])


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.sampled_from([QKV, LINEAR1]),
    st.integers(1, 3),
    st.floats(0.01, 10),
    kernels,
    st.booleans(),
)
def test_split_returns_rows_and_join_restores_the_whole(form, parts, unit, scale, kernel, magnitude):
    total = parts[0][2]
    whole = item_of(form, 2 * unit * total, scale, kernel=kernel)
    if magnitude and form != "bias":
        whole.magnitude = rand(2 * unit * total).abs()
    cut = split(whole, parts)
    for part, (begin, end, _) in zip(cut, parts, strict=True):
        rows = slice(2 * unit * begin, 2 * unit * end)
        close(product(part), product(whole)[rows])
        if isinstance(part, Pair):
            assert part.A is whole.A
            assert part.B.untyped_storage().data_ptr() == whole.B.untyped_storage().data_ptr()
        else:
            assert part_problems(part) == []
        if whole.magnitude is not None:
            W = rand(*product(whole).shape, seed=3)
            close(
                change_of(W[rows], product(part), part.magnitude), change_of(W, product(whole), whole.magnitude)[rows]
            )
    again = join_parts(cut)
    assert torch.equal(product(again), product(whole))
    assert again.scale == whole.scale
    assert (again.magnitude is None) == (whole.magnitude is None)
    assert again.magnitude is None or torch.equal(again.magnitude, whole.magnitude)
    if isinstance(again, Pair):
        assert again.rank == whole.rank
        assert again.A is whole.A
    else:
        assert (again.rows, again.whole, again.shape) == (None, (), whole.shape)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["pair", "dense", "bias", "loha"]),
    st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([0.5, 2.0, 1 / 3, -1.0]), st.integers(0, 1)),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_join_and_split_round_trip(form, drawn, magnitude):
    """`drawn`: (rows, scale, seed) of each part; pairs with equal seeds share their A."""
    parts = []
    for i, (rows, scale, seed) in enumerate(drawn):
        part = item_of(form, rows, scale, seed)
        if form == "pair":
            part.B = rand(rows, 2, seed=90 + i)
        if magnitude and form != "bias":
            part.magnitude = rand(rows, seed=i).abs()
        parts.append(part)
    whole = join_parts(parts)
    close(product(whole), torch.cat([product(p) for p in parts]))
    total, at, cuts = sum(rows for rows, _, _ in drawn), 0, []
    for rows, _, _ in drawn:
        cuts.append((at, at + rows, total))
        at += rows
    for part, again in zip(parts, split(whole, cuts), strict=True):
        close(product(again), product(part))
        assert again.magnitude is None or torch.equal(again.magnitude, part.magnitude)
    if form == "pair":
        assert whole.rank == 2 * len({seed for _, _, seed in drawn})
        assert trimmed(split(whole, cuts)[0]).rank == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_power_of_two_scales_fold_exactly(dtype):
    A, B = rand(2, 6).to(dtype), rand(4, 2).to(dtype)
    whole = join_parts([Pair(A, B, 2.0), Pair(A, B, 2.0 * 3 / 16)])
    assert whole.scale == 2.0
    assert torch.equal(whole.B[4:].double(), B.double() * 3 / 16)
    assert join_parts([Pair(A, B, 2.0), Pair(A, B, 2.0)]).B.dtype == dtype


def test_equal_a_factors_are_shared_when_joining():
    A, B = rand(2, 6), rand(3, 2)
    assert join_parts([Pair(A, B, 1.0), Pair(A.clone(), B, 1.0)]).rank == 2
    other = join_parts([Pair(A, B, 1.0), Pair(A + 1, B, 1.0), Pair(A, B, 1.0)])
    assert other.rank == 4
    assert torch.equal(other.B[3:6, :2], torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("form", ["pair", "dense", "loha"])
def test_missing_part_becomes_zero_rows(form):
    part = item_of(form, 4, 0.5)
    whole = join_parts([None, part, None], rows=[2, 4, 6])
    want = torch.zeros(12, 6, dtype=torch.float64)
    want[2:6] = product(part)
    close(product(whole), want)


def test_gains():
    W = rand(6, 5)
    out = Delta("gain", {"value": rand(6)}, (), 0.5)
    cut = split(out, QKV)
    close(torch.cat([delta_of(w, d) for w, d in zip(W.chunk(3), cut, strict=True)]), delta_of(W, out))
    close(delta_of(W, join_parts(cut)), delta_of(W, out))
    close(delta_of(W.roll(3, 0), swap_halves(out)), delta_of(W, out).roll(3, 0))
    inputs = Delta("gain", {"value": rand(1, 5)}, (), 0.5)
    assert all(part is inputs for part in split(inputs, QKV))
    assert join_parts([inputs, inputs]) is inputs
    with pytest.raises(AdapterError, match="different gains"):
        join_parts([inputs, Delta("gain", {"value": rand(1, 5, seed=1)}, (), 0.5)])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.integers(1, 4), kernels, st.booleans())
def test_swap_halves_rolls_outputs_by_half(form, half, kernel, magnitude):
    whole = item_of(form, 2 * half, 0.5, kernel=kernel)
    if magnitude and form != "bias":
        whole.magnitude = rand(2 * half)
    swapped = swap_halves(whole)
    close(product(swapped), product(whole).roll(half, 0))
    assert swapped.magnitude is None or torch.equal(swapped.magnitude, whole.magnitude.roll(half, 0))
    assert torch.equal(product(swap_halves(swapped)), product(whole))


def test_split_and_join_keep_an_origin():
    A, B, A0, B0 = rand(2, 6), rand(6, 2), rand(2, 6, seed=1), rand(6, 2, seed=1)
    pair = Pair(A, B, 0.5, origin=(A0, B0))
    cut = split(pair, QKV)
    close(torch.cat([product(p) for p in cut]), product(pair))
    close(product(join_parts(cut)), product(pair))


def test_consecutive_parts_of_a_lokr_are_joined():
    whole = item_of("lokr", 12, 0.5)
    q, k, v = split(whole, QKV)
    close(product(join_parts([k, v])), product(whole)[4:])
    close(product(split(join_parts([k, v]), [(1, 2, 2)])[0]), product(v))
    with pytest.raises(AdapterError, match="adjacent"):
        join_parts([q, v])
    with pytest.raises(AdapterError, match="adjacent"):
        join_parts([q, item_of("lokr", 4, 0.5)])


def test_trimming_removes_unused_ranks_except_one():
    A, B = rand(3, 6), rand(4, 3)
    assert trimmed(Pair(A, B, 1.0)).A is A
    B[:, 1] = 0
    close(product(trimmed(Pair(A, B, 1.0))), B @ A)
    assert trimmed(Pair(A, B, 1.0)).rank == 2
    assert trimmed(Pair(A, torch.zeros(4, 3), 1.0)).rank == 1


INPUTS = Pair(rand(2, 6), rand(6, 2), 1.0, magnitude=rand(1, 6))


ITEMS = [
    (lambda: split(INPUTS, QKV), "norm over all rows"),
    (lambda: split(item_of("pair", 8, 1.0), QKV), "8 rows cannot be cut into 3"),
    (lambda: split(Pair(rand(2, 6), rand(6, 2), 1.0, "embedding"), QKV), "embedding is not fused"),
    (lambda: swap_halves(item_of("pair", 7, 1.0)), "no halves"),
    (lambda: swap_halves(Delta("kronecker", {"w1": rand(3, 3), "w2": rand(2, 2)}, (6, 6))), "odd"),
    (lambda: join_parts([item_of("pair", 4, 1.0), item_of("dense", 4, 1.0)]), "different forms"),
    (lambda: join_parts([item_of("loha", 4, 1.0), item_of("dense", 4, 1.0)]), "different forms"),
    (lambda: join_parts([INPUTS, INPUTS]), "of one part only"),
    (lambda: join_parts([item_of("pair", 4, 1.0), Pair(rand(2, 5), rand(4, 2), 1.0)]), "inputs differ"),
    (
        lambda: join_parts([item_of("pair", 4, 1.0), Pair(rand(2, 6), rand(4, 2), 1.0, magnitude=rand(4))]),
        "some have none",
    ),
    (lambda: join_parts([item_of("pair", 4, 1.0), None], rows=[3, 3]), "rows are not"),
    (lambda: join_parts([item_of("loha", 4, 1, 0, (3, 3)), item_of("loha", 4, 1, 1, (3, 3))]), "different cores"),
]


@pytest.mark.parametrize(("action", "words"), ITEMS)
def test_items_that_cannot_be_fused_are_refused(action, words):
    with pytest.raises(AdapterError, match=words):
        action()
