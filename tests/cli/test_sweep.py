"""`veneer sweep`: the table, the JSON object, and errors of an invalid grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import run
from tests.tiny_base import tiny_base_dir


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_base_dir(folder)
    rows = [{"prompt": f"Where is parcel {i}?", "completion": f"Shelf {i % 7}."} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "run.yaml").write_text(
        "base: ./tiny-base\ndata: {train: rows.jsonl, split: 4}\noutput: out\nbatching: {rows: 4}\n"
        "schedule: {steps: 2}\noptimizer: {learning_rate: 1e-2}\n"
    )
    return folder / "run.yaml"


def test_the_results_are_printed_as_a_table(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, "sweep", str(config), "adapter.rank=2,3", f"output={tmp_path}")
    lines = out.splitlines()
    assert lines[0].split() == ["adapter.rank", "validation", "loss", "kept", "step"]
    assert sorted(line.split()[0] for line in lines[1:]) == ["2", "3"]
    assert f"report   {tmp_path / 'sweep.html'}" in err
    assert "rank=3: step 2/2" in err
    made = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["adapter"] for run in made["runs"]] == [str(tmp_path / run["name"]) for run in made["runs"]]
    assert all((tmp_path / run["name"] / "adapter_model.safetensors").is_file() for run in made["runs"])


@pytest.mark.parametrize(
    ("settings", "says"), [(["adapter.rank=2"], "nothing is swept"), (["base.dtype=float32,bfloat16"], "base.dtype")]
)
def test_invalid_sweep_values_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], says: str
) -> None:
    assert says in run(capsys, "sweep", str(config), *settings, f"output={tmp_path}", code=2).err
    assert not list(tmp_path.iterdir())
