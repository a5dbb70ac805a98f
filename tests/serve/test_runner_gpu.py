"""The runner on a CUDA device, with torch's own operations: the same rules hold as on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.families import FAMILIES
from tests.serve.forward.test_runner import adapters_of, base_of, prompts, reference, same, serve
from veneer.serve.forward.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "mixtral"])
def test_each_rows_result_equals_the_row_alone(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """The reference uses the same weights in float32. On a CPU, bfloat16 logits differ by at most 0.03."""
    model = FAMILIES[family]().to(torch.bfloat16).float()
    adapters = adapters_of(model, family)
    mixes: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("a", 0.7), ("b", 0.4)], [("c", 0.5), ("a", 1.0)]]
    ids = prompts([20, 33, 17, 40])
    want = [reference(model, adapters, mix, p) for mix, p in zip(mixes, ids, strict=True)]
    model.to("cuda", dtype)
    runner = Runner(replace(base_of(model), device=torch.device("cuda")), cache_bytes=1 << 20)
    ready = {name: runner.prepare(a, name) for name, a in adapters.items()}
    work = [(p, [(ready[n], s) for n, s in mix]) for p, mix in zip(ids, mixes, strict=True)]
    for g, w in zip(serve(runner, work, [7, 16, 1, 30]), want, strict=True):
        same(g.cpu(), w, tolerance)
    runner.close()
