"""Adapter: tensor names, size, digest and copies."""

from __future__ import annotations

import pytest
import torch

from veneer.core import Adapter, Pair, TokenRows
from veneer.core.forms import Delta


def sample() -> Adapter:
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    return Adapter(
        pairs={
            "b": Pair(rand(2, 5), rand(3, 2), 0.5, magnitude=rand(3)),
            "a.w": Pair(rand(4, 2, 5), rand(4, 3, 2), 2.0, "experts", origin=(rand(4, 1, 5), rand(4, 3, 1))),
        },
        modules={"norm": {"weight": rand(5), "gain": torch.tensor(2.0)}},
        token_rows={"emb": TokenRows((3, 1), rand(2, 5))},
    )


def test_tensors_have_stable_sorted_names() -> None:
    names = [n for n, _ in sample().tensors()]
    assert names == ["a.w.A", "a.w.B", "b.A", "b.B", "b.magnitude", "norm=gain", "norm=weight", "emb#rows"]


def test_size_counts_every_byte() -> None:
    adapter = sample()
    assert adapter.size_bytes() == 4 * (4 * 2 * 5 + 4 * 3 * 2 + 10 + 6 + 3 + 5 + 1 + 10)
    assert adapter.mapped(lambda t: t.bfloat16()).size_bytes() * 2 == adapter.size_bytes()


def test_collapsed_pair_keeps_product_and_digest() -> None:
    adapter = sample()
    small = adapter.collapsed()
    pair, old = small.pairs["a.w"], adapter.pairs["a.w"]
    assert pair.rank == 3
    torch.testing.assert_close(pair.B @ pair.A, old.B @ old.A - old.origin[1] @ old.origin[0])
    assert small.digest() == adapter.digest()
    assert small.modules == adapter.modules
    assert small.collapsed().digest() == small.digest()


def test_digest_depends_on_content_not_order() -> None:
    digest = sample().digest()
    assert digest.startswith("sha256:")
    other = sample()
    other.pairs = dict(reversed(other.pairs.items()))
    assert other.digest() == digest
    for change in range(4):
        other = sample()
        if change == 0:
            other.pairs["b"].scale = 0.25
        elif change == 1:
            other.token_rows["emb"] = TokenRows((1, 3), other.token_rows["emb"].rows)
        elif change == 2:
            other.modules["norm"]["gain"] += 1
        else:
            assert other.pairs["a.w"].origin is not None
            other.pairs["a.w"].origin[0].add_(1)
        assert other.digest() != digest


def test_mapped_copies_every_tensor() -> None:
    adapter = sample()
    doubled = adapter.mapped(lambda t: t * 2)
    for (name, old), (same, new) in zip(adapter.tensors(), doubled.tensors(), strict=True):
        assert name == same
        assert torch.equal(new, old * 2)
    origin = doubled.pairs["a.w"].origin
    assert torch.equal(origin[0], adapter.pairs["a.w"].origin[0] * 2)  # type: ignore[index]
    assert doubled.pairs["b"].scale == adapter.pairs["b"].scale


def test_component_uses_the_names_of_its_model() -> None:
    one, two = Pair(torch.ones(2, 3), torch.ones(4, 2), 0.5), Pair(torch.ones(1, 3), torch.ones(4, 1), 2.0)
    norm = Delta("dense", {"value": torch.ones(4)}, (4,))
    whole = Adapter(
        pairs={"unet.conv_in": one, "text_encoder.q": two, "text_encoder_2.q": two},
        deltas={"unet.norm.weight": norm},
        token_rows={"text_encoder.words": TokenRows((5,), torch.ones(1, 3))},
    )
    unet = whole.component("unet")
    assert (unet.pairs, unet.deltas, unet.token_rows) == ({"conv_in": one}, {"norm.weight": norm}, {})
    assert set(whole.component("text_encoder").pairs) == {"q"}
    assert set(whole.component("text_encoder").token_rows) == {"words"}
    assert not whole.component("vae").pairs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("at", [0, 1, 500, 998, 999])
def test_one_non_finite_value_anywhere_is_found(dtype, at):
    from veneer.core.adapter import all_finite

    good = torch.linspace(-3, 3, 1000).to(dtype)
    assert all_finite(good)
    assert all_finite(good[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        t = good.clone()
        t[at] = bad
        assert not all_finite(t)


def test_divided_parts_sum_to_the_adapter() -> None:
    adapter = sample()
    adapter.deltas = {"c.weight": Delta("dense", {"value": torch.ones(2, 2)}, (2, 2))}
    strengths = {"a": 0.5, "b": 0.5, "c": 2.0, "norm": 1.0, "emb": 0.0}
    parts = adapter.divided(strengths.__getitem__)
    assert {by: [n for n, _ in part.tensors()] for by, part in parts.items()} == {
        0.5: ["a.w.A", "a.w.B", "b.A", "b.B", "b.magnitude"],
        2.0: ["c.weight~value"],
        1.0: ["norm=gain", "norm=weight"],
    }
    assert parts[0.5].pairs["b"] is adapter.pairs["b"], "nothing is copied or scaled"
    assert adapter.divided(lambda _: 0.0) == {}
    (whole,) = adapter.divided(lambda _: 1.0).values()
    assert whole.digest() == adapter.digest()
