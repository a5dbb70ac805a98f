"""The runner with a quantized base: each row equals the row computed alone with dequantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import FAMILIES, MOE_FAMILIES
from tests.ops.draws import coded
from tests.serve.forward.test_runner import (
    MIXES,
    WAYS,
    adapters_of,
    base_of,
    check_rows,
    loha,
    prompts,
    reference,
    same,
    serve,
    trained,
)
from veneer.core.adapter import Adapter
from veneer.core.merge import merged_state
from veneer.models.quantize import quantized_weights
from veneer.ops.cpu import compiled
from veneer.ops.dispatch import override_ops
from veneer.ops.quantized import Quantized, dequantized
from veneer.ops.weight_panels import Panels
from veneer.serve.forward.runner import Runner, RunnerRow

KINDS = ("nf4", "fp4", "int8", "Q8_0")


def model_in(kind: str, family: str = "llama3", dtype: torch.dtype = torch.float32) -> Any:
    """Return a model as if loaded in a quantized format.

    Linear layers and experts hold quantized codes; other weights are unchanged.
    """
    model: Any = FAMILIES[family](hidden_size=64, intermediate_size=96).to(dtype)
    for name in quantized_weights(model):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, key, nn.Parameter(coded(getattr(module, key).detach(), kind), requires_grad=False))
    if family in MOE_FAMILIES:
        model.set_experts_implementation("eager")
    return model


def plain_of(model: Any, family: str = "llama3") -> Any:
    """Return a transformers model with the dequantized weights."""
    plain: Any = FAMILIES[family](hidden_size=64, intermediate_size=96).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name, own in model.named_parameters():
            plain.get_parameter(name).copy_(dequantized(own))
    return plain


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama3", kind) for kind in KINDS), ("qwen3", "nf4"), ("gemma3", "nf4"), ("mixtral", "nf4")]
)
def test_each_row_equals_the_row_alone_over_dequantized_weights(family: str, kind: str) -> None:
    model = model_in(kind, family)
    plain = plain_of(model, family)
    adapters = adapters_of(plain, family)
    codes = {n: [t.clone() for t in p.stored.tensors().values()] for n, p in quantized_of(model)}
    ids, how = prompts([1, 20, 33, 17, 40, 16]), WAYS.get(family, "fused")
    runner, _ = check_rows(plain, adapters, MIXES, ids, [7, 16, 1, 30], served=model, how=how)
    runner.close()
    for name, weight in quantized_of(model):  # the base is unchanged and holds no dense copy of any weight
        assert weight.kept is None
        assert all(map(torch.equal, codes[name], weight.stored.tensors().values()))


def quantized_of(model: Any) -> list[tuple[str, Quantized]]:
    return [(n, p) for n, p in model.named_parameters() if isinstance(p, Quantized)]


def test_no_projection_has_a_dense_copy() -> None:
    """There is no second copy of the codes either."""
    model = model_in("nf4", dtype=torch.bfloat16)
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    for layer, block in zip(model.model.layers, runner.llama.blocks, strict=True):
        own = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        for module, held in zip(own, (block.qkv, block.out, block.gate_up, block.down), strict=True):
            if compiled.has("panel_product"):
                assert isinstance(held, Panels)
                assert module.weight.stored.panels is held
            else:
                assert all(isinstance(p, Quantized) for p in held.parts)
    runner.close()


def continued(runner: Runner, mixes: list[Any], texts: list[list[int]], tokens: Tensor | None = None) -> Tensor:
    """Return the logits (12, rows, vocabulary) of twelve batched steps that continue the prompts.

    `tokens`: logits whose argmax is appended to the prompts; default: the runner's own logits.
    """
    rows = [RunnerRow(t, 0, range(4 * i, 4 * i + 4), mix) for i, (t, mix) in enumerate(zip(texts, mixes, strict=True))]
    out = []
    for step in range(12):
        out.append(runner.run(rows))
        chosen = (out[-1] if tokens is None else tokens[step]).argmax(1).tolist()
        rows = [RunnerRow([t], r.first + len(r.tokens), r.blocks, r.mix) for t, r in zip(chosen, rows, strict=True)]
    return torch.stack(out)


@pytest.mark.skipif(not compiled.has("decode"), reason="no kernels for a decoder on this processor")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "Q8_0", "Q4_0"])
def test_products_with_codes_equal_the_reference(kind: str) -> None:
    """At temperature 0, compiled steps on quantized codes give the same tokens as modules that dequantize.

    Ties within bfloat16 rounding are excepted. The base's weights stay equal bit for bit.
    """
    model = model_in(kind, dtype=torch.bfloat16)
    adapter = trained(plain_of(model), 1, rank=3)
    before, texts = {n: p.dense() for n, p in quantized_of(model)}, prompts([9, 20, 5, 33])
    found: list[Tensor] = []
    for laid in (False, True):
        with override_ops(panel_linear="compiled" if laid else "torch"):
            runner = Runner(base_of(model), cache_bytes=1 << 20)
        assert runner.how == "fused", runner.why
        assert (runner.llama.decode_table is not None) == laid
        ready = runner.prepare(adapter, "a")
        mixes = [[], [(ready, 1.0)], [], [(ready, -0.5)]]
        found.append(continued(runner, mixes, texts, found[0] if laid else None).double())
        runner.close()
    slow, fast = found
    same_weights = kind != "int8"  # the compiled int8 step does not round weights to bfloat16
    assert (fast - slow).norm() <= (0.04 if same_weights else 0.08) * slow.norm()
    best = slow.topk(2).values
    clear = best[..., 0] - best[..., 1] > 0.1 * slow.abs().max()
    assert clear.any()
    if same_weights:
        assert torch.equal(fast.argmax(-1)[clear], slow.argmax(-1)[clear])
    assert all(torch.equal(before[n], p.dense()) for n, p in quantized_of(model))


def test_unsupported_codes_use_the_next_forward_path_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in("nf4", dtype=torch.bfloat16)
    texts = prompts([9, 20])
    with override_ops(panel_linear="torch"):
        slow = Runner(base_of(model), cache_bytes=1 << 20)
    wanted = continued(slow, [[], []], texts).double()
    slow.close()

    def fails(parts: Any) -> None:
        raise RuntimeError("there is no room for panels")

    monkeypatch.setattr("veneer.serve.forward.runner.panels_here", lambda bits: True)
    monkeypatch.setattr("veneer.serve.forward.runner.panels_of_codes", fails)
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    assert runner.how == "packed"
    assert runner.why == "not fused with quantized codes (RuntimeError: there is no room for panels)"
    got = continued(runner, [[], []], texts, wanted).double()
    runner.close()
    assert (got - wanted).norm() <= 0.04 * wanted.norm()


def test_full_rank_and_low_rank_adapters_share_a_batch() -> None:
    model = model_in("nf4")
    plain = plain_of(model)
    q = "model.layers.1.self_attn.q_proj"
    adapters = {"a": trained(plain, 1), "loha": Adapter(deltas={f"{q}.weight": loha(plain.get_submodule(q), 7)})}
    mixes = [[("a", 1.0)], [("loha", -0.8)], [("a", 0.5), ("loha", 0.5)], []]
    runner, _ = check_rows(plain, adapters, mixes, prompts([17, 20, 3, 30]), [9, 2, 16], served=model)
    runner.close()


def test_adapters_on_quantized_weights_equal_merged_adapters() -> None:
    model = model_in("int8")
    plain = plain_of(model)
    adapter = trained(plain, 3, dora=True)
    (ids,) = prompts([25])
    merged = merged_state(plain, [(adapter, 0.7)])
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    got = serve(runner, [(ids, [(runner.prepare(adapter, "c"), 0.7)])], [9, 2, 16])[0]
    runner.close()
    plain.load_state_dict(merged, strict=False)
    same(got, reference(plain, {}, [], ids))


def test_quantized_bases_can_be_batch_invariant() -> None:
    model = model_in("nf4", dtype=torch.bfloat16)
    runner = Runner(base_of(model), cache_bytes=1 << 20, batch_invariant=True)
    a = runner.prepare(trained(plain_of(model), 1), "a")
    work = [(ids, mix) for ids, mix in zip(prompts([41, 5, 17]), ([(a, 1.0)], [], [(a, 0.3)]), strict=True)]
    alone = [serve(runner, [one], [100])[0] for one in work]
    for got, want in zip(serve(runner, work, [7, 3, 20]), alone, strict=True):
        assert torch.equal(got, want)
    runner.close()
