"""Parts of preflight that all runs share: the report, parameter counts of a base, and memory limits."""

from __future__ import annotations

import psutil
import pytest
import torch

from tests.families import FAMILIES, MOE_FAMILIES
from veneer.core.init import create
from veneer.core.targets import resolve_targets
from veneer.train.config.load import config_from
from veneer.train.preflight import (
    Finding,
    Report,
    available_memory,
    free_memory,
    memory_finding,
    recomputes,
    trainable_parameters,
)

VALUES = {"base": "tiny", "data": {"train": "d.jsonl"}, "output": "o"}


def test_errors_come_before_warnings_in_any_order() -> None:
    report = Report()
    report.add(Finding("ok", "a", "fine"), Finding("warn", "b", "hm"))
    report.add(Finding("stop", "c", "no", "do this"), Finding("warn", "d", "hm too"))
    assert [f.check for f in report.findings] == ["c", "b", "d", "a"]
    assert report.text().splitlines()[-2:] == ["STOP  no", "      fix: do this"]


def test_activations_are_recomputed_above_nine_tenths_of_memory() -> None:
    assert [recomputes("auto", need, 100)[0] for need in (90, 91, None)] == [False, True, False]
    assert [recomputes(mode, need, 100) for mode, need in (("on", 1), ("off", 1000))] == [(True, ""), (False, "")]


def test_a_run_that_does_not_fit_stops_unless_forced() -> None:
    assert memory_finding(100, 100, "so", fix="less", force=False).level == "ok"
    found = memory_finding(2_000_000_000, 1_000_000_000, "so", fix="less", force=False)
    assert (found.level, found.fix) == ("stop", "less")
    assert found.text == "this run does not fit: it needs about 2.0 GB in addition to the base, but 1.0 GB are free; so"
    assert memory_finding(101, 100, "so", fix="less", force=True).level == "warn"


def test_a_memory_limit_bounds_free_memory() -> None:
    config, limited = config_from(VALUES)[0], config_from(VALUES, ["memory.limit_gb=0.5"])[0]
    device = torch.device("cpu")
    assert available_memory(config, device, 1000) == available_memory(limited, device, 1000) == 1000
    assert available_memory(limited, device, 1 << 40) == 500_000_000


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    "extra", [[], ["adapter.dora=true"], ["adapter.targets=[q_proj, embed_tokens]"], ["adapter.kind=lokr"]]
)
def test_trainable_parameter_count_equals_created_adapter(family: str, extra: list[str]) -> None:
    model = FAMILIES[family]()
    if family == "phi3":
        extra = [e.replace("q_proj", "qkv_proj") for e in extra]
    if family in MOE_FAMILIES and extra in (["adapter.dora=true"], ["adapter.kind=lokr"]):
        pytest.skip("DoRA and LoKr are not for experts")
    pattern = ["adapter.rank_pattern={embed_tokens: 3}"] if "embed" in str(extra) else []
    spec = config_from(VALUES, [*extra, *pattern])[0].adapter.spec()
    pairs, whole = trainable_parameters(model, resolve_targets(model, spec), spec)
    adapter = create(model, spec, seed=0)
    assert pairs + whole == sum(t.numel() for _, t in adapter.tensors())


def test_free_memory_is_at_most_total_memory() -> None:
    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total
