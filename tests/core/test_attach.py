"""Detaching restores the base, and errors list every problem."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.attached import attached
from tests.core.test_layers import IDS, trained
from tests.families import FAMILIES
from veneer.core import Adapter, Attachment, LoraSpec, Pair, TokenRows, attach
from veneer.core.layers import Layer
from veneer.errors import AdapterError, ConfigError
from veneer.ops.lora_segments import LoraSegments

EVERYTHING = LoraSpec(
    rank=2,
    targets=("all-linear",),
    modules_to_save=("model.norm", "re:.*layers.0.(mlp|feed_forward)"),
    token_rows={"embed_tokens": (5, 9)},
)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


class Witness:
    """Snapshot of a model: module objects, tensors (identity and bits), state-dict keys, and outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [(n, id(m)) for n, m in model.named_modules()]
        self.tensors = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)]
        self.flags = [p.requires_grad for p in model.parameters()]
        self.keys = list(model.state_dict())
        self.attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
        self.logits = logits(model)

    def check(self) -> None:
        assert [(n, id(m)) for n, m in self.model.named_modules()] == self.modules
        now = list(self.model.named_parameters(remove_duplicate=False))
        assert [(n, id(p)) for n, p in now] == [(n, i) for n, i, _ in self.tensors]
        assert all(torch.equal(p, t) for (_, p), (_, _, t) in zip(now, self.tensors, strict=True))
        assert [p.requires_grad for p in self.model.parameters()] == self.flags
        assert list(self.model.state_dict()) == self.keys
        assert {n: sorted(m.__dict__) for n, m in self.model.named_modules()} == self.attributes
        assert torch.equal(logits(self.model), self.logits)


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama3"]()


@pytest.fixture
def attachment(model: PreTrainedModel) -> Iterator[Attachment]:
    with attach(model) as out:
        yield out


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_restores_everything(family: str) -> None:
    model = FAMILIES[family]()
    witness = Witness(model)
    attachment = attach(model)
    attachment.add("a", trained(model, EVERYTHING), trainable=True)
    attachment.use("a")
    assert not torch.equal(logits(model), witness.logits)
    assert list(model.state_dict()) == witness.keys, "an attached model saves as the base"
    model(IDS).logits.sum().backward()
    for p in model.parameters():
        p.grad = None
    attachment.detach()
    witness.check()
    attachment.detach()
    attach(model).detach()


