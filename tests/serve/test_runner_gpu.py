"""The runner on a CUDA device: the same laws, in torch's own operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.families import FAMILIES
from tests.serve.forward.test_runner import base_of, prompts, reference, same, serve, trained
from veneer.serve.forward.runner import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "mixtral"])
def test_every_row_as_if_it_were_alone(family: str) -> None:
    model = FAMILIES[family]()
    exclude = ("*.experts",) if family == "mixtral" else ()
    adapters = {
        "a": trained(model, 1),
        "b": trained(model, 2, rank=5),
        "c": trained(model, 3, dora=True, exclude=exclude),
    }
    mixes: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("a", 0.7), ("b", 0.4)], [("c", 0.5), ("a", 1.0)]]
    ids = prompts([20, 33, 17, 40])
    want = [reference(model, adapters, mix, p) for mix, p in zip(mixes, ids, strict=True)]
    model.to("cuda")
    runner = Runner(replace(base_of(model), device=torch.device("cuda")), cache_bytes=1 << 20)
    ready = {name: runner.prepare(a, name) for name, a in adapters.items()}
    work = [(p, [(ready[n], s) for n, s in mix]) for p, mix in zip(ids, mixes, strict=True)]
    for g, w in zip(serve(runner, work, [7, 16, 1, 30]), want, strict=True):
        same(g.cpu(), w, 1e-3)
    runner.close()


def test_decoding_that_is_recorded_gives_what_it_gives_otherwise() -> None:
    model = FAMILIES["qwen3"]()
    adapters = {"a": trained(model, 1), "b": trained(model, 2, rank=5)}
    model.to("cuda")
    base = replace(base_of(model), device=torch.device("cuda"))
    recorded, plain = (Runner(base, cache_bytes=1 << 20) for _ in range(2))
    plain.graphs = None
    ids = prompts([5, 17, 9])
    mixes: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("a", 0.7), ("b", 0.4)]]
    got, want = [], []
    for runner, out in ((recorded, got), (plain, want)):
        ready = {name: runner.prepare(a, name) for name, a in adapters.items()}
        for turn in range(3):  # another mix for each row, over the same pages
            work = [(p, [(ready[n], s) for n, s in mixes[(i + turn) % 3]]) for i, p in enumerate(ids)]
            out += serve(runner, work, [4, 1, 1, 1, 1, 1])
    assert recorded.graphs is not None
    assert recorded.graphs.problem == ""
    assert recorded.graphs.sizes >= 1
    for g, w in zip(got, want, strict=True):
        same(g.cpu(), w.cpu(), 1e-3)
    recorded.close()
    plain.close()
