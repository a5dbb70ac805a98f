"""Sweeps: the grid, the adapter of each combination, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.tiny_base import tiny_base_dir
from veneer.errors import ConfigError
from veneer.formats.peft import read_folder
from veneer.models.text.base import TextBase, load_text
from veneer.train.text.save import RunResult
from veneer.train.text.sweep import grid, run_sweep


def test_grid_has_every_combination() -> None:
    combinations = grid(
        ["adapter.rank=2,4", "schedule.steps=3", "adapter.targets=[q_proj,v_proj],all-linear", "seed=1"]
    )
    targets = ("_q_proj_v_proj_", "all-linear")
    assert [c.name for c in combinations] == [f"rank={rank},targets={t}" for rank in (2, 4) for t in targets]
    expected = ["schedule.steps=3", "seed=1", "adapter.rank=2", "adapter.targets=[q_proj,v_proj]"]
    assert combinations[0].overrides == expected
    assert grid(["data.limit=5,6", "evaluation.limit=1,2"])[0].name == "data.limit=5,evaluation.limit=1"
    alike = [c.name for c in grid([f"data.train=a/b,a_b,{'x' * 300},{'x' * 301}"])]
    assert len(set(alike)) == 4
    assert max(map(len, alike)) < 200  # long folder names are shortened


INVALID_GRIDS = [
    (["seed=1"], "nothing is swept"),
    (["seed=" + "1," * 300], "301 comb"),
    (["seed=1,2,1"], "seed=1 is given twice"),
    (["seed=1,2", "seed=3,4"], "seed is given twice"),
    (["output.directory=a,b"], "output cannot be swept"),
    (["seed=1,2", "output=a,b"], "output cannot be swept"),
]


@pytest.mark.parametrize(("settings", "says"), INVALID_GRIDS)
def test_invalid_grids_are_refused(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        grid(settings)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    rows = [{"prompt": f"Where is parcel {i}?", "completion": f"Shelf {i % 3}."} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = {"base": str(tiny_base_dir(folder)), "data": {"train": "rows.jsonl", "split": 4}, "output": "out"}
    values |= {
        "batching": {"rows": 2},
        "schedule": {"steps": 8},
        "evaluation": {"every": 2},
        "checkpoint": {"every": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def base(config: Path) -> TextBase:
    return load_text(str(config.parent / "tiny-base"))


def test_every_combination_has_an_adapter_and_a_row(config: Path, base: TextBase, tmp_path: Path) -> None:
    settings = ["adapter.rank=2,4", "optimizer.learning_rate=1e-4,1e-2", f"output={tmp_path}"]
    made = run_sweep(config, settings, base=base)
    assert all(isinstance(result, RunResult) for result in made.results)
    rows = made.rows()
    losses = [row["validation"] for row in rows]
    assert losses == sorted(losses)
    assert {(row["adapter.rank"], row["optimizer.learning_rate"]) for row in rows[:2]} == {("2", "1e-2"), ("4", "1e-2")}
    for row in rows:
        assert Path(row["adapter"]).name == row["name"]
        ranks = {pair.rank for pair in read_folder(Path(row["adapter"]), base.model).pairs.values()}
        assert ranks == {int(row["adapter.rank"])}
    page = Path(made.report).read_text()
    assert page.count("<tr>") == 5
    assert "<svg" in page
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(made.to_dict()))


def test_seeds_share_their_held_out_rows(config: Path, base: TextBase, tmp_path: Path) -> None:
    made = run_sweep(config, ["seed=0,1", "schedule.steps=2", f"output={tmp_path}"], base=base)
    first, second = made.results
    assert isinstance(first, RunResult)
    assert isinstance(second, RunResult)
    assert first.validation_before == second.validation_before
    assert first.validation != second.validation


INCOMPARABLE_SWEEPS = [
    (["preference.loss=dpo", "preference.beta=0.1,0.5"], "different preference.beta"),
    (["preference.loss=dpo,simpo"], "different preference.loss"),
    (["preference.loss=dpo", "adapter.start=a,b"], "different adapter.start"),
    (["data.train_on=assistant,all"], "different data.train_on"),
    (["data.split_seed=0,1"], "different data.split_seed"),
    (["data.max_length=64,128"], "different data.max_length"), (["evaluation.rows=2,4"], "different evaluation.rows"),
    (["data.limit=20,24"], "set data.validation"), (["data.validation=a.jsonl,b.jsonl", "data.split=null"], "data"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), INCOMPARABLE_SWEEPS)
def test_incomparable_sweeps_are_refused(config: Path, settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match="not comparable") as caught:
        run_sweep(config, settings)
    assert says in str(caught.value)


def test_training_rows_can_differ_with_common_validation(config: Path, base: TextBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"Where is letter {i}?", "completion": "Here."} for i in range(3)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data.limit=8,16", f"data.validation={tmp_path / 'held.jsonl'}", "data.split=null", "seed=0,1"]
    made = run_sweep(config, [*settings, "schedule.steps=1", f"output={tmp_path}"], base=base)
    assert len({row["validation_before"] for row in made.rows()}) == 1
