"""One forward pass over many sequences: in every family, each row equals the same row computed separately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, MOE_FAMILIES, OTHERS, VOCAB
from tests.tiny_base import tiny_tokenizer
from veneer.core.adapter import Adapter, LoraSpec, TokenRows
from veneer.core.attach import attach
from veneer.core.forms import Delta
from veneer.core.init import create
from veneer.errors import ConfigError
from veneer.models.text.base import TextBase
from veneer.serve.forward.paged import BLOCK
from veneer.serve.forward.runner import Prepared, Runner, RunnerRow

MIXES: list[list[tuple[str, float]]] = [
    [], [("a", 1.0)], [("b", -0.5)], [("a", 0.7), ("b", 0.4)], [("c", 1.0)], [("c", 0.5), ("a", 1.0)],
]  # fmt: skip
WAYS = {"gemma3": "packed", "llama4": "alone", "mixtral": "packed", "qwen3_moe": "packed"}


def base_of(model: Any) -> TextBase:
    fields: dict[str, Any] = {"stop_ids": (), "pad_id": 2, "context": 256}
    dtype = next(model.parameters()).dtype
    return TextBase("tiny", model, tiny_tokenizer(), Path(), "", dtype, torch.device("cpu"), "", **fields)


def trained(model: Any, seed: int, **spec: Any) -> Adapter:
    """Return an adapter whose tensors are all nonzero, so that each has an effect."""
    adapter = create(model, LoraSpec(**{"rank": 3, "alpha": 6.0, "targets": "all-linear"} | spec), seed=seed)
    g = torch.Generator().manual_seed(seed)
    for pair in adapter.pairs.values():
        pair.B = torch.randn(pair.B.shape, generator=g) * 0.1
        if pair.magnitude is not None:
            pair.magnitude = pair.magnitude * (0.7 + 0.6 * torch.rand(pair.magnitude.shape, generator=g))
    return adapter


def reference(model: Any, adapters: dict[str, Adapter], mix: Sequence[tuple[str, float]], ids: list[int]) -> Tensor:
    """Return the logits of the last token from one uncached pass, with the mix attached by veneer.core."""
    with attach(model) as attachment, torch.no_grad():
        for name, _ in mix:
            attachment.add(name, adapters[name])
        attachment.use(*mix)
        out: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return out


def serve(runner: Runner, work: list[tuple[list[int], list[tuple[Prepared, float]]]], cuts: list[int]) -> list[Tensor]:
    """Run each sequence in chunks; every step batches all sequences. Return each sequence's last logits."""
    blocks, rows_of, at = [], [], 0
    for ids, _ in work:
        need = -(-len(ids) // BLOCK)
        blocks.append(list(range(at, at + need)))
        at += need
    done, out = [0] * len(work), [torch.empty(0)] * len(work)
    step = 0
    while any(d < len(ids) for d, (ids, _) in zip(done, work, strict=True)):
        rows_of = []
        for s, (ids, mix) in enumerate(work):
            if done[s] < len(ids):
                end = min(len(ids), done[s] + cuts[(step + s) % len(cuts)])
                rows_of.append((s, RunnerRow(ids[done[s] : end], done[s], blocks[s], mix, end == len(ids), s)))
                done[s] = end
        logits = iter(runner.run([row for _, row in rows_of]))
        for s, row in rows_of:
            if row.wants:
                out[s] = next(logits)
        step += 1
    return out


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]


