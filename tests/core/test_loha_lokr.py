"""Trained LoHa and LoKr: outputs and gradients equal PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attached import attached, holding
from tests.families import llama3, qwen3_moe
from tests.models.test_quantize import dequantized_twin, quantized
from veneer.core import Adapter, LoraSpec, attach, create
from veneer.core.forms import product_of
from veneer.errors import AdapterError, ConfigError, TargetError

_PARTS = {"a1": "w1_a", "b1": "w1_b", "a2": "w2_a", "b2": "w2_b", "w1": "w1", "w2": "w2"}
WAYS: dict[str, dict[str, Any]] = {
    "loha": {"kind": "loha", "rank": 2},
    "loha of more numbers than the weight": {"kind": "loha", "rank": 20},
    "lokr": {"kind": "lokr", "rank": 2},
    "lokr, both in two": {"kind": "lokr", "rank": 1, "decompose_both": True},
    "lokr by 4": {"kind": "lokr", "rank": 2, "factor": 4},
    "lokr whole": {"kind": "lokr", "rank": 100, "factor": 4},
    "lokr by what divides nothing": {"kind": "lokr", "rank": 1, "factor": 5},
}


class Sums(nn.Module):
    """A linear layer and two convolutions with different kernel sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.conv = nn.Linear(24, 36), nn.Conv2d(8, 12, 3, padding=1, stride=2)
        self.point = nn.Conv2d(12, 16, 1)

    def forward(self, x: Tensor, pictures: Tensor) -> Tensor:
        parts = self.lin(x), self.point(self.conv(pictures))
        return sum(part.square().sum() for part in parts)  # type: ignore[return-value]


NAMES = ("lin", "conv", "point")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(5, 7, 24, generator=g, dtype=dtype), torch.randn(2, 8, 9, 9, generator=g, dtype=dtype)


