"""A base whose weights serving rounds to 8 or 4 bits, with adapters beside them."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES
from tests.serve.forward.test_runner import base_of, prompts, serve, trained
from veneer.errors import ConfigError
from veneer.serve.forward.runner import Runner


def test_a_vocabulary_of_any_size_is_served_in_int8() -> None:
    model = FAMILIES["llama3"](hidden_size=64, intermediate_size=96, vocab_size=161).bfloat16()
    ((ids,), rows) = prompts([20]), []
    for weights in ("dense", "int8"):
        runner = Runner(base_of(model), cache_bytes=1 << 20, weights=weights)  # type: ignore[arg-type]
        rows.append(serve(runner, [(ids, [])], [7, 16])[0].double())
        runner.close()
    assert len(rows[1]) == 161
    assert (rows[1] - rows[0]).norm() <= 0.1 * rows[0].norm()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_base_with_adapters_is_its_rounded_weights_with_them(kind: str) -> None:
    model = FAMILIES["llama3"](hidden_size=64, intermediate_size=96, tie_word_embeddings=True).bfloat16()
    adapters = {"a": trained(model, 1), "b": trained(model, 2, dora=True)}
    runner = Runner(base_of(model), cache_bytes=1 << 20, weights=kind)  # type: ignore[arg-type]
    assert all(w.is_meta for n, w in model.named_parameters() if n.endswith("_proj.weight"))
    twin = FAMILIES["llama3"](hidden_size=64, intermediate_size=96, tie_word_embeddings=False).bfloat16()
    twin.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data
    own = dict(twin.named_modules())
    own["model.norm"].weight.data = model.model.norm.weight.data
    for i, layer in enumerate(model.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(twin.model.layers[i], name).weight.data = getattr(layer, name).weight.data
    for group in runner.layout.groups:
        for i, name in enumerate(group.modules):
            own[name].weight.data = group.weight(i).clone()
    dense = Runner(base_of(twin), cache_bytes=1 << 20)
    mixes: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("a", 0.5), ("b", 1.0)]]
    ids = prompts([20, 33, 17])
    out = []
    for each in (runner, dense):
        ready = {name: each.prepare(a, name) for name, a in adapters.items()}
        work = [(p, [(ready[n], s) for n, s in mix]) for p, mix in zip(ids, mixes, strict=True)]
        out.append(serve(each, work, [7, 16]))
        each.close()
    for g, w in zip(*out, strict=True):
        assert (g.double() - w.double()).norm() <= 0.04 * w.double().norm()


def test_what_a_quantized_base_cannot_serve_is_said() -> None:
    from veneer.core.adapter import Adapter

    model = FAMILIES["llama3"](hidden_size=64, intermediate_size=96).bfloat16()
    norms = Adapter(modules={"model.norm": {"weight": model.model.norm.weight.detach().clone()}})
    runner = Runner(base_of(model), cache_bytes=1 << 20, weights="int8")
    assert runner.problems(norms) == ["model.norm: a full copy, which a base in int8 cannot have"]
    with pytest.raises(ConfigError, match="runs packed"):
        Runner(base_of(FAMILIES["gemma3"]().bfloat16()), cache_bytes=1 << 20, weights="int8")
    with pytest.raises(ConfigError, match="float32"):
        Runner(base_of(FAMILIES["llama3"]()), cache_bytes=1 << 20, weights="int8")