def same(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()


Mixes = list[list[tuple[str, float]]]


def check_rows(
    model: Any,
    adapters: dict[str, Adapter],
    mixes: Mixes,
    ids: list[list[int]],
    cuts: list[int],
    *,
    served: Any = None,
    how: str = "",
    tolerance: float = 2e-5,
) -> tuple[Runner, dict[str, Prepared]]:
    """Serve all sequences together and compare each with the same sequence computed separately.

    `served`: the model to serve, if it is not `model`.
    """
    want = [reference(model, adapters, mix, p) for mix, p in zip(mixes, ids, strict=True)]
    runner = Runner(base_of(model if served is None else served), cache_bytes=1 << 20)
    assert how in ("", runner.how), runner.why
    assert not any(runner.problems(a) for a in adapters.values())
    ready = {name: runner.prepare(a, name) for name, a in adapters.items()}
    got = serve(runner, [(p, [(ready[n], s) for n, s in mix]) for p, mix in zip(ids, mixes, strict=True)], cuts)
    for g, w in zip(got, want, strict=True):
        same(g, w, tolerance)
    return runner, ready


def test_llama_4_runs_packed_within_one_chunk() -> None:
    """Each expert receives the tokens routed to it, grouped by mix."""
    model, other = FAMILIES["llama4"](), FAMILIES["llama4"]()
    for one in (model, other):
        one.config.get_text_config().attention_chunk_size = 256
    adapters = {"a": trained(model, 1), "b": trained(model, 2, exclude=("*.experts",))}
    mixes: Mixes = [[], [("a", 1.0)], [("b", 0.5)], [("a", 0.7), ("b", 0.4)]]
    runner, _ = check_rows(other, adapters, mixes, prompts([1, 20, 33, 17]), [7, 16], served=model, how="packed")
    runner.close()


def adapters_of(model: Any, family: str) -> dict[str, Adapter]:
    return {
        "a": trained(model, 1, rank=3),
        "b": trained(model, 2, rank=5, rslora=True),
        "c": trained(model, 3, dora=True, exclude=("*.experts",) if family in MOE_FAMILIES else ()),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rows_result_equals_the_row_alone(family: str) -> None:
    model = FAMILIES[family]()
    adapters = adapters_of(model, family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = prompts([1, 20, 33, 17, 40, 16])
    runner, _ = check_rows(model, adapters, MIXES, ids, [7, 16, 1, 30], how=WAYS.get(family, "fused"))
    runner.close()
    assert model.config._attn_implementation == "sdpa"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def loha(module: Any, seed: int) -> Delta:
    g = torch.Generator().manual_seed(seed)
    out, into = module.weight.shape
    shapes = {"a1": (out, 2), "b1": (2, into), "a2": (out, 2), "b2": (2, into)}
    return Delta("hadamard", {k: torch.randn(s, generator=g) * 0.3 for k, s in shapes.items()}, (out, into), scale=0.5)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_full_rank_and_low_rank_adapters_share_a_batch(family: str) -> None:
    model = FAMILIES[family]()
    g = torch.Generator().manual_seed(6)
    q = "model.layers.1.self_attn.q_proj"
    adapters = {
        "plain": trained(model, 1),
        "ends": trained(model, 2, targets=("embed_tokens", "lm_head")),
        "norms": Adapter(modules={"model.norm": {"weight": model.model.norm.weight.detach() * 0.5 + 0.2}}),
        "words": Adapter(token_rows={"model.embed_tokens": TokenRows((5, 9), torch.randn(2, 32, generator=g))}),
        "loha": Adapter(deltas={f"{q}.weight": loha(model.get_submodule(q), 7)}),
    }
    if family == "llama3":  # the adapter "ends" needs a head that is not tied to the embedding
        del adapters["ends"]
    mixes = [[(n, s)] for n, s in zip(adapters, [1.0, 1.0, 1.0, 1.0, -0.8], strict=False)]
    mixes += [[("plain", 0.5), ("loha", 0.5)], []]
    ids = [[5, 9, *p] for p in prompts([3, 17, 20, 35, 8, 11, 30][: len(mixes)])]
    runner, ready = check_rows(model, adapters, mixes, ids, [9, 2, 16])
    assert runner.attached == set(ready)
    for name in ready:
        runner.drop(name)
    assert not runner.attached
    runner.close()


def test_embedding_and_head_have_low_rank_forms() -> None:
    model = FAMILIES["qwen3"]()
    adapters = {"ends": trained(model, 2, targets=("embed_tokens", "lm_head")), "plain": trained(model, 1)}
    mixes = [[("ends", 0.5), ("plain", 1.0)], [("plain", 1.0)], [], [("ends", 1.0)]]
    runner, ready = check_rows(model, adapters, mixes, prompts([19, 3, 18, 33]), [9, 2, 16])
    assert all(p.packed is not None for p in ready.values())
    runner.close()


def test_bfloat16_is_about_as_exact_as_attached_adapters() -> None:
    """The reference attaches float32 A and B; the runner rounds A and B once to the base's dtype."""
    exact = FAMILIES["llama3"]()
    adapters = {"a": trained(exact, 1), "b": trained(exact, 2, dora=True)}
    mixes: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("a", 0.5), ("b", 1.0)]]
    ids = prompts([20, 33, 17])
    want = [reference(exact, adapters, mix, p) for mix, p in zip(mixes, ids, strict=True)]
    model = FAMILIES["llama3"]().bfloat16()
    own = [reference(model, adapters, mix, p) for mix, p in zip(mixes, ids, strict=True)]
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    assert runner.how == "fused", runner.why
    ready = {name: runner.prepare(a, name) for name, a in adapters.items()}
    got = serve(runner, [(p, [(ready[n], s) for n, s in mix]) for p, mix in zip(ids, mixes, strict=True)], [7, 16])
    for g, o, w in zip(got, own, want, strict=True):
        assert (g.double() - w.double()).norm() <= 2 * (o.double() - w.double()).norm()
    runner.close()


def recurrent() -> Any:
    """Return a model with layers that carry state from token to token."""
    from transformers import AutoModelForCausalLM, Lfm2Config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256}
        layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
        config = Lfm2Config(**sizes, **layers, num_attention_heads=4, num_key_value_heads=2)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_recurrent_layers_run_each_sequence_alone() -> None:
    model = recurrent()
    mixes: Mixes = [[], [("a", 1.0)]]
    runner, _ = check_rows(model, {"a": trained(model, 1)}, mixes, prompts([20, 33]), [7, 16, 1], how="alone")
    assert not runner.shares
    runner.close()


