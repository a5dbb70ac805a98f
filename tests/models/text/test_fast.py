"""`fast` keeps the loss and gradients of every family, and restores the base."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, OTHERS, VOCAB, large_norms
from veneer.core.adapter import Adapter, LoraSpec
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.models.patching import fast_report
from veneer.models.text.fast import fast
from veneer.models.text.loss import padded_nll, row_logps, text_loss
from veneer.ops.dispatch import override_ops

LENGTHS = [20, 3, 37]
IDS = torch.tensor([[4, 8, 6, 3, 9]])
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def padded_loss(*given: Any) -> torch.Tensor:
    return padded_nll(*given).sum()


def rows(seed: int = 0) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (sum(LENGTHS),), generator=gen)
    trained = torch.rand(len(ids), generator=gen) > 0.5
    trained[[0, 20, 23]] = False
    return ids, LENGTHS, trained


def attached(model: Any, **spec: Any) -> Attachment:
    attachment = attach(model.requires_grad_(False))
    adapter = create(model, LoraSpec(rank=4, **spec), seed=0)
    gen = torch.Generator().manual_seed(1)
    for pair in adapter.pairs.values():
        pair.B = torch.randn(pair.B.shape, generator=gen) * 0.1
    attachment.add("a", adapter, trainable=True)
    attachment.use("a")
    return attachment


def gradients(model: Any, attachment: Attachment) -> list[torch.Tensor]:
    parameters = list(attachment.parameters("a").values())
    loss = text_loss(model, *rows())
    return [loss, *torch.autograd.grad(loss, parameters)]


@FAMILY
@pytest.mark.parametrize("spec", [{}, {"dora": True}, {"dropout": 0.5}, {"init": "pissa"}], ids=str)
def test_loss_and_gradients_equal_the_padded_reference(family: str, spec: dict[str, Any]) -> None:
    model = FAMILIES[family]()
    if spec.get("dora") and any(p.ndim == 3 for p in model.parameters()):
        spec = {**spec, "exclude": ("*experts*",)}
    attachment = attached(model, **spec)
    model.eval()  # no dropout, because the two implementations sample masks of different shapes
    slow = gradients(model, attachment)
    with fast(model) as how:
        assert how.rows, how.summary()
        assert fast_report(model) is how
        assert how.keeps == (family in ("llama3", "mistral"))
        assert any(kind.endswith("Attention") for kind in how.swapped) == (family not in ("llama4", "phi3"))
        quick = gradients(model, attachment)
    for a, b in zip(quick, slow, strict=True):
        assert (a - b).norm() <= 3e-5 * b.norm() + 1e-7


@pytest.mark.parametrize("spec", [{}, {"dora": True}], ids=str)
@pytest.mark.parametrize("name", ["blocks", "columns"])
def test_training_in_float32_arithmetic_gives_the_losses_of_float32(spec: dict[str, Any], name: str) -> None:
    """A few steps of a bfloat16 base, compared with the same base in float32, up to the activations' rounding."""

    def losses(dtype: torch.dtype, **ops: str) -> torch.Tensor:
        model = FAMILIES["llama3"]().bfloat16().to(dtype)
        attachment = attached(model, **spec)
        optimizer = torch.optim.AdamW(attachment.parameters("a").values(), lr=1e-3)
        found, sums = [], set[torch.dtype]()
        model.model.layers[1].register_forward_pre_hook(lambda _, inputs: sums.add(inputs[0].dtype))
        with override_ops(**ops), fast(model):
            for step in range(4):
                loss = text_loss(model, *rows(step)) / 10
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.detach())
        assert torch.float32 in sums
        return torch.stack(found)

    tiles = "torch" if name == "columns" else "tiles32"
    found, exact = losses(torch.bfloat16, product=name, rope_varlen_attention=tiles), losses(torch.float32)
    assert (found - exact).abs().max() <= 0.004 * exact.abs().max()


@FAMILY
def test_row_likelihoods_equal_those_of_single_rows(family: str) -> None:
    """Rows have separate weights, as in preference losses; gradients are compared too."""
    model = FAMILIES[family]()
    attachment = attached(model)
    model.eval()
    parameters = list(attachment.parameters("a").values())
    ids, lengths, trained = rows()
    weights = torch.tensor([1.0, -2.0, 0.5])
    each = [-text_loss(model, i, [len(i)], t) for i, t in zip(ids.split(lengths), trained.split(lengths), strict=True)]
    wanted = [torch.stack(each), *torch.autograd.grad(torch.stack(each) @ weights, parameters)]
    for together in (False, True):
        with ExitStack() as stack:
            if together:
                stack.enter_context(fast(model))
            got = row_logps(model, ids, lengths, trained)
            found = [got, *torch.autograd.grad(got @ weights, parameters)]
        assert got.shape == (3,)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).norm() <= 3e-5 * b.norm() + 1e-7
    assert row_logps(model, ids, lengths, torch.zeros_like(trained)).tolist() == [0.0] * 3


