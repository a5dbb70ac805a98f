"""`inspect_run` and the row previews agree with the run; each row's preview shows how the run uses the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_base import tiny_base_dir
from tests.tiny_image_base import tiny_image_base
from tests.train.tiny_pictures import drawings
from veneer.errors import DataError
from veneer.jobs.validate import this_device
from veneer.models.text.base import load_text
from veneer.train.config.load import config_from
from veneer.train.config.text import TrainConfig
from veneer.train.image.captions import write_caption
from veneer.train.image.pictures import read_pictures
from veneer.train.inspect import inspect_run, inspection_text, preview_picture, preview_pictures, preview_rows
from veneer.train.text.data import read_data

ANSWER = "Shelf 3, on the left."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base_dir(tmp_path_factory.mktemp("preview"))


def config(base: Path, rows: list[Any], folder: Path, **data: Any) -> TrainConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, _ = config_from({"base": str(base), "data": {"train": str(file), **data}, "output": str(folder / "out")})
    return made


def row(text: str, answer: str = ANSWER) -> dict[str, str]:
    return {"prompt": text, "completion": answer}


def test_counts_for_few_rows_equal_the_runs(base: Path, tmp_path: Path) -> None:
    chosen = config(base, [row(f"Where is parcel {i}?") for i in range(30)], tmp_path)
    look = inspect_run(chosen, device=this_device())
    data = read_data(chosen, load_text(str(base)))
    tokens = sum(item.tokens for item in data.train.items)
    assert (look.rows, look.looked) == (30, 30)
    assert look.plan.job.rows * look.plan.job.tokens_per_row == pytest.approx(tokens)
    assert not any("first" in guess for guess in look.guesses)
    learned = "".join(text for text, learned in look.sample if learned)
    assert ANSWER in learned
    assert "parcel" not in learned
    assert {"learned", "end", "template", "held out"} <= {finding.check for finding in look.findings}
    assert "It fits" in inspection_text(look) or "fits" in inspection_text(look)


def test_many_rows_are_sampled_and_changed_files_read_again(base: Path, tmp_path: Path) -> None:
    chosen = config(base, [row(f"Where is parcel {i:04}?") for i in range(400)], tmp_path, split=200)
    look = inspect_run(chosen, rows=40, device=this_device())
    assert (look.rows, look.looked) == (400, 40)
    assert "only the first 40 rows of 400" in look.guesses[0]
    assert look.plan.job.rows == pytest.approx(200, abs=20)
    config(base, [row("")], tmp_path)
    broken = inspect_run(chosen, rows=40, device=this_device())
    assert broken.stops
    assert "prompt` is empty" in broken.findings[0].text


def test_each_row_is_shown_with_its_verdict(base: Path, tmp_path: Path) -> None:
    rows = [row(f"Where is parcel {i}?") for i in range(30)]
    rows[3] = row("Where? " * 80)
    rows[5] = {"prompt": "no answer"}  # type: ignore[dict-item]
    rows[7] = row("")
    chosen = config(base, rows, tmp_path, max_length=200, long_rows="drop")
    seen = preview_rows(chosen, limit=100)
    assert [one.where.rpartition(":")[2] for one in seen.rows] == [str(i + 1) for i in range(30)]
    assert seen.rows[3].verdict == "left out"
    assert "more than data.max_length, 200" in seen.rows[3].why
    assert {seen.rows[i].verdict for i in (5, 7)} == {"unusable"}
    assert "completion" in seen.rows[5].why
    (held,) = [one for one in seen.rows if one.verdict == "held out"]
    usable = [each for i, each in enumerate(rows) if i not in (5, 7)]
    good = config(base, usable, tmp_path, max_length=200, long_rows="drop")
    data = read_data(good, load_text(str(base)))
    assert data.held_out.rows[0].messages[0]["content"] in held.said  # the row that the run holds out
    assert seen.counts["learned"] == len(data.train.items)
    learned = [one for one in seen.rows if one.verdict == "learned"]
    assert [one.tokens for one in learned] == [item.tokens for item in data.train.items]
    assert sum(len(text) for text, on in learned[0].pieces if on) >= len(ANSWER)
    page = preview_rows(config(base, rows, tmp_path, max_length=200, long_rows="drop"), limit=2, verdicts=["unusable"])
    assert [one.where.rpartition(":")[2] for one in page.rows] == ["6", "8"]
    cut = preview_rows(config(base, rows, tmp_path, max_length=100, long_rows="cut"), limit=100)
    assert cut.rows[3].verdict == "cut"


def test_pairs_are_one_row_of_the_table(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Parcel {i}?", "chosen": ANSWER, "rejected": "I do not know."} for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    made, _ = config_from(
        {"base": str(base), "data": {"train": str(file)}, "preference": {"loss": "dpo"}, "output": str(tmp_path / "o")}
    )
    seen = preview_rows(made)
    assert (len(seen.rows), seen.format) == (4, "preference")
    assert "".join(text for text, on in seen.rows[0].pieces if on).count("I do not know.") == 1


def test_images_are_shown_with_crops_and_changed_captions(tmp_path: Path) -> None:
    folder = drawings(tmp_path / "drawings")
    data = {"pictures": str(folder), "resolution": 32, "buckets": False, "split": 1}
    values = {"base": str(tiny_image_base(tmp_path, "sdxl")), "output": str(tmp_path / "o"), "data": data}
    made, _ = config_from(values)
    seen = preview_pictures(made)
    assert {one.name for one in seen} == {f"{i}.png" for i in range(6)}
    assert [one.verdict for one in seen].count("held out") == 1
    wide = next(one for one in seen if (one.width, one.height) == (48, 32) and one.crop is not None)
    left, top, width, height = wide.crop
    assert (top, height, wide.verdict) == (0, 1, "cut")  # the 32 × 32 square in the center of 48 × 32
    assert (left, width) == (pytest.approx(8 / 48), pytest.approx(32 / 48))
    look = inspect_run(made, device=this_device())
    assert look.plan is not None
    assert any(finding.check == "buckets" for finding in look.findings)
    assert preview_picture(made, wide.id).path == folder / wide.name
    with pytest.raises(DataError, match="no such picture"):
        preview_picture(made, "../" + wide.name)
    written = write_caption(wide.path, "a house\n on a hill", str(folder))
    assert written.caption == "a house on a hill"
    assert {one.name: one.caption for one in preview_pictures(made)}[wide.name] == "a house on a hill"
    assert {p.name: p.caption for p in read_pictures(made.data)[0]}[wide.name] == "a house on a hill"