def test_a_cache_that_is_too_small_is_refused() -> None:
    with pytest.raises(Exception, match="blocks of 16 tokens"):
        Runner(base_of(FAMILIES["llama3"]()), cache_bytes=1000)


# -- batch-invariant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_batch_invariant_results_equal_single_requests(family: str) -> None:
    """A row's logits do not depend on the rest of the batch or on how the prompt is split into chunks.

    The adapters include DoRA and a LoRA of the output head."""
    model = FAMILIES[family](hidden_size=64, intermediate_size=96).bfloat16()
    lora = trained(model, 1, targets=("all-linear", "lm_head"))
    dora = trained(model, 2, dora=True)
    runner = Runner(base_of(model), cache_bytes=1 << 20, batch_invariant=True)
    a, b = runner.prepare(lora, "a"), runner.prepare(dora, "b")
    ids = prompts([41, 5, 17, 64, 30, 1, 9, 77, 33])
    mixes = [[(a, 1.0)], [], [(b, 0.5)], [(a, 1.0), (b, -1.0)], [(a, 0.3)], [(a, 1.0)], [], [(b, 1.0)], [(a, 1.0)]]
    work = list(zip(ids, mixes, strict=True))
    alone = [serve(runner, [one], [100])[0] for one in work]
    for cuts in ([100], [1], [7, 3, 20, 1], [16]):
        for got, want in zip(serve(runner, work, cuts), alone, strict=True):
            assert torch.equal(got, want)
    runner.close()