@FAMILY
def test_fast_restores_the_base_after_an_error(family: str) -> None:
    model = FAMILIES[family]().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    ids = torch.arange(3, 15)[None]
    wanted = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="in the middle"), fast(model):
        raise RuntimeError("in the middle")
    assert not fast_report(model).rows
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(parameters[k] is p for k, p in model.named_parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    assert torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize(
    "name", ["norm", "layers.0.input_layernorm", "layers.1.mlp", "layers.1.self_attn", "layers.0", "layers.1"]
)
@pytest.mark.parametrize("first", ["attached", "fast"])
def test_full_copies_work_before_and_after_fast(family: str, name: str, first: str) -> None:
    """`fast` sets forward methods on modules; these must use the copies' tensors."""
    model = FAMILIES[family]().requires_grad_(False).eval()
    gen = torch.Generator().manual_seed(0)
    own = model.get_submodule(f"model.{name}").state_dict()
    copies = {k: t + 0.3 * torch.randn(t.shape, generator=gen) for k, t in own.items()}
    adapter = Adapter(modules={f"model.{name}": copies})

    def losses(attachment: Attachment, loss: Any) -> list[torch.Tensor]:
        attachment.add("a", adapter, trainable=True)
        attachment.use("a")
        out = loss(model, *rows())
        return [out, *torch.autograd.grad(out, list(attachment.parameters("a").values()))]

    with attach(model) as attachment:
        wanted = losses(attachment, padded_loss)
    with ExitStack() as stack:
        if first == "attached":
            attachment = stack.enter_context(attach(model))
            stack.enter_context(fast(model))
        else:
            stack.enter_context(fast(model))
            attachment = stack.enter_context(attach(model))
        got = losses(attachment, text_loss)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@FAMILY
def test_generation_is_equal_inside_fast(family: str) -> None:
    model = FAMILIES[family]().requires_grad_(False)
    ids = torch.tensor([[0, 0, 5, 9, 7], [4, 8, 6, 3, 9]])
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    arguments["attention_mask"] = (ids != 0).long()
    wanted = model.generate(ids, **arguments)
    with fast(model):
        assert torch.equal(model.generate(ids, **arguments), wanted)


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "gemma3"])
def test_activation_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = FAMILIES[family]()
    attachment = attached(model)
    with fast(model):
        wanted = gradients(model, attachment)
        model.train()
        model.activation_checkpointing_enable()
        got = gradients(model, attachment)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fast_paths_follow_the_selection() -> None:
    """Inside `fast`, the selection changes from one plain pair to several or none."""
    model = FAMILIES["llama3"]()
    attachment = attached(model)
    other = create(model, LoraSpec(rank=2, targets=("q_proj", "down_proj"), dora=True, init="gaussian"), seed=3)
    attachment.add("b", other)
    mixes: list[list[Any]] = [["a"], [], ["b"], [("a", 0.5), ("b", -1.0)], ["a"]]
    wanted = []
    for mix in mixes:
        with attachment.using(*mix), torch.no_grad():
            wanted.append(padded_loss(model, *rows()))
    with fast(model), torch.no_grad():
        for mix, value in zip(mixes, wanted, strict=True):
            with attachment.using(*mix):
                torch.testing.assert_close(text_loss(model, *rows()), value, rtol=1e-6, atol=0.0)


def test_head_with_a_pair_is_called() -> None:
    model = FAMILIES["qwen3"]()
    attachment = attached(model, targets=("lm_head", "embed_tokens"))
    wanted = gradients(model, attachment)
    with fast(model):
        got = gradients(model, attachment)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 3e-5 * b.norm()


def test_a_norm_with_another_formula_is_not_replaced() -> None:
    model = FAMILIES["llama3"]()
    norm = model.model.norm
    original = type(norm).forward
    type_name = type(norm).__name__
    norm.__class__ = type(type_name, (type(norm),), {"forward": lambda self, x: original(self, x).abs()})
    wanted = padded_loss(model.requires_grad_(False), *rows())
    with fast(model) as how:
        assert type_name in how.skipped
        assert how.swapped[type_name] == 4
        torch.testing.assert_close(text_loss(model, *rows()), wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("settings", "chunk"), [({}, 16), ({"floor_scale": 30}, None)], ids=["chunk", "floor"])
