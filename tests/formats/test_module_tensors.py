"""The tensors of each algorithm give the ΔW that its definition gives, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from veneer.core.forms import change_of, delta_of, product_of
from veneer.core.merge import pair_matrix
from veneer.errors import AdapterError
from veneer.formats.keys import split_key
from veneer.formats.module_tensors import MAX_RANK, ModuleChanges, fitted, read_module


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def product(leaf: ModuleChanges, shape: tuple[int, ...]) -> Tensor:
    """Return s·P, summed over the pair and the delta of the weight."""
    total = torch.zeros(shape, dtype=torch.float64)
    if leaf.pair is not None:
        total = total + pair_matrix(leaf.pair).reshape(shape)
    if "weight" in leaf.deltas:
        total = total + product_of(leaf.deltas["weight"]).reshape(shape)
    return total


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("key", "module", "suffix"),
    [
        ("lora_unet_a_b.lora_down.weight", "lora_unet_a_b", "lora_down.weight"),
        ("lora_unet_a_b.alpha", "lora_unet_a_b", "alpha"),
        ("x_lora_up.weight", "x", "lora_up.weight"),
        ("t.blocks.0.to_q.lora_A.weight", "t.blocks.0.to_q", "lora_A.weight"),
        ("t.to_q.lora_B.default.weight", "t.to_q", "lora_B.default.weight"),
        ("t.to_q.lora_B.bias", "t.to_q", "lora_B.bias"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q", "lora.down.weight"),
        ("te.q_proj.lora_linear_layer.up.weight", "te.q_proj", "lora_linear_layer.up.weight"),
        ("a.attn1.processor.to_q_lora.down.weight", "a.attn1.processor.to_q_lora", "down.weight"),
        ("double_blocks.0.processor.qkv_lora1.up.weight", "double_blocks.0.processor.qkv_lora1", "up.weight"),
        ("x.lora_magnitude_vector", "x", "lora_magnitude_vector"),
        ("x.lora_magnitude_vector.default.weight", "x", "lora_magnitude_vector.default.weight"),
        ("x.hada_w1_a", "x", "hada_w1_a"),
        ("x.lokr_w2_b", "x", "lokr_w2_b"),
        ("lora_te_a.diff_b", "lora_te_a", "diff_b"),
        ("a.norm.query_norm.scale", "a.norm.query_norm", "scale"),
        ("x.weight", "x", "weight"),
        ("x.oft_blocks", "x", "oft_blocks"),
        ("x.reshape_weight", "x", "reshape_weight"),
    ],
)
def test_key_is_split_before_its_suffix(key, module, suffix):
    assert split_key(key) == (module, suffix)


@pytest.mark.parametrize("key", ["<cat>", "x.bias", "up_blocks.0.up", "string_to_param.*", "alpha"])
def test_unknown_suffixes_are_not_split(key):
    assert split_key(key) is None


NAMINGS = [
    ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"), ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), ("down.weight", "up.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("down", "up"), NAMINGS)
def test_a_linear_pair(down, up):
    A, B = rand(4, 6), rand(10, 4)
    leaf = read_module({down: A, up: B, "alpha": torch.tensor(2.0)}, where="x")
    assert (leaf.pair.kind, leaf.pair.rank, leaf.pair.scale) == ("linear", 4, 0.5)
    assert leaf.pair.A is A
    close(product(leaf, (10, 6)), 0.5 * B @ A)
    assert read_module({down: A, up: B}, where="x").pair.scale == 1.0  # a missing alpha means that alpha is the rank
    assert read_module({down: A, up: B, "alpha": torch.tensor(2.0)}, alpha=8, where="x").pair.scale == 2.0
    assert read_module({down: A, up: B}, alpha=8, rslora=True, where="x").pair.scale == 4.0
    assert read_module({down: A, up: B, "scalar": torch.tensor(0.25)}, alpha=8, where="x").pair.scale == 0.5


def test_convolution_pairs_accept_squeezed_b():
    A, B = rand(4, 3, 3, 3), rand(5, 4, 1, 1)
    want = torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A) * 0.25
    for up in (B, B[:, :, 0, 0]):
        leaf = read_module({"lora_down.weight": A, "lora_up.weight": up}, alpha=1, where="x")
        assert leaf.pair.kind == "conv"
        assert leaf.pair.B.shape == (5, 4, 1, 1)
        close(product(leaf, (5, 3, 3, 3)), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tucker_convolution_reads_as_a_plain_pair(dtype):
    down, mid, up = (t.to(dtype) for t in (rand(4, 3, 1, 1), rand(4, 4, 3, 2), rand(5, 4, 1, 1)))
    leaf = read_module({"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, alpha=2, where="x")
    want = torch.zeros(5, 3, 3, 2, dtype=torch.float64)
    for p in range(4):
        for q in range(4):
            outer = up.double()[:, p, 0, 0][:, None] * down.double()[q, :, 0, 0][None]
            want += 0.5 * outer[:, :, None, None] * mid.double()[p, q]
    assert leaf.pair.kind == "conv"
    close(product(leaf, (5, 3, 3, 2)), want, 1e-12 if dtype == torch.float64 else 1e-5)


def test_bias_of_b_has_the_scale_of_the_pair():
    bias = rand(10)
    leaf = read_module(
        {"lora_A.weight": rand(4, 6), "lora_B.weight": rand(10, 4), "lora_B.bias": bias}, alpha=2, where="x"
    )
    close(product_of(leaf.deltas["bias"]), 0.5 * bias)


def sparse_parts(matrix: Tensor) -> dict[str, Tensor]:
    """Return a sparse matrix as the tensors in which LyCORIS stores it."""
    whole = {"bias_indices": matrix.indices(), "bias_size": torch.tensor(matrix.shape)}
    return {name: t.to(torch.int16) for name, t in whole.items()} | {"bias_values": matrix.values()}


def test_a_sparse_part_beside_the_pair():
    A, B = rand(2, 3, 3, 3), rand(5, 2, 1, 1)
    dense = torch.zeros(5, 27)
    dense[1, 20], dense[4, 0] = 2.0, -3.0
    parts = {"lora_down.weight": A, "lora_up.weight": B} | sparse_parts(dense.to_sparse().coalesce())
    leaf = read_module(parts, alpha=1, where="x")
    close(product(leaf, (5, 27)), 0.5 * (B.flatten(1) @ A.flatten(1) + dense.double()))
    parts["bias_size"] = torch.tensor([5, 28])
    with pytest.raises(AdapterError, match="do not fit"):
        read_module(parts, where="x")


def test_wrapped_int16_sparse_indices_are_restored():
    flat = torch.zeros(2, 40_000)
    flat[1, 39_999] = 1.5
    sparse = flat.to_sparse().coalesce()
    parts = {"lora_down.weight": torch.zeros(1, 40_000), "lora_up.weight": torch.zeros(2, 1)}
    assert torch.equal(product_of(read_module(parts | sparse_parts(sparse), where="x").deltas["weight"]), flat)


def loha(out: int, n: int, r: int) -> dict[str, Tensor]:
    shapes = {"w1_a": (out, r), "w1_b": (r, n), "w2_a": (out, r), "w2_b": (r, n)}
    return {f"hada_{part}": rand(*shape, seed=i) for i, (part, shape) in enumerate(shapes.items())}


def test_loha():
    p = loha(6, 5, 4)
    leaf = read_module(p | {"alpha": torch.tensor(2.0)}, where="x")
    close(product(leaf, (6, 5)), 0.5 * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]))
    assert leaf.pair is None
    assert leaf.deltas["weight"].shape == (6, 5)


def test_loha_with_cores_stores_a_transposed():
    r, out, n = 3, 6, 5
    p = loha(out, n, r) | {f"hada_t{k}": rand(r, r, 2, 2, seed=k) for k in (1, 2)}
    p |= {f"hada_w{k}_a": rand(r, out, seed=k) for k in (1, 2)}
    one, two = (
        sum(
            p[f"hada_t{k}"][i, j] * (p[f"hada_w{k}_a"][i][:, None] * p[f"hada_w{k}_b"][j][None])[:, :, None, None]
            for i in range(r)
            for j in range(r)
        )
        for k in (1, 2)
    )
    leaf = read_module(p, alpha=1.5, where="x")
    assert leaf.deltas["weight"].shape == (out, n, 2, 2)
    close(product(leaf, (out, n, 2, 2)), 0.5 * one * two)


def kron(one: Tensor, two: Tensor) -> Tensor:
    out = torch.zeros(one.shape[0] * two.shape[0], one.shape[1] * two.shape[1], *two.shape[2:], dtype=torch.float64)
    for a in range(one.shape[0]):
        for c in range(one.shape[1]):
            b, d = two.shape[:2]
            out[a * b : a * b + b, c * d : c * d + d] = one[a, c] * two
    return out


@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors", "core"])
def test_lokr(first, second, kernel):
    """As in LyCORIS and ComfyUI, alpha has an effect only if a factor is decomposed."""
    if second == "core" and not kernel:
        return
    a, c, b, d, r, alpha = 2, 3, 4, 5, 2, 3.0
    p: dict[str, Tensor] = {"alpha": torch.tensor(alpha)}
    if first == "whole":
        p["lokr_w1"] = one = rand(a, c)
    else:
        p["lokr_w1_a"], p["lokr_w1_b"] = rand(a, r), rand(r, c)
        one = p["lokr_w1_a"] @ p["lokr_w1_b"]
    if second == "whole":
        p["lokr_w2"] = two = rand(b, d, *kernel)
    elif second == "factors":
        p["lokr_w2_a"], p["lokr_w2_b"] = rand(b, r), rand(r, d * math.prod(kernel))
        two = (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(b, d, *kernel)
    else:
        p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"] = rand(r, r, *kernel), rand(r, b), rand(r, d)
        two = torch.einsum("pqhw,po,qi->oihw", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    scale = 1.0 if first == second == "whole" else alpha / r
    leaf = read_module(p, where="x")
    assert leaf.deltas["weight"].scale == scale
    close(product(leaf, (a * b, c * d, *kernel)), scale * kron(one, two))
    flat = second == "factors" and bool(kernel)
    assert leaf.deltas["weight"].shape == ((8, 15 * 6) if flat else (8, 15, *kernel))


def test_lokr_of_two_ranks_has_no_scale():
    p = {"lokr_w1_a": rand(4, 2), "lokr_w1_b": rand(2, 4), "lokr_w2_a": rand(4, 3), "lokr_w2_b": rand(3, 4)}
    assert read_module(p, where="x").deltas["weight"].scale == 1
    with pytest.raises(AdapterError, match="ranks 2 and 3"):
        read_module(p, alpha=1, where="x")


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(on_input, shape):
    w, W = rand(3 if on_input else 4), rand(*shape)
    stored = w if len(shape) == 2 else w.reshape(1, -1, 1, 1)
    leaf = read_module({"weight": stored, "on_input": torch.tensor(int(on_input))}, where="x")
    axis = (1, -1, *[1] * (len(shape) - 2)) if on_input else (-1, *[1] * (len(shape) - 1))
    close(delta_of(W, leaf.deltas["weight"]), W * w.reshape(axis))


@pytest.mark.parametrize(
    ("suffix", "name"), [("diff", "weight"), ("w_norm", "weight"), ("diff_b", "bias"), ("b_norm", "bias")]
)
def test_dense_changes_have_no_alpha(suffix, name):
    value = rand(7)
    close(product_of(read_module({suffix: value, "alpha": torch.tensor(3.0)}, where="x").deltas[name]), value)


@pytest.mark.parametrize("suffix", ["set_weight", "scale"])
def test_a_full_weight_replaces_the_base_weight(suffix):
    assert set(read_module({suffix: rand(7)}, where="x").full) == {"weight"}


def dora(W: Tensor, P: Tensor, m: Tensor, axis: int) -> Tensor:
    """Return m/‖W + P‖·(W + P) − W, with one norm per index along `axis`, computed in a loop."""
    new = W + P
    out = torch.empty_like(W)
    for i in range(W.shape[axis]):
        part = new.select(axis, i)
        out.select(axis, i).copy_(m.reshape(-1)[i] * part / part.pow(2).sum().sqrt())
    return out - W


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("algorithm", ["pair", "loha", "lokr", "flat loha"])
def test_dora_on_either_axis(algorithm, kernel, axis):
    shape = (6, 6, *kernel)  # square, so that the axis cannot be inferred from the sizes
    if algorithm == "pair":
        p = {"lora_down.weight": rand(2, 6, *kernel), "lora_up.weight": rand(6, 2, *[1] * len(kernel))}
    elif algorithm == "loha":
        p = loha(6, 6, 2)
        if kernel:
            p |= {"hada_t1": rand(2, 2, *kernel), "hada_t2": rand(2, 2, *kernel, seed=1)}
            p |= {k: p[k].t().contiguous() for k in ("hada_w1_a", "hada_w2_a")}
    elif algorithm == "flat loha":
        p = loha(6, 6 * math.prod(kernel), 2)
    else:
        p = {"lokr_w1": rand(2, 3), "lokr_w2": rand(3, 2, *kernel)}
    m = rand(6).abs()
    stored = m.reshape(*(1 if i != axis else -1 for i in range(len(shape))))
    leaf = read_module(p | {"dora_scale": stored}, alpha=1, where="x")
    leaf = fitted(leaf, shape)
    held = leaf.pair or leaf.deltas["weight"]
    assert held.magnitude.shape == ((6,) if axis == 0 else (1, 6, *[1] * len(kernel)))
    W = rand(*shape, seed=9)
    P = product(leaf, shape)
    close(change_of(W, P, held.magnitude), dora(W, P, m, axis))


@pytest.mark.parametrize("stored", [(5,), (5, 1), (1, 5, 1, 1)])
def test_peft_magnitude_is_per_output(stored):
    p = {"lora_A.weight": rand(2, 5, 3, 3), "lora_B.weight": rand(5, 2, 1, 1)}
    assert read_module(p | {"lora_magnitude_vector": rand(*stored)}, where="x").pair.magnitude.shape == (5,)


PAIR = {"lora_down.weight": rand(2, 3), "lora_up.weight": rand(4, 2)}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "nothing: without the tensors that belong to it"),
        ({"alpha": torch.tensor(1.0)}, "alpha: without the tensors that belong to it"),
        ({"lora_down.weight": rand(2, 3)}, r"lora_down.weight \(2, 3\): without its partner"),
        ({"lora_up.weight": rand(3, 2), "alpha": torch.tensor(1.0)}, r"lora_up.weight \(3, 2\): without"),
        ({"lora_down.weight": rand(2, 3), "lora_up.weight": rand(4, 3)}, r"A \(2, 3\) and B \(4, 3\)"),
        (PAIR | {"lora_A.weight": rand(2, 3)}, "a second tensor with the same role"),
        ({"lora_down.weight": rand(2), "lora_up.weight": rand(4, 2)}, r"A \(2,\)"),
        ({"lora_down.weight": rand(0, 3), "lora_up.weight": rand(4, 0)}, "rank 0: only ranks"),
        (PAIR | {"alpha": rand(2)}, r"alpha \(2,\)"),
        (PAIR | {"alpha": torch.tensor(0.0)}, "read 0 as the rank"),
        (PAIR | {"alpha": torch.tensor(math.inf)}, "not finite"),
        (PAIR | {"lora_down.weight": torch.ones(2, 3, dtype=torch.int8)}, "not a floating-point"),
        ({"oft_blocks": rand(2, 3, 3), "alpha": torch.tensor(1.0)}, "OFT"),
        ({"boft_s": rand(2)}, "BOFT"),
        ({"a1.weight": rand(2, 3), "bm.weight": rand(2, 2)}, "GLoRA"),
        ({"lambda_layer": rand(1, 2)}, "T-LoRA"),
        ({"weight": rand(3, 3)}, "not a tensor of any known adapter type"),
        ({"lokr_w1": rand(3, 3)}, "one factor only"),
        ({"lokr_w1": rand(3, 3), "lokr_w2_a": rand(3, 3)}, "lokr_w2_a"),
        ({"hada_w1_a": rand(3, 3), "hada_w1_b": rand(3, 3)}, "hada_w1_a"),
        (loha(3, 3, 2) | {"lokr_w1": rand(1, 1), "lokr_w2": rand(3, 3)}, "two changes of the same weight"),
        (loha(3, 3, 2) | {"hada_w2_b": rand(2, 4)}, "do not fit"),
        ({"diff": rand(3, 3), "set_weight": rand(3, 3)}, "a change of the original"),
        ({"diff": rand(3, 3), "dora_scale": rand(3, 1)}, "dora_scale"),
        ({"dora_scale": rand(3, 1)}, "dora_scale"),
        (PAIR | {"dora_scale": torch.tensor(1.0)}, "neither"),
        ({"weight": rand(3, 3), "on_input": torch.tensor(1)}, "one factor for each"),
        (PAIR | {"lora_B.bias": rand(4), "dora_scale": rand(4)}, "does not define both"),
        (PAIR | {"dora_scale": rand(3, 1)}, "neither"),
        (PAIR | {"reshape_weight": torch.tensor([4, 9])}, "reshape"),
        (PAIR | {"lora_mid.weight": rand(2, 3, 3)}, "lora_mid"),
    ],
)
def test_faulty_modules_are_named(parts, words):
    with pytest.raises(AdapterError, match=words) as caught:
        read_module(parts, where="lora_unet_x")
    assert caught.value.where == "lora_unet_x"


def test_every_problem_is_in_one_error():
    with pytest.raises(AdapterError) as caught:
        read_module({"lora_down.weight": rand(2, 3), "oft_blocks": rand(2), "dora_scale": rand(3)}, where="x")
    assert all(word in str(caught.value) for word in ("lora_down.weight", "oft_blocks", "dora_scale"))


def test_absurd_sizes_are_refused_before_allocation():
    A, B = torch.zeros(1).expand(MAX_RANK + 1, 2), torch.zeros(1).expand(2, MAX_RANK + 1)
    with pytest.raises(AdapterError, match="rank 65,537: only ranks"):
        read_module({"lora_down.weight": A, "lora_up.weight": B}, where="x")
    wide = torch.zeros(1).expand(1, 1_000_000)
    p = {"lora_down.weight": wide, "lora_up.weight": wide.t()}
    with pytest.raises(AdapterError, match="too large"):
        read_module(p | {"lora_mid.weight": torch.zeros(1).expand(1, 1, 100_000)}, where="x")
    sparse = {"bias_indices": torch.zeros(2, 0), "bias_values": torch.zeros(0), "bias_size": torch.zeros(2)}
    with pytest.raises(AdapterError, match="too large"):
        read_module(p | {k: v.long() if k != "bias_values" else v for k, v in sparse.items()}, where="x")


def test_module_changes_are_reshaped_to_the_weight():
    pair = {"lora_down.weight": rand(2, 6), "lora_up.weight": rand(5, 2)}
    conv = fitted(read_module(pair, where="x"), (5, 6, 1, 1))
    assert (conv.pair.kind, conv.pair.A.shape, conv.pair.B.shape) == ("conv", (2, 6, 1, 1), (5, 2, 1, 1))
    assert fitted(conv, (5, 6)).pair.kind == "linear"
    flat = read_module(loha(6, 45, 2), where="x")
    assert fitted(flat, (6, 5, 3, 3)).deltas["weight"].shape == (6, 5, 3, 3)
    for leaf, shape in ((conv, (5, 7)), (conv, (5, 6, 3, 3)), (flat, (5, 6, 3, 3))):
        with pytest.raises(AdapterError, match="the base's is"):
            fitted(leaf, shape)
