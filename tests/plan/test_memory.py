"""Memory per part: monotonicity, NF4's published sizes, and the tensors that autograd saves."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.models.text.fast import fast
from veneer.models.text.loss import compared_logits, head_logits, text_loss
from veneer.ops.dispatch import override_ops
from veneer.ops.linear import keeps_copy
from veneer.plan.image import ImageLoad, image_counts
from veneer.plan.memory import Load, Memory, kept_dequantized, packed_weights, run_memory, text_memory, weight_bytes
from veneer.plan.shape import model_shape, pair_parameters, text_shape
from veneer.plan.tables import Device, base_config, device_named
from veneer.train.text.policy_losses import divergences

CPU = Device("cpu", "cpu", 16 << 30, 1e12, 2e10)
LLAMA = text_shape(base_config("meta-llama/Llama-3.1-8B"))
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
loads = st.builds(
    Load,
    st.lists(st.integers(2, 700), min_size=1, max_size=4).map(tuple),
    st.floats(0.01, 1.0),
    micros=st.integers(1, 4),
    rank=st.sampled_from([4, 16, 64]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    quantize=st.sampled_from([None, "nf4", "int8"]),
    checkpointing=st.booleans(),
)


@given(loads)
@settings(max_examples=30, deadline=None)
def test_parts_are_never_negative_and_add_up(load: Load) -> None:
    for device in (CPU, device_named("h100-80gb")):
        memory = text_memory(LLAMA, load, device)
        assert all(value >= 0 for value in memory.parts.values())
        assert memory.peak == sum(memory.parts.values())
        assert memory.weights + memory.constants == sum(weight_bytes(LLAMA, load.dtype, load.quantize))


@given(loads)
@settings(max_examples=20, deadline=None)
def test_larger_loads_never_take_less_memory(load: Load) -> None:
    before = text_memory(LLAMA, load, CPU).peak
    for more in (
        replace(load, lengths=(*load.lengths, load.lengths[-1])),  # a different length could reduce padding
        replace(load, rank=2 * load.rank),
        replace(load, lengths=tuple(2 * n for n in load.lengths)),
    ):
        assert text_memory(LLAMA, more, CPU).peak >= before
    if load.checkpointing and load.tokens > 64:
        assert text_memory(LLAMA, replace(load, checkpointing=False), CPU).activations > 0


def test_nf4_constants_take_the_published_bits() -> None:
    """arXiv 2305.14314: constants take 0.127 bits per parameter with double quantization, 0.5 without it."""
    for double, bits in ((True, 0.127), (False, 0.5)):
        _, constants = weight_bytes(LLAMA, "bfloat16", "nf4", double)
        assert 8 * constants / LLAMA.matrices == pytest.approx(bits, abs=5e-4)
    weights, _ = weight_bytes(LLAMA, "bfloat16", "nf4")
    assert weights == LLAMA.matrices // 2 + 2 * (LLAMA.parameters - LLAMA.matrices)


def test_a_quantized_base_dequantizes_one_joined_weight_at_a_time() -> None:
    load = Load((512,), quantize="nf4")
    assert text_memory(LLAMA, load, CPU).dequantized == 2 * 4096 * 2 * 14336  # gate and up projections
    assert text_memory(LLAMA, replace(load, quantize=None), CPU).dequantized == 0


def test_dequantized_bytes_are_whole_layers_within_the_limit() -> None:
    memory = text_memory(LLAMA, Load((512,), quantize="nf4"), CPU)
    layer = 2 * LLAMA.layers[0].matrices
    assert kept_dequantized(LLAMA, memory, memory.peak) == 0
    assert kept_dequantized(LLAMA, memory, memory.peak + 3 * layer + 5) == 3 * layer
    assert kept_dequantized(LLAMA, memory, memory.peak + 1000 * layer) == 32 * layer


def test_packed_weights_are_two_copies_if_gradients_are_needed() -> None:
    plain = LLAMA.matrices + LLAMA.vocabulary * LLAMA.hidden
    first = sum(linear.parameters for linear in LLAMA.layers[0].products["qkv"])
    assert packed_weights(LLAMA, "bfloat16", lambda *product: True) == 2 * (2 * plain - first)
    assert packed_weights(LLAMA, "float32", lambda rows, columns, turned: turned) == 4 * plain
    assert packed_weights(LLAMA, "float32", lambda *product: False) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_bytes_match_a_step_with_equal_gradients(dtype: torch.dtype) -> None:
    """The model is large enough for prepacked copies, which are released after the block."""
    config = LlamaConfig(
        **{**SMALL, "hidden_size": 256, "intermediate_size": 288, "vocab_size": 300}, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    adapter, ids = create(model, LoraSpec(rank=4), seed=0), torch.randint(3, 300, (40,))
    for pair in adapter.pairs.values():
        pair.B = torch.randn_like(pair.B) * 0.1
    trained = torch.arange(40) % 20 > 2
    results = []
    with override_ops(prepacked_linear="onednn"), attach(model) as attachment:
        attachment.add("a", adapter, trainable=True)
        attachment.use("a")
        counted = packed_weights(model_shape(model), str(dtype)[6:], functools.partial(keeps_copy, dtype))
        for most in (0, counted + 1):
            with fast(model, pack=most) as how:
                loss = text_loss(model, ids, [20, 20], trained)
                results.append([loss, *torch.autograd.grad(loss, list(attachment.parameters("a").values()))])
                assert how.prepack_budget.taken == (counted if most else 0)
            assert how.head is None
            assert all(join.copies is None for join in how.joins)
    for plain, packed in zip(*results, strict=True):
        assert (plain - packed).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * plain.norm()


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"dora": True, "dropout": 0.1}])
@pytest.mark.parametrize(("lengths", "share"), [([128, 128], 0.25), ([200], 1.0)])
def test_activations_equal_what_autograd_saves(more: dict[str, Any], lengths: list[int], share: float) -> None:
    """Covers the forward pass of a small Llama on the fast paths.

    The weights of the base and of the adapter are not counted.
    """
    torch.manual_seed(0)
    spec = LoraSpec(rank=8, **more)
    config = LlamaConfig(**SMALL, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    saved: dict[int, int] = {}
    with attach(model) as attachment:
        attachment.add("a", create(model, spec, seed=0), trainable=True)
        attachment.use("a")
        model.train()
        trained = torch.cat([torch.arange(n) >= max(1, n - round(share * n)) for n in lengths])
        ids = torch.randint(3, 256, (sum(lengths),))
        with fast(model):
            own = [*model.parameters(), *attachment.parameters("a").values()]
            known = {p.untyped_storage().data_ptr() for p in own}

            def pack(t: torch.Tensor) -> torch.Tensor:
                if t.untyped_storage().data_ptr() not in known and t.is_floating_point():
                    saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = text_loss(model, ids, lengths, trained)
            total = sum(saved.values())
            del loss
    shape = text_shape({"model_type": "llama", "tie_word_embeddings": True, **SMALL})
    counted = text_memory(shape, Load(tuple(lengths), share, rank=8, spec=spec), CPU).activations
    assert total == pytest.approx(counted, rel=0.2)


class _Held(TorchDispatchMode):
    """Measures the peak size in bytes of the tensors created while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            storage = made.untyped_storage() if isinstance(made, torch.Tensor) else None
            if storage is not None and storage.nbytes() and storage.data_ptr() not in self._known:
                self.take(storage.data_ptr(), storage.nbytes())
                weakref.finalize(storage, self.take, storage.data_ptr(), -storage.nbytes())
        return out

    def take(self, key: int, size: int) -> None:
        self._known ^= {key}
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_bytes_of_compared_logits_equal_the_measured_peak(dtype: str, direction: Literal["reverse", "forward"]) -> None:
    hidden, kind, config = SMALL["hidden_size"], getattr(torch, dtype), {**SMALL, "vocab_size": 8000}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=kind).requires_grad_(False)
    ours, theirs = torch.randn(300, hidden, dtype=kind, requires_grad=True), torch.randn(300, hidden, dtype=kind)
    head = model.get_output_embeddings().weight.untyped_storage()
    with _Held() as held:
        held.take(head.data_ptr(), 0)
        compared_logits(
            model, ours, lambda part: head_logits(model, theirs[part]), lambda a, b, part: divergences(a, b, direction)
        ).sum().backward()
    counted = text_memory(
        text_shape({"model_type": "llama", **config}), Load((300,), dtype=dtype, compared=True), CPU
    ).logits
    assert held.most == pytest.approx(counted, rel=0.03)