def test_bases_that_cannot_be_batch_invariant_are_refused() -> None:
    with pytest.raises(ConfigError, match="a base of the Llama architecture; this one runs packed"):
        Runner(base_of(FAMILIES["gemma3"]()), cache_bytes=1 << 20, batch_invariant=True)
    model = FAMILIES["llama3"]()
    runner = Runner(base_of(model), cache_bytes=1 << 20, batch_invariant=True)
    whole = Adapter(modules={"model.norm": {"weight": torch.ones(model.config.hidden_size)}})
    assert any("which a batch-invariant base does not support" in p for p in runner.problems(whole))
    runner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OTHERS)
def test_sinks_caps_and_states_equal_the_models(family: str, dtype: torch.dtype) -> None:
    model = OTHERS[family]().to(dtype)
    how = "alone" if family in ("gpt_oss", "qwen3_next", "deepseek_v3") else "packed"
    ids, tolerance = prompts([1, 20, 33, 40]), 2e-5 if dtype == torch.float32 else 0.05
    runner, _ = check_rows(model, {}, [[]] * 4, ids, [7, 16, 1, 30], how=how, tolerance=tolerance)
    runner.close()


def test_heads_of_two_sizes_serve_mixed_adapters() -> None:
    model = OTHERS["gemma4"]()
    adapters = {str(i): trained(model, i) for i in range(2)}
    mixes: Mixes = [[], [("0", 1.0)], [("0", 0.5), ("1", -1.0)]]
    runner, _ = check_rows(model, adapters, mixes, prompts([9, 40, 33]), [7, 16, 1, 30], how="packed")
    runner.close()


def test_unsupported_attention_is_not_paged() -> None:
    """Paged attention would ignore a keyword argument that the attention hook does not know."""
    model = FAMILIES["gemma3"]()
    for layer in model.model.layers:
        original = type(layer.self_attn).forward

        def forward(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs, position_bias=torch.zeros(1))

        layer.self_attn.__class__ = type("OwnAttention", (type(layer.self_attn),), {"forward": forward})
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    assert runner.how == "alone"
    assert "position_bias" in runner.why
    runner.close()


# -- the probe that chooses a forward path -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_one_wrong_token(dtype: torch.dtype) -> None:
    """An error in the last layer affects no later token, so the probe must compare the logits of every token."""
    model = FAMILIES["llama3"]().to(dtype)
    mlp = model.model.layers[-1].mlp
    original = type(mlp).forward

    def forward(self: Any, x: Tensor) -> Tensor:
        out = original(self, x)
        if x.shape[1] > 4:
            out[:, 3] += 0.5 * out.abs().amax()
        return out

    mlp.__class__ = type("OwnMLP", (type(mlp),), {"forward": forward})
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    assert runner.how == "alone"
    assert "the largest logit of token" in runner.why
    runner.close()


def test_the_probe_finds_a_longer_window() -> None:
    """This model family passes the window to attention only through the mask."""
    model = FAMILIES["gemma3"](sliding_window=64)
    for layer in model.model.layers:
        original = type(layer.self_attn).forward

        def forward(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            window, self.sliding_window = self.sliding_window, None
            try:
                return original(self, *args, **kwargs)
            finally:
                self.sliding_window = window

        layer.self_attn.__class__ = type("OwnAttention", (type(layer.self_attn),), {"forward": forward})
    (ids,) = prompts([100])
    want = reference(model, {}, [], ids)
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    same(serve(runner, [(ids, [])], [30, 1])[0], want)
    assert runner.how == "alone"
    runner.close()


@pytest.mark.parametrize(("context", "how"), [(256, "alone"), (64, "packed")])
def test_llama_4_keeps_chunks_for_longer_sequences(context: int, how: str) -> None:
    model = FAMILIES["llama4"]()  # attention chunks of 64 tokens
    (ids,) = prompts([min(context, 100)])
    want = reference(model, {}, [], ids)
    runner = Runner(replace(base_of(model), context=context), cache_bytes=1 << 20)
    assert runner.how == how, runner.why
    same(serve(runner, [(ids, [])], [30, 1])[0], want)
    runner.close()
