"""Functions available with `import veneer`."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import veneer
from tests.tiny_base import tiny_base_dir
from veneer.models.text.base import TextBase
from veneer.models.text.generate import complete
from veneer.train.text.save import RunResult


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TextBase:
    return veneer.load_base(str(tiny_base_dir(tmp_path_factory.mktemp("base"))))


def test_generate_has_the_options_of_complete(base: TextBase) -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (veneer.generate, complete))
    assert {name: each.default for name, each in theirs.items() if name not in ("base", "prompts")} == {
        name: ours[name].default for name in theirs if name not in ("base", "prompts")
    }
    with pytest.raises(TypeError, match="temprature"):
        veneer.generate(base, ["Hello"], temprature=1.0)  # type: ignore[call-arg]


def test_mix_library_and_jobs_need_no_other_import(base: TextBase, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        veneer.save_adapter(veneer.create(base.model, veneer.LoraSpec(rank=2), seed=seed), tmp_path / name, base)
    made = veneer.mix([f"{tmp_path / 'a'}:0.5", str(tmp_path / "b")], tmp_path / "both")
    with veneer.open_library(tmp_path / "library") as library:
        assert library.add(tmp_path / "both", "both").version.digest == made.digest
    with veneer.open_jobs(tmp_path / "library") as jobs:
        assert callable(veneer.submit)
        assert jobs.jobs(None)[0] == []
    assert callable(veneer.train_together)


def test_repr_of_results_is_short(base: TextBase) -> None:
    adapter = veneer.create(base.model, veneer.LoraSpec(rank=4), seed=0)
    run = RunResult(adapter="runs/a", preflight={"sample": ["a long row"] * 1000})
    for shown in (base, adapter, next(iter(adapter.pairs.values())), run):
        assert len(repr(shown)) < 1000, repr(shown)
    assert repr(adapter) == "Adapter(14 × pair, rank 4)"