def test_recomputing_keeps_a_tenth_of_the_activations() -> None:
    plain = text_memory(LLAMA, Load((2048,)), CPU)
    again = text_memory(LLAMA, Load((2048,), checkpointing=True), CPU)
    assert again.activations < plain.activations / 10
    assert again.peak < plain.peak


def test_several_micro_batches_need_memory_for_gradients() -> None:
    one, four = (text_memory(LLAMA, Load((512,), micros=n), CPU) for n in (1, 4))
    assert one.gradients == 0
    assert four.gradients == 4 * pair_parameters(LLAMA)


def test_offloading_moves_all_blocks_but_one_to_the_host() -> None:
    """Each of FLUX.1's single blocks has 141,607,936 parameters: 3,072² · 15 in matrices, plus biases and two
    norms."""
    load = ImageLoad(1, 512, 512, checkpointing=True)
    card, counts = device_named("h100-80gb"), image_counts(base_config("flux.1-dev"), load)
    assert len(counts.blocks) == 19 + 38
    single = 3072 * (3 * 3072 + 3 * 3072 + 4 * 3072 + 5 * 3072) + 3072 * (3 + 3 + 4 + 1) + 2 * 128
    plain, moved = (run_memory(counts, replace(load, offload=n), card) for n in (0, 10))
    assert moved.host == 2 * 10 * single
    assert moved.weights == plain.weights - moved.host + 2 * single
    assert moved.activations == plain.activations


@pytest.mark.parametrize("name", ["sdxl", "flux.1-dev", "black-forest-labs/FLUX.2-klein-4B", "qwen-image"])
def test_image_activations_grow_with_picture_count_and_area(name: str) -> None:
    card, config = device_named("h100-80gb"), base_config(name)

    def memory(load: ImageLoad) -> Memory:
        return run_memory(image_counts(config, load), load, card)

    one, two = memory(ImageLoad(1)), memory(ImageLoad(2))
    assert two.activations == pytest.approx(2 * one.activations)
    assert two.weights == one.weights
    assert memory(ImageLoad(1, checkpointing=True)).peak < one.peak
    assert memory(ImageLoad(1, quantize="nf4")).weights < 0.6 * one.weights
    assert memory(ImageLoad(1, 512, 512)).activations < one.activations / 2
