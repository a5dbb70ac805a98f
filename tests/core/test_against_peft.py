"""For every family and kind of module, outputs and gradients equal those of PEFT in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attached import attached
from tests.core.peft_twin import gradients, twin
from tests.families import FAMILIES
from veneer.core import Adapter, LoraSpec, TokenRows, create, merged_state, resolve_targets
from veneer.ops import linear

RTOL = 1e-5
# PEFT reads transformers' deprecated `is_gradient_checkpointing`
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def noisy(adapter: Adapter, seed: int = 0, amount: float = 0.1) -> Adapter:
    """Return the adapter with noise added to every tensor, as if trained."""
    g = torch.Generator().manual_seed(seed)
    return adapter.mapped(lambda t: t + amount * torch.randn(t.shape, generator=g))


def close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """Assert equality within RTOL, relative to the largest entry.

    If positive and negative terms cancel, a sum can lose more than its last digits."""
    torch.testing.assert_close(
        ours, theirs, rtol=RTOL, atol=RTOL * theirs.abs().max().item(), msg=lambda m: f"{what}: {m}"
    )


def compare(model: nn.Module, adapter: Adapter, run: Callable[[nn.Module], Tensor], **config: object) -> None:
    """Assert that outputs, and gradients of all the adapter's tensors, are equal in veneer and PEFT."""
    model.requires_grad_(False)
    theirs = twin(model, adapter, **config)
    with attached(model, adapter, trainable=True) as attachment:
        torch.manual_seed(1)
        y = run(model)
        torch.manual_seed(1)
        z = run(theirs)
        close(y, z, "output")
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        (y * weight).sum().backward()
        (z * weight).sum().backward()
        expected = gradients(theirs, adapter)
        parameters = attachment.parameters("a")
        assert set(parameters) == set(expected)
        for name, parameter in parameters.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            close(grad, expected[name], f"gradient of {name}")


def ids(rows: int = 2, length: int = 12, vocabulary: int = 160) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(ids()).logits
    return out


EMBEDDINGS = ("embed_tokens", "lm_head", "q_proj")
CASES: list[tuple[str, dict[str, Any], bool]] = [
    *((family, {"alpha": 7.0}, True) for family in FAMILIES),
    *((family, {"dora": True}, True) for family in ("llama3", "gemma3", "qwen3")),
    # Gemma scales its embeddings, so the pair's output must be scaled too
    *((f, {"targets": EMBEDDINGS, "dora": dora}, False) for f in ("mistral", "gemma3") for dora in (False, True)),
    ("mistral", {"dropout": 0.9}, True),  # without effect outside training
    *(
        ("mistral", {"targets": ("q_proj",), "modules_to_save": modules}, True)
        for modules in (("lm_head",), ("norm",), ("lm_head", "embed_tokens"), ("layers.1.mlp",))
    ),
]


@pytest.mark.parametrize(("family", "spec", "tied"), CASES)
def test_outputs_and_gradients(family: str, spec: dict[str, Any], tied: bool) -> None:
    model = FAMILIES[family](**({} if tied else {"tie_word_embeddings": False}))
    adapter = noisy(create(model, LoraSpec(rank=3, **spec), seed=0))
    compare(model, adapter, logits, use_dora=spec.get("dora", False))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_selects_the_modules_that_peft_selects(family: str) -> None:
    model = FAMILIES[family]()
    ours = resolve_targets(model, LoraSpec())
    config = peft.LoraConfig(target_modules="all-linear")
    theirs = peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, copy.deepcopy(model)).target_modules
    # PEFT cannot apply a pair to Llama 4's router, which returns two tensors
    assert {t.name for t in ours if t.kind == "linear"} == {n for n in theirs if not n.endswith("router")}
    experts = {n for n, p in model.named_parameters() if ".experts." in n}
    assert {t.name for t in ours if t.kind == "experts"} == experts