def test_a_failing_add_changes_nothing(
    model: PreTrainedModel, attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment.add("a", trained(model, LoraSpec(rank=2)))
    attachment.use("a")
    before, wrapped = logits(model), {n: id(m) for n, m in model.named_modules()}
    made = 0

    def limited(self: nn.Module, *args: object) -> None:
        nonlocal made
        made += 1
        if made == 2:
            raise MemoryError
        original(self, *args)

    original = Layer.__init__
    monkeypatch.setattr(Layer, "__init__", limited)
    with pytest.raises(MemoryError):
        attachment.add("b", trained(model, LoraSpec(targets=("lm_head", "embed_tokens"))))
    monkeypatch.undo()
    assert {n: id(m) for n, m in model.named_modules()} == wrapped
    assert torch.equal(logits(model), before)
    assert list(attachment.adapters) == ["a"]


def test_layers_are_wrapped_only_while_needed(model: PreTrainedModel, attachment: Attachment) -> None:
    def wrapped() -> set[str]:
        return {m.name for m in model.modules() if isinstance(m, Layer)}

    attachment.add("a", trained(model, LoraSpec(rank=2, targets=("q_proj",))))
    attachment.add("b", trained(model, LoraSpec(rank=2, targets=("q_proj", "v_proj"), layers=(0,))))
    q0, q1, v0 = (f"model.layers.{i}.self_attn.{p}_proj" for i, p in ((0, "q"), (1, "q"), (0, "v")))
    assert wrapped() == {q0, q1, v0}
    attachment.remove("a")
    assert wrapped() == {q0, v0}
    attachment.remove("b")
    assert wrapped() == set()


def test_adapters_are_switched_by_use_and_using(model: PreTrainedModel, attachment: Attachment) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        attachment.add(name, trained(model, LoraSpec(rank=2), seed))
    attachment.use("a")
    first = logits(model)
    attachment.use("b")
    second = logits(model)
    assert not torch.equal(first, second)
    with attachment.using("a"):
        assert torch.equal(logits(model), first)
        with pytest.raises(ZeroDivisionError), attachment.off():
            _ = 1 / 0
        assert torch.equal(logits(model), first)
    assert torch.equal(logits(model), second)
    attachment.remove("b")
    assert attachment.selection.mix == ()


def test_one_error_lists_every_problem(model: PreTrainedModel, attachment: Attachment) -> None:
    good = trained(model, LoraSpec(rank=2, targets=("q_proj",)))
    q0, q1 = good.pairs
    bad = Adapter(
        pairs={
            q0: Pair(torch.ones(2, 31), good.pairs[q0].B, 1.0),
            q1: Pair(good.pairs[q1].A, torch.full((32, 2), torch.nan), 1.0),
            "model.layers.0.self_attn.q_porj": good.pairs[q0],
            "model.norm": good.pairs[q0],
            "lm_head": Pair(torch.ones(2, 5, 5), torch.ones(3, 2, 1), 1.0, "conv"),
            "model.layers.0.mlp.experts.down_proj": Pair(torch.ones(2, 5, 5), torch.ones(3, 2, 1), 1.0, "experts"),
        },
        modules={"model.layers.0.input_layernorm": {"weight": torch.ones(7), "bias": torch.ones(7)}},
        token_rows={
            "model.embed_tokens": TokenRows((1, 1, 400), torch.ones(2, 32)),
            "model.norm": TokenRows((), torch.ones(0, 1)),
        },
    )
    with pytest.raises(AdapterError) as error:
        attachment.add("bad", bad)
    text = str(error.value)
    for part in [
        f"{q0}: A is (2, 31), the base needs (2, 32)",
        f"{q1}.B: not finite",
        "q_porj: no such module in the base; nearest: model.layers.0.self_attn.q_proj",
        "model.norm: a pair of kind linear does not fit a LlamaRMSNorm",
        "lm_head: a pair of kind conv does not fit a Linear",
        "model.layers.0.mlp.experts: no such module",
        "input_layernorm.bias: no such tensor",
        "input_layernorm.weight is (7,), the base needs (32,)",
        "token id 400 is outside",
        "listed twice",
        "the token rows are (2, 32), the base needs (3, 32)",
        "not an embedding",
    ]:
        assert part in text, part
    assert attachment.adapters == {}
    assert not any(isinstance(m, Layer) for m in model.modules())


def test_invalid_arguments_of_use_are_refused(model: PreTrainedModel, attachment: Attachment) -> None:
    attachment.add("pairs", trained(model, LoraSpec(rank=2, targets=("q_proj", "lm_head"))))
    attachment.add("whole", trained(model, LoraSpec(rank=2, targets=("q_proj",), modules_to_save=("lm_head",))))
    attachment.add("norm", trained(model, LoraSpec(targets=(), modules_to_save=("model.norm",))))
    for mix, say in [
        (("pears",), "attached: norm, pairs, whole"),
        ((("whole", 0.5),), "strength 1.0"),
        (("whole", "pairs"), "use one of the two"),
    ]:
        with pytest.raises(AdapterError, match=say):
            attachment.use(*mix)
        assert attachment.selection.mix == ()
    for strength in (float("nan"), float("inf"), -10001.0):
        with pytest.raises(ConfigError, match="strength of 'pairs' is"):
            attachment.use(("pairs", strength))
        assert attachment.selection.mix == ()
    attachment.use("whole", "norm")
    attachment.use("norm", ("pairs", -0.5))
    with pytest.raises(AdapterError, match="attached already"):
        attachment.add("pairs", Adapter())
    with pytest.raises(AdapterError, match="not trainable"):
        attachment.parameters("pairs")


def test_full_copies_do_not_nest(model: PreTrainedModel, attachment: Attachment) -> None:
    attachment.add("mlp", trained(model, LoraSpec(targets=(), modules_to_save=("layers.0.mlp",))))
    with pytest.raises(AdapterError, match=r"gate_proj lies inside model\.layers\.0\.mlp"):
        attachment.add("gate", trained(model, LoraSpec(rank=2, targets=("gate_proj",))))


def test_attaching_twice_is_an_error(model: PreTrainedModel, attachment: Attachment) -> None:
    attachment.add("a", trained(model, LoraSpec(rank=2)))
    for again in (model, model.model, nn.Sequential(model)):
        with pytest.raises(AdapterError, match="attached already"):
            attach(again)
    attachment.detach()
    with pytest.raises(AdapterError, match="detached"):
        attachment.add("a", Adapter())
    attach(model).detach()


def test_parameters_and_snapshots_are_independent_copies(model: PreTrainedModel, attachment: Attachment) -> None:
    adapter = trained(model, EVERYTHING)
    digest = adapter.digest()
    attachment.add("a", adapter, trainable=True)
    parameters = attachment.parameters("a")
    assert all(p.is_leaf and p.requires_grad for p in parameters.values())
    assert set(parameters) == {n for n, _ in adapter.tensors()}
    assert attachment.adapter("a").digest() == digest
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1)
    assert adapter.digest() == digest
    snapshot = attachment.adapter("a")
    assert snapshot.digest() != digest
    before = snapshot.digest()
    with torch.no_grad():
        parameters["model.layers.0.self_attn.q_proj.A"].zero_()
    assert snapshot.digest() == before
    assert not any(t.requires_grad for _, t in snapshot.tensors())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama3", "mixtral", "llama4"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """Gradients stay equal if the backward pass recomputes activations, also with dropout."""
    grads = []
    for checkpointing in (False, True):
        model = FAMILIES[family]().train()
        model.requires_grad_(False)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        with attached(model, trained(model, LoraSpec(rank=2, dropout=0.2)), trainable=True) as attachment:
            torch.manual_seed(0)
            model(IDS, use_cache=False).logits.square().mean().backward()
            grads.append({n: p.grad for n, p in attachment.parameters("a").items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6)


def test_modules_shared_by_two_parents_are_wrapped_in_both() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    with attached(model, Adapter(pairs={"a.0": Pair(torch.ones(1, 3), torch.ones(3, 1), 1.0)})):
        assert isinstance(model["a"][0], Layer)
        assert model["a"][0] is model["b"][0]
    assert model["a"][0] is model["b"][0] is shared


def test_attributes_of_the_base_stay_accessible(model: PreTrainedModel, attachment: Attachment) -> None:
    attachment.add("a", trained(model, LoraSpec(rank=2, targets=("lm_head", "embed_tokens"))))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().padding_idx == 0
    with pytest.raises(AttributeError):
        _ = model.lm_head.nonsense


def test_a_router_takes_a_linear_pair() -> None:
    """The pair changes outputs, merges, trains and detaches, but cannot apply to some tokens only."""
    model = FAMILIES["mixtral"]()
    witness = Witness(model)
    g = torch.Generator().manual_seed(2)
    name = "model.layers.0.mlp.gate"
    pair = Pair(torch.randn(2, 32, generator=g), torch.randn(4, 2, generator=g), 0.5)
    by_hand = FAMILIES["mixtral"]()
    with torch.no_grad():
        by_hand.get_parameter(f"{name}.weight").add_(pair.scale * pair.B @ pair.A)
    with attached(model, Adapter({name: pair}), trainable=True) as attachment:
        torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-5, atol=1e-5)
        model(IDS).logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attachment.parameters("a").values())
        merged = attachment.merged("a")
        torch.testing.assert_close(merged[f"{name}.weight"], by_hand.get_parameter(f"{name}.weight").data)
        with pytest.raises(AdapterError, match=f"{name} is not a linear layer"):
            attachment.use_spans(["a"], LoraSegments((20,), (20,), [torch.Generator()], sizes=(20, 20)))
        with pytest.raises(AdapterError, match="MixtralTopKRouter"):
            attachment.add("b", Adapter({name: Pair(pair.A, pair.B, 1.0, "embedding")}))
    model.zero_grad()
    witness.check()