def test_long_llama4_batches_use_padded_rows(settings: dict[str, Any], chunk: int | None) -> None:
    """Rows are longer than a chunk, or the batch has positions beyond `floor_scale`.

    Layers without rope scale queries by the position in the row, because transformers does so in batches."""
    model = FAMILIES["llama4"](**settings).requires_grad_(False)
    model.config.attention_chunk_size = chunk or model.config.attention_chunk_size
    wanted = padded_loss(model, *rows())
    with fast(model) as how:
        assert how.rows == (chunk is None)
        torch.testing.assert_close(text_loss(model, *rows()), wanted, rtol=1e-6, atol=0.0)


LEFT = {
    "qwen3_next": "1 of 2 layers do not use a supported attention function",
    "deepseek_v3": "keys and values of different widths",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OTHERS)
def test_unswapped_family_parts_are_reported(family: str, dtype: torch.dtype) -> None:
    """Covers sinks, capped scores and recurrent states.

    The fast path is exact for such a part, or reports that the model computes it."""
    model = OTHERS[family]().to(dtype)
    attachment = attached(model, targets=(r"re:.*self_attn\.(q_proj|q_b_proj|o_proj|dense)",))
    model.eval()
    wanted, each = gradients(model, attachment), padded_nll(model, *rows())
    with fast(model) as how:
        assert how.rows == (family not in LEFT)
        assert LEFT.get(family, "rows without padding") in how.summary()
        got = gradients(model, attachment)
        nll = -row_logps(model, *rows())
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)[:, :5], IDS)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6
    counts = torch.stack([t.sum() for t in rows()[2].split(LENGTHS)]).tolist()
    for a, b in zip(nll, each.split(counts), strict=True):
        assert (a - b.sum()).abs() <= tolerance * b.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama3", "gemma3", "gemma2", "qwen3_next"])
def test_norms_with_large_weights_are_swapped_exactly(family: str, dtype: torch.dtype) -> None:
    """Outputs are compared per channel and token.

    Over a whole output, w and 1 + w would look nearly equal, because w reaches 450."""
    model = large_norms((FAMILIES | OTHERS)[family]()).to(dtype).requires_grad_(False)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    inputs = [torch.randn(6, len(m.weight), generator=torch.Generator().manual_seed(1)).to(dtype) for m in norms]
    wanted = [m(x) for m, x in zip(norms, inputs, strict=True)]
    with fast(model) as how:
        swapped = sum(n for kind, n in how.swapped.items() if kind.endswith("RMSNorm"))
        assert swapped == sum("forward" in m.__dict__ for m in norms) > 0
        for norm, x, want in zip(norms, inputs, wanted, strict=True):
            torch.testing.assert_close(norm(x), want, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


def test_attention_with_dropout_is_not_swapped() -> None:
    model = FAMILIES["llama3"](attention_dropout=0.5).requires_grad_(False)
    with fast(model) as how:
        assert not how.rows
        assert "uses attention dropout in training" in how.summary()


def test_window_in_the_mask_is_detected() -> None:
    """The model hides its window from the attention interface, so only rows longer than the window reveal it."""
    model = FAMILIES["mistral"](sliding_window=64).requires_grad_(False)
    for layer in model.model.layers:
        attention = layer.self_attn
        original = type(attention).forward

        def forward(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            config, self.config = self.config, copy.copy(self.config)
            self.config.sliding_window = None
            try:
                return original(self, *args, **kwargs)
            finally:
                self.config = config

        attention.__class__ = type("OwnAttention", (type(attention),), {"forward": forward})
    with fast(model) as how:
        assert not how.rows
        assert "off, but rounding explains only" in how.summary()


def test_a_leak_between_rows_is_found() -> None:
    """One layer adds to each token the previous token of the batch, even across rows."""
    model = FAMILIES["llama3"]().requires_grad_(False)
    mlp = model.model.layers[0].mlp
    original = type(mlp).forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return original(self, x + 0.05 * torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))

    mlp.__class__ = type("LeakyMLP", (type(mlp),), {"forward": forward})
    wanted = padded_loss(model, *rows())
    with fast(model) as how:
        assert not how.rows
        assert "LeakyMLP" in how.skipped
        torch.testing.assert_close(text_loss(model, *rows()), wanted, rtol=1e-6, atol=0.0)


def test_a_first_token_cannot_be_trained() -> None:
    model = FAMILIES["llama3"]()
    ids, lengths, trained = rows()
    trained[20] = True
    with pytest.raises(ValueError, match="first token"):
        text_loss(model, ids, lengths, trained)
    with pytest.raises(ValueError, match="add up"):
        text_loss(model, ids, [1], trained)
