"""The runner with `--compute int8`: long rows run in 8 bits under every mix, and other rows do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES
from tests.serve.forward.test_runner import Mixes, base_of, loha, prompts, reference, trained
from tests.serve.forward.test_runner_quantized import model_in
from veneer.core.adapter import Adapter
from veneer.errors import ConfigError
from veneer.serve.forward.paged import BLOCK
from veneer.serve.forward.runner import INT8_ROWS, Prepared, Runner, RunnerRow

LONG, SHORT = (INT8_ROWS, 2 * INT8_ROWS + 5, INT8_ROWS + 20, INT8_ROWS + 1), (INT8_ROWS - 1, 5)
LOW_RANK: Mixes = [[], [("a", 1.0)], [("a", 0.7), ("b", 0.4)], [("b", -0.5)]]


def model_of() -> Any:
    return FAMILIES["llama3"](hidden_size=64, intermediate_size=96).bfloat16()


def adapters_of(model: Any) -> dict[str, Adapter]:
    return {"a": trained(model, 1), "b": trained(model, 2, dora=True)}


def served(adapters: dict[str, Adapter], mixes: Mixes, ids: list[list[int]], int8: bool, alone: bool) -> list[Tensor]:
    """Return each row's last logits, computed in one step, or in a step of its own."""
    runner = Runner(base_of(model_of()), cache_bytes=1 << 21, int8=int8)
    assert runner.how == "fused", runner.why
    ready: dict[str, Prepared] = {name: runner.prepare(a, name) for name, a in adapters.items()}
    rows, used = [], 0
    for own, mix in zip(ids, mixes, strict=True):
        need = -(-len(own) // BLOCK)
        rows.append(RunnerRow(own, 0, range(used, used := used + need), [(ready[n], s) for n, s in mix]))
    steps = [[row] for row in rows] if alone else [rows]
    out = [logits.clone() for step in steps for logits in runner.run(step)]
    runner.close()
    return out


def test_long_rows_are_near_the_exact_result_under_every_mix() -> None:
    """Codes with the step max|x|/127 round about 7 times as coarsely as bfloat16's 8 bits, for normal x."""
    exact, ids = FAMILIES["llama3"](hidden_size=64, intermediate_size=96), prompts(LONG)
    adapters = adapters_of(exact)
    got, plain = (served(adapters, LOW_RANK, ids, int8, alone=False) for int8 in (True, False))
    for mix, own, g, p in zip(LOW_RANK, ids, got, plain, strict=True):
        want = reference(exact, adapters, mix, own)
        assert (g - want).norm() <= 10 * (p - want).norm()
        assert not torch.equal(g, p)


def test_short_rows_and_adapters_without_low_rank_form_stay_in_16_bits() -> None:
    """This also holds if the same step has a long row."""
    model = model_of()
    adapters = adapters_of(model)
    adapters["c"] = Adapter(
        deltas={"model.layers.0.mlp.down_proj.weight": loha(model.model.layers[0].mlp.down_proj, 3)}
    )
    ids, mixes = prompts((*SHORT, LONG[1], LONG[0])), [[("a", 1.0)], [], [("c", 1.0)], [("a", 1.0)]]
    got, plain = (served(adapters, mixes, ids, int8, alone=False) for int8 in (True, False))
    assert [torch.equal(g, p) for g, p in zip(got, plain, strict=True)] == [True, True, True, False]


def test_a_long_row_does_not_depend_on_the_other_rows() -> None:
    """Activations are quantized token by token."""
    adapters, ids = adapters_of(model_of()), prompts(LONG)
    together, alone = (served(adapters, LOW_RANK, ids, True, alone=alone) for alone in (False, True))
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize(
    ("model", "more"),
    [
        (lambda: model_in("nf4", dtype=torch.bfloat16), {}),
        (model_of, {"batch_invariant": True}),
        (FAMILIES["gemma3"], {}),
    ],
)
def test_other_bases_and_settings_are_refused(model: Any, more: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="Llama-like base"):
        Runner(base_of(model()), cache_bytes=1 << 20, int8=True, **more)
