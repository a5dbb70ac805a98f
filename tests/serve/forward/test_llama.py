"""Computing all decoder layers in one call gives the same bits as computing each layer separately.

This holds for any batch.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES
from tests.serve.forward.test_runner import base_of, prompts, serve, trained
from veneer.ops.cpu import build, compiled
from veneer.ops.weight_panels import panels_here
from veneer.serve.forward.llama import LlamaForward
from veneer.serve.forward.runner import Prepared, Runner

pytestmark = pytest.mark.skipif(not panels_here(16), reason="no kernels for a decoder on this processor")
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
BASES: dict[str, Any] = {
    "llama": lambda: FAMILIES["llama3"](**SHAPE),
    "biases": lambda: FAMILIES["llama3"](**SHAPE, attention_bias=True),
    "a window": lambda: FAMILIES["mistral"](**SHAPE, sliding_window=12),
    "norms of q and k": lambda: FAMILIES["qwen3"](**SHAPE),
    "joined": lambda: FAMILIES["phi3"](**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
}


def runner_of(name: str) -> tuple[Runner, LlamaForward, dict[str, Prepared]]:
    model = BASES[name]().bfloat16()
    for part in model.modules():  # make biases and norms nonzero, so that they have an effect
        for key in ("bias", "weight"):
            own = getattr(part, key, None)
            if isinstance(own, Tensor) and own.ndim == 1:
                own.data += 0.3 * torch.randn(own.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    adapters = {n: trained(model, i, rank=3 + 14 * i) for i, n in enumerate("ab")}
    adapters["dora"] = trained(model, 7, dora=True)
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    assert runner.how == "fused", runner.why
    return runner, runner.llama, {n: runner.prepare(a, n) for n, a in adapters.items()}


def line_by_line(runner: Runner, patch: pytest.MonkeyPatch) -> None:
    """Make the runner compute layers separately, as if decoder.c were missing."""
    usable = compiled.usable
    patch.setattr(compiled, "usable", lambda names, *tensors: None if names == "decode" else usable(names, *tensors))
    runner.llama = replace(runner.llama)
    assert runner.llama.decode_table is None


def answers(runner: Runner, adapters: dict[str, Prepared], lengths: tuple[int, ...] = (1, 20, 33, 70)) -> list[Tensor]:
    mixes: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("b", -0.5), ("a", 0.7)], []]
    work = [(p, [(adapters[n], s) for n, s in mix]) for p, mix in zip(prompts(lengths), mixes, strict=True)]
    return serve(runner, work, [7, 40, 1, 30])


@pytest.mark.parametrize("name", BASES)
def test_fused_layers_equal_separate_layers_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, llama, adapters = runner_of(name)
    assert llama.decode_table is not None
    together = answers(runner, adapters)
    line_by_line(runner, monkeypatch)
    apart = answers(runner, adapters)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_fused_layers_equal_separate_layers_with_avx2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX512-BF16, weights in bfloat16 are multiplied in float32. The runner checks the logits."""
    if not any("avx2" in line.split() for line in build.processor_features()):
        pytest.skip("this processor has no AVX2")
    library, here = tmp_path / "native.so", Path(compiled.__file__).parent
    sources = [here / source for source in compiled.SOURCES]
    build.compile_kernels(
        build.find_compiler("CC", ("cc", "gcc", "clang"))[0], sources, library, ["-march=x86-64-v3", "-O1"]
    )
    older = compiled.load_library(library)
    monkeypatch.setattr(compiled, "kernels", lambda: older)
    runner, llama, adapters = runner_of("norms of q and k")
    assert llama.decode_table.run is older.decode
    at_once = answers(runner, adapters)
    line_by_line(runner, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(at_once, answers(runner, adapters), strict=True))


def test_a_dora_does_not_change_other_rows() -> None:
    """A batch with a DoRA adapter computes the layers separately."""
    runner, _, adapters = runner_of("llama")
    alone = answers(runner, adapters)
    ids = prompts((1, 20, 33, 70))
    work: list[Any] = [
        (ids[0], []),
        (ids[1], [(adapters["a"], 1.0)]),
        (ids[2], [(adapters["dora"], 1.0)]),
        (ids[3], []),
    ]
    mixed = serve(runner, work, [7, 40, 1, 30])
    assert all(torch.equal(alone[i], mixed[i]) for i in (0, 1, 3))


def test_results_do_not_depend_on_the_thread_count() -> None:
    runner, _, adapters = runner_of("llama")
    found: dict[int, list[Tensor]] = {}
    before = torch.get_num_threads()

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        found[threads] = answers(runner, adapters)

    for n in (1, 2, 5):
        thread = threading.Thread(target=run, args=(n,))
        thread.start()
        thread.join()
    torch.set_num_threads(before)
    for n in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(found[1], found[n], strict=True))


def test_bases_without_panels_run_layer_by_layer() -> None:
    model = FAMILIES["llama3"](**(SHAPE | {"intermediate_size": 90})).bfloat16()
    runner = Runner(base_of(model), cache_bytes=1 << 20)
    assert runner.how == "fused", runner.why
    assert runner.llama.decode_table is None
    (got,) = serve(runner, [(prompts((20,))[0], [])], [20])
    with torch.no_grad():
        want = model(input_ids=torch.tensor(prompts((20,)))).logits[0, -1]
    assert (got - want).abs().max() <= 0.04 * want.abs().max()