class TorchDropout:
    """Replaces core.dropout's Dropout, with the same mask as F.dropout."""

    def __init__(self, p: float) -> None:
        self.p, self.mask = p, torch.empty(0)

    sample = classmethod(lambda cls, p: cls(p))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.mask.numel():
            self.mask = F.dropout(torch.ones_like(x), self.p)
        return x * self.mask


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_while_training(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """veneer and PEFT both use torch's mask, so they drop the same entries.

    As in PEFT, DoRA's norm part uses the input after dropout."""
    monkeypatch.setattr(linear, "Dropout", TorchDropout)
    model = FAMILIES["mistral"]().train()
    adapter = noisy(create(model, LoraSpec(rank=3, dropout=0.3, dora=dora), seed=0))
    compare(model, adapter, logits, use_dora=dora, lora_dropout=0.3)


MODULES = [
    *(lambda bias=bias: nn.Linear(4, 9, bias=bias) for bias in (False, True)),
    lambda: nn.Conv2d(4, 6, 3),
    lambda: nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), bias=False),
    lambda: nn.Conv2d(4, 6, 1),
    lambda: nn.Conv1d(4, 6, 3, padding=1),
    lambda: nn.Conv1d(4, 6, 5, stride=2),
]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", MODULES)
def test_linears_and_convolutions(make: Callable[[], nn.Module], dora: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(2, 4, *([7] * (model[0].weight.ndim - 2)))
    model(x)
    adapter = noisy(create(model, LoraSpec(rank=2, targets=("0", "3"), dora=dora), seed=0), amount=0.5)
    compare(model, adapter, lambda m: m(x), use_dora=dora)


@pytest.mark.parametrize("family", ["llama3", "gemma3", "qwen3", "mistral"])
def test_token_rows(family: str) -> None:
    """Three of these families tie the head to the embedding, so replaced rows change it too."""
    model = FAMILIES[family]()
    hit = tuple(sorted({int(i) for i in ids().flatten()[:3]} | {159}))
    adapter = noisy(create(model, LoraSpec(rank=3, targets=("q_proj",), token_rows={"embed_tokens": hit}), seed=0))
    compare(model, adapter, logits)


def test_token_rows_change_every_tied_module() -> None:
    """T5 ties three embeddings and the head; PEFT's adapter names only the first embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).double().eval().requires_grad_(False)
    rows = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = {"input_ids": ids(vocabulary=60), "decoder_input_ids": ids(2, 5, 60)}
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["q"], trainable_token_indices=[4, 9])
    )
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.copy_(rows)
    with torch.no_grad():
        want = theirs.eval()(**own).logits
        with attached(model, Adapter(token_rows={"shared": TokenRows((4, 9), rows)})):
            close(model(**own).logits, want)


def test_rank_alpha_patterns_and_rslora() -> None:
    """Ranks and scales equal those that PEFT derives from the same settings."""
    model = FAMILIES["mistral"]()
    targets = ("q_proj", "v_proj", "down_proj")
    patterns = {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"down_proj": 5.0}}
    spec = LoraSpec(rank=4, alpha=9.0, targets=targets, rslora=True, **patterns)
    config = peft.LoraConfig(r=4, lora_alpha=9.0, target_modules=list(targets), use_rslora=True, **patterns)
    ours = create(model, spec, seed=0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {n: (p.rank, p.scale) for n, p in ours.pairs.items()} == {
        n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()
    }


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_train_like_peft_on_unchanged_base(init: str) -> None:
    """PEFT subtracts s·B·A from W in place; veneer subtracts an origin and leaves W unchanged.

    Outputs agree before and after equal updates."""
    model = FAMILIES["mistral"]()
    model.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter = create(model, LoraSpec(rank=3, alpha=5.0, targets=("q_proj", "down_proj"), init=init), seed=0)
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    for name, pair in adapter.pairs.items():
        layer = theirs.get_submodule("base_model.model." + name)
        close(pair.A, layer.lora_A["default"].weight)
        close(pair.B, layer.lora_B["default"].weight)
    with attached(model, adapter, trainable=True) as attachment:
        for _ in range(2):
            y, z = logits(model), logits(theirs)
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
            y.square().sum().backward()
            z.square().sum().backward()
            with torch.no_grad():
                for p in [*attachment.parameters("a").values(), *(p for p in theirs.parameters() if p.requires_grad)]:
                    p -= 1e-4 * p.grad
                    p.grad = None
        assert (y - logits(model)).abs().max() > 1e-3
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama4"])
def test_experts_by_hand_in_float64(family: str, implementation: str) -> None:
    """The reference adds s·B·A to the weights of a float64 model; veneer uses low-rank products in float32.

    This is checked for every experts implementation of transformers. (PEFT materializes the changed weights
    of all experts in each step.)"""
    model = FAMILIES[family]()
    if family != "llama4":  # Llama 4 has no choice of implementations
        model.set_experts_implementation(implementation)
    elif implementation != "eager":
        pytest.skip("Llama 4 has one implementation")
    adapter = noisy(create(model, LoraSpec(rank=3, targets=("*experts.*_proj",)), seed=0), amount=0.3)
    adapter.pairs = {n: p for n, p in adapter.pairs.items() if p.kind == "experts"}
    assert adapter.pairs
    exact = copy.deepcopy(model).double()
    if family != "llama4":
        exact.set_experts_implementation("eager")
    for name, pair in adapter.pairs.items():
        with torch.no_grad():
            product = torch.einsum("eor,eri->eoi", pair.B.double(), pair.A.double())
            exact.get_parameter(name).add_(pair.scale * product)
    with attached(model, adapter):
        close(logits(model).double(), logits(exact), family)


def test_dilation_is_kept_although_peft_ignores_it() -> None:
    """PEFT's down convolution ignores dilation and padding mode.

    veneer's output equals that of the merged convolution in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2, padding=1, padding_mode="reflect"))
    adapter = noisy(create(model, LoraSpec(rank=3, targets=("0",)), seed=0), amount=0.5)
    x = torch.randn(2, 4, 9, 9)
    exact = copy.deepcopy(model).double()
    exact.load_state_dict(merged_state(exact, [(adapter, 1.0)]), strict=False)
    with attached(model, adapter):
        close(model(x).double(), exact(x.double()))
