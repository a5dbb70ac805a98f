"""QLoRA: a run on a quantized base equals a run on the dequantized weights.

Also covers resuming and messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_quantize import dequantized_twin
from tests.tiny_gguf import tiny_gguf
from tests.train.text.tiny_runs import merged, train, with_rows
from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.core.merge import pair_matrix
from veneer.errors import ConfigError
from veneer.formats.card import read_card
from veneer.models.quantize import quantized_weights
from veneer.models.text.base import TextBase, load_text
from veneer.models.text.fast import fast
from veneer.models.text.loss import text_loss
from veneer.ops.quantized import Quantized
from veneer.train.events import Event, Stepped
from veneer.train.text.save import RunResult


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_rows(tmp_path_factory.mktemp("qlora"))


def _run(
    shared: Path, output: Path, base: TextBase | None = None, quantize: str | None = "nf4", **more: Any
) -> RunResult:
    own = {
        "base": {"quantize": quantize, "dtype": "float32"},
        "adapter": {"dropout": 0.0},
        "schedule": {"steps": 6},
        "evaluation": {"every": "epoch"},
    }
    return train(shared, output, base, **merged(own, more))


def _losses(seen: list[Event]) -> list[float]:
    return [e.loss for e in seen if isinstance(e, Stepped)]


def test_quantized_training_equals_training_on_dequantized_weights(shared: Path, tmp_path: Path) -> None:
    base, twin = (load_text(str(shared / "tiny-base"), dtype="float32", quantize="nf4") for _ in range(2))
    twin.model = dequantized_twin(twin.model)
    first: list[Event] = []
    second: list[Event] = []
    one = _run(shared, tmp_path / "codes", base, on_event=first.append)
    two = _run(shared, tmp_path / "plain", twin, on_event=second.append)
    assert _losses(first) == pytest.approx(_losses(second), rel=1e-5)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("codes", "plain"))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-6)
    assert one.validation == pytest.approx(two.validation, rel=1e-5)
    assert one.validation < one.validation_before
    card = read_card(tmp_path / "codes").card
    assert card.recipe["base"]["quantize"] == "nf4"
    assert card.base_fingerprint == load_text(str(shared / "tiny-base")).fingerprint
    assert all(isinstance(base.model.get_parameter(n), Quantized) for n in quantized_weights(base.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["none", "some", "all"])
def test_fast_paths_support_quantized_weights(shared: Path, dtype: torch.dtype, kept: str) -> None:
    base = load_text(str(shared / "tiny-base"), dtype=dtype, quantize="nf4")
    reference = dequantized_twin(base.model)
    ids = torch.randint(3, 384, (30,), generator=torch.Generator().manual_seed(0))
    trained = torch.ones(30, dtype=torch.bool)
    trained[[0, 12]] = False
    found = []
    whole = sum(2 * p.numel() * dtype.itemsize // 2 for p in base.model.parameters() if isinstance(p, Quantized))
    keep = {"none": 0, "some": whole // 2, "all": whole}[kept]
    for model, budget in ((base.model, keep), (reference, 0)):
        with attach(model) as attachment:
            attachment.add("a", create(model, LoraSpec(rank=4), seed=0), trainable=True)
            for name, p in attachment.parameters("a").items():
                if name.endswith(".B"):
                    p.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
            attachment.use("a")
            model.train()
            with fast(model, keep=budget) as how:
                loss = text_loss(model, ids, [12, 18], trained)
                loss.backward()
                found.append((how, loss.detach(), {n: p.grad for n, p in attachment.parameters("a").items()}))
    (how, loss, grads), (plain, want, wanted) = found
    assert how.swapped == plain.swapped
    assert how.rows
    assert 0 <= how.dequantized_bytes <= keep
    assert (how.dequantized_bytes == 0) == (kept == "none")
    assert how.dequantized_bytes == whole or kept != "all"
    assert torch.equal(loss, want)
    for name, grad in grads.items():
        assert torch.equal(grad, wanted[name]), name
    assert all(p.kept is None for p in base.model.parameters() if isinstance(p, Quantized))


def test_activations_can_be_recomputed_with_quantized_weights(shared: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    again: list[Event] = []
    _run(shared, tmp_path / "a", on_event=seen.append)
    _run(shared, tmp_path / "b", on_event=again.append, memory={"activation_checkpointing": "on"})
    assert _losses(seen) == pytest.approx(_losses(again), rel=1e-6)


def test_loftq_approximates_the_quantization_error(shared: Path, tmp_path: Path) -> None:
    """LoftQ starts from the best rank-r approximation of W − W̃ (Eckart-Young), so that the adapted base is
    closer to the 16-bit base."""
    base = load_text(str(shared / "tiny-base"), dtype="float32", quantize="nf4")
    adapter = create(base.model, LoraSpec(rank=4, init="loftq"), seed=0, original=base.original)
    for name, pair in adapter.pairs.items():
        lost = base.original(f"{name}.weight").double() - base.model.get_parameter(f"{name}.weight").double()
        best = torch.linalg.svdvals(lost)[4:].norm()
        left = (lost - pair_matrix(pair).double()).norm()
        assert float(left) == pytest.approx(float(best), rel=1e-4)
    result = _run(shared, tmp_path / "a", adapter={"init": "loftq"})
    assert result.steps == 6
    full = load_text(str(shared / "tiny-base"), dtype="float32")
    for known in (None, full.original):
        with pytest.raises(ConfigError, match="loftq"):
            create(full.model, LoraSpec(rank=4, init="loftq"), seed=0, original=known)


def test_full_modules_start_from_dequantized_weights(shared: Path) -> None:
    base = load_text(str(shared / "tiny-base"), dtype="float32", quantize="nf4")
    adapter = create(base.model, LoraSpec(rank=2, modules_to_save=("model.layers.0.mlp.up_proj",)), seed=0)
    weight = adapter.modules["model.layers.0.mlp.up_proj"]["weight"]
    assert not isinstance(weight, Quantized)
    assert torch.equal(weight, base.model.get_parameter("model.layers.0.mlp.up_proj.weight").dense())  # type: ignore[attr-defined]


def test_training_on_gguf_blocks_equals_training_on_values(shared: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file, quantized=True)
    losses = []
    for quantize in ("keep", None):
        base = load_text(str(file), dtype="float32", quantize=quantize)
        seen: list[Event] = []
        _run(shared, tmp_path / f"run-{quantize}", base, on_event=seen.append, quantize=quantize)
        losses.append(_losses(seen))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