def learned(model: nn.Module, dtype: torch.dtype = torch.float64, **spec: Any) -> Adapter:
    """Return an adapter with random values in every part, as if trained."""
    made = create(model, LoraSpec(alpha=2.0 * spec["rank"], targets=NAMES, **spec), seed=0, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    return made.mapped(lambda t: torch.randn(t.shape, generator=g, dtype=dtype))


def peft_twin(model: nn.Module, adapter: Adapter, spec: dict[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return PEFT's model with the same values, and its parameters by veneer's names."""
    rank, both, factor = spec["rank"], spec.get("decompose_both", False), spec.get("factor") or -1
    common: dict[str, Any] = {"r": rank, "alpha": 2 * rank, "target_modules": list(NAMES)}
    config = (
        peft.LoHaConfig(**common)
        if spec["kind"] == "loha"
        else peft.LoKrConfig(**common, decompose_both=both, decompose_factor=factor)
    )
    out = peft.get_peft_model(copy.deepcopy(model), config)
    found = {}
    for name, delta in adapter.deltas.items():
        layer: Any = out.get_submodule("base_model.model." + name.removesuffix(".weight"))
        layer.scaling["default"] = delta.scale
        for part, tensor in delta.parts.items():
            theirs = getattr(layer, f"{'hada' if spec['kind'] == 'loha' else 'lokr'}_{_PARTS[part]}")["default"]
            assert theirs.shape == tensor.shape, (name, part)
            theirs.data = tensor.clone()
            found[f"{name}~{part}"] = theirs
    return out, found


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_equal_pefts(way: str) -> None:
    torch.manual_seed(0)
    model, spec, given = Sums().double(), WAYS[way], inputs()
    adapter = learned(model, **spec)
    theirs, expected = peft_twin(model, adapter, spec)
    with attached(model, adapter, trainable=True) as attachment:
        y, z = model(*given), theirs(*given)
        torch.testing.assert_close(y, z)
        y.backward()
        z.backward()
        ours = attachment.parameters("a")
        assert ours.keys() == expected.keys()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("way", WAYS)
def test_trained_lycoris_equals_its_merge(way: str) -> None:
    """At strength −0.7, the output equals that of weights merged with strength −0.7."""
    torch.manual_seed(0)
    model, given = Sums().double(), inputs()
    adapter = learned(model, **WAYS[way])
    with attached(model, adapter, -0.7, trainable=True) as attachment:
        y, weights = model(*given), attachment.merged(("a", -0.7))
    plain = copy.deepcopy(model)
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(y, plain(*given))


@pytest.mark.parametrize("way", WAYS)
def test_row_mixes_equal_separate_rows(way: str) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"lin": nn.Linear(24, 36)}).double(), inputs()[0]
    adapter = create(model, LoraSpec(targets=("lin",), **WAYS[way]), seed=0, dtype=torch.float64)
    adapter = adapter.mapped(lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).double())
    with holding(model, trainable=True, a=adapter) as attachment:
        alone = []
        for row, mix in zip(x, ROWS, strict=True):
            attachment.use(*mix)
            alone.append(model["lin"](row[None]))
        attachment.use_rows(ROWS)
        torch.testing.assert_close(model["lin"](x), torch.cat(alone))


ROWS: list[list[tuple[str, float]]] = [[("a", 1.0)], [], [("a", -0.5)], [("a", 2.0)], []]


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_new_lycoris_adapter_is_zero_and_trains(kind: Any) -> None:
    model = llama3()
    tokens = torch.arange(12)[None]
    before = model(input_ids=tokens).logits.detach()
    adapter = create(model, LoraSpec(rank=4, kind=kind), seed=0)
    again = create(model, LoraSpec(rank=4, kind=kind), seed=0)
    assert adapter.digest() == again.digest() != create(model, LoraSpec(rank=4, kind=kind), seed=1).digest()
    assert all(not product_of(delta).any() for delta in adapter.deltas.values())
    with attached(model, adapter, trainable=True) as attachment:
        torch.testing.assert_close(model(input_ids=tokens).logits, before)
        optimizer = torch.optim.AdamW(attachment.parameters("a").values(), lr=5e-3)
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("kind", "factor"), [("loha", None), ("lokr", None), ("lokr", 8)])
def test_trained_delta_saves_no_dense_weight(kind: Any, factor: int | None) -> None:
    layer, x = nn.Linear(256, 256), torch.randn(8, 256)
    model = nn.ModuleDict({"lin": layer}).requires_grad_(False)
    spec = LoraSpec(rank=4, kind=kind, factor=factor, targets=("lin",))
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel() if t.data_ptr() != layer.weight.data_ptr() else 0)
        return t

    with attached(model, create(model, spec, seed=0), trainable=True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model["lin"](x)
        y.sum().backward()
    assert sum(kept) < 256 * 256 / 2


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_on_nf4_equals_dequantized_base(kind: Any, tmp_path: Path) -> None:
    model = quantized(llama3(), tmp_path, "nf4")
    plain, tokens = dequantized_twin(model), torch.arange(12)[None]
    adapter = create(plain, LoraSpec(rank=4, kind=kind), seed=0)
    g = torch.Generator().manual_seed(1)
    adapter = adapter.mapped(lambda t: 0.3 * torch.randn(t.shape, generator=g))
    found = []
    for base in (model, plain):
        with attached(base, adapter, trainable=True) as attachment:
            y = base(input_ids=tokens).logits
            y.square().sum().backward()
            found.append([y, *(p.grad for p in attachment.parameters("a").values())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


UNSUPPORTED_LYCORIS_SETTINGS = [
    (LoraSpec(kind="loha", dora=True), "dora"),
    (LoraSpec(kind="lokr", init="pissa"), "init 'pissa'"),
    (LoraSpec(kind="lokr", dropout=0.1), "dropout"),
    (LoraSpec(kind="lokr", factor=0), "factor 0"),
    (LoraSpec(kind="oft"), "'oft'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("spec", "say"), UNSUPPORTED_LYCORIS_SETTINGS)
def test_unsupported_lycoris_settings_are_refused(spec: LoraSpec, say: str) -> None:
    with pytest.raises(ConfigError, match=say):
        create(llama3(), spec, seed=0)


@pytest.mark.parametrize(
    ("model", "targets", "say"),
    [(llama3, ("embed_tokens",), r"embed_tokens.*"), (qwen3_moe, "all-linear", r"experts.*")],
)
def test_undefined_lycoris_targets_are_refused_with_a_fix(model: Any, targets: Any, say: str) -> None:
    with pytest.raises(TargetError, match=f"lokr is not defined for the .*{say}") as caught:
        create(model(), LoraSpec(kind="lokr", targets=targets), seed=0)
    assert "exclude" in str(caught.value.fix)


def test_other_deltas_are_not_trained() -> None:
    model = nn.ModuleDict({"lin": nn.Linear(24, 36)})
    adapter = create(model, LoraSpec(rank=2, kind="loha", targets=("lin",)), seed=0)
    adapter.deltas["lin.weight"].magnitude = torch.ones(36)
    with attach(model) as attachment, pytest.raises(AdapterError, match="only a LoHa or LoKr of an entire linear"):
        attachment.add("a", adapter, trainable=True)
